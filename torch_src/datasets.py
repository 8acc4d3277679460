"""Training data: which query, positive and negatives make step s of epoch e — a pure function of (seed,
epoch, step).
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torch_src.errors import UserError
from torch_src.formats import DualRow, decode, parse_dual_row


@dataclass(frozen=True)
class DualBatch:
    """Texts of one micro-batch: queries (B), passages (P, repeats removed), and how they belong together."""

    queries: list[str]
    passages: list[str]
    targets: np.ndarray  # (B,) int64: the column of each query's positive
    masked: np.ndarray  # (B, P) bool: True where a passage must not count as a negative
    rows: list[int]  # line numbers of the training file, from 1, to name them in an error


class DualTrainingSet:
    """dual.train.tsv grouped by query. Holds hashes and offsets (about 40 bytes a row), never the texts."""

    def __init__(self, path, clean: Callable[[str], str] = lambda text: text):
        """Read the file once. `clean` is what makes two texts the same for the model (removing
        spaces, say).
        """
        self.path, self.clean = path, clean
        offsets, hashes = _scan(path, clean)
        self.offsets = offsets
        self.rows = len(hashes)
        if not self.rows:
            raise UserError(f"{path}: no training rows in it")
        query_hashes, self.positive_hash, self.negative_hash = hashes.T
        order = np.argsort(query_hashes, kind="stable")
        in_order = query_hashes[order]
        groups = np.split(order, np.flatnonzero(in_order[1:] != in_order[:-1]) + 1)
        # Queries in the order of their first row: the same whatever the hashes are.
        self.groups = sorted(groups, key=lambda group: int(group[0]))

    @property
    def queries(self) -> int:
        """The number of distinct queries."""
        return len(self.groups)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the whole batches in one pass; the few queries left over have their turn in another epoch's
        order.
        """
        if batch_size > self.queries:
            raise UserError(
                f"--batch_size {batch_size}: {self.path} has only {self.queries} distinct queries, "
                "and a batch never holds a query twice"
            )
        return self.queries // batch_size

    def batch(self, seed: int, epoch: int, step: int, batch_size: int, hard_negatives: int) -> DualBatch:
        """Return the batch of (epoch, step), both from 0: distinct queries, positives and negatives drawn
        afresh.
        """
        order = np.random.default_rng([seed, epoch, 0]).permutation(self.queries)
        chosen = order[step * batch_size : (step + 1) * batch_size]
        draw = np.random.default_rng([seed, epoch, 1, step])
        picks = [self._draw(self.groups[group], draw, hard_negatives) for group in chosen]
        return self._assemble(chosen, picks)

    def _draw(
        self, group: np.ndarray, draw: np.random.Generator, hard_negatives: int
    ) -> tuple[int, list[int]]:
        """Return (row of the positive, rows of the negatives): distinct texts, no known positive among the
        negatives.

        A query with fewer distinct negatives than asked gives what it has: in-batch negatives make up for it.
        """
        positives = np.unique(self.positive_hash[group], return_index=True)[1]
        positive = group[positives[draw.integers(len(positives))]]
        texts, negatives = np.unique(self.negative_hash[group], return_index=True)
        negatives = negatives[~np.isin(texts, self.positive_hash[group])]
        chosen = draw.permutation(len(negatives))[:hard_negatives]
        return int(positive), [int(group[negatives[at]]) for at in chosen]

    def _assemble(self, chosen: np.ndarray, picks: list[tuple[int, list[int]]]) -> DualBatch:
        queries, passages, rows = [], [], []
        column: dict[int, int] = {}  # text hash -> column: a text that was drawn twice is encoded once
        targets = np.empty(len(picks), dtype=np.int64)
        with open(self.path, "rb") as file:
            for at, (positive, negatives) in enumerate(picks):
                row = self._read(file, positive)
                rows.append(positive + 1)
                queries.append(row.query)
                targets[at] = column.setdefault(int(self.positive_hash[positive]), len(passages))
                passages += [row.positive] * (len(column) - len(passages))
                for negative in negatives:
                    column.setdefault(int(self.negative_hash[negative]), len(passages))
                    if len(column) > len(passages):
                        passages.append(self._read(file, negative).negative)
        masked = np.zeros((len(picks), len(passages)), dtype=bool)
        for at, group in enumerate(chosen):
            known = {int(text) for text in self.positive_hash[self.groups[group]]}
            masked[at, [column[text] for text in known if text in column]] = True
        masked[np.arange(len(picks)), targets] = False
        return DualBatch(queries, passages, targets, masked, rows)

    def _read(self, file, row: int) -> DualRow:
        file.seek(int(self.offsets[row]))
        raw = file.read(int(self.offsets[row + 1] - self.offsets[row]))
        return parse_dual_row(decode(raw, self.path, row + 1), self.path, row + 1)


def _scan(path, clean: Callable[[str], str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (line offsets (rows + 1,), hashes (rows, 3) of query, positive and negative); checks
    every line.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file (training rows); get it with `sh script/download.sh`")
    rows = _count_lines(path)
    offsets = np.zeros(rows + 1, dtype=np.int64)
    hashes = np.empty((rows, 3), dtype=np.uint64)
    with open(path, "rb") as file:
        for number, raw in enumerate(file):
            row = parse_dual_row(decode(raw, path, number + 1), path, number + 1)
            offsets[number + 1] = offsets[number] + len(raw)
            hashes[number] = [text_hash(clean(text)) for text in (row.query, row.positive, row.negative)]
    return offsets, hashes


def _count_lines(path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def text_hash(text: str) -> int:
    """Return 64 bits that stand for a text: two of 10^6 texts collide with probability 3 x 10^-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
