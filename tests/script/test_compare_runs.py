"""Two results compared: metrics by hand, the test of their difference."""

import json
import math

import numpy as np
import pytest

from script import compare_runs
from script.compare_runs import all_values
from script.lib.paired_test import compare, interval, randomization_p

REFERENCE = {"q1": {"a", "b"}, "q2": {"c"}, "q3": {"d"}}
RESULT = {"q1": ["x", "a", "b"], "q2": ["c"]}


@pytest.mark.tools
def test_measures_by_hand():
    values = all_values(REFERENCE, RESULT)
    assert values["MRR@10"].tolist() == [0.5, 1.0, 0.0]
    assert values["recall@50"].tolist() == [1.0, 1.0, 0.0]  # DuReader's: a hit
    assert values["RR@10"] == pytest.approx([0.5, 1.0, 0.0])
    assert values["R@50"] == pytest.approx([1.0, 1.0, 0.0]) and values["AP@50"][0] == pytest.approx(
        (1 / 2 + 2 / 3) / 2
    )
    ideal = 1 + 1 / np.log2(3)
    assert values["nDCG@10"][0] == pytest.approx((1 / np.log2(3) + 1 / np.log2(4)) / ideal)
    half = all_values({"q1": {"a", "b"}}, {"q1": ["a"]})
    assert half["recall@50"][0] == 1.0 and half["R@50"][0] == 0.5  # the two recalls differ, under their names


@pytest.mark.tools
def test_a_repeated_pid_counts_once():
    assert all_values({"q1": {"a"}}, {"q1": ["x", "x", "a"]})["RR@10"][0] == 0.5


def test_p_values():
    draw = np.random.default_rng(0)
    assert randomization_p(np.zeros(50), 1) == 1.0
    assert (
        randomization_p(np.full(20, 0.1), 1) < 0.001
    )  # all signs agree: 2 / 2^20, below what draws can show
    # five differences of one sign: exactly 2 of 32 sign patterns are as extreme
    assert randomization_p(np.full(5, 0.1), 1) == pytest.approx(2 / 32, abs=0.01)
    noise = draw.normal(size=200)
    assert 0.001 < randomization_p(noise - noise.mean() + 0.02, 1) <= 1


def test_the_interval_holds_the_mean():
    differences = np.random.default_rng(1).normal(0.1, 1, 300)
    low, high = interval(differences, 1)
    assert low < differences.mean() < high and high - low == pytest.approx(2 * 1.96 / 300**0.5, rel=0.2)


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    """A resample of 40 values with 10 ones has a binomial number of ones."""
    chances = np.cumsum([math.comb(40, ones) * 0.25**ones * 0.75 ** (40 - ones) for ones in range(41)])
    exact = [np.searchsorted(chances, share) / 40 for share in (0.025, 0.975)]
    assert interval(np.repeat([1.0, 0.0], [10, 30]), 3) == pytest.approx(exact, abs=1 / 40)


def test_a_difference_by_hand():
    found = compare(np.array([0.0, 1.0, 0.5, 0.5]), np.array([1.0, 0.5, 1.0, 0.5]))
    assert (found.first, found.second, found.mean) == (0.5, 0.75, 0.25)
    assert (found.better, found.worse, found.same) == (2, 1, 1)
    # of the 8 sign patterns of 1, .5 and .5, six have a sum of at least 1
    assert found.p == pytest.approx(6 / 8, abs=0.02) and not found.is_significant


@pytest.mark.tools
def test_the_program(tmp_path, capsys):
    lines = [
        {"question_id": qid, "answer_paragraphs": [{"paragraph_id": pid} for pid in pids]}
        for qid, pids in REFERENCE.items()
    ]
    (tmp_path / "dev.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "a").write_text(json.dumps(RESULT))
    (tmp_path / "b").write_text(json.dumps({**RESULT, "q3": ["d"]}))
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--reference", str(tmp_path / "dev.json")]
    assert compare_runs.main([*words, "--per_query", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "MRR@10        0.5000   0.8333  +0.3333" in out and "1/0/2" in out and "trec_eval:" in out
    assert json.loads((tmp_path / "out").read_text().split("\n")[2])["MRR@10"] == [0.0, 1.0]
    (tmp_path / "a").write_text("[")
    assert compare_runs.main(words) == 2 and "a:1: not JSON" in capsys.readouterr().err
