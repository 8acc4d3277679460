"""Vectors of an earlier state of a collection: those of unchanged texts are copied instead of encoded.

When only the collection changes, its old blocks are moved to the folder previous/CHECKSUM (of their manifest)
beside the new ones, and deleted when the new store is complete. previous/rows-CHECKSUM.bin has for each new
row (int64) its row in the old stores, or -1.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from torch_src.retrieval.vectors import DamagedBlock, VectorStore
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import checksum_text

SORTED_AT_ONCE = 1 << 20  # hashes
Hashes = Callable[[int, int], np.ndarray]  # (first row, last row + 1) -> (n, 16) uint8


class KnownVectors:
    """For each row of a store, its row in the old stores (one after the other), or -1."""

    def __init__(self, store: VectorStore, sources: list[VectorStore], rows: np.ndarray | None):
        self.store, self.sources, self.rows = store, sources, rows
        self.starts: list[int] = np.cumsum([0, *(source.rows for source in sources)]).tolist()
        self.usable: dict[tuple[int, int], bool] = {}  # (source, block): its checksums agree

    @classmethod
    def of(cls, store: VectorStore, hashes: Hashes) -> "KnownVectors":
        """Return the known vectors of the texts with these hashes; one process looks them up for all."""
        if not store.previous.is_dir():
            return cls(store, [], None)
        with store.locks.folder():
            sources = store.old_stores()
            names = [store.manifest_checksum, *(source.manifest_checksum for source in sources)]
            path = store.previous / f"rows-{checksum_text(' '.join(names))}.bin"
            if not sources:
                return cls(store, [], None)
            if not path.exists() or path.stat().st_size != 8 * store.rows:
                _look_up(store, sources, hashes, path)
        return cls(store, sources, np.memmap(path, np.int64, "r"))

    def count(self, blocks: list[int]) -> int:
        """Return the number of rows of these blocks that have a known vector."""
        if self.rows is None:
            return 0
        ranges = map(self.store.block_range, blocks)
        return sum(int(np.count_nonzero(self.rows[first:last] >= 0)) for first, last in ranges)

    def rows_of(self, block: int, hashes: np.ndarray | None) -> np.ndarray:
        """Return the rows (n,) int64 in the old stores of a block's vectors; -1 for those to encode.

        `hashes` (n, 16) uint8: of the texts of the block.

        An old block with a checksum mismatch is not used.
        """
        first, last = self.store.block_range(block)
        if self.rows is None or hashes is None:
            return np.full(last - first, -1)
        rows = np.array(self.rows[first:last])
        rows[rows >= self.starts[-1]] = -1
        for source, old_block, here, within in self._by_block(rows):
            if not self._is_usable(source, old_block):
                rows[here] = -1
                continue
            found = self.sources[source].read_hashes(old_block)
            assert found is not None
            rows[here[(found[within] != hashes[here]).any(axis=1)]] = -1  # the file of rows is damaged
        return rows

    def copy(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Set out[i] (n, H) to the old vector rows[i], where that is not -1."""
        for source, block, here, within in self._by_block(rows):
            out[here] = self.sources[source].map_block(block)[within]

    def _by_block(self, rows: np.ndarray) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """Return (source, its block, positions in `rows`, rows within the block) of all that are not -1."""
        groups = []
        for number, source in enumerate(self.sources):
            here = np.flatnonzero((rows >= self.starts[number]) & (rows < self.starts[number + 1]))
            blocks, within = np.divmod(rows[here] - self.starts[number], source.block_rows)
            for block in np.unique(blocks).tolist():
                groups.append((number, block, here[blocks == block], within[blocks == block]))
        return groups

    def _is_usable(self, source: int, block: int) -> bool:
        if (source, block) not in self.usable:
            store = self.sources[source]
            try:
                store.read_block(block)
                self.usable[source, block] = store.read_hashes(block) is not None
            except DamagedBlock as damage:
                self.usable[source, block] = False
                warn(f"{damage.reason}; its vectors are not copied")
        return self.usable[source, block]


def _look_up(store: VectorStore, sources: list[VectorStore], hashes: Hashes, path: Path) -> None:
    """Write the rows (N,) int64 of the texts of `store` in the sources, -1 for an unknown text."""
    table = _sorted_hashes(sources, store.previous / "hashes.npy")
    with atomic_write(path, "wb") as file:
        for block in range(store.block_count):
            file.write(_find(table, hashes(*store.block_range(block))).tobytes())
    (store.previous / "hashes.npy").unlink()


def _sorted_hashes(sources: list[VectorStore], path: Path) -> np.ndarray:
    """Return (3, N) uint64 on disk, sorted by the first row: two halves of a hash, and its row.

    Each pass over the sources sorts one range of the hashes, so that memory does not depend on N.
    """
    starts = np.cumsum([0, *(source.rows for source in sources)]).tolist()
    blocks = []
    for source, start in zip(sources, starts, strict=False):
        for block in range(source.block_count):
            if not source.is_missing(block):
                blocks.append((source, block, start + source.block_range(block)[0]))
            elif source.block_stamp(block):
                warn(f"{source.hashes_path(block)}: checksum mismatch; its vectors are not copied")
    total = sum(source.block_range(block)[1] - source.block_range(block)[0] for source, block, _ in blocks)
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint64, shape=(3, total))
    passes, done = max(1, math.ceil(total / SORTED_AT_ONCE)), 0
    for number in range(passes):
        columns = [np.empty((3, 0), dtype=np.uint64)]
        for source, block, first in blocks:
            found = source.read_hashes(block)
            assert found is not None  # the folder is locked
            high, low = found.view("<u8").T
            here = np.flatnonzero((high >> np.uint64(32)) * np.uint64(passes) >> np.uint64(32) == number)
            columns.append(np.stack([high[here], low[here], (first + here).astype(np.uint64)]))
        part = np.concatenate(columns, axis=1)
        part = part[:, np.argsort(part[0], kind="stable")]
        table[:, done : done + part.shape[1]] = part
        done += part.shape[1]
    return table


def _find(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return the row (n,) int64 of each hash (n, 16) uint8 in a table of _sorted_hashes, or -1."""
    rows = np.full(len(hashes), -1, dtype=np.int64)
    if not table.shape[1]:
        return rows
    high, low = np.ascontiguousarray(hashes).view("<u8").T
    at = np.minimum(np.searchsorted(table[0], high), table.shape[1] - 1)
    same = (table[0][at] == high) & (table[1][at] == low)
    rows[same] = table[2][at[same]]
    return rows
