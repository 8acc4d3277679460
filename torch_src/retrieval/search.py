"""Exact search: the top-k passages of every query by inner product, in bounded memory, from vectors on disk.

The score is the inner product of the fp32 query vector and the stored fp16 passage vector in fp64
arithmetic, higher first; ties go to the lower row. Every device and kind of product gives the same result.
The passages are read once, in chunks (chunks.py), for all queries. For each chunk and batch of queries:
1. A fast inexact product with a proved error bound (score_bounds.py) selects the (query, passage) pairs whose
   score can reach the query's current k-th best score. If it selects too many, fp32 is used instead.
2. On a CPU the selected pairs are scored in fp32, which excludes most of them.
3. The remaining pairs are scored in fp64 and merged into the query's top k.
All of it stays on the device; only the results are copied to the host.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from torch_src.retrieval.chunks import BUFFERS, Chunk, ChunkReader, DeviceCache
from torch_src.retrieval.passage_windows import PassageWindows
from torch_src.retrieval.score_bounds import (
    GROUP,
    KINDS,
    Float32,
    Passages,
    Queries,
    Scratch,
    fastest_kind,
    full_precision,
    int8_is_exact,
)
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import available_gpu_memory
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import duration

QUERIES = 1000  # per batch: the queries that are compared with a chunk at once
CHUNK_ROWS = {"cpu": 2048, "cuda": 65536}  # maximum passages per chunk: on a CPU they stay in its caches
PRODUCT_PAIRS = {"cpu": 1 << 31, "cuda": 1 << 23}  # maximum pairs per fp32 product: all may be selected
PENDING_PAIRS = 8  # average pairs per query to collect before a merge into the top k
SCORED_PAIRS = {"cpu": 2048, "cuda": 32768}  # pairs scored before those that enter are selected
# Pairs scored in fp32 and in fp64 at once: on a CPU both sides stay in a cache. On a GPU, where fp64 is fast
# and the fast product leaves little to exclude, none are scored in fp32.
FP32_PAIRS = {"cpu": 256, "cuda": 0}
FP64_PAIRS = {"cpu": 512, "cuda": 32768}
GPU_FRACTION = 0.5  # maximum fraction of a GPU's free memory for the chunks and products of a search
PAIRS_FRACTION = 1 / 128  # maximum fraction of a chunk's pairs that the fast product may select
MAX_SKIPPED = 16  # maximum chunks without the fast product after it selected too many pairs
NO_ROW = torch.iinfo(torch.int64).max

Pairs = tuple[torch.Tensor, torch.Tensor]  # (query, passage) indices, both (n,) int64


class TopK:
    """The best K (row, score) of each query so far, in fp64, ties to the lower row."""

    def __init__(self, queries: int, keep: int, device: torch.device):
        self.scores = torch.full((queries, keep), -torch.inf, dtype=torch.float64, device=device)
        self.rows = torch.full((queries, keep), NO_ROW, device=device)
        self.pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.pending_pairs, self.max_pending = 0, PENDING_PAIRS * queries

    @property
    def thresholds(self) -> torch.Tensor:
        """The K-th best score (B,) of each query, -inf while there are fewer; a new pair must exceed it."""
        return self.scores[:, -1]

    def add(self, query: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor) -> None:
        """Add pairs (query, row, score), all (n,); merged later, because a merge has a fixed cost.

        The rows of a query must come in increasing order, in this call and from call to call.
        """
        self.pending.append((query, rows, scores))
        self.pending_pairs += len(query)
        if self.pending_pairs >= self.max_pending:
            self.flush()

    def flush(self) -> None:
        """Merge the pending pairs into the top k. Waits once for a GPU."""
        if not self.pending_pairs:
            return
        query, rows, scores = (torch.cat(tensors) for tensors in zip(*self.pending, strict=True))
        self.pending, self.pending_pairs = [], 0
        # by query, then score; the sorts are stable, which leaves equal scores in the order of their rows
        order = torch.sort(scores, descending=True, stable=True).indices
        order = order[torch.sort(query[order], stable=True).indices]
        query, rows, scores = query[order], rows[order], scores[order]
        position = torch.arange(len(query), device=query.device) - torch.searchsorted(query, query)
        count, keep = self.scores.shape
        width = min(keep, int(position.max()) + 1)
        # A table row for each query: its top k so far, its best new pairs, and a column that takes the rest.
        column = keep + position.clamp_(max=width)
        table = self.scores.new_full((count, keep + width + 1), -torch.inf)
        table_rows = self.rows.new_full(table.shape, NO_ROW)
        table[:, :keep], table_rows[:, :keep] = self.scores, self.rows
        table[query, column], table_rows[query, column] = scores, rows
        best = torch.sort(table[:, :-1], dim=1, descending=True, stable=True)
        self.scores = best.values[:, :keep].contiguous()
        self.rows = table_rows.gather(1, best.indices[:, :keep])


class ExactScorer:
    """fp64 inner products of pairs.

    Products are summed in one order on every device, so equal vectors get equal scores everywhere.
    """

    def __init__(self, queries: torch.Tensor, scratch: Scratch):
        """queries (B, H) float32, on the device of the vectors."""
        self.queries, self.scratch = queries, scratch
        self.at_once = FP64_PAIRS[queries.device.type]

    def scores(self, query: torch.Tensor, vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return (n,) fp64 of pairs (query, row of `vectors` (C, H) float16)."""
        scores = torch.empty(len(query), dtype=torch.float64, device=query.device)
        for start in range(0, len(query), self.at_once):
            q, r = query[start : start + self.at_once], rows[start : start + self.at_once]
            products = self._rows("query", self.queries, q)
            products *= self._rows("passage", vectors, r)
            scores[start : start + len(q)] = _tree_sum(products)
        return scores

    def _rows(self, name: str, vectors: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the rows (n, H) of the vectors at positions (n,), in fp64."""
        rows = self.scratch.rows(name, vectors, at)
        return self.scratch.like(rows, f"{name} in fp64", torch.float64).copy_(rows)


def _tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sums (n,) of rows (n, H), which are overwritten.

    One half is added to the other until one column is left: plain additions, which round alike everywhere.
    """
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half].add_(values[:, width - half : width])
        width -= half
    return values[:, 0]


@dataclass
class SearchStats:
    """Counts of a search, for the log; a chunk counts once for each batch of queries."""

    chunks: int = 0
    fp32_chunks: int = 0  # chunks without the fast product
    selected_pairs: int = 0
    fp64_pairs: int = 0

    def add(self, other: "SearchStats") -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def __str__(self) -> str:
        pairs = f"{self.selected_pairs:,} pairs selected, {self.fp64_pairs:,} scored in fp64"
        return f"{pairs}; fp32 product for {self.fp32_chunks:,} of {self.chunks:,} (chunk, batch) pairs"


class DeviceSearch:
    """The search for all queries on one device. Chunks must come in the order of their rows."""

    def __init__(self, queries: np.ndarray, bs: int, keep: int, kind: str, device: torch.device):
        """queries (N, H) float32, in batches of `bs`."""
        self.scratch = Scratch()
        self.batches = [
            BatchSearch(queries[start : start + bs], keep, kind, device, self.scratch)
            for start in range(0, len(queries), bs)
        ]

    def add_chunk(self, first: int, chunk: torch.Tensor) -> None:
        """Search one chunk (C, H) float16 whose first row is `first`."""
        passages = Passages(chunk, self.scratch)
        for batch in self.batches:
            batch.add(first, passages)

    def results(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows (N, K) int64, scores (N, K) float64), best first; score -inf where there are fewer."""
        for batch in self.batches:
            batch.top.flush()
        rows, scores = zip(*((batch.top.rows, batch.top.scores) for batch in self.batches), strict=True)
        return torch.cat(rows).cpu().numpy(), torch.cat(scores).cpu().numpy()

    def stats(self) -> SearchStats:
        total = SearchStats()
        for batch in self.batches:
            total.add(batch.stats)
        return total


class BatchSearch:
    """The search for one batch of queries on one device."""

    def __init__(self, queries: np.ndarray, keep: int, kind: str, device: torch.device, scratch: Scratch):
        """queries (B, H) float32."""
        self.queries, self.keep, self.device, self.scratch = Queries(queries, device), keep, device, scratch
        self.fp32 = Float32(self.queries)
        self.fast = self.fp32 if kind == Float32.name else KINDS[kind](self.queries)
        self.exact = ExactScorer(self.queries.vectors, scratch)
        self.top, self.stats = TopK(len(queries), keep, device), SearchStats()
        self.seen, self.skip, self.failures = 0, 0, 0

    @property
    def full(self) -> bool:
        """Whether every query has K results: each passage is a result of every query until then."""
        return self.seen >= self.keep

    def add(self, first: int, passages: Passages) -> None:
        """Search the passages, whose first row is `first`."""
        self.stats.chunks += 1
        pairs = self._fast_pairs(passages) if self._use_fast_product() else None
        if pairs is not None:
            self._score(first, passages, *pairs)
            return
        self.stats.fp32_chunks += 1
        for start, chunk in passages.split(_product_rows(len(self.top.scores), self.device.type)):
            self._score(first + start, chunk, *self._fp32_pairs(chunk))
            if not self.full:
                self.top.flush()
            self.seen += len(chunk)

    def _use_fast_product(self) -> bool:
        if self.fast is self.fp32 or not self.full:
            return False
        self.skip -= 1
        return self.skip < 0

    def _floor(self) -> torch.Tensor:
        """Return the scores (B,) fp64 to exceed, of the scaled queries."""
        return self.top.thresholds * self.queries.scale

    def _fast_pairs(self, passages: Passages) -> Pairs | None:
        """Return the pairs that may enter the top k by the fast product; None when there are too many."""
        limit = max(64, int(PAIRS_FRACTION * len(self.top.scores) * len(passages)))
        pairs = self.fast.pairs_above(passages, self._floor(), limit)
        self.failures = 0 if pairs is not None else self.failures + 1
        self.skip = 0 if pairs is not None else min(2**self.failures, MAX_SKIPPED)
        return pairs

    def _fp32_pairs(self, passages: Passages) -> Pairs:
        """Return the pairs that may enter the top k by the fp32 product of all passages."""
        floor = self._floor()
        if not self.full and len(passages) >= self.keep:
            # No threshold yet: a score that K of these passages reach excludes most pairs.
            floor = torch.maximum(floor, self.fp32.kth_score(passages, self.keep))
        pairs = self.fp32.pairs_above(passages, floor, len(self.top.scores) * len(passages))
        assert pairs is not None  # the limit is all pairs
        return pairs

    def _score(self, first: int, passages: Passages, query: torch.Tensor, column: torch.Tensor) -> None:
        """Score the pairs (query, passage) in fp64 and add those that enter to the top k."""
        self.stats.selected_pairs += len(query)
        step, in_fp32 = SCORED_PAIRS[self.device.type], FP32_PAIRS[self.device.type] > 0
        lowest = self._floor() - self.fp32.bound(passages) if in_fp32 else None
        for start in range(0, len(query), step):
            q, c = query[start : start + step], column[start : start + step]
            if lowest is not None:
                q, c = _selected(self._fp32_scores(passages.float32, q, c).double() >= lowest[q], q, c)
            scores = self.exact.scores(q, passages.float16, c)
            self.stats.fp64_pairs += len(q)
            # Equal is not enough: the rows so far are lower.
            self.top.add(*_selected(scores > self.top.thresholds[q], q, c + first, scores))

    def _fp32_scores(self, vectors: torch.Tensor, query: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return the inner products (n,) fp32 of pairs (query, column of this chunk), scaled."""
        scores, size = vectors.new_empty(len(query)), FP32_PAIRS[self.device.type]
        for start in range(0, len(query), size):
            q, c = query[start : start + size], column[start : start + size]
            products = self.scratch.rows("left", self.queries.scaled, q)
            products *= self.scratch.rows("right", vectors, c)
            torch.sum(products, 1, out=scores[start : start + len(q)])
        return scores


def _selected(mask: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the entries (m,) of tensors (n,) where the mask (n,) is set. Waits once for a GPU."""
    at = torch.nonzero(mask)[:, 0]
    return [tensor[at] for tensor in tensors]


def search(
    store: VectorStore,
    queries: np.ndarray,
    topk: int,
    devices: list[torch.device],
    kind: str = "auto",
    memory_gb: float = 2.0,
    cache: DeviceCache | None = None,
    bs: int = QUERIES,
    searched: Callable[[int], None] | None = None,
    windows: PassageWindows | None = None,
) -> tuple[np.ndarray, np.ndarray, SearchStats]:
    """Return (rows (N, K) int64, scores (N, K) float64, stats), K = min(topk, passages), best first.

    queries: (N, H) float32, compared in batches of `bs`. kind: fp32, fp16 (CUDA), bf16, int8 (CPU) or auto,
    the fastest; the result is the same. Several devices share the chunks. The vectors are read once, and
    `cache` keeps them on the devices for the next search. `searched` gets the number of passages per chunk.
    Host memory: at most `memory_gb` (10^9 bytes) in addition to the cache, `state_bytes` and the results.
    GPU memory: the cache, `state_bytes`, and at most GPU_FRACTION of what is free.
    windows: of passages that the vectors belong to; the rows are then passages, with the score of their best
    window.
    """
    if windows is not None:
        # so many windows always belong to `topk` passages: one pass over the vectors is enough
        found, best, stats = search(
            store, queries, windows.depth(topk), devices, kind, memory_gb, cache, bs, searched
        )
        return *windows.collapse(found, best, min(topk, windows.passages)), stats
    assert queries.dtype == np.float32 and queries.ndim == 2 and queries.shape[1] == store.hidden
    keep, bs = min(topk, store.rows), min(bs, len(queries))
    kind = choose_kind(kind, store.hidden, devices[0])
    searches = [DeviceSearch(queries, bs, keep, kind, device) for device in devices]
    rows = chunk_rows(bs, store.hidden, memory_gb, devices)
    if cache and cache.complete:
        sources = [cache.split(at, rows) for at in range(len(devices))]
    else:
        reader = ChunkReader(store, rows)
        sources = [reader.chunks(device, keep=cache is not None) for device in devices]
        if cache:
            sources = [cache.keep(at, chunks) for at, chunks in enumerate(sources)]
    with full_precision():
        _run(searches, sources, searched or (lambda passages: None))
    if cache:
        cache.complete = True
    stats = SearchStats()
    for device_search in searches:
        stats.add(device_search.stats())
    found, scores = zip(*(device_search.results() for device_search in searches), strict=True)
    if len(searches) == 1:
        return found[0], scores[0], stats
    return *best_first(np.concatenate(found, axis=1), np.concatenate(scores, axis=1), keep), stats


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


def state_bytes(queries: int, hidden: int, keep: int) -> int:
    """Return the bytes that all queries of a search take on each device: vectors and top k."""
    # vectors fp32, scaled, and rounded for the fast product; (row, score), and norms
    return queries * (hidden * (4 + 4 + 2) + keep * 16 + 64)


def chunk_rows(queries: int, hidden: int, memory_gb: float, devices: list[torch.device]) -> int:
    """Return the passages per chunk for batches of `queries`; UserError when not even GROUP of them fit.

    On GPUs `memory_gb` limits only the chunks in host memory.
    """
    host = memory_gb * 1e9 / len(devices)
    if devices[0].type == "cpu":
        needed, rows = _rows_within(host, *_cpu_bytes(queries, hidden))
        limit, fix = f"--search_memory_gb {memory_gb}:", "raise it, or lower --bs"
        needed *= len(devices)
    else:
        free = min(map(available_gpu_memory, devices))
        budget = GPU_FRACTION * free
        needed, rows = _rows_within(budget, *_gpu_bytes(queries, hidden))
        rows = min(rows, _rows_within(host, 0, BUFFERS * 2 * hidden)[1])
        limit = f"the search may use {budget / 1e9:.1f} of {free / 1e9:.1f} GB of free GPU memory, but"
        fix = "lower --bs"
    if rows < GROUP:
        raise UserError(f"{limit} {queries:,} queries at once need {needed / 1e9:.1f} GB; {fix}")
    return min(rows, CHUNK_ROWS[devices[0].type])


def _product_rows(queries: int, device_type: str) -> int:
    """Return the maximum number of passages per fp32 product, whole groups."""
    return max(1, min(CHUNK_ROWS[device_type], PRODUCT_PAIRS[device_type] // queries) // GROUP) * GROUP


def _rows_within(budget: float, fixed_bytes: int, row_bytes: int) -> tuple[int, int]:
    """Return (bytes for the smallest chunk, passages per chunk within `budget` bytes)."""
    return fixed_bytes + GROUP * row_bytes, int((budget - fixed_bytes) / row_bytes) // GROUP * GROUP


def _cpu_bytes(queries: int, hidden: int) -> tuple[int, int]:
    """Return (bytes of a batch of queries, additional bytes per passage of a chunk) on a CPU."""
    # per pair to score: both vectors in fp32, in 16 bits and in fp64; per query: its conversions
    fixed = hidden * (FP32_PAIRS["cpu"] * 2 * 4 + FP64_PAIRS["cpu"] * (4 + 2 + 2 * 8) + queries * 16)
    # per passage: its vector in fp16, in fp32 (3: as is, minus the mean, scaled) and int8; per pair: its
    # score and, at worst, its indices in the list of selected pairs
    return fixed, hidden * (BUFFERS * 2 + 3 * 4 + 1) + queries * (4 + 4 + 4 * 8)


def _gpu_bytes(queries: int, hidden: int) -> tuple[int, int]:
    """Return (bytes of a batch of queries, additional bytes per passage of a chunk) on a GPU."""
    # an fp32 product, all of whose pairs may be selected; pairs to score, in fp32, fp16 and fp64
    rows = _product_rows(queries, "cuda")
    fixed = rows * (hidden * 4 + queries * (4 + 4 + 7 * 8))
    fixed += FP64_PAIRS["cuda"] * hidden * (4 + 2 + 2 * 8)
    # per passage: its vector in fp16 (copied, used, not yet freed); per pair: its score, a padded copy of it,
    # and the groups with selected pairs
    return fixed, hidden * 3 * 2 + queries * (2 + 2 + 4)


def _run(
    searches: list[DeviceSearch], sources: list[Iterator[Chunk]], searched: Callable[[int], None]
) -> None:
    """Search every device's chunks, one thread per device; the first error ends all of them."""
    failed, lock = threading.Event(), threading.Lock()

    def work(search: DeviceSearch, chunks: Iterator[Chunk]) -> None:
        try:
            for first, chunk in chunks:
                search.add_chunk(first, chunk)
                with lock:
                    searched(len(chunk))
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


def exact_scores(store: VectorStore, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the fp64 scores (B, K) of rows (B, K) found by an approximate search; -inf where a row is -1."""
    query, column = np.nonzero(found >= 0)
    rows, scorer = found[query, column], ExactScorer(torch.from_numpy(queries), Scratch())
    scores, by_row = np.empty(len(rows)), np.argsort(rows, kind="stable")
    for start in range(0, len(rows), SCORED_PAIRS["cpu"]):
        at = by_row[start : start + SCORED_PAIRS["cpu"]]
        distinct, which = np.unique(rows[at], return_inverse=True)
        vectors = torch.from_numpy(store.vectors_at(distinct))
        scores[at] = scorer.scores(torch.from_numpy(query[at]), vectors, torch.from_numpy(which)).numpy()
    table = np.full(found.shape, -np.inf)
    table[query, column] = scores
    return table


def best_first(found: np.ndarray, scores: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows (B, keep) int64, scores (B, keep) float64), best first, ties by row.

    `found` and `scores` (B, D), D >= keep. Missing results, rows of -1, come last with score -inf.
    """
    scores = np.where(found >= 0, scores, -np.inf)
    order = np.lexsort((found, -scores), axis=1)[:, :keep]
    return np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)


def measured_recall(
    find: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    store: VectorStore,
    queries: np.ndarray,
    topk: int,
    device: torch.device,
    count: int,
    memory_gb: float,
    seed: int,
    windows: PassageWindows | None = None,
) -> str:
    """Return a log line: the share of the exact top-k that `find` returns for `count` of the queries."""
    draw = np.random.default_rng([seed, 6])
    sample = queries[np.sort(draw.choice(len(queries), min(count, len(queries)), replace=False))]
    started = time.monotonic()
    found, _ = find(sample)
    took = time.monotonic() - started
    exact, _, _ = search(store, sample, topk, [device], memory_gb=memory_gb, windows=windows)
    exact_took = time.monotonic() - started - took
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
    return (
        f"recall@{topk} {hits / exact.size:.4f} relative to exact search on {len(sample)} queries "
        f"({duration(took)}, exact {duration(exact_took)})"
    )
