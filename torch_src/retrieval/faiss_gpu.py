"""A faiss index on GPUs: its kind and memory are checked first, it is filled in shards and copied back."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from torch_src.retrieval.index_options import faiss_reason
from torch_src.runtime.devices import USABLE_FRACTION

MAX_SELECTED = 2048  # results, or probed lists, of a query: the limit of faiss on a GPU
FLAT_SHARD_BYTES = 1 << 30  # a flat index moves when it grows, so its last shard takes twice its memory
# Inverted lists are padded to 32 vectors, and their memory is rounded up to a power of two: on average
LIST_PADDING, LIST_SLACK = 16, 1.5
ID_BYTES = 8  # of a vector in an inverted list
TEMPORARY_BYTES, TEMPORARY_FRACTION = 3 << 29, 1 / 16  # faiss's maximum; of the free memory


class IndexGpus:
    """The GPUs of an index. What fails there raises faiss's RuntimeError, also when it is out of memory."""

    def __init__(
        self,
        faiss: Any,
        devices: list[int],
        free_bytes: Callable[[int], int],
        chunk_rows: int,
        spare_bytes: int = 0,
    ):
        """faiss: the module. chunk_rows: vectors added at once. spare_bytes: to leave free on each GPU."""
        self.faiss, self.devices, self.free_bytes = faiss, devices, free_bytes
        self.chunk_rows, self.spare_bytes = chunk_rows, spare_bytes
        self.reported = ""  # the last log line on why an index is not on them

    def unsupported_reason(self, empty: Any, search_params: str, topk: int) -> str:
        """Return why faiss has no GPU version of this empty index or search, "" if it has one."""
        for parameter in filter(None, search_params.split(",")):
            name, _, value = parameter.partition("=")
            if name != "nprobe":
                return f"{name} is not a parameter of a GPU index"
            if int(value) > MAX_SELECTED:
                return f"nprobe={value} (at most {MAX_SELECTED:,} on a GPU)"
        if topk > MAX_SELECTED:
            return f"topk {topk:,} (at most {MAX_SELECTED:,} on a GPU)"
        try:
            self._clone(empty, 0, self._resources(0, pinned=False))
        except RuntimeError as error:
            return faiss_reason(error)
        return ""

    def memory_reason(self, index: Any, rows: int) -> str:
        """Return why an index of `rows` vectors does not fit, "" if it does."""
        needed = self.bytes_needed(index, rows)
        free = min(map(self.free_bytes, self.devices))
        if needed + self.spare_bytes <= USABLE_FRACTION * free:
            return ""
        return f"needs about {needed / 1e9:.1f} GB of each GPU's memory, {free / 1e9:.1f} GB are free"

    def bytes_needed(self, index: Any, rows: int) -> int:
        """Return the bytes that an index of `rows` vectors takes on each GPU while it is filled."""
        shard_rows, per_gpu = self._layout(index, rows)
        lists = self._list_count(index)
        held = min(rows, per_gpu * shard_rows)
        if lists:
            held = int(LIST_SLACK * (held + LIST_PADDING * lists))
        else:
            held += min(rows, shard_rows)
        centroids = 4 * lists * index.d
        return held * self.vector_bytes(index) + centroids + self._temporary_bytes()

    def vector_bytes(self, index: Any) -> int:
        """Return the bytes of a vector on a GPU, which are those on a CPU but for a flat index (fp16)."""
        inner = self._innermost(index)
        return inner.code_size + ID_BYTES if self._list_count(index) else 2 * inner.d

    def saved_bytes(self, index: Any, rows: int) -> int:
        """Return the bytes of the vectors in a copy on the CPU; 0 for a flat index, which needs no copy."""
        return rows * self.vector_bytes(index) if self._list_count(index) else 0

    def train(self, index: Any, sample: np.ndarray) -> None:
        """Train an index of the CPU; the k-means of its inverted lists runs on the first GPU."""
        ivf = self.faiss.extract_index_ivf(index)
        centroids = self.faiss.IndexFlat(ivf.d, ivf.metric_type)
        on_gpu = self._clone(centroids, 0, self._resources(self._temporary_bytes(), pinned=False), fp16=False)
        ivf.clustering_index = on_gpu
        on_gpu.thisown = True  # the assignment cleared it, but the index does not delete it
        try:
            index.train(sample)
        finally:
            ivf.clustering_index = None

    def fill(self, empty: Any, rows: int, chunks: Iterable[tuple[int, np.ndarray]]) -> "GpuIndex":
        """Return an index on the GPUs with the vectors of all chunks; `empty` is trained and stays empty.

        chunks: (first row, vectors (chunk_rows, H) float16) in order, `rows` vectors in all.
        """
        shard_rows, per_gpu = self._layout(empty, rows)
        resources = [self._resources(self._temporary_bytes()) for _ in self.devices]
        shards: list[Any] = []
        for first, chunk in chunks:
            if first % shard_rows == 0:
                gpu = len(shards) // per_gpu
                shards.append(self._clone(empty, gpu, resources[gpu]))
            shards[-1].add(torch.from_numpy(chunk).float().numpy())
        groups = [shards[start : start + per_gpu] for start in range(0, len(shards), per_gpu)]
        return GpuIndex(self, groups, resources, rows * self.vector_bytes(empty))

    def set_parameters(self, shard: Any, parameters: str) -> None:
        self.faiss.GpuParameterSpace().set_index_parameters(self._innermost(shard), parameters)

    def joined(self, shards: list[Any], threaded: bool) -> Any:
        """Return one index over shards with successive rows; several threads must not share a GPU."""
        if len(shards) == 1:
            return shards[0]
        whole = self.faiss.IndexShards(shards[0].d, threaded, True)
        for shard in shards:
            whole.add_shard(shard)
        return whole

    def __str__(self) -> str:
        return "1 GPU" if len(self.devices) == 1 else f"{len(self.devices)} GPUs"

    def _layout(self, index: Any, rows: int) -> tuple[int, int]:
        """Return (rows of a shard, a multiple of chunk_rows; shards of a GPU).

        Inverted lists are one shard per GPU: every shard searches its own centroids.
        """
        shard_rows = math.ceil(rows / len(self.devices))
        if not self._list_count(index):
            shard_rows = min(shard_rows, FLAT_SHARD_BYTES // self.vector_bytes(index))
        shard_rows = max(1, math.ceil(shard_rows / self.chunk_rows)) * self.chunk_rows
        return shard_rows, math.ceil(math.ceil(rows / shard_rows) / len(self.devices))

    def _list_count(self, index: Any) -> int:
        inner = self._innermost(index)
        return inner.nlist if isinstance(inner, self.faiss.IndexIVF) else 0

    def _innermost(self, index: Any) -> Any:
        """Return the index behind linear transforms (OPQ, PCA)."""
        while isinstance(index, self.faiss.IndexPreTransform):
            index = self.faiss.downcast_index(index.index)
        return index

    def _temporary_bytes(self) -> int:
        return min(TEMPORARY_BYTES, int(TEMPORARY_FRACTION * min(map(self.free_bytes, self.devices))))

    def _resources(self, temporary_bytes: int, pinned: bool = True) -> Any:
        """Return faiss's memory and streams. pinned: with 256 MB of host memory for copies, slow to get."""
        resources = self.faiss.StandardGpuResources()
        resources.setTempMemory(temporary_bytes)
        if not pinned:
            resources.setPinnedMemory(0)
        return resources

    def _clone(self, index: Any, gpu: int, resources: Any, fp16: bool = True) -> Any:
        """Return a copy of an index on one GPU, flat vectors and lookup tables in fp16.

        One GPU at a time: faiss's own function for several ends the process when one of them fails.
        """
        options = self.faiss.GpuClonerOptions()
        options.useFloat16, options.use_cuvs = fp16, False
        return self.faiss.index_cpu_to_gpu(resources, self.devices[gpu], index, options)


class GpuIndex:
    """A filled index on GPUs."""

    def __init__(self, gpus: IndexGpus, groups: list[list[Any]], resources: list[Any], size: int):
        """groups: the shards of each GPU, in the order of their rows; size: bytes of all vectors."""
        self.gpus, self.resources, self.size = gpus, resources, size
        self.shards = [shard for group in groups for shard in group]
        self.whole = gpus.joined([gpus.joined(group, threaded=False) for group in groups], threaded=True)

    def search(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores (B, K) float32, rows (B, K) int64); -1 where fewer are found."""
        return self.whole.search(queries, topk)

    def set_parameters(self, parameters: str) -> None:
        for shard in self.shards:
            self.gpus.set_parameters(shard, parameters)

    def to_cpu(self) -> Any:
        """Return an index of the CPU with the vectors of all shards, which must be inverted lists."""
        whole, *others = (self.gpus.faiss.index_gpu_to_cpu(shard) for shard in self.shards)
        for other in others:
            whole.merge_from(other, whole.ntotal)
        return whole
