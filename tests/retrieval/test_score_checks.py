"""Each warning fires on its failure, names cause and fix, and not on healthy scores."""

import numpy as np
import pytest

from torch_src.retrieval.score_checks import below_retriever, collapsed, negatives_too_easy

SPANS = [slice(0, 10), slice(10, 20), slice(20, 30)]


def healthy(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=30).astype(np.float32)


def test_healthy_scores_are_silent():
    assert collapsed(healthy(), SPANS) is None


def test_flat_scores_warn():
    offsets = np.repeat([0, 5, -3], 10)  # queries differ, the candidates of a query do not
    warning = collapsed((offsets + 1e-5 * healthy()).astype(np.float32), SPANS)
    assert "nearly equal" in warning and "--lr" in warning and "negatives" in warning


def test_small_but_clear_differences_are_silent():
    assert collapsed(0.01 * healthy(), SPANS) is None


def test_one_flat_query_of_three_is_silent():
    scores = healthy()
    scores[SPANS[1]] = 0.5
    assert collapsed(scores, SPANS) is None


def test_tied_scores_warn():
    scores = np.tile([1, 1, 1, 1, 1, 1, 1, 1, 1, -3], 3).astype(np.float32)
    warning = collapsed(scores, SPANS)
    assert "tied with another" in warning and "--precision fp32" in warning


def test_scores_in_tied_pairs_warn():
    """Every candidate is tied with another one: the share is 100%, not 50%."""
    scores = np.tile(np.repeat(np.arange(5), 2), 3).astype(np.float32)
    warning = collapsed(scores, SPANS)
    assert warning is not None and warning.startswith("100%")


def test_the_tied_share_that_is_named_is_the_share_of_candidates():
    """Eight of ten candidates are tied."""
    scores = np.tile([1, 1, 1, 1, 1, 1, 1, 1, 2, 3], 3).astype(np.float32)
    assert collapsed(scores, SPANS).startswith("80%")


def test_a_few_ties_are_silent():
    scores = healthy()
    scores[1] = scores[0]
    scores[11] = scores[10]
    assert collapsed(scores, SPANS) is None


def test_equal_scores_of_different_queries_are_no_tie():
    assert collapsed(np.tile(healthy()[:10], 3), SPANS) is None


def test_queries_with_one_candidate_are_silent():
    assert collapsed(np.zeros(3, dtype=np.float32), [slice(at, at + 1) for at in range(3)]) is None
    assert collapsed(np.zeros(0, dtype=np.float32), []) is None


@pytest.mark.parametrize(
    "reranked, retriever, warns", [(0.4, 0.5, True), (0.5, 0.5, False), (0.6, 0.5, False)]
)
def test_below_the_retriever(reranked, retriever, warns):
    warning = below_retriever(reranked, retriever)
    assert (warning is not None) == warns
    if warns:
        assert "0.4000 is below the retriever's 0.5000" in warning
        assert (
            "negatives from the retriever's own results" in warning and "--fuse_retriever_weight" in warning
        )


def test_fused_scores_below_the_retriever_name_the_tool_for_another_weight():
    warning = below_retriever(0.4, 0.5, fused=True)
    assert "script/fuse_curve.py" in warning and "--fuse_retriever_weight 2" not in warning


def test_negatives_that_score_far_below_the_candidates_warn():
    draw = np.random.default_rng(0)
    warning = negatives_too_easy(draw.normal(-6, 1, 500), draw.normal(0, 1, 500))
    assert "are easier than the candidates" in warning and "mine negatives" in warning
    assert "mean score -6.0" in warning or "mean score -5.9" in warning


@pytest.mark.parametrize("candidates", [0.0, 0.5, -6.0])
def test_negatives_like_the_candidates_or_harder_are_silent(candidates):
    draw = np.random.default_rng(0)
    assert negatives_too_easy(draw.normal(0, 1, 500), draw.normal(candidates, 1, 500)) is None


@pytest.mark.filterwarnings("error")
def test_without_irrelevant_candidates_is_silent():
    assert negatives_too_easy(healthy(), np.zeros(0, dtype=np.float32)) is None
