"""What every approximate search does with what it found: exact scores from the blocks, order, recall."""

import time
from collections.abc import Callable

import numpy as np
import torch

from torch_src.retrieval.search import BestRows, exact_scores, read_chunks, search
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.log import duration

CHECK_ROWS = 16384  # vectors read at once


def check_blocks(store: VectorStore) -> None:
    """Read every block in order, which checks its bytes (DamagedBlock): exact scores come from there."""
    for _ in read_chunks(store, CHECK_ROWS, buffers=3):
        pass


def exact_scores_of(store: VectorStore, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the fp64 scores (B, K) of rows (B, K); -inf where the row is -1."""
    query, column = np.nonzero(found >= 0)
    scores = np.full(found.shape, -np.inf)
    scores[query, column] = exact_scores(store, queries, query, found[query, column])
    return scores


def best_first(found: np.ndarray, scores: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows (B, keep) int64, scores (B, keep) float64) of what was found, ties by row.

    Where fewer than `keep` were found, the rest are rows of -1 with a score of -inf.
    """
    query, column = np.nonzero(found >= 0)
    best = BestRows(len(found), keep)
    best.add(query, found[query, column], scores[query, column])
    best.settle()
    best.rows[~np.isfinite(best.scores)] = -1
    return best.rows, best.scores


def recall_line(
    find: Callable, store: VectorStore, queries: np.ndarray, topk: int, device: torch.device,
    count: int, memory_gb: float, seed: int,
) -> str:  # fmt: skip
    """Return the share of the exact top-k that find(queries) -> (rows, scores) finds on `count` of them."""
    draw = np.random.default_rng([seed, 6])
    sample = queries[np.sort(draw.choice(len(queries), min(count, len(queries)), replace=False))]
    begun = time.monotonic()
    found, _ = find(sample)
    took = time.monotonic() - begun
    exact, _, _ = search(store, sample, topk, [device], memory_gb=memory_gb)
    exact_took = time.monotonic() - begun - took
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
    return (
        f"recall@{topk} {hits / exact.size:.4f} against exact search on {len(sample)} queries "
        f"({duration(took)}, exact {duration(exact_took)})"
    )
