"""`convert_dataset.py feedback`: clicks become training and dev files, against hand-worked cases."""

import json
from pathlib import Path

import pytest
from test_foreign_datasets import Converted, put, read
from toy_world import write

from script import convert_dataset
from script.lib.feedback import read_clicks
from torch_src.data.formats import FeedbackHit, FeedbackRow, format_feedback
from torch_src.tools.data_check import DataCheck

TEXTS = [f"第{row}段" for row in range(8)]


def hit(row: int, text: str = "", pid: str = "") -> FeedbackHit:
    return FeedbackHit(pid or f"p{row}", row, text or TEXTS[row])


def click(query: str, row: int, *above: int, relevant: bool = True) -> FeedbackRow:
    return FeedbackRow("2026-01-01T00:00:00Z", query, hit(row), relevant, "dense", 1 + len(above),
                       [hit(other) for other in above])  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    """A collection of eight passages."""
    folder = tmp_path / "D/passage-collection"
    write(folder / "part-00", [f"-\t\t{text}\t0" for text in TEXTS])
    write(folder / "passage2id.map.json", [json.dumps({str(row): f"p{row}" for row in range(8)})])
    return tmp_path / "D"


@pytest.fixture
def convert(data, tmp_path, capsys):
    """Return a function: rows of feedback, options -> the converted data set."""

    def run(rows: list[FeedbackRow], *words: object, status: int = 0) -> Converted:
        source = put(tmp_path / "feedback.jsonl", "".join(map(format_feedback, rows)))
        given = ["feedback", source, "--data_dir", data, "--to", tmp_path / "E", *words]
        assert convert_dataset.main([*map(str, given)]) == status
        return read(tmp_path / "E") if not status else None

    return run


def test_answers_and_what_stood_above_them(convert):
    found = convert([click("甲", 3, 1, 2), click("甲", 2, 1), click("乙", 5, 4)], "--dev_share", 0)
    assert found.dual == [
        ("甲", TEXTS[3], TEXTS[1]), ("甲", TEXTS[2], TEXTS[1]), ("乙", TEXTS[5], TEXTS[4]),
    ]  # fmt: skip
    assert ("甲", TEXTS[2], 1) in found.cross and ("甲", TEXTS[2], 0) not in found.cross
    assert (found.folder / "passage-collection").is_symlink() and len(found.passages) == 8
    assert not DataCheck(str(found.folder)).run().faults


def test_the_last_word_counts(convert, capsys):
    rows = [
        click("甲", 3, 1),
        click("甲", 3, 1, relevant=False),
        click("甲", 4, 3),
        click("乙", 5, relevant=False),
    ]
    found = convert(rows, "--dev_share", 0)
    assert found.dual == [("甲", TEXTS[4], TEXTS[3])]
    assert "1 queries have no positive passage" in capsys.readouterr().out


def test_dev_queries_are_chosen_by_their_text(convert, tmp_path):
    rows = [click(f"问{n}", n % 8, (n + 1) % 8) for n in range(40)]
    found = convert(rows)
    assert 4 < len(found.dev) < 20
    dev = {query for query, _ in found.dev.values()}
    assert dev | {query for query, *_ in found.dual} == {row.query for row in rows}
    assert all(grades == {f"p{int(query[1:]) % 8}": 1} for query, grades in found.dev.values())
    (tmp_path / "E").rename(tmp_path / "first")
    assert {query for query, _ in convert(rows[::-1]).dev.values()} == dev


def test_an_answer_on_top_gets_random_negatives(convert):
    found = convert([click("甲", 3)], "--dev_share", 0)
    assert len(found.dual) == 4 and all(row[1] == TEXTS[3] != row[2] for row in found.dual)


def test_passages_that_moved_or_changed(convert, data, tmp_path, capsys):
    rows = [FeedbackRow("t", "甲", hit(0, TEXTS[3], "p3"), True, "bm25", 2, [hit(1)]), click("乙", 6)]
    rows += [FeedbackRow("t", "丙", hit(2, "改过的"), True, "bm25", 1, [])]
    assert convert(rows, "--dev_share", 0).dual[0] == ("甲", TEXTS[3], TEXTS[1])  # found by its pid
    assert "1 passages of the feedback are no longer in the collection" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[], [click("甲", 3, relevant=False)]])
def test_nothing_to_learn_is_an_error(convert, capsys, rows):
    convert(rows, status=2)
    assert "feedback.jsonl" in capsys.readouterr().err


def test_a_line_that_is_not_feedback_is_named(tmp_path, data, capsys):
    source = put(tmp_path / "x.jsonl", '{"query": "a"}\n')
    words = ["feedback", source, "--data_dir", data, "--to", tmp_path / "E"]
    assert convert_dataset.main([*map(str, words)]) == 2
    assert f"{source}:1: " in capsys.readouterr().err
    assert convert_dataset.main([*map(str, words[:2]), "--to", str(tmp_path / "E")]) == 2
    assert "--data_dir" in capsys.readouterr().err


def test_clicks_of_a_query_are_read_together(tmp_path):
    source = put(tmp_path / "f.jsonl", format_feedback(click("甲", 1)) + format_feedback(click(" 甲 ", 2, 1)))
    (clicks,) = read_clicks(source).values()
    assert [found.row for found in clicks.positives] == [1, 2] and clicks.negatives == []
