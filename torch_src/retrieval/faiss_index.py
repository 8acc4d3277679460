"""Approximate search by any faiss factory string: trained on a sample, filled from blocks, kept on disk."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torch_src.retrieval.approximate import best_first, check_blocks, exact_scores_of, recall_line
from torch_src.retrieval.faiss_loading import load_faiss
from torch_src.retrieval.search import read_chunks
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import free_memory
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import duration, log
from torch_src.runtime.stamps import changes, clear_stamp, is_intact, read_stamp, write_stamp

FILL_ROWS = 16384  # vectors added at once
LEAST_TRAINING = 10240  # vectors that a quantiser of 256 centroids wants (39 a centroid, by faiss's own rule)
MOST_TRAINING = 262144
PROBED_VECTORS = 2048  # added to a small index to see what one of them takes


@dataclass
class IndexSettings:
    """What decides an index, beside the vectors."""

    factory: str  # Flat, HNSW32, IVF4096,PQ192x4fs,Refine(SQfp16), ...
    search_params: str  # nprobe=64,k_factor_rf=10, ...
    memory_gb: float  # for training vectors; the index itself comes on top
    seed: int


class ApproximateSearch:
    """An index over the vectors of a store, made or read; `search` gives exact scores of what it finds."""

    def __init__(
        self,
        store: VectorStore,
        settings: IndexSettings,
        path: Path,
        stamp: dict,
        force: bool = False,
        make: bool = True,
    ):
        """Read the index at `path` when its stamp agrees, else make and write it; not `make`: refuse it.

        UserError for a malformed factory string or parameter, and when the index will not fit into memory.
        """
        self.store, self.settings, self.faiss = store, settings, load_faiss()
        stamp = {
            **stamp, "factory": settings.factory, "seed": settings.seed, "memory_gb": settings.memory_gb,
        }  # fmt: skip
        old = None if force else read_stamp(path)
        different = [] if old is None else changes(old, stamp)
        if old is not None and not different and not is_intact(path):
            different = ["its bytes are not those that were written"]
        if old is not None and not different:
            self.index = self._read(path)
            check_blocks(store)
            log(f"{path}: up to date")
        elif not make:
            why = "; ".join(different) or "no finished index there"
            raise UserError(f"{path}: {why}; make it with do_dual_infer.py --index '{settings.factory}'")
        else:
            if different:
                log(f"{path}: out of date, made again ({'; '.join(different)})")
            self.index = self._make(path, stamp)
        set_parameters(self.index, settings.factory, settings.search_params)

    def _read(self, path: Path):
        try:
            index = self.faiss.read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be read as an index; delete it and run again") from error
        if index.ntotal != self.store.rows or index.d != self.store.hidden:
            raise UserError(f"{path}: has {index.ntotal:,} vectors, not {self.store.rows:,}; delete it")
        return index

    def _make(self, path: Path, stamp: dict):
        check_memory(
            self.settings.factory, estimate_bytes(self.settings.factory, self.store.hidden, self.store.rows)
        )
        begun = time.monotonic()
        index = new_index(self.settings.factory, self.store.hidden)
        if not index.is_trained:
            sample = self._sample(index)
            log(f"index {self.settings.factory}: training on {len(sample):,} vectors")
            try:
                index.train(sample)
            except RuntimeError as error:
                why = str(error).strip().split("\n")[-1][-200:]
                raise UserError(
                    f"--index {self.settings.factory}: not for {len(sample):,} vectors ({why})"
                ) from error
            del sample
        for _, chunk in read_chunks(self.store, FILL_ROWS, buffers=3):
            index.add(torch.from_numpy(chunk).float().numpy())
        clear_stamp(path)
        with atomic_write(path, "wb") as file:
            try:
                self.faiss.write_index(index, file.name)
            except RuntimeError as error:
                raise UserError(f"{path}: could not be written; is the disk full?") from error
        write_stamp(path, stamp)
        size = os.path.getsize(path) / 1e9
        log(f"wrote {path} ({size:.2f} GB) in {duration(time.monotonic() - begun)}")
        return index

    def _sample(self, index) -> np.ndarray:
        """Return vectors (n, H) float32 of evenly drawn rows."""
        lists = inverted_lists(index)
        allowed = int(self.settings.memory_gb * 1e9 / (8 * self.store.hidden))  # faiss holds a copy
        wanted = min(max(LEAST_TRAINING, 64 * lists), MOST_TRAINING, max(allowed, lists))
        draw = np.random.default_rng([self.settings.seed, 5])
        rows = np.sort(draw.choice(self.store.rows, min(wanted, self.store.rows), replace=False))
        return torch.from_numpy(self.store.vectors_at(rows)).float().numpy()

    def search(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows (B, K) int64, scores (B, K) float64), best first, ties by row.

        Where the index finds fewer than K, the rest are rows of -1 with a score of -inf.
        """
        keep = min(topk, self.store.rows)
        found = self.index.search(queries, keep)[1].astype(np.int64)
        return best_first(found, exact_scores_of(self.store, queries, found), keep)

    def recall(self, queries: np.ndarray, topk: int, device: torch.device, count: int) -> str:
        """Return one line: the share of the exact top-k that is found, on `count` of the queries."""
        settings = self.settings
        line = recall_line(
            lambda some: self.search(some, topk), self.store, queries, topk, device, count,
            settings.memory_gb, settings.seed,
        )  # fmt: skip
        return f"index {settings.factory}: {line}"


def new_index(factory: str, hidden: int):
    """Return an empty index for inner products; UserError for a factory string that faiss does not know."""
    faiss = load_faiss()
    try:
        return faiss.index_factory(hidden, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"--index {factory}: faiss makes no such index of {hidden} dimensions") from error


def set_parameters(index, factory: str, parameters: str) -> None:
    """Set `nprobe=64,k_factor_rf=10`, ...; UserError for one that this kind of index does not have."""
    for parameter in filter(None, parameters.split(",")):
        try:
            load_faiss().ParameterSpace().set_index_parameters(index, parameter)
        except RuntimeError as error:
            raise UserError(
                f"--search_params {parameter}: not a parameter of an index {factory} "
                "(nprobe, efSearch, k_factor_rf, ...)"
            ) from error


def inverted_lists(index) -> int:
    """Return the number of inverted lists, 0 for an index without."""
    try:
        return load_faiss().extract_index_ivf(index).nlist
    except RuntimeError:
        return 0


def estimate_bytes(factory: str, hidden: int, rows: int) -> int:
    """Return about how many bytes an index of `rows` vectors takes."""
    return estimate(factory, hidden, rows)[0]


def estimate(factory: str, hidden: int, rows: int) -> tuple[int, float]:
    """Return about (bytes, seconds of filling) of an index of `rows` vectors, from a small one of random
    vectors. Its training is not in the seconds.
    """
    faiss, index = load_faiss(), new_index(factory, hidden)
    lists, draw = inverted_lists(index), np.random.default_rng(0)
    if lists:
        clustering = faiss.extract_index_ivf(index).cp
        clustering.niter, clustering.min_points_per_centroid = 1, 1
    few = draw.standard_normal((max(LEAST_TRAINING, 2 * lists), hidden), dtype=np.float32)
    if not index.is_trained:
        index.train(few)
    empty = len(faiss.serialize_index(index))
    begun = time.perf_counter()
    index.add(few[:PROBED_VECTORS])
    each = (time.perf_counter() - begun) / PROBED_VECTORS
    return empty + rows * (len(faiss.serialize_index(index)) - empty) // PROBED_VECTORS, each * rows


def check_memory(factory: str, needed: int, available: Callable[[], int] | None = None) -> None:
    """UserError when an index of `needed` bytes does not fit into the memory that is free."""
    free = (available or free_memory)()
    log(f"index {factory}: about {needed / 1e9:.2f} GB of memory, {free / 1e9:.1f} GB are free")
    if needed > 0.9 * free:
        raise UserError(
            f"--index {factory}: needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "take a smaller one (IVF4096,PQ192x4fs, say), or none: exact search needs no memory for it"
        )
