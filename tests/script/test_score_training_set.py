"""script/score_training_set.py: the scores of each row, each pair once, and training with them."""

from pathlib import Path

import pytest
from toy_world import lines, make_world, write

from script import score_training_set
from torch_src import Reranker
from torch_src.data.mined_files import LOGITS, read_teachers
from torch_src.runtime.errors import UserError

ROWS = ["甲一二", "乙二一", "甲一三", "甲三二", "甲一二"]  # query, positive, negative


def train_file(folder: Path, rows: list[str]) -> Path:
    write(folder / "t.tsv", ["{}\t\t{}\t\t{}\t0".format(*row) for row in rows])
    return folder / "t.tsv"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a re-ranker of random weights."""
    return make_world(tmp_path_factory.mktemp("world")) / "model"


def test_the_scores_of_each_row(model, tmp_path, capsys):
    train, output = train_file(tmp_path, ROWS), tmp_path / "a.tsv"
    words = ["--train_set", str(train), "--output", str(output), "--cross_params", "none"]
    words += ["--pretrained_model_path", str(model), "--precision", "fp32"]
    assert score_training_set.main([*words, "--plan"]) == 0 and not output.exists()
    assert "plan of score_training_set.py" in capsys.readouterr().out
    assert score_training_set.main(words) == 0
    assert "5 distinct pairs" in capsys.readouterr().out  # of 10
    reranker = Reranker.load(model, precision="fp32")
    header, *scored = [line.split("\t") for line in lines(output)]
    assert header == LOGITS and len(scored) == len(ROWS)
    for (query, *passages), logits in zip(ROWS, scored, strict=True):
        expected = reranker.score(query, passages).tolist()
        assert [float(logit) for logit in logits] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "a.tsv.stamp.json", "t.tsv"]
    assert score_training_set.main(words) == 0 and "up to date" in capsys.readouterr().out
    assert read_teachers(train, [output], len(ROWS)).shape == (5, 2)
    train_file(tmp_path, [row[0] + row[2] + row[1] for row in ROWS])
    with pytest.raises(UserError, match="another training file"):
        read_teachers(train, [output], len(ROWS))
    assert score_training_set.main(words) == 0 and "train_rows: " in capsys.readouterr().out  # scored again
    assert [line.split("\t") for line in lines(output)[1:]] == [logits[::-1] for logits in scored]


def test_a_foreign_file_is_not_replaced(model, tmp_path, capsys):
    train = train_file(tmp_path, ROWS)
    write(tmp_path / "notes.tsv", ["mine"])
    words = ["--train_set", str(train), "--cross_params", "none", "--pretrained_model_path", str(model)]
    for name in ("notes.tsv", "t.tsv"):
        assert score_training_set.main([*words, "--output", str(tmp_path / name)]) == 2
        assert f"{name}: " in capsys.readouterr().err
    assert lines(tmp_path / "notes.tsv") == ["mine"]
