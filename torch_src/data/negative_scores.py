"""cross_negatives.json beside the re-ranker's weights: its scores of a sample of training negatives."""

from pathlib import Path

import numpy as np

from torch_src.runtime.stamps import read_checked_json, write_checked_json


def negative_scores_path(params: str | Path) -> Path:
    """Return the path of the scores that belong to these weights."""
    return Path(params).with_name("cross_negatives.json")


def write_negative_scores(params: str | Path, weights: str, scores: np.ndarray) -> None:
    """Write the scores (N,) of training negatives by the weights with this checksum."""
    rounded = [round(score, 6) for score in scores.tolist()]
    write_checked_json(negative_scores_path(params), {"weights": weights, "scores": rounded})


def read_negative_scores(params: str | Path, weights: str) -> np.ndarray | None:
    """Return the scores (N,) float32; None when missing, damaged or of other weights."""
    entries = read_checked_json(negative_scores_path(params))
    if entries is None or entries["weights"] != weights:
        return None
    return np.array(entries["scores"], dtype=np.float32)
