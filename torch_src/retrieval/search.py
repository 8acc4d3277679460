"""Exact search: the top-k passages of every query by inner product, in bounded memory, from vectors on disk.

The score is the inner product of the fp32 query vector and the stored fp16 passage vector in fp64
arithmetic, higher first; ties go to the lower row. Every device and kind of product gives the same result.
The passages are read once, in chunks. For each chunk:
1. A fast inexact product with a proved error bound (score_bounds.py) selects the (query, passage) pairs whose
   score can reach the query's current k-th best score. If it selects too many, fp32 is used instead.
2. The selected pairs are scored in fp32, which excludes most of them.
3. The remaining pairs are scored in fp64 and merged into the query's top k.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from torch_src.retrieval.score_bounds import (
    GROUP,
    KINDS,
    Float32,
    ScoreBounds,
    fastest_kind,
    full_precision,
    int8_is_exact,
)
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import free_gpu_memory, free_memory
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import duration
from torch_src.runtime.prefetch import one_ahead

Chunk = np.ndarray | torch.Tensor  # vectors (C, H) float16: in memory, or on the device of the search

CHUNK_ROWS = {"cpu": 2048, "cuda": 65536}  # maximum passages per chunk: on a CPU they stay in its caches
PENDING_PAIRS = 8  # average pairs per query to collect before a merge into the top k
REFINE_PAIRS = 2048  # pairs re-scored at once
CACHED_PAIRS = {"cpu": 256, "cuda": REFINE_PAIRS}  # pairs scored in fp32 at once: both sides stay in a cache
EXACT_PAIRS = 512  # pairs scored in fp64 at once: both sides stay in a cache
CACHE_SHARE = 0.6  # maximum share of a GPU's free memory for cached vectors
PAIRS_SHARE = 1 / 128  # maximum share of a chunk's pairs that the fast product may select
MAX_SKIPPED = 16  # maximum chunks without the fast product after it selected too many pairs
CHECK_ROWS = 16384  # vectors read at once to verify checksums


class TopK:
    """The best K (row, score) of each query so far, in fp64, ties to the lower row."""

    def __init__(self, queries: int, keep: int):
        self.scores = np.full((queries, keep), -np.inf)
        self.rows = np.full((queries, keep), np.iinfo(np.int64).max)
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.pending_pairs, self.max_pending = 0, PENDING_PAIRS * queries

    @property
    def thresholds(self) -> np.ndarray:
        """The K-th best score (B,) of each query, -inf while there are fewer; a new pair must reach it."""
        return self.scores[:, -1]

    def add(self, query: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        """Add pairs (query, row, score), all (n,); merged later, because a merge has a fixed cost."""
        self.pending.append((query, rows, scores))
        self.pending_pairs += len(query)
        if self.pending_pairs >= self.max_pending:
            self.flush()

    def flush(self) -> None:
        """Merge the pending pairs into the top k."""
        if not self.pending_pairs:
            return
        query, rows, scores = (np.concatenate(arrays) for arrays in zip(*self.pending, strict=True))
        self.pending, self.pending_pairs = [], 0
        keep = self.scores.shape[1]
        order = np.lexsort((rows, -scores, query))
        query, rows, scores = query[order], rows[order], scores[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        best = place < keep  # only the K best new pairs of a query, which bounds the table below
        query, rows, scores, place = query[best], rows[best], scores[best], place[best]
        changed, count = np.unique(query, return_counts=True)
        # A table row for each query with new pairs: its top k so far, then the new pairs.
        table_scores = np.full((len(changed), keep + count.max()), -np.inf)
        table_rows = np.full(table_scores.shape, np.iinfo(np.int64).max)
        table_scores[:, :keep], table_rows[:, :keep] = self.scores[changed], self.rows[changed]
        line = np.repeat(np.arange(len(changed)), count)
        table_scores[line, keep + place], table_rows[line, keep + place] = scores, rows
        order = np.lexsort((table_rows, -table_scores), axis=1)[:, :keep]
        self.scores[changed] = np.take_along_axis(table_scores, order, 1)
        self.rows[changed] = np.take_along_axis(table_rows, order, 1)

    def merge(self, other: "TopK") -> None:
        """Add the results of another device for the same queries."""
        query, column = np.nonzero(np.isfinite(other.scores))
        self.add(query, other.rows[query, column], other.scores[query, column])
        self.flush()


@dataclass
class SearchStats:
    """Counts of a search, for the log."""

    chunks: int = 0
    fp32_chunks: int = 0  # chunks without the fast product
    fp32_pairs: int = 0
    fp64_pairs: int = 0

    def add(self, other: "SearchStats") -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def __str__(self) -> str:
        pairs = f"{self.fp32_pairs:,} pairs scored in fp32, {self.fp64_pairs:,} in fp64"
        return f"({pairs}, {self.fp32_chunks}/{self.chunks} chunks by fp32 alone)"


class DeviceSearch:
    """The search of one batch of queries on one device; chunks may come in any order."""

    def __init__(self, queries: np.ndarray, keep: int, kind: str, device: torch.device, cache: list | None):
        """queries (B, H) float32; `cache` collects the chunks to keep on the device; None: keep none."""
        self.exact, self.device, self.cache = ExactScorer(queries), device, cache
        self.fp32 = Float32(queries, device)
        self.fast: ScoreBounds = self.fp32 if kind == Float32.name else KINDS[kind](queries, device)
        self.top, self.stats = TopK(len(queries), keep), SearchStats()
        self.skip, self.failures, self.full = 0, 0, False  # full: every query has K results

    def add_chunk(self, first: int, chunk: Chunk) -> None:
        """Search one chunk (C, H) whose first row is `first`."""
        if isinstance(chunk, np.ndarray):
            chunk = torch.from_numpy(chunk).to(self.device, copy=self.cache is not None)
            if self.cache is not None:
                self.cache.append((first, chunk))
        vectors = self.fp32.scratch.like(chunk, "vectors").copy_(chunk)  # fp16 to fp32
        floor = torch.from_numpy(self.top.thresholds).to(self.device) * self.fp32.scale
        pairs = self._fast_pairs(vectors, floor) if self._use_fast_product() else None
        if pairs is None:
            pairs = self._fp32_pairs(vectors, floor)
        self.stats.chunks += 1
        self._refine(first, chunk, vectors, floor, *pairs)

    def _use_fast_product(self) -> bool:
        if self.fast is self.fp32 or not self.full:
            return False
        self.skip -= 1
        return self.skip < 0

    def _fast_pairs(
        self, vectors: torch.Tensor, floor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the pairs that may enter the top k by the fast product; None when there are too many."""
        limit = max(64, int(PAIRS_SHARE * len(self.fp32.queries) * len(vectors)))
        pairs = self.fast.pairs_above(vectors, floor, limit)
        self.failures = 0 if pairs is not None else self.failures + 1
        self.skip = 0 if pairs is not None else min(2**self.failures, MAX_SKIPPED)
        return pairs

    def _fp32_pairs(self, vectors: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pairs that may enter the top k by the fp32 product of the whole chunk."""
        self.stats.fp32_chunks += 1
        keep = self.top.scores.shape[1]
        if not self.full and len(vectors) >= keep:
            # No threshold yet: the chunk's own K-th score, minus the error bound, excludes most pairs.
            kth = torch.topk(self.fp32.scores(vectors).T, keep, dim=1).values[:, -1].double()
            floor = torch.maximum(floor, kth - self.fp32.bound(vectors))
        pairs = self.fp32.pairs_above(vectors, floor, len(self.fp32.queries) * len(vectors))
        assert pairs is not None  # the limit is all pairs
        return pairs

    def _refine(
        self,
        first: int,
        chunk: torch.Tensor,
        vectors: torch.Tensor,
        floor: torch.Tensor,
        query: torch.Tensor,
        column: torch.Tensor,
    ) -> None:
        """Score the pairs in fp32, re-score those that may enter in fp64, and add them to the top k."""
        self.stats.fp32_pairs += len(query)
        lowest = floor - self.fp32.bound(vectors)
        for start in range(0, len(query), REFINE_PAIRS):
            q, c = query[start : start + REFINE_PAIRS], column[start : start + REFINE_PAIRS]
            near = self._fp32_scores(vectors, q, c).double() >= lowest[q]
            queries, c = q[near].cpu().numpy(), c[near]
            exact = self.exact.scores(queries, chunk, c)
            rows = c.cpu().numpy() + first
            self.stats.fp64_pairs += len(queries)
            enters = exact >= self.top.thresholds[queries]
            self.top.add(queries[enters], rows[enters], exact[enters])
        if not self.full:
            self.top.flush()
            self.full = bool(np.isfinite(self.top.thresholds).all())

    def _fp32_scores(self, vectors: torch.Tensor, query: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return the inner products (n,) fp32 of pairs (query, column of this chunk)."""
        size = CACHED_PAIRS[self.device.type]
        left, right = (self.fp32.scratch.like(vectors[:size], side) for side in ("left", "right"))
        scores = torch.empty(len(query), dtype=torch.float32, device=self.device)
        for start in range(0, len(query), len(left)):
            q, c = query[start : start + len(left)], column[start : start + len(left)]
            one = torch.index_select(self.fp32.queries, 0, q, out=left[: len(q)])
            other = torch.index_select(vectors, 0, c, out=right[: len(q)])
            torch.sum(one.mul_(other), 1, out=scores[start : start + len(q)])
        return scores


class ExactScorer:
    """fp64 inner products of pairs, in steps small enough for a CPU cache.

    Every product is summed in the same order, so equal vectors get equal scores.
    """

    def __init__(self, queries: np.ndarray):
        """queries (B, H) float32."""
        self.queries, size = queries.astype(np.float64), (EXACT_PAIRS, queries.shape[1])
        self.left, self.half = np.empty(size), torch.empty(size, dtype=torch.float16)
        self.right = torch.empty(size, dtype=torch.float64)  # torch: numpy converts fp16 slowly

    def scores(self, query: np.ndarray, vectors: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
        """Return (n,) fp64 of pairs (query, row of `vectors` (C, H) float16, on any device)."""
        scores = np.empty(len(query))
        for start in range(0, len(query), EXACT_PAIRS):
            q, r = query[start : start + EXACT_PAIRS], rows[start : start + EXACT_PAIRS]
            left, right = self.left[: len(q)], self.right[: len(q)]
            if vectors.device.type == "cpu":
                right.copy_(torch.index_select(vectors, 0, r, out=self.half[: len(q)]))
            else:
                right.copy_(vectors[r])
            np.take(self.queries, q, axis=0, out=left, mode="clip")
            product = np.multiply(left, right.numpy(), out=left)
            np.sum(product, axis=1, out=scores[start : start + len(q)])
        return scores


class DeviceCache:
    """Vectors that stay on their devices from one batch of queries to the next."""

    def __init__(self, devices: list[torch.device]):
        self.chunks: list[list[tuple[int, torch.Tensor]]] = [[] for _ in devices]
        self.complete = False

    @classmethod
    def if_it_fits(
        cls, store: VectorStore, devices: list[torch.device], memory_gb: float = 0.0
    ) -> "DeviceCache | None":
        """Return a cache on the GPUs, or on a CPU within `memory_gb`; None when the vectors are too large."""
        share = store.rows * store.hidden * 2 / len(devices)
        return cls(devices) if all(share < _cache_room(device, memory_gb) for device in devices) else None


def _cache_room(device: torch.device, memory_gb: float) -> float:
    """Return the bytes that cached vectors may take."""
    if device.type == "cuda":
        return CACHE_SHARE * free_gpu_memory(device)
    return min(memory_gb * 1e9, 0.9 * free_memory())


def search(
    store: VectorStore,
    queries: np.ndarray,
    topk: int,
    devices: list[torch.device],
    kind: str = "auto",
    memory_gb: float = 2.0,
    cache: DeviceCache | None = None,
) -> tuple[np.ndarray, np.ndarray, SearchStats]:
    """Return (rows (B, K) int64, scores (B, K) float64, stats), K = min(topk, passages), best first.

    queries: (B, H) float32. kind: fp32, bf16, int8 or auto (the fastest); the result is the same. Several
    devices share the chunks. Memory: at most `memory_gb` (10^9 bytes) in addition to the queries, the results
    and the `cache`, which the first search fills.
    """
    assert queries.dtype == np.float32 and queries.ndim == 2 and queries.shape[1] == store.hidden
    keep = min(topk, store.rows)
    rows = chunk_rows(len(queries), store.hidden, memory_gb, devices)
    kind = choose_kind(kind, store.hidden, devices[0])
    if cache and cache.complete:
        searches = [DeviceSearch(queries, keep, kind, device, None) for device in devices]
        sources: list[Iterator] = [iter(chunks) for chunks in cache.chunks]
    else:
        caches = cache.chunks if cache else [None] * len(devices)
        for chunks in cache.chunks if cache else ():
            chunks.clear()  # left by a search that failed
        searches = [DeviceSearch(queries, keep, kind, *pair) for pair in zip(devices, caches, strict=True)]
        sources = _shared(read_chunks(store, rows, buffers=2 + len(devices)), len(devices))
    with full_precision():
        _run(searches, sources)
    if cache:
        cache.complete = True
    top, stats = searches[0].top, searches[0].stats
    top.flush()
    for other in searches[1:]:
        other.top.flush()
        top.merge(other.top)
        stats.add(other.stats)
    return top.rows, top.scores, stats


def choose_kind(
    name: str, hidden: int, device: torch.device, log: Callable[[str], None] | None = None
) -> str:
    """Return the kind of product `name`, or for `auto` the fastest on this machine, which is logged."""
    if name == "auto":
        name, seconds = fastest_kind(hidden, device)
        ratios = ", ".join(f"{kind} {seconds['fp32'] / s:.2f}" for kind, s in seconds.items())
        if log is not None:
            log(f"search: {name} products first (speed relative to fp32: {ratios})")
    elif name == "int8" and not (device.type == "cpu" and int8_is_exact(hidden)):
        raise UserError("--search_product int8: no exact int8 products on this machine; use auto")
    return name


def chunk_rows(queries: int, hidden: int, memory_gb: float, devices: list[torch.device]) -> int:
    """Return the passages per chunk; UserError when `memory_gb` is too little for GROUP passages."""
    # per passage: its vector in fp16 (3 times, read ahead), fp32 (3: as is, minus the mean, scaled) and int8
    # (2); per pair: its score and, at worst, its place in the list of selected pairs
    row_bytes = hidden * (3 * 2 + 3 * 4 + 2) + queries * (4 + 4 + 4 * 8)
    fixed_bytes = REFINE_PAIRS * hidden * (3 * 4 + 3 * 8) + queries * hidden * (4 + 4 + 8)
    rows = int((memory_gb * 1e9 / len(devices) - fixed_bytes) / row_bytes) // GROUP * GROUP
    if rows < GROUP:
        needed = len(devices) * (fixed_bytes + GROUP * row_bytes) / 1e9
        raise UserError(
            f"--search_memory_gb {memory_gb}: {queries:,} queries at once need {needed:.1f} GB; "
            "raise it, or lower --bs"
        )
    return min(rows, CHUNK_ROWS[devices[0].type])


def read_chunks(store: VectorStore, rows: int, buffers: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, vectors (rows, H) float16), reading one chunk ahead.

    The memory of a chunk is reused after `buffers` - 1 more chunks.
    """
    memory = [np.empty((min(rows, store.rows), store.hidden), dtype=np.float16) for _ in range(buffers)]

    def read(at: int) -> tuple[int, np.ndarray]:
        first = at * rows
        chunk = memory[at % buffers][: min(rows, store.rows - first)]
        store.read_into(first, chunk)
        return first, chunk

    return one_ahead(read, range(math.ceil(store.rows / rows)))


def _shared(chunks: Iterator[tuple[int, np.ndarray]], count: int) -> list[Iterator]:
    """Return `count` iterators, each for one thread, that take the chunks in turn as they are needed."""
    if count == 1:
        return [chunks]
    lock = threading.Lock()

    def take() -> Iterator[tuple[int, np.ndarray]]:
        while True:
            with lock:
                first, chunk = next(chunks, (0, None))
                if chunk is None:
                    return
                chunk = chunk.copy()  # the other threads may reuse its memory before this one has finished
            yield first, chunk

    return [take() for _ in range(count)]


def _run(searches: list[DeviceSearch], sources: list[Iterator]) -> None:
    """Search every device's chunks, one thread per device; the first error ends all of them."""
    failed = threading.Event()

    def work(search: DeviceSearch, chunks: Iterator) -> None:
        try:
            for first, chunk in chunks:
                search.add_chunk(first, chunk)
                if failed.is_set():
                    return
        except BaseException:
            failed.set()
            raise

    if len(searches) == 1:
        return work(searches[0], sources[0])
    with ThreadPoolExecutor(len(searches)) as pool:
        futures = [pool.submit(work, *pair) for pair in zip(searches, sources, strict=True)]
        try:
            for future in futures:
                future.result()
        finally:
            failed.set()  # ends the other threads after an interrupt, too


def check_blocks(store: VectorStore) -> None:
    """Read every block in order, which verifies its checksum (DamagedBlock)."""
    for _ in read_chunks(store, CHECK_ROWS, buffers=3):
        pass


def exact_scores(store: VectorStore, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the fp64 scores (B, K) of rows (B, K) found by an approximate search; -inf where a row is -1."""
    query, column = np.nonzero(found >= 0)
    rows, scorer = found[query, column], ExactScorer(queries)
    scores, by_row = np.empty(len(rows)), np.argsort(rows, kind="stable")
    for start in range(0, len(rows), REFINE_PAIRS):
        at = by_row[start : start + REFINE_PAIRS]
        distinct, which = np.unique(rows[at], return_inverse=True)
        vectors = torch.from_numpy(store.vectors_at(distinct))
        scores[at] = scorer.scores(query[at], vectors, torch.from_numpy(which))
    table = np.full(found.shape, -np.inf)
    table[query, column] = scores
    return table


def best_first(found: np.ndarray, scores: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows (B, keep) int64, scores (B, keep) float64), best first, ties by row.

    Missing results (rows of -1 in `found`) come last, with row -1 and score -inf.
    """
    query, column = np.nonzero(found >= 0)
    top = TopK(len(found), keep)
    top.add(query, found[query, column], scores[query, column])
    top.flush()
    top.rows[~np.isfinite(top.scores)] = -1
    return top.rows, top.scores


def measured_recall(
    find: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    store: VectorStore,
    queries: np.ndarray,
    topk: int,
    device: torch.device,
    count: int,
    memory_gb: float,
    seed: int,
) -> str:
    """Return a log line: the share of the exact top-k that `find` returns for `count` of the queries."""
    draw = np.random.default_rng([seed, 6])
    sample = queries[np.sort(draw.choice(len(queries), min(count, len(queries)), replace=False))]
    started = time.monotonic()
    found, _ = find(sample)
    took = time.monotonic() - started
    exact, _, _ = search(store, sample, topk, [device], memory_gb=memory_gb)
    exact_took = time.monotonic() - started - took
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
    return (
        f"recall@{topk} {hits / exact.size:.4f} relative to exact search on {len(sample)} queries "
        f"({duration(took)}, exact {duration(exact_took)})"
    )
