"""Rows of a training file by number; only offsets and a few 64-bit numbers per row are in memory."""

import hashlib
import os
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from torch_src.data.lines import FilePath, decode, raw_lines
from torch_src.runtime.commands import how_to_get
from torch_src.runtime.errors import UserError

Row = TypeVar("Row")


class RowFile(Generic[Row]):
    """Rows 0..N-1 of a TSV file; `numbers` (N, n) uint64 holds the result of `numbers_of` for each row.

    `parse(text, path, line)` checks and splits a line; every line is parsed once when the file is opened.
    """

    def __init__(
        self,
        path: FilePath,
        parse: Callable[[str, FilePath, int], Row],
        numbers_of: Callable[[Row], tuple[int, ...]],
    ):
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file (training rows){how_to_get(path)}")
        self.path, self.parse = path, parse
        with open(path, "rb") as file:
            rows = sum(1 for _ in raw_lines(file, path))
        if not rows:
            raise UserError(f"{path}: contains no training rows")
        self.offsets = np.zeros(rows + 1, dtype=np.int64)
        self.numbers = np.empty((rows, 0), dtype=np.uint64)
        with open(path, "rb") as file:
            for line, raw in raw_lines(file, path):
                numbers = numbers_of(parse(decode(raw, path, line), path, line))
                if line == 1:
                    self.numbers = np.empty((rows, len(numbers)), dtype=np.uint64)
                self.numbers[line - 1] = numbers
                self.offsets[line] = self.offsets[line - 1] + len(raw)

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, rows: list[int]) -> list[Row]:
        found = []
        with open(self.path, "rb") as file:
            for row in rows:
                file.seek(int(self.offsets[row]))
                raw = file.read(int(self.offsets[row + 1] - self.offsets[row]))
                found.append(self.parse(decode(raw, self.path, row + 1), self.path, row + 1))
        return found


def group_rows(keys: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each distinct key, groups in the order of their first row."""
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    groups = np.split(order, np.flatnonzero(in_order[1:] != in_order[:-1]) + 1)
    return sorted(groups, key=lambda group: int(group[0]))


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text: two of 10^6 texts collide with probability 3 x 10^-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
