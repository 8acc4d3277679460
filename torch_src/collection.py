"""The passage collection on disk: 8 M passages by row number, without loading them."""

import hashlib
import os
import re
import zipfile
from bisect import bisect_right
from pathlib import Path

import numpy as np

from torch_src.errors import UserError
from torch_src.formats import decode, parse_passage
from torch_src.helpers import atomic_write, read_json, say, write_json

PART = re.compile(r"part-(\d+)$")
READ_SIZE = 1 << 24


class PassageCollection:
    """`len(c)`, `c[row]` and `c[start:stop]` over part-00, part-01, ... (or all_doc), rows global and
    0-based.

    Opening finds the line offsets in one pass (8 bytes a row) and keeps them in `cache_dir` for the next
    time. A malformed line is a FormatError that names file and line, raised when the row is read.
    """

    def __init__(self, folder, cache_dir=None):
        self._open(collection_files(folder), cache_dir)
        self._check_all_doc(Path(folder) / "all_doc", cache_dir)

    @classmethod
    def of_file(cls, path, cache_dir=None) -> "PassageCollection":
        """Return the passages of one file of the same four columns (auxiliary/*.res.tsv has them, too)."""
        collection = cls.__new__(cls)
        collection._open([Path(path)], cache_dir)
        return collection

    def _open(self, files: list[Path], cache_dir) -> None:
        self.files = files
        indexes = [_index(path, cache_dir) for path in self.files]
        self.offsets = [
            offsets for offsets, _ in indexes
        ]  # per file: start of each line and the end of the last
        self.starts = np.cumsum(
            [0] + [len(offsets) - 1 for offsets in self.offsets]
        ).tolist()  # first row of each file
        self.fingerprint = hashlib.blake2b("".join(d for _, d in indexes).encode(), digest_size=8).hexdigest()
        if not len(self):
            raise UserError(f"{files[0].parent}: the collection is empty")

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, which):
        """Return one text, or the list of texts of a slice with step 1."""
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            assert step == 1, "a collection is read forwards, row by row"
            return self._read(start, stop)
        if not 0 <= which < len(self):
            raise IndexError(f"row {which} is outside the collection of {len(self)} passages")
        return self._read(which, which + 1)[0]

    def _read(self, start: int, stop: int) -> list[str]:
        texts = []
        while start < stop:
            part = bisect_right(self.starts, start) - 1
            first = start - self.starts[part]
            last = min(stop, self.starts[part + 1]) - self.starts[part]
            texts.extend(self._read_part(part, first, last))
            start += last - first
        return texts

    def _read_part(self, part: int, first: int, last: int) -> list[str]:
        """Return the texts of lines first..last-1 (0-based) of one file, read in one piece."""
        path, offsets = self.files[part], self.offsets[part]
        begin, end = int(offsets[first]), int(offsets[last])
        with open(path, "rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) < end - begin:
            raise UserError(f"{path}: shorter than when it was opened; was it changed meanwhile?")
        cuts = (offsets[first : last + 1] - begin).tolist()
        texts = []
        for at in range(last - first):
            line = first + at + 1
            texts.append(parse_passage(decode(data[cuts[at] : cuts[at + 1]], path, line), path, line))
        return texts

    def _check_all_doc(self, all_doc: Path, cache_dir) -> None:
        if all_doc in self.files or not all_doc.exists():
            return
        rows = len(_index(all_doc, cache_dir)[0]) - 1
        if rows != len(self):
            raise UserError(
                f"{all_doc}: {rows:,} rows, but the parts beside it have {len(self):,}; "
                "delete it, or make it again with script/handle.py"
            )


def collection_files(folder) -> list[Path]:
    """Return part-00, part-01, ... in numeric order, else [all_doc]; UserError when a part is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder (the passage collection); get it with `sh script/download.sh`"
        )
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := PART.match(path.name))]
    parts = dict(sorted(named))
    if len(parts) < len(named):
        raise UserError(f"{folder}: two files are part {next(n for n, p in named if parts[n] != p)}")
    if not parts:
        if (folder / "all_doc").exists():
            return [folder / "all_doc"]
        raise UserError(f"{folder}: holds neither part-00, part-01, ... nor all_doc")
    missing = [number for number in range(max(parts) + 1) if number not in parts]
    if missing:
        raise UserError(f"{folder}: part-{missing[0]:02d} is missing, but part-{max(parts):02d} is there")
    return [parts[number] for number in sorted(parts)]


def _index(path: Path, cache_dir) -> tuple[np.ndarray, str]:
    """Return (line offsets, (rows + 1,) int64; fingerprint of the content), from the cache when it still
    fits.
    """
    state = os.stat(path)
    identity = {"path": str(path.resolve()), "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    if cache_dir is None:
        return _scan(path)
    name = hashlib.blake2b(identity["path"].encode(), digest_size=6).hexdigest()
    saved, note = (
        Path(cache_dir) / f"{path.name}-{name}.offsets.npy",
        Path(cache_dir) / f"{path.name}-{name}.json",
    )
    if saved.exists() and note.exists():
        try:
            known = read_json(note)
            offsets = np.load(saved, allow_pickle=False)
            if {key: known.get(key) for key in identity} == identity:
                _check_offsets(offsets, known, state.st_size)
                return offsets, known["fingerprint"]
        except (UserError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
            say(f"{saved}: damaged, made again")
    offsets, fingerprint = _scan(path)
    with atomic_write(saved, "wb") as file:
        np.save(file, offsets, allow_pickle=False)
    write_json(note, {**identity, "offsets": _digest(offsets), "fingerprint": fingerprint})
    return offsets, fingerprint


def _check_offsets(offsets: np.ndarray, known: dict, size: int) -> None:
    """ValueError unless the cached offsets are as they were saved, byte for byte."""
    if offsets.ndim != 1 or offsets.dtype != np.int64 or offsets[0] != 0 or offsets[-1] != size:
        raise ValueError("not the offsets of this file")
    if not isinstance(known["fingerprint"], str) or known["offsets"] != _digest(offsets):
        raise ValueError("not the offsets that were saved")


def _digest(offsets: np.ndarray) -> str:
    return hashlib.blake2b(offsets.tobytes(), digest_size=8).hexdigest()


def _scan(path: Path) -> tuple[np.ndarray, str]:
    """Read the file once: where its lines begin (cut at `\\n` alone) and a fingerprint of its content."""
    ends, position, digest = [], 0, hashlib.blake2b(digest_size=16)
    last = b"\n"
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(READ_SIZE):
            ends.append(np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == 10) + (position + 1))
            position += len(piece)
            last = piece[-1:]
            digest.update(piece)
    if last != b"\n":
        ends.append(np.array([position]))  # a last line without its newline is a row all the same
    return np.concatenate([[0], *ends]).astype(np.int64), digest.hexdigest()
