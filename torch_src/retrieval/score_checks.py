"""Silent failures of re-rankers, reported as warnings that name cause and fix."""

from collections.abc import Callable

import numpy as np

FLAT = 1e-3  # standard deviation of a query's logits below which they count as equal
TIED = 0.5  # fraction of candidates with the score of another candidate of their query
FUSION_WEIGHTS = (0.5, 1.0, 2.0)  # of the retriever's score, for fused_metrics
TOO_EASY = 1.0  # largest gap between irrelevant candidates and training negatives, in standard deviations


def collapsed(scores: np.ndarray, spans: list[slice]) -> str | None:
    """Return a warning when most queries' scores are nearly equal, or most candidates are tied.

    `scores` (N,); `spans` are the candidates of each query.
    """
    several = [scores[span] for span in spans if span.stop - span.start > 1]
    if not several:
        return None
    spread = float(np.median([values.std() for values in several]))
    if spread < FLAT:
        return (
            f"the scores of a query's candidates are nearly equal (median standard deviation {spread:.1e}): "
            "lower --lr, train longer, or mine negatives from the retriever's own results"
        )
    counts = [np.unique(values, return_counts=True)[1] for values in several]
    tied = sum(int(count[count > 1].sum()) for count in counts) / sum(map(len, several))
    if tied > TIED:
        return (
            f"{100 * tied:.0f}% of the candidates are tied with another one of their query: "
            "they keep the retriever's order; use --precision fp32 and check the logits"
        )
    return None


def below_retriever(reranked: float, retriever: float, fused: bool = False) -> str | None:
    """Return a warning when re-ranking, `fused` with the retriever's scores or alone, lowers MRR@10."""
    if reranked >= retriever:
        return None
    fusion = "fuse both scores (--fuse_retriever_weight 2)"
    if fused:
        fusion = "choose another --fuse_retriever_weight by script/fuse_curve.py"
    return (
        f"re-ranked MRR@10 {reranked:.4f} is below the retriever's {retriever:.4f} on the same candidates: "
        "train longer, on negatives from the retriever's own results (script/mine_negatives.py), from its "
        f"encoder (--dual_params), with --loss listwise; or {fusion}"
    )


def fused_metrics(mrr: Callable[[float], float]) -> str:
    """Return a line on what --fuse_retriever_weight gives; mrr(weight): MRR@10 of the fused scores."""
    figures = ", ".join(f"{weight:g} gives {mrr(weight):.4f}" for weight in FUSION_WEIGHTS)
    return f"MRR@10 with the retriever's score added: --fuse_retriever_weight {figures}"


def negatives_too_easy(negatives: np.ndarray, candidates: np.ndarray) -> str | None:
    """Return a warning when irrelevant dev candidates score far above the training negatives, both (N,)."""
    if not len(negatives) or not len(candidates):
        return None
    spread = float(np.concatenate([negatives, candidates]).std())
    gap = float(candidates.mean() - negatives.mean())
    if gap <= TOO_EASY * spread:
        return None
    return (
        f"the training negatives are easier than the candidates (mean score {negatives.mean():.2f}, "
        f"irrelevant dev candidates {candidates.mean():.2f}): mine negatives from the retriever's own results"
    )
