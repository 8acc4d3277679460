"""Arrays on disk in blocks of rows with a manifest: passage vectors (fp16) and re-ranking scores (fp32)."""

import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write, read_json, write_json
from torch_src.runtime.locks import BlockLocks
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import (
    CODE_VERSION,
    JsonDict,
    changes,
    checksum_json,
    read_checked_json,
    write_checked_json,
)

# Manifest fields that are ignored in a search: queries may be encoded on other hardware.
NOT_COMPARED = ("precision", "device")
# Manifest fields of the collection: when only they change, the vectors of unchanged texts are copied.
COLLECTION_FIELDS = ("collection", "rows", "block_rows")
TEXT_HASH = {"text_hash": "xxh3_128"}  # manifest field of stores whose blocks have hashes of their texts
HASH_BYTES = 16
BLOCK_FILE = re.compile(r"block-[0-9]{5,}\.(npy|json|hashes)")  # and temporary files of these


class DamagedBlock(UserError):
    """A block is missing, has a wrong size, or its checksum does not match; `block` is its number."""

    def __init__(self, path: Path, block: int, reason: str):
        super().__init__(f"{path}: {reason}; delete it and run again")
        self.block, self.reason = block, f"{path}: {reason}"


class VectorStore:
    """A folder of block-00000.npy, block-00001.npy, ... and manifest.json.

    Block b holds the vectors of rows b * block_rows up to (not including) (b + 1) * block_rows, (rows, H)
    float16. Its stamp block-00000.json is written last: without one the block is missing. With the field
    TEXT_HASH in the manifest, block-00000.hashes holds the hashes of the texts, 16 bytes each.
    """

    dtype: np.dtype[Any] = np.dtype(np.float16)

    def __init__(self, folder: str | Path, manifest: JsonDict):
        self.folder = Path(folder)
        self.manifest = manifest
        self.rows: int = manifest["rows"]
        self.hidden: int = manifest["hidden"]
        self.block_rows: int = manifest["block_rows"]
        self.hashed = TEXT_HASH.items() <= manifest.items()
        self.manifest_checksum = checksum_json(manifest)  # in every block's stamp
        self.read_checksum = _ReadChecksum()

    @classmethod
    def create_or_continue(
        cls,
        folder: str | Path,
        stamp: JsonDict,
        rows: int,
        hidden: int,
        block_rows: int,
        log: Callable[[str], None],
        force: bool = False,
        shared: bool = False,
    ) -> "VectorStore":
        """Return the store for these settings; keep its blocks if the manifest agrees, else delete them.

        Blocks of another collection, with hashes, are moved to `previous` (see retrieval.known_vectors).
        UserError instead of deleting vectors that are `shared` by several runs or read by another process.
        """
        store = cls(folder, new_manifest(stamp, rows, hidden, block_rows))
        _StoreFolder(store, log).prepare(force, shared)
        return store

    @classmethod
    def where_complete(cls, folder: str | Path, manifest: JsonDict) -> "VectorStore | None":
        """Return the store in the folder when it has this manifest and all blocks, else None."""
        store = cls(folder, manifest)
        return store if store.is_complete() else None

    @cached_property
    def locks(self) -> BlockLocks:
        """Return this process's locks on the folder; OSError where it cannot be written to."""
        return BlockLocks.of(self.folder)

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def previous(self) -> Path:
        """The folder of the vectors of earlier collections, while this store is incomplete."""
        return self.folder / "previous"

    @property
    def block_count(self) -> int:
        return math.ceil(self.rows / self.block_rows)

    def block_path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.npy"

    def stamp_path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"

    def hashes_path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.hashes"

    def block_range(self, block: int) -> tuple[int, int]:
        """Return the first row of a block and the row after its last."""
        return block * self.block_rows, min(self.rows, (block + 1) * self.block_rows)

    def _shape(self, block: int) -> tuple[int, int]:
        first, end = self.block_range(block)
        return end - first, self.hidden

    def block_stamp(self, block: int) -> JsonDict:
        """Return the stamp of a block; empty when there is none for this manifest."""
        stamp = read_checked_json(self.stamp_path(block)) or {}
        return stamp if stamp.get("manifest") == self.manifest_checksum else {}

    def is_missing(self, block: int) -> bool:
        if not (self.block_stamp(block) and self.block_path(block).exists()):
            return True
        return self.hashed and self.read_hashes(block) is None

    def read_hashes(self, block: int) -> np.ndarray | None:
        """Return the hashes (rows, 16) uint8 of the texts of a block; None when they are damaged."""
        try:
            hashes = np.fromfile(self.hashes_path(block), np.uint8)
        except FileNotFoundError:
            return None
        if len(hashes) != self._shape(block)[0] * HASH_BYTES:
            return None
        hashes = hashes.reshape(-1, HASH_BYTES)
        return hashes if self.block_stamp(block).get("hashes") == _checksum(hashes) else None

    def missing_blocks(self) -> list[int]:
        return [block for block in range(self.block_count) if self.is_missing(block)]

    def changed_fields(self) -> list[str]:
        """Return `field: old -> new` for every field in which manifest.json differs from this manifest."""
        try:
            return changes(read_json(self.manifest_path), self.manifest)
        except UserError:
            return [f"{self.manifest_path.name}: missing or unreadable"]

    def differs_only_in_collection(self, manifest: JsonDict) -> bool:
        """Return whether vectors of another manifest are those of this one where the texts are equal."""
        sizes = [manifest.get("rows"), manifest.get("block_rows")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return False  # damaged
        old, new = (
            {name: value for name, value in fields.items() if name not in COLLECTION_FIELDS}
            for fields in (manifest, self.manifest)
        )
        return self.hashed and "collection" in manifest and not changes(old, new)

    def old_stores(self) -> list["VectorStore"]:
        """Return the stores in `previous` whose vectors are those of this store where the texts are equal."""
        found = []
        for path in sorted(self.previous.glob("*/manifest.json")):
            try:
                manifest = read_json(path)
            except UserError:
                continue
            if self.differs_only_in_collection(manifest):
                found.append(VectorStore(path.parent, manifest))
        return found

    def delete_previous(self) -> None:
        """Delete the vectors of earlier collections once no block is missing."""
        if self.previous.is_dir() and os.access(self.folder, os.W_OK):
            with self.locks.folder():
                if not self.changed_fields() and not self.missing_blocks() and self.previous.is_dir():
                    shutil.rmtree(self.previous)

    def is_complete(self) -> bool:
        """Return whether manifest.json is this manifest and no block is missing."""
        return not self.changed_fields() and not self.missing_blocks()

    def write_block(
        self,
        block: int,
        vectors: np.ndarray,
        settings: JsonDict | None = None,
        hashes: np.ndarray | None = None,
    ) -> None:
        """Write one block, (rows of the block, H) of the store's dtype, then its stamp, each atomically.

        `hashes`: of its texts, (rows, 16) uint8.
        """
        assert vectors.shape == self._shape(block) and vectors.dtype == self.dtype
        assert self.hashed == (hashes is not None)
        if self.changed_fields():
            raise UserError(
                f"{self.folder}: another run with other settings writes to this folder; "
                "use another --output_dir for one of them"
            )
        for path in self.folder.glob(f"block-{block:05d}.*.tmp"):
            path.unlink(missing_ok=True)  # left by a killed process; a lock excludes other writers
        with atomic_write(self.block_path(block), "wb") as file:
            np.save(file, vectors, allow_pickle=False)
        stamp = {**(settings or {}), "manifest": self.manifest_checksum, "vectors": _checksum(vectors)}
        if hashes is not None:
            assert hashes.shape == (len(vectors), HASH_BYTES) and hashes.dtype == np.uint8
            with atomic_write(self.hashes_path(block), "wb") as file:
                file.write(np.ascontiguousarray(hashes).data)
            stamp["hashes"] = _checksum(hashes)
        write_checked_json(self.stamp_path(block), stamp)

    def delete_damaged(self, damage: DamagedBlock, deleted: set[int]) -> None:
        """Delete a damaged block and add it to `deleted`; raise `damage` when it was deleted before."""
        if damage.block in deleted:
            raise damage  # rebuilt and damaged again: the disk or the memory is faulty
        warn(f"{damage.reason}; rebuilding it")
        deleted.add(damage.block)
        with self.locks.folder():
            try:
                self.read_block(damage.block)  # another process may have rebuilt it
            except DamagedBlock:
                self.stamp_path(damage.block).unlink(missing_ok=True)
                self.block_path(damage.block).unlink(missing_ok=True)
                self.hashes_path(damage.block).unlink(missing_ok=True)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors (rows, H), memory-mapped) of every block in order (DamagedBlock)."""
        for block in range(self.block_count):
            yield self.block_range(block)[0], self.read_block(block)

    def read_block(self, block: int) -> np.ndarray:
        """Return the vectors (rows, H) of one block, memory-mapped; DamagedBlock on a checksum mismatch."""
        vectors = self.map_block(block)
        self._compare(block, _checksum(vectors))
        return vectors

    def map_block(self, block: int) -> np.ndarray:
        """Return the vectors (rows, H) of one block, memory-mapped and not compared with the checksum."""
        with self._open(block) as file:
            return np.memmap(file, self.dtype, "r", file.tell(), self._shape(block))

    def read_into(self, first: int, out: np.ndarray) -> None:
        """Fill `out` (rows, H) with the vectors from row `first` on; DamagedBlock on a checksum mismatch.

        A checksum is compared once consecutive calls have read the whole block. Files are read, not
        memory-mapped, to limit resident memory.
        """
        done = 0
        while done < len(out):
            block = (first + done) // self.block_rows
            begin, end = self.block_range(block)
            count = min(len(out) - done, end - (first + done))
            self._read_rows(block, first + done - begin, out[done : done + count])
            done += count

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (n, H) of these rows, in any order, read one by one."""
        out = np.empty((len(rows), self.hidden), dtype=self.dtype)
        order = np.argsort(rows, kind="stable")
        sorted_rows, size = rows[order], self.hidden * self.dtype.itemsize
        for block in range(self.block_count):
            begin, end = self.block_range(block)
            here = range(*np.searchsorted(sorted_rows, [begin, end]).tolist())
            if not here:
                continue
            with self._open(block) as file:
                start = file.tell()
                for at in here:
                    data = os.pread(file.fileno(), size, start + int(sorted_rows[at] - begin) * size)
                    out[order[at]] = np.frombuffer(data, dtype=self.dtype)
        return out

    def _open(self, block: int) -> FileIO:
        """Return a block's file, positioned at its first vector; DamagedBlock unless header and size fit."""
        path, shape = self.block_path(block), self._shape(block)
        header = _npy_header(shape, self.dtype)
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            raise DamagedBlock(path, block, "missing") from None
        size = len(header) + shape[0] * shape[1] * self.dtype.itemsize
        if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != size:
            file.close()
            raise DamagedBlock(path, block, f"damaged (expected an array {shape} {self.dtype})")
        return file

    def _read_rows(self, block: int, first: int, out: np.ndarray) -> None:
        with self._open(block) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            file.seek(first * self.hidden * self.dtype.itemsize, os.SEEK_CUR)
            buffer, filled = out.data.cast("B"), 0
            while filled < len(buffer):
                count = file.readinto(buffer[filled:])
                if not count:
                    raise DamagedBlock(self.block_path(block), block, "truncated")
                filled += count
        checksum = self.read_checksum.add(block, first, out)
        if checksum is not None and first + len(out) == self._shape(block)[0]:
            self._compare(block, checksum)

    def _compare(self, block: int, checksum: str) -> None:
        if self.block_stamp(block).get("vectors") != checksum:
            raise DamagedBlock(self.block_path(block), block, "checksum mismatch")


class ScoreStore(VectorStore):
    """Blocks of logits (pairs, 1) float32."""

    dtype: np.dtype[Any] = np.dtype(np.float32)


class MemoryVectors(VectorStore):
    """Vectors (N, H) float16 in memory, of passages that belong to no folder."""

    def __init__(self, vectors: np.ndarray):
        self.vectors, (self.rows, self.hidden) = vectors, vectors.shape
        self.block_rows = self.rows

    def read_into(self, first: int, out: np.ndarray) -> None:
        out[:] = self.vectors[first : first + len(out)]


class _ReadChecksum:
    """Running checksum of a block that several calls read in order."""

    def __init__(self) -> None:
        self.block, self.next_row, self.digest = -1, 0, xxhash.xxh3_64()

    def add(self, block: int, first: int, rows: np.ndarray) -> str | None:
        """Return the checksum of the block up to these rows; None when earlier rows were not read."""
        if first == 0:
            self.block, self.next_row, self.digest = block, 0, xxhash.xxh3_64()
        if (block, first) != (self.block, self.next_row):
            return None
        self.digest.update(rows.data)
        self.next_row += len(rows)
        return self.digest.hexdigest()


class _StoreFolder:
    """The folder of a store before its first use: blocks of this run are kept, all others deleted."""

    def __init__(self, store: VectorStore, log: Callable[[str], None]):
        self.store, self.folder, self.log = store, store.folder, log

    def prepare(self, force: bool, shared: bool) -> None:
        """Remove blocks of other runs and take the read lock; a complete folder may be read-only."""
        try:
            locks = self.store.locks
        except OSError as error:
            read_only = error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not force
            if read_only and self.store.is_complete():
                return
            raise
        with locks.folder():
            self._keep_or_empty(force, shared)
            locks.read()

    def _keep_or_empty(self, force: bool, shared: bool) -> None:
        """Keep the blocks of this run; delete the others, unless they are shared or in use (UserError)."""
        path = self.store.manifest_path
        blocks = sorted(found for found in self.folder.glob("block-*") if BLOCK_FILE.match(found.name))
        if not blocks:
            self._require_own_manifest()
        changed = self.store.changed_fields()
        if not changed and not force:
            return
        if not force and self._all_stamps_agree():
            self.log(f"{path}: damaged; rewriting it and keeping the blocks of this run")
            write_json(path, self.store.manifest)
            return
        reason = "--force" if force else "; ".join(changed)
        if blocks or (path.exists() and not force):
            self._require_unused(reason, shared and not force)
        if not force and self._move_to_previous(blocks):
            self.log(
                f"{self.folder}: the collection changed ({reason}); the vectors of unchanged texts are copied"
            )
        else:
            if blocks or (path.exists() and not force):
                self.log(f"{self.folder}: deleting the vectors of another run ({reason})")
            path.unlink(missing_ok=True)  # first: blocks without a manifest are never used
            for block in blocks:
                block.unlink(missing_ok=True)
            if self.store.previous.is_dir() and (force or not self.store.old_stores()):
                shutil.rmtree(self.store.previous)
        write_json(path, self.store.manifest)

    def _move_to_previous(self, blocks: list[Path]) -> bool:
        """Move the blocks of an earlier collection to `previous`; False when they have other settings.

        A run that is killed before the new manifest is written repeats this.
        """
        try:
            manifest = read_json(self.store.manifest_path)
        except UserError:
            return False
        if not self.store.differs_only_in_collection(manifest):
            return False
        folder = self.store.previous / checksum_json(manifest)
        write_json(folder / "manifest.json", manifest)
        for block in blocks:
            if block.suffix == ".tmp":
                block.unlink(missing_ok=True)
            else:
                os.replace(block, folder / block.name)
        return True

    def _require_own_manifest(self) -> None:
        """UserError when manifest.json is readable, but not of vectors: another program wrote it."""
        try:
            manifest = read_json(self.store.manifest_path)
        except UserError:
            return  # missing or damaged
        if "block_rows" not in manifest:
            raise UserError(f"{self.store.manifest_path}: not a manifest of vectors; use another folder")

    def _all_stamps_agree(self) -> bool:
        """Return whether there are block stamps, all of this manifest."""
        stamps = filter(None, map(read_checked_json, self.folder.glob("block-*.json")))
        return {stamp.get("manifest") for stamp in stamps} == {self.store.manifest_checksum}

    def _require_unused(self, reason: str, shared: bool) -> None:
        if shared:
            raise UserError(
                f"{self.folder}: the vectors belong to another run ({reason}); "
                "name another folder (--para_emb), or pass --force to replace them"
            )
        if not self.store.locks.only_reader():
            raise UserError(
                f"{self.folder}: another run reads the vectors, and this one would replace them ({reason}); "
                "wait until it ends, or use another --output_dir"
            )


def new_manifest(stamp: JsonDict, rows: int, hidden: int, block_rows: int) -> JsonDict:
    """Return the manifest of vectors that were made from `stamp`."""
    return {**stamp, "rows": rows, "hidden": hidden, "block_rows": block_rows, "code": CODE_VERSION}


def save_vectors(path: str | Path, vectors: np.ndarray) -> None:
    """Write one array of vectors (query.emb.npy) atomically."""
    with atomic_write(path, "wb") as file:
        np.save(file, vectors, allow_pickle=False)


def _checksum(vectors: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(vectors).data)


def _npy_header(shape: tuple[int, int], dtype: np.dtype) -> bytes:
    """Return the header that np.save writes; it is compared as bytes, because numpy parses it as Python."""
    header = BytesIO()
    entries = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, entries)
    return header.getvalue()
