"""The passage collection on disk: 8 M passages by row number, without loading them."""

import os
import re
from bisect import bisect_right
from pathlib import Path

import numpy as np
import xxhash

from torch_src.data.array_cache import cached_array
from torch_src.data.formats import parse_passage
from torch_src.data.lines import LONGEST_LINE, FormatError, decode
from torch_src.runtime.errors import UserError

PART = re.compile(r"part-(\d+)$")
READ_SIZE = 1 << 22


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
        self.fingerprint = xxhash.xxh3_64_hexdigest("".join(digest for _, digest in indexes).encode())
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
    """Return (line offsets, (rows + 1,) int64; fingerprint of the content)."""
    return cached_array(path, cache_dir, "offsets", lambda: _scan(path))


def _scan(path: Path) -> tuple[np.ndarray, str]:
    """Read the file once: where its lines begin (cut at `\\n` alone) and a fingerprint of its content."""
    ends, position, digest = [], 0, xxhash.xxh3_128()
    piece, last = bytearray(READ_SIZE), b"\n"
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(piece):
            view = memoryview(piece)[:count]
            ends.append(np.flatnonzero(np.frombuffer(view, dtype=np.uint8) == 10) + (position + 1))
            position += count
            last = bytes(view[-1:])
            digest.update(view)
    if last != b"\n":
        ends.append(np.array([position]))  # a last line without its newline is a row all the same
    offsets = np.zeros(1 + sum(map(len, ends)), dtype=np.int64)
    np.concatenate(ends or [offsets[1:]], out=offsets[1:])
    too_long = np.flatnonzero(np.diff(offsets) > LONGEST_LINE)
    if len(too_long):
        raise FormatError(path, int(too_long[0]) + 1, f"a line of more than {LONGEST_LINE >> 20} MiB")
    return offsets, digest.hexdigest()
