"""Approximate search with a faiss index: trained on a sample, filled from blocks, kept on disk."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_src.retrieval.index_options import check_factory, check_search_params, faiss_errors
from torch_src.retrieval.search import best_first, check_blocks, exact_scores, measured_recall, read_chunks
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import free_memory
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import duration, log
from torch_src.runtime.stamps import changes, clear_stamp, is_intact, read_stamp, write_stamp

INDEX = "para.index"  # in the output folder
FILL_ROWS = 16384  # vectors added at once
MIN_TRAINING = 10240  # vectors that a quantizer with 256 centroids needs (39 per centroid, faiss's own rule)
MAX_TRAINING = 262144
PROBED_VECTORS = 2048  # added to a small index to measure memory and time per vector


def load_faiss() -> Any:
    """Return the faiss module; UserError when it is missing or broken (both packages use one folder)."""
    fix = "run: pip uninstall -y faiss-cpu faiss-gpu, then install the requirements file again"
    if len([name for name in ("faiss-cpu", "faiss-gpu") if _is_installed(name)]) == 2:
        raise UserError(f"both faiss-cpu and faiss-gpu are installed and overwrite each other; {fix}")
    try:
        faiss = import_module("faiss")
    except ImportError as error:
        raise UserError(f"faiss cannot be imported ({error}); {fix}") from error
    if not hasattr(faiss, "knn"):
        raise UserError(f"faiss is broken: its package is empty; {fix}")
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@dataclass
class IndexSettings:
    """Settings of an index."""

    factory: str  # Flat, HNSW32, IVF4096,PQ192x4fs,Refine(SQfp16), ...
    search_params: str  # nprobe=64,k_factor_rf=10, ...
    memory_gb: float  # for training vectors; the index itself is not included
    seed: int


class FaissSearch:
    """Search with an index of a store's vectors; results are re-scored exactly from the blocks."""

    def __init__(
        self,
        store: VectorStore,
        settings: IndexSettings,
        path: Path,
        stamp: dict[str, Any],
        force: bool = False,
        build: bool = True,
    ):
        """Read the index at `path` when its stamp agrees, else build it (UserError without `build`).

        UserError for a malformed factory string or parameter, and when the index does not fit into memory.
        """
        self.store, self.settings, self.faiss = store, settings, load_faiss()
        stamp = {**stamp, "factory": settings.factory, "seed": settings.seed, "memory_gb": settings.memory_gb}
        old = None if force else read_stamp(path)
        different = [] if old is None else changes(old, stamp)
        if old is not None and not different and not is_intact(path):
            different = ["checksum mismatch"]
        if old is not None and not different:
            self.index = self._read(path)
            check_blocks(store)
            log(f"{path}: up to date")
        elif not build:
            reason = "; ".join(different) or "no finished index"
            raise UserError(f"{path}: {reason}; run do_dual_infer.py --index '{settings.factory}'")
        else:
            if different:
                log(f"{path}: out of date ({'; '.join(different)}); rebuilding it")
            self.index = self._build(path, stamp)
        set_parameters(self.index, settings.factory, settings.search_params)

    def _read(self, path: Path) -> Any:
        try:
            index = self.faiss.read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be read as an index; delete it and run again") from error
        if index.ntotal != self.store.rows or index.d != self.store.hidden:
            found = f"has {index.ntotal:,} vectors (expected {self.store.rows:,})"
            raise UserError(f"{path}: {found}; delete it and run again")
        return index

    def _build(self, path: Path, stamp: dict[str, Any]) -> Any:
        factory, hidden = self.settings.factory, self.store.hidden
        check_memory(factory, estimate(factory, hidden, self.store.rows)[0])
        started = time.monotonic()
        index = new_index(factory, hidden)
        if not index.is_trained:
            self._train(index)
        for _, chunk in read_chunks(self.store, FILL_ROWS, buffers=3):
            with faiss_errors(factory):
                index.add(torch.from_numpy(chunk).float().numpy())
        clear_stamp(path)
        with atomic_write(path, "wb") as file:
            try:
                self.faiss.write_index(index, file.name)
            except RuntimeError as error:
                raise UserError(f"{path}: cannot be written; check the free disk space") from error
        write_stamp(path, stamp)
        size = os.path.getsize(path) / 1e9
        log(f"wrote {path} ({size:.2f} GB) in {duration(time.monotonic() - started)}")
        return index

    def _train(self, index: Any) -> None:
        sample = self._sample(index)
        log(f"index {self.settings.factory}: training on {len(sample):,} vectors")
        try:
            index.train(sample)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1][-200:]
            raise UserError(
                f"--index {self.settings.factory}: cannot be trained on {len(sample):,} vectors ({reason})"
            ) from error

    def _sample(self, index: Any) -> np.ndarray:
        """Return vectors (n, H) float32 of rows drawn at random."""
        lists = inverted_lists(index)
        allowed = int(self.settings.memory_gb * 1e9 / (8 * self.store.hidden))  # faiss holds a copy
        wanted = min(max(MIN_TRAINING, 64 * lists), MAX_TRAINING, max(allowed, lists))
        draw = np.random.default_rng([self.settings.seed, 5])
        rows = np.sort(draw.choice(self.store.rows, min(wanted, self.store.rows), replace=False))
        return torch.from_numpy(self.store.vectors_at(rows)).float().numpy()

    def search(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows (B, K) int64, scores (B, K) float64), best first, ties by row.

        If the index finds fewer than K, the rest have row -1 and score -inf.
        """
        keep = min(topk, self.store.rows)
        with faiss_errors(self.settings.factory):
            found = self.index.search(queries, keep)[1].astype(np.int64)
        return best_first(found, exact_scores(self.store, queries, found), keep)

    def recall(self, queries: np.ndarray, topk: int, device: torch.device, count: int) -> str:
        """Return a log line: the share of the exact top-k that the index finds for `count` of the queries."""
        limits = (count, self.settings.memory_gb, self.settings.seed)
        line = measured_recall(lambda q: self.search(q, topk), self.store, queries, topk, device, *limits)
        return f"index {self.settings.factory}: {line}"


def new_index(factory: str, hidden: int) -> Any:
    """Return an empty index for inner products; UserError for a factory string that faiss does not accept."""
    check_factory(factory)
    faiss = load_faiss()
    try:
        return faiss.index_factory(hidden, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"--index {factory}: not a faiss index of {hidden} dimensions") from error


def set_parameters(index: Any, factory: str, parameters: str) -> None:
    """Set search parameters (nprobe=64,k_factor_rf=10); UserError for one that the index does not have."""
    check_search_params(parameters)
    for parameter in filter(None, parameters.split(",")):
        try:
            load_faiss().ParameterSpace().set_index_parameters(index, parameter)
        except RuntimeError as error:
            raise UserError(
                f"--search_params {parameter}: not a parameter of the index {factory} "
                "(nprobe, efSearch, k_factor_rf, ...)"
            ) from error


def inverted_lists(index: Any) -> int:
    """Return the number of inverted lists, 0 if the index has none."""
    try:
        return load_faiss().extract_index_ivf(index).nlist
    except RuntimeError:
        return 0


def estimate(factory: str, hidden: int, rows: int) -> tuple[int, float]:
    """Return the estimated (bytes, seconds to fill without training) of an index, from a small random one."""
    faiss, index = load_faiss(), new_index(factory, hidden)
    lists, draw = inverted_lists(index), np.random.default_rng(0)
    if lists:
        clustering = faiss.extract_index_ivf(index).cp
        clustering.niter, clustering.min_points_per_centroid = 1, 1
    if lists > rows:
        raise UserError(f"--index {factory}: {lists:,} lists for {rows:,} passages; use fewer")
    sample = draw.standard_normal((max(MIN_TRAINING, 2 * lists), hidden), dtype=np.float32)
    with faiss_errors(factory):
        if not index.is_trained:
            index.train(sample)
        empty = len(faiss.serialize_index(index))
        started = time.perf_counter()
        index.add(sample[:PROBED_VECTORS])
        seconds = (time.perf_counter() - started) / PROBED_VECTORS
        filled = len(faiss.serialize_index(index))
    return empty + rows * (filled - empty) // PROBED_VECTORS, seconds * rows


def check_memory(factory: str, needed: int, available: Callable[[], int] | None = None) -> None:
    """UserError when an index of `needed` bytes does not fit into the free memory."""
    free = (available or free_memory)()
    log(f"index {factory}: about {needed / 1e9:.2f} GB of memory, {free / 1e9:.1f} GB free")
    if needed > 0.9 * free:
        raise UserError(
            f"--index {factory}: needs about {needed / 1e9:.1f} GB of memory ({free / 1e9:.1f} GB are free); "
            "use a smaller index (e.g. IVF4096,PQ192x4fs) or none: exact search needs no memory for it"
        )
