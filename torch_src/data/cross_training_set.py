"""Training data of the cross-encoder, pairs or groups: a batch is a pure function of (seed, epoch, step)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torch_src.data.formats import CrossRow, parse_cross_row
from torch_src.data.lines import FilePath
from torch_src.data.row_file import RowFile, group_rows, text_hash
from torch_src.runtime.errors import UserError


@dataclass(frozen=True)
class CrossBatch:
    """B pairs. Listwise: one group after the other, the positive first in each."""

    queries: list[str]
    passages: list[str]
    labels: np.ndarray  # (B,) float32, 1 relevant, 0 not
    rows: list[int]  # line numbers of the training file, from 1


class CrossTrainingSet:
    """cross.train.tsv by row. Holds hashes, labels and offsets (about 32 bytes per row), not texts."""

    def __init__(self, path: FilePath, clean: Callable[[str], str] = lambda text: text):
        """Read the file once; texts are compared after `clean`. UserError when all labels are equal."""
        self.path = path

        def numbers(row: CrossRow) -> tuple[int, int, int]:
            return text_hash(clean(row.query)), text_hash(clean(row.passage)), row.label

        self.file = RowFile(path, parse_cross_row, numbers)
        query_hash, self.passage_hash, self.labels = self.file.numbers.T
        if self.labels.min() == self.labels.max():
            raise UserError(f"{path}: every label is {self.labels[0]} (expected both 0 and 1)")
        by_query = [self._split(rows) for rows in group_rows(query_hash)]
        self.rows = len(self.file)
        self.queries = len(by_query)  # distinct
        # One (row of the positive, rows of its negatives) for each positive that has negatives.
        self.groups = [
            (positive, negatives)
            for positives, negatives in by_query
            for positive in (positives if len(negatives) else ())
        ]

    def _split(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return one query's (positive, negative) rows, each text once; a positive is never a negative."""
        positives, negatives = (self._distinct(rows[self.labels[rows] == label]) for label in (1, 0))
        is_positive = np.isin(self.passage_hash[negatives], self.passage_hash[positives])
        return positives, negatives[~is_positive]

    def _distinct(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.unique(self.passage_hash[rows], return_index=True)[1]]

    def short_groups(self, group_size: int) -> int:
        """Return how many positives have fewer than group_size - 1 distinct negatives."""
        return sum(len(negatives) < group_size - 1 for _, negatives in self.groups)

    def steps_per_epoch(self, units: int, listwise: bool) -> int:
        """Return the number of full batches of `units` pairs, or of `units` positives when listwise."""
        count, name, knob = self.rows, "rows", "batch_size"
        if listwise:
            count, name, knob = len(self.groups), "positives with negatives", "groups_per_step"
        if units > count:
            message = f"only {count} {name}, fewer than one batch of {units}; lower --{knob}"
            raise UserError(f"{self.path}: {message}")
        return count // units

    def pair_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> CrossBatch:
        """Return the pairs of (epoch, step), both from 0."""
        order = np.random.default_rng([seed, epoch, 0]).permutation(self.rows)
        return self._batch(order[step * batch_size : (step + 1) * batch_size].tolist())

    def group_batch(self, seed: int, epoch: int, step: int, count: int, group_size: int) -> CrossBatch:
        """Return `count` groups: a positive and group_size - 1 random negatives, with repeats if needed."""
        order = np.random.default_rng([seed, epoch, 0]).permutation(len(self.groups))
        random = np.random.default_rng([seed, epoch, 1, step])
        rows = []
        for index in order[step * count : (step + 1) * count]:
            positive, negatives = self.groups[index]
            rows += [int(positive), *draw_negatives(negatives, group_size - 1, random)]
        return self._batch(rows)

    def _batch(self, rows: list[int]) -> CrossBatch:
        parsed = self.file.read(rows)
        labels = np.array([row.label for row in parsed], dtype=np.float32)
        queries, passages = [row.query for row in parsed], [row.passage for row in parsed]
        return CrossBatch(queries, passages, labels, [row + 1 for row in rows])


def draw_negatives(negatives: np.ndarray, count: int, random: np.random.Generator) -> list[int]:
    """Return `count` of the rows in random order; a row repeats only after all have been drawn."""
    rounds = [random.permutation(negatives) for _ in range(math.ceil(count / len(negatives)))]
    return np.concatenate(rounds)[:count].tolist()
