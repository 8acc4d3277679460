"""script/fuse_curve.py: the best weight of a hand-worked case, and files that do not fit."""

import pytest
from toy_world import write

from script import fuse_curve


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", ["问 一\t0\t1\t9.0", "问 一\t1\t2\t1.0"])
    write(tmp_path / "scores", ["-1.5", "1.5"])
    write(tmp_path / "ids", ["q1\ta", "q1\tb"])
    write(tmp_path / "dev.json", ['{"question_id": "q1", "question": "问 一", "answer_paragraphs": '
                                  '[{"paragraph_id": "a", "paragraph_text": "甲"}]}'])  # fmt: skip
    return ["--run", "run", "--scores", "scores", "--id_map", "ids", "--reference", "dev.json"]


def test_the_retriever_is_right(words, capsys):
    assert fuse_curve.main(words) == 0
    out = capsys.readouterr().out
    assert "0.00  0.5000" in out and "5.00  1.0000" in out


@pytest.mark.parametrize("place, name", [(1, "ids"), (3, "ids"), (5, "scores"), (7, "run")])
def test_swapped_files_are_named(words, capsys, place, name):
    words[place] = name
    assert fuse_curve.main(words) == 2
    assert f"{name}: " in (error := capsys.readouterr().err) and "(expected" in error


def test_empty_files(words, tmp_path, capsys):
    for name in ("run", "scores", "ids"):
        (tmp_path / name).write_text("")
    assert fuse_curve.main(words) == 2
    assert "ERROR run: " in capsys.readouterr().err
