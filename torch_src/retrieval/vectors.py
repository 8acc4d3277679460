"""Arrays on disk in blocks of rows with a manifest: passage vectors (fp16) and re-ranking scores (fp32)."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from torch_src.runtime.claims import Claims, Hold
from torch_src.runtime.errors import DAMAGE, UserError
from torch_src.runtime.files import atomic_write, read_json, write_json
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import CODE_VERSION, changes, record_seal, seal_holds, sealed

NO_MATTER = ("precision", "device")  # to a search: another machine may encode the query


class DamagedBlock(UserError):
    """A block whose bytes are not those that were written; `block` is its number."""

    def __init__(self, path: Path, block: int, what: str):
        super().__init__(f"{path}: {what}; delete it and run again")
        self.block, self.what = block, f"{path}: {what}"


class VectorStore:
    """A folder of block-00000.npy, block-00001.npy, ... and manifest.json.

    Block b holds the vectors of rows b * block_rows up to (not including) (b + 1) * block_rows, (rows, H)
    float16. Whoever encodes a block, its bytes are the same.
    """

    dtype = np.dtype(np.float16)

    def __init__(self, folder, manifest: dict):
        self.folder = Path(folder)
        self.manifest = manifest
        self.rows: int = manifest["rows"]
        self.hidden: int = manifest["hidden"]
        self.block_rows: int = manifest["block_rows"]
        self.identity = record_seal(manifest)  # stands in every block's note: no other run's block is taken
        self.reading: tuple = (-1, 0, None)  # block, rows of it read in order so far, their checksum
        self.hold: Hold | None = None  # against a run that would make other vectors here
        self.begins: dict[int, int] = {}  # {block that is being read: where its vectors begin}

    @classmethod
    def create_or_continue(
        cls, folder, stamp: dict, rows: int, hidden: int, block_rows: int, log, force=False, shared=False
    ):
        """Return the store for these settings: its finished blocks are kept when the manifest agrees.

        A manifest that disagrees means other vectors: every block is deleted and `say` is told which field
        changed. Blocks that are `shared` with other runs are refused instead (UserError).
        """
        manifest = new_manifest(stamp, rows, hidden, block_rows)
        store = cls(folder, manifest)
        try:
            claims = Claims(folder)
            store.hold = Hold.of(folder)
        except OSError as error:
            readable = error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not force
            if (
                readable
                and not changes(_old_manifest(store.manifest_path), manifest)
                and not store.missing_blocks()
            ):
                return store  # of others, complete, and not ours to write to
            raise
        try:
            with claims.whole_folder():
                store._keep_or_empty(manifest, log, force, shared)
                store.hold.together()
        finally:
            claims.close()
        return store

    @classmethod
    def where_complete(cls, folder, manifest: dict):
        """Return the store in the folder when it is whole and of this manifest, else None."""
        store = cls(folder, manifest)
        same = not changes(_old_manifest(store.manifest_path), manifest)
        return store if same and not store.missing_blocks() else None

    def _keep_or_empty(self, manifest: dict, log, force: bool, shared: bool) -> None:
        path, folder = self.manifest_path, self.folder
        blocks = sorted(folder.glob("block-*"))
        different = changes(_old_manifest(path), manifest)
        if not different and not force:
            return
        if not force and self._notes_are_of_this_run():
            # who makes other vectors here takes these away first: it is the manifest that is damaged
            log(f"{path}: not what was written; written again, the blocks of this run are kept")
            write_json(path, manifest)
            return
        if path.exists() and not force:
            if shared:
                raise UserError(
                    f"{folder}: vectors of another run ({'; '.join(different)}); "
                    "leave --para_emb out, name another folder, or pass --force to make them again there"
                )
            self._require_unused(f"this one would make others ({'; '.join(different)})")
            log(f"{folder}: the vectors there are of another run and are made again ({'; '.join(different)})")
        elif blocks and shared and not force:
            raise UserError(f"{folder}: blocks without a manifest; name another folder, or pass --force")
        elif blocks:
            self._require_unused("this one would make them again")
            log(f"{folder}: {'--force' if force else 'no manifest beside the vectors'}; they are made again")
        path.unlink(missing_ok=True)  # first: blocks without a manifest are never trusted
        for block in blocks:
            block.unlink(missing_ok=True)
        write_json(path, manifest)

    def _notes_are_of_this_run(self) -> bool:
        """Return whether there are notes of blocks here, none of them of another run."""
        own = 0
        for path in self.folder.glob("block-*.json"):
            try:
                note = read_json(path)
            except UserError:
                continue
            if seal_holds(note) and note.get("manifest") != self.identity:
                return False
            own += seal_holds(note)
        return own > 0

    def _require_unused(self, what: str) -> None:
        if not self.hold.alone():
            raise UserError(
                f"{self.folder}: another run is using the vectors there, and {what}; "
                "wait for its end, or give this one another --output_dir"
            )

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def block_count(self) -> int:
        return -(-self.rows // self.block_rows)

    def block_path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.npy"

    def block_range(self, block: int) -> tuple[int, int]:
        """Return the first row of a block and the row after its last."""
        return block * self.block_rows, min(self.rows, (block + 1) * self.block_rows)

    def note_path(self, block: int) -> Path:
        """Return the path of a block's note: how it was made. Written last: without it the block is not
        there.
        """
        return self.folder / f"block-{block:05d}.json"

    def note(self, block: int) -> dict:
        """Return a block's note; empty when there is none, or it is of a run with another manifest."""
        try:
            note = read_json(self.note_path(block))
        except UserError:
            return {}
        return note if seal_holds(note) and note.get("manifest") == self.identity else {}

    def missing_blocks(self) -> list[int]:
        """Return the blocks that are not there yet, whole."""
        return [block for block in range(self.block_count) if self.is_missing(block)]

    def is_missing(self, block: int) -> bool:
        """Return whether a block is not there yet, or not whole."""
        return not (self.note(block) and self.block_path(block).exists())

    def write_block(self, block: int, vectors: np.ndarray, made_with: dict | None = None) -> None:
        """Write one block, (rows of the block, H) of the store's dtype, atomically, then its note."""
        first, last = self.block_range(block)
        assert vectors.shape == (last - first, self.hidden) and vectors.dtype == self.dtype
        if changes(_old_manifest(self.manifest_path), self.manifest):
            raise UserError(
                f"{self.folder}: another run with other settings makes its vectors there now; "
                "give one of the two another --output_dir"
            )
        for left in self.folder.glob(f"block-{block:05d}.*.tmp"):
            left.unlink(missing_ok=True)  # of a killed process: nobody else writes a block that is claimed
        with atomic_write(self.block_path(block), "wb") as file:
            np.save(file, vectors, allow_pickle=False)
        note = {**(made_with or {}), "manifest": self.identity, "xxh3": _checksum(vectors)}
        write_json(self.note_path(block), sealed(note))

    def drop_once(self, damage: DamagedBlock, dropped: set[int]) -> None:
        """Forget the block, to be made again, and note it in `dropped`; a second time it is raised."""
        if damage.block in dropped:
            raise damage  # made again, and damaged again: not for us to mend
        warn(f"{damage.what}; it is made again")
        self.drop(damage.block)
        dropped.add(damage.block)

    def drop(self, block: int) -> None:
        """Forget a damaged block, so that it is made again; one that another process has mended stays."""
        claims = Claims(self.folder)
        try:
            with claims.whole_folder():
                try:
                    self._compare(block, _checksum(self._open(block)))
                except DamagedBlock:
                    self.note_path(block).unlink(missing_ok=True)
                    self.block_path(block).unlink(missing_ok=True)
        finally:
            claims.close()

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors (rows, H), memory-mapped) of every block in order, its bytes checked."""
        for block in range(self.block_count):
            yield self.block_range(block)[0], self.read_block(block)

    def read_block(self, block: int) -> np.ndarray:
        """Return the vectors (rows, H) of one block, memory-mapped, its bytes checked (DamagedBlock)."""
        vectors = self._open(block)
        self._compare(block, _checksum(vectors))
        return vectors

    def read_into(self, first: int, out: np.ndarray) -> None:
        """Fill `out` (rows, H) with the vectors from row `first` on, by plain reads.

        A memory map would leave the pages that were read in this process's resident memory. Where a block is
        read from its first row to its last, call by call, its bytes are checked at the end (DamagedBlock).
        """
        at = 0
        while at < len(out):
            block = (first + at) // self.block_rows
            begin, end = self.block_range(block)
            count = min(len(out) - at, end - (first + at))
            self._read_block(block, first + at - begin, out[at : at + count])
            at += count

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (n, H) of these rows, read one by one; `rows` need not be sorted."""
        out = np.empty((len(rows), self.hidden), dtype=self.dtype)
        order = np.argsort(rows, kind="stable")
        sorted_rows, size = rows[order], self.hidden * self.dtype.itemsize
        for block in range(self.block_count):
            begin, end = self.block_range(block)
            here = range(*np.searchsorted(sorted_rows, [begin, end]).tolist())
            if not here:
                continue
            start = self._open(block).offset
            with open(self.block_path(block), "rb", buffering=0) as file:
                for at in here:
                    data = os.pread(file.fileno(), size, start + int(sorted_rows[at] - begin) * size)
                    out[order[at]] = np.frombuffer(data, dtype=self.dtype)
        return out

    def _read_block(self, block: int, first: int, out: np.ndarray) -> None:
        path, start = self.block_path(block), self.begins.get(block)
        if first == 0 or start is None:
            start = self._open(block).offset  # checks the header
            self.begins = {block: start}
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError:  # another run has dropped it
            raise DamagedBlock(path, block, "is not there any more") from None
        with file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            file.seek(start + first * self.hidden * self.dtype.itemsize)
            into, filled = memoryview(out).cast("B"), 0
            while filled < len(into):
                count = file.readinto(into[filled:])
                if not count:
                    raise DamagedBlock(path, block, "ends before its last vector")
                filled += count
        self._check(block, first, out)

    def _check(self, block: int, first: int, out: np.ndarray) -> None:
        if first == 0:
            self.reading = (block, 0, xxhash.xxh3_64())
        at, row, digest = self.reading
        if (at, row) != (block, first):
            return  # not in order: nothing to compare with
        digest.update(out)
        self.reading = (block, first + len(out), digest)
        begin, end = self.block_range(block)
        if first + len(out) == end - begin:
            self._compare(block, digest.hexdigest())

    def _compare(self, block: int, found: str) -> None:
        if self.note(block).get("xxh3") != found:
            raise DamagedBlock(self.block_path(block), block, "its bytes are not those that were written")

    def _open(self, block: int) -> np.ndarray:
        path = self.block_path(block)
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (*DAMAGE, FileNotFoundError) as error:
            raise DamagedBlock(path, block, f"cannot be read as vectors ({error})") from None
        first, last = self.block_range(block)
        if vectors.shape != (last - first, self.hidden) or vectors.dtype != self.dtype:
            expected = (last - first, self.hidden)
            what = f"holds {vectors.shape} {vectors.dtype}, expected {expected} {self.dtype}"
            raise DamagedBlock(path, block, what)
        return vectors


class ScoreStore(VectorStore):
    """Blocks of logits (pairs, 1) float32."""

    dtype = np.dtype(np.float32)


def new_manifest(stamp: dict, rows: int, hidden: int, block_rows: int) -> dict:
    """Return the manifest of vectors that `stamp` decides."""
    return {**stamp, "rows": rows, "hidden": hidden, "block_rows": block_rows, "code": CODE_VERSION}


def _checksum(vectors: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(vectors))


def _old_manifest(path: Path) -> dict:
    try:
        return read_json(path)
    except UserError:
        return {"manifest": "unreadable"}


def save_vectors(path, vectors: np.ndarray) -> None:
    """Write one array of vectors (query.emb.npy) atomically."""
    with atomic_write(path, "wb") as file:
        np.save(file, vectors, allow_pickle=False)
