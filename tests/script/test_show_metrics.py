"""The table of several results: figures, tests by hand, verdict."""

import json

import pytest

from script import show_metrics


@pytest.fixture
def results(tmp_path):
    """Ten queries: `first` has the answer at rank 2, `second` at rank 1, `third` once in ten at rank 1."""
    answers = [{"paragraph_id": "a", "paragraph_text": "段"}]
    dev = [
        {"question_id": f"q{at}", "question": f"问题{at}", "answer_paragraphs": answers} for at in range(10)
    ]
    (tmp_path / "dev.json").write_text("".join(json.dumps(row) + "\n" for row in dev), encoding="utf-8")
    lists = {
        "first": [["b", "a"]] * 10,
        "second": [["a", "b"]] * 10,
        "third": [["a", "b"]] + [["b", "a"]] * 9,
    }
    for name, of in lists.items():
        found = {f"q{at}": pids for at, pids in enumerate(of)}
        (tmp_path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return tmp_path


def words(folder, *tests):
    named = [f"{name}={folder / name}.json" for name in ("first", "second", "third")]
    return [str(folder / "dev.json"), *named, *(word for pair in tests for word in ("--test", *pair))]


def test_table_and_tests(results, capsys):
    assert show_metrics.main(words(results, ("first", "second"), ("first", "third"))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["first", "0.5000", "0.0000"], ["second", "1.0000", "1.0000"], ["third", "0.5500", "0.1000"],
    ]  # fmt: skip
    second, third = (
        next(line.split() for line in lines if line.startswith(f"{name} - ")) for name in ("second", "third")
    )
    assert second[3] == "+0.5000" and second[-1] == "10/0/0"
    assert float(second[-2]) == pytest.approx(2 / 2**10, abs=0.003)  # all ten signs alike, two-sided
    assert third[3] == "+0.0500" and third[-1] == "1/0/9" and float(third[-2]) == 1
    better, unclear = lines[-1].removeprefix("verdict: ").split("; ")
    assert better == "second is better than first" and "not" in unclear


def test_no_test_no_verdict(results, capsys):
    assert show_metrics.main(words(results)) == 0
    assert "verdict" not in capsys.readouterr().out


def test_an_unknown_name_is_refused(results, capsys):
    assert show_metrics.main(words(results, ("first", "fourth"))) == 2
    assert "fourth" in capsys.readouterr().err
