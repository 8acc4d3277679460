"""Passages by row number, read from disk on demand."""

import os
import re
from bisect import bisect_right
from pathlib import Path
from typing import overload

import numpy as np
import xxhash

from torch_src.data.array_cache import cached_array
from torch_src.data.encodings import GZIPPED, GZIPPED_FILE
from torch_src.data.formats import parse_passage
from torch_src.data.lines import LONGEST_LINE, FilePath, FormatError, decode
from torch_src.runtime.commands import how_to_get
from torch_src.runtime.errors import UserError

PART = re.compile(r"part-(\d+)$")
READ_SIZE = 1 << 22


class PassageCollection:
    """`len(c)`, `c[row]`, `c[start:stop]` over part-00, part-01, ... (or all_doc); rows global and 0-based.

    Opening finds the line offsets in one pass (8 bytes per row) and caches them in `cache_dir`. A malformed
    line is a FormatError, raised when its row is read.
    """

    def __init__(self, folder: FilePath, cache_dir: FilePath | None = None):
        self._open(collection_files(folder), cache_dir)
        all_doc = Path(folder) / "all_doc"
        if all_doc not in self.files and all_doc.exists():
            rows = len(_index(all_doc, cache_dir)[0]) - 1
            if rows != len(self):
                raise UserError(
                    f"{all_doc}: {rows:,} rows, but the parts beside it have {len(self):,}; "
                    "delete it, or rebuild it with script/handle.py"
                )

    @classmethod
    def of_file(cls, path: FilePath, cache_dir: FilePath | None = None) -> "PassageCollection":
        """Return the passages of one file with the same four columns, such as auxiliary/*.res.tsv."""
        collection = cls.__new__(cls)
        collection._open([Path(path)], cache_dir)
        return collection

    def _open(self, files: list[Path], cache_dir: FilePath | None) -> None:
        self.files = files
        indexes = [_index(path, cache_dir) for path in files]
        self.offsets = [offsets for offsets, _ in indexes]  # per file: start of each line, end of the last
        rows = [len(offsets) - 1 for offsets in self.offsets]
        self.starts: list[int] = np.cumsum([0, *rows]).tolist()  # first row of each file, and the row count
        self.checksum = xxhash.xxh3_64_hexdigest("".join(digest for _, digest in indexes).encode())
        if not len(self):
            raise UserError(f"{files[0].parent}: the collection is empty")

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        """Return one text, or the list of texts of a slice with step 1."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1, "a slice must have step 1"
            return self._read(start, stop)
        if not 0 <= key < len(self):
            raise IndexError(f"row {key} is outside the collection of {len(self)} passages")
        return self._read(key, key + 1)[0]

    def _read(self, start: int, stop: int) -> list[str]:
        texts: list[str] = []
        while start < stop:
            number = bisect_right(self.starts, start) - 1
            first = start - self.starts[number]
            last = min(stop, self.starts[number + 1]) - self.starts[number]
            texts.extend(self._read_file(number, first, last))
            start += last - first
        return texts

    def _read_file(self, number: int, first: int, last: int) -> list[str]:
        """Return the texts of lines first..last-1 (0-based) of one file, with a single read."""
        path, offsets = self.files[number], self.offsets[number]
        begin, end = int(offsets[first]), int(offsets[last])
        with open(path, "rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) < end - begin:
            raise UserError(f"{path}: shorter than when it was opened; do not change it during a run")
        ends = (offsets[first + 1 : last + 1] - begin).tolist()
        texts, begin = [], 0
        for line, end in enumerate(ends, start=first + 1):
            texts.append(parse_passage(decode(data[begin:end], path, line), path, line))
            begin = end
        return texts


def collection_files(folder: FilePath) -> list[Path]:
    """Return part-00, part-01, ... in numeric order, else [all_doc]; UserError when a part is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (passages){how_to_get(folder)}")
    parts: dict[int, Path] = {}
    for path in folder.iterdir():
        if match := PART.match(path.name):
            if (number := int(match[1])) in parts:
                raise UserError(f"{folder}: {parts[number].name} and {path.name} have the same number")
            parts[number] = path
    if not parts:
        if packed := [path.name for path in sorted(folder.glob("part-*.gz"))]:
            raise UserError(f"{folder}: {packed[0]} {GZIPPED_FILE}")
        if (folder / "all_doc").exists():
            return [folder / "all_doc"]
        raise UserError(f"{folder}: no passages (expected part-00, part-01, ... or all_doc)")
    for number in range(max(parts)):
        if number not in parts:
            raise UserError(f"{folder}: part-{number:02d} is missing, but part-{max(parts):02d} exists")
    return [parts[number] for number in sorted(parts)]


def _index(path: Path, cache_dir: FilePath | None) -> tuple[np.ndarray, str]:
    """Return (line offsets, (rows + 1,) int64; checksum of the content)."""
    return cached_array(path, cache_dir, "offsets", lambda: _scan(path))


def _scan(path: Path) -> tuple[np.ndarray, str]:
    """Return line offsets and checksum, read in one pass; only `\\n` ends a line."""
    ends: list[np.ndarray] = []
    position, digest = 0, xxhash.xxh3_128()
    buffer, last = bytearray(READ_SIZE), b"\n"
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            view = memoryview(buffer)[:count]
            if not position and view[: len(GZIPPED)] == GZIPPED:
                raise UserError(f"{path}: {GZIPPED_FILE}")
            ends.append(np.flatnonzero(np.frombuffer(view, dtype=np.uint8) == 10) + (position + 1))
            position += count
            last = bytes(view[-1:])
            digest.update(view)
    if last != b"\n":
        ends.append(np.array([position]))  # a last line without its newline is a row, too
    offsets = np.zeros(1 + sum(map(len, ends)), dtype=np.int64)
    np.concatenate(ends or [offsets[1:]], out=offsets[1:])
    too_long = np.flatnonzero(np.diff(offsets) > LONGEST_LINE)
    if len(too_long):
        raise FormatError(path, int(too_long[0]) + 1, f"a line of more than {LONGEST_LINE >> 20} MiB")
    return offsets, digest.hexdigest()
