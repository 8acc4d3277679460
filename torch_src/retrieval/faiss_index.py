"""Search with a faiss index, on GPUs or the CPU: trained on a sample, filled from blocks, kept on disk."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_src.retrieval.chunks import check_blocks, read_chunks
from torch_src.retrieval.faiss_gpu import MAX_SELECTED, GpuIndex, IndexGpus
from torch_src.retrieval.index_options import check_factory, check_search_params, faiss_errors, faiss_reason
from torch_src.retrieval.passage_windows import PassageWindows
from torch_src.retrieval.search import best_first, exact_scores, measured_recall
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import USABLE_FRACTION, free_memory
from torch_src.runtime.errors import UserError, is_out_of_memory
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import duration, log, warn
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
    except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA libraries raises the latter
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
    topk: int = 0  # the most results of a query; 0: not known


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
        gpus: IndexGpus | None = None,
        windows: PassageWindows | None = None,
    ):
        """Read the index at `path` when its stamp agrees, else build it (UserError without `build`).

        The index is held on the GPUs, or by the CPU where they cannot hold it. A file written on a GPU may
        lack the vectors (see _save_from_gpus), which are then added again.
        UserError for a malformed factory string or parameter, and when the index does not fit into memory.
        windows: of passages, which are the results where the vectors are windows.
        """
        self.windows = windows
        self.store, self.settings, self.path, self.faiss = store, settings, path, load_faiss()
        stamp = {**stamp, "factory": settings.factory, "seed": settings.seed, "memory_gb": settings.memory_gb}
        self.stamp, self.build = stamp, build
        old = None if force else read_stamp(path)
        different = [] if old is None else changes(old, stamp)
        if old is not None and not different and not is_intact(path):
            different = ["checksum mismatch"]
        is_current = old is not None and not different
        if not is_current and not build:
            reason = "; ".join(different) or "no finished index"
            raise UserError(f"{path}: {reason}; run do_dual_infer.py --index '{settings.factory}'")
        if is_current:
            log(f"{path}: up to date")
        elif different:
            log(f"{path}: out of date ({'; '.join(different)}); rebuilding it")
        self.training_gpus, self.gpus = gpus, usable_gpus(gpus, settings, store.hidden, store.rows)
        index = self._on_gpus(is_current) if self.gpus else None
        self.index: Any = self._on_cpu(is_current) if index is None else index
        set_parameters(self.index, settings.factory, settings.search_params)

    def _read(self) -> Any:
        """Return the index at `path`; UserError unless it has the vectors of the store, or none."""
        try:
            index = self.faiss.read_index(str(self.path))
        except RuntimeError as error:
            raise UserError(f"{self.path}: cannot be read as an index; delete it and run again") from error
        if index.ntotal not in (0, self.store.rows) or index.d != self.store.hidden:
            found = f"has {index.ntotal:,} vectors (expected {self.store.rows:,})"
            raise UserError(f"{self.path}: {found}; delete it and run again")
        return index

    def _on_gpus(self, is_current: bool) -> GpuIndex | None:
        """Return the index on the GPUs, after saving it if it is new; None when they run out of memory."""
        assert self.gpus is not None
        started, factory = time.monotonic(), self.settings.factory
        index = self._read() if is_current else self._trained()
        index.reset()  # it stays trained: adding the vectors again is as fast as copying them
        chunks = read_chunks(self.store, self.gpus.chunk_rows, buffers=3)
        try:
            with faiss_errors(factory):
                filled = self.gpus.fill(index, self.store.rows, chunks)
        except RuntimeError as error:  # out of memory: any other became a UserError
            warn(f"index {factory}: on the CPU (out of GPU memory: {faiss_reason(error)})")
            return None
        size = f"{filled.size / 1e9:.2f} GB"
        log(f"index {factory} on {self.gpus}: {size}, in {duration(time.monotonic() - started)}")
        if not is_current:
            self._save_from_gpus(index, filled)
        return filled

    def _save_from_gpus(self, trained: Any, filled: GpuIndex) -> None:
        """Save a copy of the index; without its vectors if it is flat, or too large for the host's memory.

        A run reads all blocks anyway, so it adds them again as fast as it would read a copy.
        """
        started, free = time.monotonic(), free_memory()
        reason = f"a copy needs {filled.size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        if not inverted_lists(trained):
            reason = "flat index"
        elif filled.size <= USABLE_FRACTION * free:
            return self._save(filled.to_cpu(), started)
        log(
            f"{self.path}: saved without vectors; each run adds them from {self.store.folder} "
            f"(reason: {reason})"
        )
        self._save(trained, started)

    def _on_cpu(self, is_current: bool) -> Any:
        """Return the index on the CPU, after saving it if it is new."""
        index = self._read() if is_current else None
        if index is not None and index.ntotal:
            check_blocks(self.store)
            return index
        factory, started = self.settings.factory, time.monotonic()
        check_memory(factory, estimate(factory, self.store.hidden, self.store.rows)[0])
        if index is None:
            index = self._trained()
        for _, chunk in read_chunks(self.store, FILL_ROWS, buffers=3):
            with faiss_errors(factory):
                index.add(torch.from_numpy(chunk).float().numpy())
        if self.build:
            self._save(index, started)
        return index

    def _save(self, index: Any, started: float) -> None:
        """Write the index, then its stamp, and log the time since `started`."""
        clear_stamp(self.path)
        with atomic_write(self.path, "wb") as file:
            try:
                self.faiss.write_index(index, file.name)
            except RuntimeError as error:
                raise UserError(f"{self.path}: cannot be written; check the free disk space") from error
        write_stamp(self.path, self.stamp)
        size = os.path.getsize(self.path) / 1e9
        log(f"wrote {self.path} ({size:.2f} GB) in {duration(time.monotonic() - started)}")

    def _trained(self) -> Any:
        """Return an empty trained index; the k-means of inverted lists runs on a GPU where there is one."""
        index = new_index(self.settings.factory, self.store.hidden)
        if index.is_trained:
            return index
        sample = self._sample(index)
        log(f"index {self.settings.factory}: training on {len(sample):,} vectors")
        try:
            self._train(index, sample)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1][-200:]
            raise UserError(
                f"--index {self.settings.factory}: cannot be trained on {len(sample):,} vectors ({reason})"
            ) from error
        return index

    def _train(self, index: Any, sample: np.ndarray) -> None:
        if self.training_gpus and inverted_lists(index):
            try:
                return self.training_gpus.train(index, sample)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                warn(f"index {self.settings.factory}: training on the CPU, the GPU is out of memory")
        index.train(sample)

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
        if self.windows is None:
            return self._search_rows(queries, topk)
        most = MAX_SELECTED if isinstance(self.index, GpuIndex) else None
        return self.windows.search(self._search_deep, queries, topk, most)

    def _search_deep(self, queries: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the result of search for many vector rows: HNSW finds no more than its efSearch."""
        settings = self.settings
        if any(part.startswith("HNSW") for part in settings.factory.split(",")):
            given = re.search(r"\befSearch=(\d+)", settings.search_params)
            wide = max(depth, int(given[1]) if given else 0)
            set_parameters(self.index, settings.factory, f"efSearch={wide}")
        return self._search_rows(queries, depth)

    def _search_rows(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the result of search, of vector rows."""
        keep = min(topk, self.store.rows)
        with faiss_errors(self.settings.factory):
            found = self.index.search(queries, keep)[1].astype(np.int64)
        return best_first(found, exact_scores(self.store, queries, found), keep)

    def recall(self, queries: np.ndarray, topk: int, device: torch.device, count: int) -> str:
        """Return a log line: the share of the exact top-k that the index finds for `count` of the queries."""
        limits = (count, self.settings.memory_gb, self.settings.seed)
        line = measured_recall(
            lambda q: self.search(q, topk), self.store, queries, topk, device, *limits, self.windows
        )
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
            if isinstance(index, GpuIndex):
                index.set_parameters(parameter)
            else:
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


def check_lists(factory: str, lists: int, rows: int) -> None:
    """UserError for more inverted lists than passages."""
    if lists > rows:
        raise UserError(f"--index {factory}: {lists:,} lists for {rows:,} passages; use fewer")


def estimate(factory: str, hidden: int, rows: int) -> tuple[int, float]:
    """Return the estimated (bytes, seconds to fill without training) of an index, from a small random one."""
    faiss, index = load_faiss(), new_index(factory, hidden)
    lists, draw = inverted_lists(index), np.random.default_rng(0)
    if lists:
        clustering = faiss.extract_index_ivf(index).cp
        clustering.niter, clustering.min_points_per_centroid = 1, 1
    check_lists(factory, lists, rows)
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
    if needed > USABLE_FRACTION * free:
        raise UserError(
            f"--index {factory}: needs about {needed / 1e9:.1f} GB of memory ({free / 1e9:.1f} GB are free); "
            "use a smaller index (e.g. IVF4096,PQ192x4fs) or none: exact search needs no memory for it"
        )


def index_gpus(devices: list[torch.device], spare_gb: float = 0.0) -> IndexGpus | None:
    """Return the GPUs for an index, which leaves `spare_gb` of each free.

    Return None on a CPU or with a faiss without GPU support.
    """
    if devices[0].type != "cuda":
        return None
    faiss = load_faiss()
    if not getattr(faiss, "get_num_gpus", int)():
        log("faiss finds no GPU (faiss-cpu, or a build for another CUDA): an index stays on the CPU")
        return None
    numbers = [device.index or 0 for device in devices]
    # not free_gpu_memory: faiss cannot use the memory that torch has reserved
    return IndexGpus(
        faiss, numbers, lambda gpu: torch.cuda.mem_get_info(gpu)[0], FILL_ROWS, int(spare_gb * 1e9)
    )


def usable_gpus(gpus: IndexGpus | None, settings: IndexSettings, hidden: int, rows: int) -> IndexGpus | None:
    """Return `gpus` if they can hold the index; else log why not, once, and return None."""
    if gpus is None:
        return None
    empty, factory = new_index(settings.factory, hidden), settings.factory
    check_search_params(settings.search_params)
    check_lists(factory, inverted_lists(empty), rows)
    if reason := gpus.unsupported_reason(empty, settings.search_params, min(settings.topk, rows)):
        report = log
    elif reason := gpus.memory_reason(empty, rows):
        report = warn
    else:
        return gpus
    line = f"index {factory}: on the CPU ({reason})"
    if line != gpus.reported:
        report(line)
    gpus.reported = line
    return None
