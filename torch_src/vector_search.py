"""Search in passage vectors, exact or by the index of an output folder; vectors in memory or on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.retrieval.chunks import DeviceCache
from torch_src.retrieval.faiss_index import INDEX, FaissSearch, IndexSettings, index_gpus
from torch_src.retrieval.passage_windows import PassageWindows
from torch_src.retrieval.score_bounds import Float16, Float32
from torch_src.retrieval.search import search
from torch_src.retrieval.vectors import MemoryVectors, VectorStore
from torch_src.runtime.devices import search_devices
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.stamps import read_stamp

INDEX_TOPK = 50  # that an index is opened for


class OtherVectors(UserError):
    """The vectors in a folder are of other weights, settings or passages; `details` says which."""

    def __init__(self, folder: str, details: str):
        what = f"vectors of other weights, settings or passages ({details})"
        super().__init__(f"{folder}: {what}; run do_dual_infer.py again")
        self.details = details


class ReplacedVectors(UserError):
    """The vectors were replaced since they were opened."""


class VectorSearch:
    """Finds the rows of the best vectors for query vectors. Not for several threads at once."""

    def __init__(
        self,
        hp: InferenceDeHparams,
        store: VectorStore,
        device: torch.device,
        windows: PassageWindows | None = None,
    ):
        """UserError where --index names an index that is missing or of other settings.

        windows: of passages, which are the results where the vectors are windows.
        """
        self.hp, self.store, self.windows = hp, store, windows
        self.in_memory = isinstance(store, MemoryVectors)
        self.devices = search_devices(hp.device, device)
        self.cache: DeviceCache | None = None
        self.index = None if self.in_memory or not hp.index else self._open_index()
        if self.index is None and not (self.in_memory and device.type == "cpu"):
            self.cache = DeviceCache.if_it_fits(store, self.devices, hp.search_memory_gb)

    @property
    def how(self) -> str:
        """One line about the kind of search."""
        windows = f" ({self.windows.rows:,} windows)" if self.windows else ""
        if self.index:
            return f"approximate search ({self.hp.index}){windows}"
        is_kept = self.cache or self.in_memory
        place = "kept in memory" if is_kept else "read from disk for every question"
        return f"exact search, {self._amount} of vectors{windows} {place}"

    @property
    def how_zh(self) -> str:
        windows = f"（{self.windows.rows:,} 个窗口）" if self.windows else ""
        if self.index:
            return f"近似检索（{self.hp.index}）{windows}"
        return f"精确检索，向量 {self._amount}{windows}，{'已放进内存' if self.cache else '每次从硬盘读取'}"

    @property
    def _amount(self) -> str:
        mb = self.store.rows * self.store.hidden * 2 / 1e6
        return f"{mb / 1000:,.1f} GB" if mb >= 1000 else f"{mb:,.1f} MB"

    def find(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows (N, K) int64, -1 where an index found fewer; scores (N, K) float64), best first.

        queries: (N, H) float32. ReplacedVectors when the vectors on disk were replaced.
        """
        if self.in_memory:
            return self._find(queries, topk)
        with self._same_vectors():
            return self._find(queries, topk)

    def _find(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        if self.index:
            return self.index.search(queries, topk)
        # without a conversion of the passages, which takes longer than the product of few queries
        kind = Float16.name if self.devices[0].type == "cuda" else Float32.name
        how = (self.devices, kind)
        return search(self.store, queries, topk, *how, cache=self.cache, windows=self.windows)[:2]

    @contextmanager
    def _same_vectors(self) -> Iterator[None]:
        """ReplacedVectors unless the manifest on disk is the one that was opened, before and after a search.

        Nothing locks the vectors: do_dual_infer.py may replace them at any time, with those of other weights
        than the model in memory. Checked also after an error: a missing file may mean replaced vectors.
        """
        self._check_manifest()
        try:
            yield
        finally:
            self._check_manifest()

    def _check_manifest(self) -> None:
        try:
            same = read_json(self.store.manifest_path) == self.store.manifest
        except UserError:  # missing, while the vectors are replaced
            same = False
        if not same:
            raise ReplacedVectors(f"{self.store.folder}: the vectors were replaced; load them again")

    def _open_index(self) -> FaissSearch:
        """Return the index that do_dual_infer.py wrote; UserError when it is missing or of other settings."""
        hp, path = self.hp, Path(self.hp.output_dir) / INDEX
        stamp = read_stamp(path) or {}
        memory_gb, seed = stamp.get("memory_gb", 0.0), stamp.get("seed", 0)
        topk = hp.topk or INDEX_TOPK
        depth = topk if self.windows is None else self.windows.first_depth(topk)
        settings = IndexSettings(hp.index, hp.search_params, memory_gb, seed, depth)
        stamp, gpus = {**self.store.manifest, "stage": "index"}, index_gpus(self.devices)
        return FaissSearch(self.store, settings, path, stamp, build=False, gpus=gpus, windows=self.windows)
