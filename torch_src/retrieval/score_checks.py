"""What goes wrong silently with re-rankers, as warnings that name cause and mend."""

import numpy as np

FLAT = 1e-3  # a spread of logits within a query below this decides nothing
TIED = 0.5  # share of a run's candidates with the same score as another of their query
TOO_EASY = 1.0  # spreads by which candidates that are not relevant score above the training negatives


def collapsed(scores: np.ndarray, spans: list[slice]) -> str | None:
    """Return a warning when most queries' scores are all alike, or most candidates are tied."""
    several = [scores[span] for span in spans if span.stop - span.start > 1]
    if not several:
        return None
    spread = float(np.median([values.std() for values in several]))
    if spread < FLAT:
        return (
            f"the scores of a query's candidates are all alike (median spread {spread:.1e}): the re-ranker "
            "decides nothing; lower --lr, train longer, or mine negatives from the retriever's own results"
        )
    counts = [np.unique(values, return_counts=True)[1] for values in several]
    tied = sum(int(count[count > 1].sum()) for count in counts) / sum(map(len, several))
    if tied > TIED:
        return (
            f"{100 * tied:.0f}% of the candidates have the same score as another one of their query: "
            "their order is the retriever's; use --precision fp32 and look at the logits"
        )
    return None


def below_retriever(reranked: float, retriever: float) -> str | None:
    """Return a warning when re-ranking lowers MRR@10."""
    if reranked >= retriever:
        return None
    return (
        f"re-ranked MRR@10 {reranked:.4f} is below the retriever's {retriever:.4f} on the same candidates: "
        "train longer, on negatives from the retriever's own results (script/mine_negatives.py), from its "
        "encoder (--dual_params), with --loss listwise; or fuse the two (--fuse_retriever_weight)"
    )


def negatives_too_easy(negatives: np.ndarray, candidates: np.ndarray) -> str | None:
    """Return a warning when dev candidates that are not relevant score far above the training negatives."""
    if not len(negatives) or not len(candidates):
        return None
    spread = float(np.concatenate([negatives, candidates]).std())
    gap = float(candidates.mean() - negatives.mean())
    if gap <= TOO_EASY * spread:
        return None
    return (
        f"the training negatives do not look like the candidates (mean score {negatives.mean():.2f} "
        f"against {candidates.mean():.2f} for dev candidates that are not relevant): mine negatives from "
        "the retriever's own results"
    )
