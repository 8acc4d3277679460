"""Exact search: the top-k passages of every query by inner product, in bounded memory, proved exact.

Result rule: the inner product of the fp32 query vector with the stored fp16 passage vector, final candidates
ordered by fp64 arithmetic; ties: the lower row first. CPU and GPU give the same result.
"""

from collections.abc import Iterator
from importlib import import_module, metadata

import numpy as np
import torch

from torch_src.errors import UserError
from torch_src.vectors import VectorStore

CHUNK_ROWS = 32768  # passages scored at once: 100 MB as fp32 at 768 dimensions
SPARE = 32  # candidates kept beyond k; the proof below needs a gap between the k-th and the last of them
EPSILON = 2.0**-23  # of fp32


def load_faiss():
    """Return the faiss module; UserError when it is missing, hollow, or two wheels lie over each other.

    faiss-cpu and faiss-gpu own the same folder: the later install silently replaces the earlier one, and
    uninstalling either leaves an empty `faiss` that imports and can do nothing.
    """
    wheels = [name for name in ("faiss-cpu", "faiss-gpu") if _installed(name)]
    mend = "mend: pip uninstall -y faiss-cpu faiss-gpu, then install the requirements file again"
    if len(wheels) == 2:
        raise UserError(f"both faiss-cpu and faiss-gpu are installed, one over the other; {mend}")
    try:
        faiss = import_module("faiss")
    except ImportError as error:
        raise UserError(f"faiss cannot be imported ({error}); {mend}") from error
    if not hasattr(faiss, "knn"):
        raise UserError(f"faiss is hollow: it imports but has no functions in it; {mend}")
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def search(
    store: VectorStore, queries: np.ndarray, topk: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows (B, K) int64, scores (B, K) float64), K = min(topk, passages), best first.

    queries: (B, H) float32. Memory: one chunk of passages and B x (topk + SPARE) candidates.

    First pass: fp32 scores keep topk + SPARE candidates a query, which are then scored in fp64. A query is
    proved exact when no passage left out can reach its k-th score: the worst kept fp32 score plus the
    rounding bound lies below it. For the others (ties, near ties) a second pass looks at every passage within
    the bound, in fp64.
    """
    assert queries.dtype == np.float32 and queries.ndim == 2 and queries.shape[1] == store.hidden
    keep = min(topk, store.rows)
    pool = min(keep + SPARE, store.rows)
    scores, rows, longest = _first_pass(store, queries, pool, device)
    exact = score_rows(store, queries, rows)
    order = np.lexsort((rows, -exact), axis=1)[:, :keep]
    result = np.take_along_axis(rows, order, 1), np.take_along_axis(exact, order, 1)
    bound = fp32_error_bound(queries, longest)
    unproved = np.flatnonzero(scores.min(axis=1) + bound >= result[1][:, -1]) if pool < store.rows else []
    if len(unproved):
        # Everything that reaches the k-th score found so far, less twice the error, is looked at once more.
        floor = result[1][unproved, -1] - 2 * bound[unproved]
        result[0][unproved], result[1][unproved] = _second_pass(store, queries[unproved], floor, keep)
    return result


def fp32_error_bound(queries: np.ndarray, longest: float) -> np.ndarray:
    """Return (B,): the most by which an fp32 inner product, summed in any order, can differ from the true
    one.

    |fl(q.p) - q.p| <= gamma |q|.|p| <= gamma ||q|| ||p||, gamma = n u / (1 - n u), u half of EPSILON (Higham
    2002, section 3.1); n is taken one larger and u doubled to cover the rounding of the bound itself.
    """
    size = (queries.shape[1] + 1) * EPSILON
    return size / (1 - size) * np.linalg.norm(queries.astype(np.float64), axis=1) * longest


def _chunks(store: VectorStore) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, vectors (rows, H) float16) in pieces of at most CHUNK_ROWS."""
    for first, block in store.blocks():
        for start in range(0, len(block), CHUNK_ROWS):
            yield first + start, np.array(block[start : start + CHUNK_ROWS])


def _to_float32(chunk: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(chunk).float()  # torch converts ten times as fast as numpy


def _first_pass(store: VectorStore, queries: np.ndarray, pool: int, device: torch.device):
    """Return (fp32 scores (B, pool), their rows, the longest passage vector's norm)."""
    best = np.full((len(queries), pool), -np.inf, dtype=np.float32)
    best_rows = np.full((len(queries), pool), -1, dtype=np.int64)
    longest = 0.0
    on_device = torch.from_numpy(queries).to(device)
    for first, chunk in _chunks(store):
        vectors = _to_float32(chunk)
        longest = max(longest, float(torch.linalg.vector_norm(vectors, dim=1).max()))
        found, where = _top_of_chunk(queries, on_device, vectors, min(pool, len(chunk)), device)
        best, best_rows = _merge(best, best_rows, found, where + first, pool)
    assert (best_rows >= 0).all()
    return best, best_rows, longest


def _top_of_chunk(queries: np.ndarray, on_device: torch.Tensor, vectors: torch.Tensor, count: int, device):
    """Return (scores, indices), both (B, count), of one chunk: faiss on the CPU, torch elsewhere."""
    if device.type == "cpu":
        faiss = load_faiss()
        return faiss.knn(queries, vectors.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # tf32 products would be outside the error bound
    try:
        scores, where = torch.topk(on_device @ vectors.to(device).T, count, dim=1)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return scores.cpu().numpy(), where.cpu().numpy()


def _merge(scores, rows, more_scores, more_rows, keep: int):
    """Return the `keep` best of two candidate lists, (scores, rows), ties by row."""
    scores, rows = np.concatenate([scores, more_scores], 1), np.concatenate([rows, more_rows], 1)
    order = np.lexsort((rows, -scores), axis=1)[:, :keep]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def score_rows(store: VectorStore, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the fp64 inner products (B, K) of each query with its rows (B, K)."""
    scores = np.empty(rows.shape, dtype=np.float64)
    by_row = np.argsort(rows, axis=None, kind="stable")
    sorted_rows = rows.ravel()[by_row]
    for first, block in store.blocks():
        begin, end = np.searchsorted(sorted_rows, [first, first + len(block)])
        for start in range(begin, end, CHUNK_ROWS):
            at = by_row[start : min(end, start + CHUNK_ROWS)]
            vectors = block[rows.ravel()[at] - first]
            scores.ravel()[at] = _inner_products(queries[at // rows.shape[1]], vectors)
    return scores


def _inner_products(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return (n,) fp64: row by row, always summed in the same order, so that equal vectors get
    equal scores.
    """
    return (queries.astype(np.float64) * vectors.astype(np.float64)).sum(axis=1)


def _second_pass(store: VectorStore, queries: np.ndarray, floor: np.ndarray, keep: int):
    """Return (rows, scores), both (B, keep), from every passage whose fp32 score reaches the
    query's floor.
    """
    best = np.full((len(queries), keep), -np.inf)
    rows = np.full((len(queries), keep), np.iinfo(np.int64).max)
    for first, chunk in _chunks(store):
        vectors = _to_float32(chunk).numpy()
        reached = queries @ vectors.T >= floor[:, None]
        for at in np.flatnonzero(reached.any(axis=1)):
            near = np.flatnonzero(reached[at])
            scores = _inner_products(queries[at : at + 1], chunk[near])
            merged = _merge(best[at : at + 1], rows[at : at + 1], scores[None], near[None] + first, keep)
            best[at], rows[at] = merged[0][0], merged[1][0]
    assert np.isfinite(best).all()
    return rows, best
