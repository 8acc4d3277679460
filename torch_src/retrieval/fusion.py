"""Scores of the passages for one query combined: BM25 with vectors, a re-ranker with its retriever."""

from collections.abc import Sequence

import numpy as np

RRF_OFFSET = 60  # reciprocal rank fusion scores a rank by 1 / (60 + rank)
Ranking = Sequence[tuple[int, float]]  # (row, score), best first


def fuse_rankings(rankings: Sequence[Ranking], weights: Sequence[float] = ()) -> list[tuple[int, float]]:
    """Return (row, score) of all rankings together, best first, ties by row.

    Without weights by reciprocal rank (Cormack et al. 2009). With weights by a weighted sum of scores, each
    normalized to mean 0 and variance 1 within its ranking; a passage missing in a ranking counts like its
    last one.
    """
    fused: dict[int, float] = {}
    for number, ranking in enumerate(rankings):
        if weights:
            values = weights[number] * standardized(np.array([score for _, score in ranking]))
            values -= min(values.tolist(), default=0.0)
        else:
            values = 1 / (RRF_OFFSET + 1 + np.arange(len(ranking)))
        for (row, _), value in zip(ranking, values.tolist(), strict=True):
            fused[row] = fused.get(row, 0.0) + value
    return sorted(fused.items(), key=lambda pair: (-pair[1], pair[0]))


def standardized(values: np.ndarray) -> np.ndarray:
    """Return the values at mean 0 and variance 1; zeros if they are all equal."""
    spread = values.std() if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 1e-12 else np.zeros(len(values))


def fused_scores(logits: np.ndarray, retriever: np.ndarray, spans: list[slice], weight: float) -> np.ndarray:
    """Return logits + weight * retriever scores, the latter with mean 0 and variance 1 in each span."""
    fused = logits.astype(np.float64)
    for span in spans:
        scores = retriever[span].astype(np.float64)
        spread = scores.std() if len(scores) else 0.0
        if spread > 0:
            fused[span] += weight * (scores - scores.mean()) / spread
    return fused
