"""Exact search: the top-k passages of every query by inner product, in bounded memory, from vectors on disk.

Result rule: the inner product of the fp32 query vector with the stored fp16 passage vector in fp64
arithmetic, higher first; ties: the lower row first. Every kind of product and every device gives the same
result.

The passages are read once, chunk by chunk. A fast inexact product with a proved error bound (products.py)
finds the pairs that could still enter a query's top-k; those are scored in fp32, and what is left of them in
fp64.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from torch_src.retrieval.score_bounds import (
    GROUP,
    KINDS,
    Float32,
    Products,
    fastest,
    full_precision,
    int8_is_exact,
)
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import free_gpu_memory, free_memory
from torch_src.runtime.errors import UserError
from torch_src.runtime.prefetch import one_ahead

CHUNK_ROWS = {
    "cpu": 2048,
    "cuda": 65536,
}  # passages scored at once, at most: on a CPU they stay in its caches
WAITING_PAIRS = (
    8  # a query, on average, that wait to be put in: each time has a cost beside that of the pairs
)
REFINE_PAIRS = 2048  # pairs looked at again at once
CACHED_PAIRS = {"cpu": 256, "cuda": REFINE_PAIRS}  # pairs scored in fp32 at once: both sides stay in a cache
EXACT_PAIRS = 512  # pairs scored in fp64 at once: both sides stay in a cache
RESIDENT_SHARE = 0.6  # of a GPU's free memory that vectors may take for good
PAIRS_SHARE = 1 / 128  # of all pairs of a chunk: beyond it the fast product decides too little to pay
LONGEST_REST = 16  # chunks for which a product that decided too little is left out, at most


class BestRows:
    """The best K (row, score) of each query so far, in fp64, ties to the lower row."""

    def __init__(self, queries: int, keep: int):
        self.scores = np.full((queries, keep), -np.inf)
        self.rows = np.full((queries, keep), np.iinfo(np.int64).max)
        self.waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.count, self.patience = 0, WAITING_PAIRS * queries

    @property
    def worst(self) -> np.ndarray:
        """Return (B,): a score to beat, or to equal with a lower row; -inf while there is room."""
        return self.scores[:, -1]

    def add(self, query: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        """Take pairs (query, row, score), all (n,); they are put in together with later ones, by `settle`."""
        self.waiting.append((query, rows, scores))
        self.count += len(query)
        if self.count >= self.patience:
            self.settle()

    def settle(self) -> None:
        """Put in the pairs that wait."""
        if not self.count:
            return
        query, rows, scores = (np.concatenate(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting, self.count = [], 0
        keep = self.scores.shape[1]
        order = np.lexsort((rows, -scores, query))
        query, rows, scores = query[order], rows[order], scores[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        some = place < keep  # of a query that has very many the best: the table below stays small
        query, rows, scores, place = query[some], rows[some], scores[some], place[some]
        which, count = np.unique(query, return_counts=True)
        # One row of a table for each query that has new pairs: what it had, then the new ones.
        table_scores = np.full((len(which), keep + count.max()), -np.inf)
        table_rows = np.full(table_scores.shape, np.iinfo(np.int64).max)
        table_scores[:, :keep], table_rows[:, :keep] = self.scores[which], self.rows[which]
        line = np.repeat(np.arange(len(which)), count)
        column = keep + place
        table_scores[line, column], table_rows[line, column] = scores, rows
        best = np.lexsort((table_rows, -table_scores), axis=1)[:, :keep]
        self.scores[which] = np.take_along_axis(table_scores, best, 1)
        self.rows[which] = np.take_along_axis(table_rows, best, 1)


@dataclass
class Effort:
    """What a search did, for the log: chunks by fp32 alone, pairs scored again in fp32 and in fp64."""

    chunks: int = 0
    plain_chunks: int = 0
    pairs: int = 0
    exact_pairs: int = 0

    def line(self) -> str:
        """Return it in words."""
        looked = f"{self.pairs:,} pairs scored in fp32, {self.exact_pairs:,} in fp64"
        return f"({looked}, {self.plain_chunks}/{self.chunks} chunks by fp32 alone)"


class Searcher:
    """One round of queries on one device; chunks may come in any order."""

    def __init__(self, queries: np.ndarray, keep: int, kind: str, device: torch.device, kept: list | None):
        """`kept`: where the chunks go that are to stay on the device."""
        self.exact, self.device, self.kept = ExactProducts(queries.astype(np.float64)), device, kept
        self.plain = Float32(queries, device)
        self.fast: Products = self.plain if kind == Float32.name else KINDS[kind](queries, device)
        self.best, self.effort = BestRows(len(queries), keep), Effort()
        self.rest, self.failures, self.full = 0, 0, False

    def look_at(self, first: int, chunk: np.ndarray | torch.Tensor) -> None:
        """Take one chunk (C, H) float16 whose first row is `first`; a tensor is on the device already."""
        on_device = chunk
        if isinstance(chunk, np.ndarray):
            on_device = torch.from_numpy(chunk).to(self.device, copy=self.kept is not None)
            if self.kept is not None:
                self.kept.append((first, on_device))
        vectors = self.plain.scratch.like(on_device, "vectors").copy_(on_device)  # fp16 to fp32
        worst = torch.from_numpy(self.best.worst).to(self.device) * self.plain.scale
        found = None
        if self._fast_product_pays():
            found = self.fast.reached(vectors, worst, self._limit(len(chunk)))
            self.failures = 0 if found is not None else self.failures + 1
            self.rest = 0 if found is not None else min(2**self.failures, LONGEST_REST)
        if found is None:
            found = self._by_fp32(vectors, worst)
        self.effort.chunks += 1
        self._refine(first, on_device, vectors, worst, *found)

    def _fast_product_pays(self) -> bool:
        if self.fast is self.plain or not self.full:
            return False
        self.rest -= 1
        return self.rest < 0

    def _limit(self, rows: int) -> int:
        return max(64, int(PAIRS_SHARE * len(self.plain.queries) * rows))

    def _by_fp32(self, vectors: torch.Tensor, worst: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all pairs that can enter, from fp32 products of the whole chunk."""
        self.effort.plain_chunks += 1
        keep = self.best.scores.shape[1]
        if not self.full and len(vectors) >= keep:
            # Nothing to beat yet: the chunk's own K-th score will do, less the error of both.
            kth = torch.topk(self.plain.scores(vectors).T, keep, dim=1).values[:, -1].double()
            worst = torch.maximum(worst, kth - self.plain.bound(vectors))
        found = self.plain.reached(vectors, worst, len(self.plain.queries) * len(vectors))
        assert found is not None
        return found

    def _refine(self, first: int, chunk: torch.Tensor, vectors, worst, query, column) -> None:
        """Score the pairs in fp32, those that can still enter in fp64, and keep the best."""
        self.effort.pairs += len(query)
        floor = worst - self.plain.bound(vectors)
        for start in range(0, len(query), REFINE_PAIRS):
            q, c = query[start : start + REFINE_PAIRS], column[start : start + REFINE_PAIRS]
            near = self._fp32_scores(vectors, q, c).double() >= floor[q]
            q, c = q[near].cpu().numpy(), c[near]
            exact = self.exact.scores(q, chunk, c)
            c = c.cpu().numpy()
            self.effort.exact_pairs += len(q)
            enters = exact >= self.best.worst[q]
            self.best.add(q[enters], c[enters] + first, exact[enters])
        if not self.full:
            self.best.settle()
            self.full = bool(np.isfinite(self.best.worst).all())

    def _fp32_scores(self, vectors: torch.Tensor, query: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return the inner products (n,) fp32 of pairs (query, column of this chunk)."""
        size = CACHED_PAIRS[self.device.type]
        left, right = (self.plain.scratch.like(vectors[:size], side) for side in ("left", "right"))
        scores = torch.empty(len(query), dtype=torch.float32, device=self.device)
        for start in range(0, len(query), len(left)):
            q, c = query[start : start + len(left)], column[start : start + len(left)]
            one = torch.index_select(self.plain.queries, 0, q, out=left[: len(q)])
            other = torch.index_select(vectors, 0, c, out=right[: len(q)])
            torch.sum(one.mul_(other), 1, out=scores[start : start + len(q)])
        return scores


class ExactProducts:
    """fp64 inner products of pairs, a few at a time in memory that stays in a cache.

    Each is summed in the same order, whatever the others: equal vectors get equal scores.
    """

    def __init__(self, queries: np.ndarray):
        """`queries`: (B, H) float64."""
        self.queries, size = queries, (EXACT_PAIRS, queries.shape[1])
        self.left, self.half = np.empty(size), torch.empty(size, dtype=torch.float16)
        self.right = torch.empty(size, dtype=torch.float64)  # numpy's own conversion from fp16 is slow

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


def exact_scores(store: VectorStore, queries: np.ndarray, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the fp64 inner products (n,) of pairs (query, row)."""
    scores, exact = np.empty(len(rows)), ExactProducts(queries.astype(np.float64))
    by_row = np.argsort(rows, kind="stable")
    for start in range(0, len(rows), REFINE_PAIRS):
        at = by_row[start : start + REFINE_PAIRS]
        there, which = np.unique(rows[at], return_inverse=True)
        vectors = torch.from_numpy(store.vectors_at(there))
        scores[at] = exact.scores(query[at], vectors, torch.from_numpy(which))
    return scores


class Resident:
    """Vectors that stay on their devices from one round of queries to the next, after being read once."""

    def __init__(self, devices: list[torch.device]):
        self.kept: list[list] = [[] for _ in devices]
        self.complete = False

    @classmethod
    def where_they_fit(
        cls, store: VectorStore, devices: list[torch.device], memory_gb: float = 0.0
    ) -> "Resident | None":
        """Return a place for the vectors on the GPUs, or on a CPU within `memory_gb`; None when they are too
        many.
        """
        share = store.rows * store.hidden * 2 / len(devices)
        return cls(devices) if all(share < _room(device, memory_gb) for device in devices) else None


def _room(device: torch.device, memory_gb: float) -> float:
    """Return the bytes that vectors may take for good: on a CPU what is asked for, if it is free."""
    if device.type == "cuda":
        return RESIDENT_SHARE * free_gpu_memory(device)
    return min(memory_gb * 1e9, 0.9 * free_memory())


def search(
    store: VectorStore,
    queries: np.ndarray,
    topk: int,
    devices: list[torch.device],
    kind: str = "auto",
    memory_gb: float = 2.0,
    resident: Resident | None = None,
) -> tuple[np.ndarray, np.ndarray, Effort]:
    """Return (rows (B, K) int64, scores (B, K) float64, effort), K = min(topk, passages), best first.

    queries: (B, H) float32. kind: fp32, bf16, int8, or auto for the fastest here; the result is the same.
    Several devices share the chunks out. Memory: at most `memory_gb` (10^9 bytes) beside the queries and
    results, and what is `resident` on the devices.
    """
    assert queries.dtype == np.float32 and queries.ndim == 2 and queries.shape[1] == store.hidden
    keep = min(topk, store.rows)
    rows = chunk_rows(len(queries), store.hidden, memory_gb, devices[0].type, len(devices))
    kind = choose_kind(kind, store.hidden, devices[0], lambda line: None)
    places = resident.kept if resident and not resident.complete else [None] * len(devices)
    searchers = [Searcher(queries, keep, kind, *pair) for pair in zip(devices, places, strict=True)]
    if resident and not resident.complete:
        for kept in resident.kept:
            kept.clear()  # of a search that failed half-way
    if resident and resident.complete:
        sources = [iter(kept) for kept in resident.kept]
    else:
        chunks = read_chunks(store, rows, buffers=2 + len(devices))
        sources = [chunks] if len(devices) == 1 else _shared(chunks, len(devices))
    with full_precision():
        _look_at_all(searchers, sources)
    if resident:
        resident.complete = True
    for searcher in searchers:
        searcher.best.settle()
    best, effort = searchers[0].best, searchers[0].effort
    for other in searchers[1:]:
        query = np.repeat(np.arange(len(queries)), keep)
        real = np.isfinite(other.best.scores.ravel())
        best.add(query[real], other.best.rows.ravel()[real], other.best.scores.ravel()[real])
        best.settle()
        effort = Effort(
            *(a + b for a, b in zip(vars(effort).values(), vars(other.effort).values(), strict=True))
        )
    return best.rows, best.scores, effort


def choose_kind(name: str, hidden: int, device: torch.device, log) -> str:
    """Return fp32, bf16 or int8: what was asked, or for `auto` the fastest here, which `say` is told."""
    if name == "auto":
        name, seconds = fastest(hidden, device)
        ratios = ", ".join(f"{kind} {seconds['fp32'] / s:.2f}" for kind, s in seconds.items())
        log(f"search: {name} products at first (speed against fp32: {ratios})")
    elif name == "int8" and not (device.type == "cpu" and int8_is_exact(hidden)):
        raise UserError("--search_product int8: this torch has no exact int8 products here; use auto")
    return name


def chunk_rows(queries: int, hidden: int, memory_gb: float, kind: str, devices: int = 1) -> int:
    """Return how many passages are looked at at once; UserError when `memory_gb` is too little for GROUP."""
    # a chunk in fp16 (3, read ahead), fp32 (3: as it is, less the mean, scaled) and int8 (2); a score, and at
    # worst its place in the list of pairs to look at again
    a_row = hidden * (3 * 2 + 3 * 4 + 2) + queries * (4 + 4 + 4 * 8)
    at_once = REFINE_PAIRS * hidden * (3 * 4 + 3 * 8) + queries * hidden * (4 + 4 + 8)
    rows = int((memory_gb * 1e9 / devices - at_once) / a_row) // GROUP * GROUP
    if rows < GROUP:
        needed = devices * (at_once + GROUP * a_row) / 1e9
        raise UserError(
            f"--search_memory_gb {memory_gb}: {queries:,} queries at once need {needed:.1f} GB; "
            "raise it, or lower --bs"
        )
    return min(rows, CHUNK_ROWS[kind])


def read_chunks(store: VectorStore, rows: int, buffers: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, vectors (rows, H) float16); the next chunk is read while this one is looked at.

    A chunk's memory is used again after `buffers` - 1 more chunks.
    """
    memory = [np.empty((min(rows, store.rows), store.hidden), dtype=np.float16) for _ in range(buffers)]

    def read(at: int) -> tuple[int, np.ndarray]:
        first = at * rows
        into = memory[at % buffers][: min(rows, store.rows - first)]
        store.read_into(first, into)
        return first, into

    return one_ahead(read, range(math.ceil(store.rows / rows)))


def _shared(chunks: Iterator[tuple[int, np.ndarray]], count: int) -> list[Iterator]:
    """Return `count` iterators, for as many threads, that take the next chunk each as they come."""
    lock = threading.Lock()

    def take() -> Iterator[tuple[int, np.ndarray]]:
        while True:
            with lock:
                first, chunk = next(chunks, (0, None))
                if chunk is None:
                    return
                chunk = chunk.copy()  # the others may come round to its memory before this one is done
            yield first, chunk

    return [take() for _ in range(count)]


def _look_at_all(searchers: list[Searcher], sources: list[Iterator]) -> None:
    """Let every device look at its chunks, several at the same time."""
    faults: list[BaseException] = []

    def work(searcher: Searcher, chunks: Iterator) -> None:
        try:
            for first, chunk in chunks:
                searcher.look_at(first, chunk)
                if faults:
                    return
        except BaseException as fault:  # it must not die silently in its thread: it is raised again below
            faults.append(fault)

    if len(searchers) == 1:
        for first, chunk in sources[0]:
            searchers[0].look_at(first, chunk)
        return
    threads = [threading.Thread(target=work, args=pair) for pair in zip(searchers, sources, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
