"""Chunks of vectors on their way from the disk to the devices of a search, and vectors that stay there."""

import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeVar

import numpy as np
import torch

from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import USABLE_FRACTION, available_gpu_memory, free_memory
from torch_src.runtime.prefetch import one_ahead

BUFFERS = 2  # chunks in host memory for each device: one is used, or copied to a GPU, while the next is read
CACHE_FRACTION = 0.4  # of a GPU's free memory for cached vectors, at most; a search takes half of it
CHECK_ROWS = 16384  # vectors read at once to verify checksums

Chunk = tuple[int, torch.Tensor]  # first row, vectors (C, H) float16 on a device


class ChunkReader:
    """Reads a store once, in order, for one or several devices, which take chunks when they are ready."""

    def __init__(self, store: VectorStore, rows: int):
        """rows: of a chunk."""
        self.store, self.rows = store, min(rows, store.rows)
        self.next, self.lock = 0, threading.Lock()

    def chunks(self, device: torch.device, keep: bool = False, buffers: int = BUFFERS) -> Iterator[Chunk]:
        """Yield the chunks that `device` takes, in the order of their rows; a thread reads one ahead.

        The memory of a chunk is reused after `buffers` - 1 more chunks, unless `keep`.
        """
        if device.type == "cuda":
            return _GpuChunks(self, device).chunks()
        memory = [] if keep else [self.new_buffer() for _ in range(buffers)]

        def read(at: int) -> Chunk | None:
            return self.read_into(self.new_buffer() if keep else memory[at % buffers])

        return _until_none(read)

    def new_buffer(self, pinned: bool = False) -> torch.Tensor:
        """Return memory for a chunk, (C, H) float16."""
        return torch.empty((self.rows, self.store.hidden), dtype=torch.float16, pin_memory=pinned)

    def read_into(self, buffer: torch.Tensor) -> Chunk | None:
        """Read the next chunk into a buffer; None after the last (DamagedBlock on a checksum mismatch)."""
        with self.lock:  # the store verifies checksums only where rows are read in order
            first, self.next = self.next, min(self.next + self.rows, self.store.rows)
            chunk = buffer[: self.next - first]
            if not len(chunk):
                return None
            self.store.read_into(first, chunk.numpy())
        return first, chunk


class _GpuChunks:
    """The chunks of a GPU: each is copied from pinned memory while the GPU computes on the one before it."""

    def __init__(self, reader: ChunkReader, device: torch.device):
        self.reader, self.device = reader, device
        self.buffers = [reader.new_buffer(pinned=True) for _ in range(BUFFERS)]
        self.copying, self.copied = torch.cuda.Stream(device), [torch.cuda.Event() for _ in self.buffers]

    def chunks(self) -> Iterator[Chunk]:
        """Yield (first row, vectors (C, H) on the GPU, in memory of their own)."""
        for first, vectors, copied in _until_none(self._read):
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            vectors.record_stream(computing)  # frees the memory only after the kernels that use it
            yield first, vectors

    def _read(self, at: int) -> tuple[int, torch.Tensor, torch.cuda.Event] | None:
        """Read the next chunk and start its copy, in the reading thread."""
        buffer, copied = self.buffers[at % BUFFERS], self.copied[at % BUFFERS]
        copied.synchronize()  # the last copy from this buffer
        if (chunk := self.reader.read_into(buffer)) is None:
            return None
        first, vectors = chunk
        with torch.cuda.stream(self.copying):
            on_gpu = vectors.to(self.device, non_blocking=True)
            copied.record()
        return first, on_gpu, copied


Item = TypeVar("Item")


def _until_none(read: Callable[[int], Item | None]) -> Iterator[Item]:
    """Yield read(0), read(1), ... until one is None; a thread reads one ahead."""
    for item in one_ahead(read, count()):
        if item is None:
            return
        yield item


def read_chunks(store: VectorStore, rows: int, buffers: int = BUFFERS) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, vectors (rows, H) float16), reading one chunk ahead.

    The memory of a chunk is reused after `buffers` - 1 more chunks.
    """
    for first, chunk in ChunkReader(store, rows).chunks(torch.device("cpu"), buffers=buffers):
        yield first, chunk.numpy()


def check_blocks(store: VectorStore) -> None:
    """Read every block in order, which verifies its checksum (DamagedBlock)."""
    for _ in read_chunks(store, CHECK_ROWS):
        pass


class DeviceCache:
    """Vectors that stay on their devices from one search to the next."""

    def __init__(self, devices: list[torch.device]):
        self.chunks: list[list[Chunk]] = [[] for _ in devices]
        self.complete = False

    @classmethod
    def if_it_fits(
        cls, store: VectorStore, devices: list[torch.device], memory_gb: float = 0.0
    ) -> "DeviceCache | None":
        """Return a cache on the GPUs, or on a CPU within `memory_gb`; None when the vectors are too large."""
        size = store.rows * store.hidden * 2 / len(devices)
        return cls(devices) if all(size < _cache_room(device, memory_gb) for device in devices) else None

    def keep(self, at: int, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yield the chunks of device number `at`, and keep them."""
        self.chunks[at].clear()  # left by a search that failed
        for chunk in chunks:
            self.chunks[at].append(chunk)
            yield chunk

    def split(self, at: int, rows: int) -> Iterator[Chunk]:
        """Yield the vectors of device number `at`, in chunks of at most `rows`."""
        for first, chunk in self.chunks[at]:
            for start in range(0, len(chunk), rows):
                yield first + start, chunk[start : start + rows]


def _cache_room(device: torch.device, memory_gb: float) -> float:
    """Return the bytes that cached vectors may take."""
    if device.type == "cuda":
        return CACHE_FRACTION * available_gpu_memory(device)
    return min(memory_gb * 1e9, USABLE_FRACTION * free_memory())
