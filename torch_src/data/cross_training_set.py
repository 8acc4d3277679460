"""Training data of the cross-encoder: pairs, or groups of one query; a function of (seed, epoch, step)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torch_src.data.formats import parse_cross_row
from torch_src.data.row_file import RowFile, group_rows, text_hash
from torch_src.runtime.errors import UserError


@dataclass(frozen=True)
class CrossBatch:
    """Pairs of one micro-batch. Listwise: groups one after the other, the positive first in each."""

    queries: list[str]
    passages: list[str]
    labels: np.ndarray  # (B,) float32, 1 relevant, 0 not
    rows: list[int]  # line numbers of the training file, from 1


class CrossTrainingSet:
    """cross.train.tsv by row. Holds hashes, labels and offsets (about 32 bytes a row), never the texts."""

    def __init__(self, path, clean: Callable[[str], str] = lambda text: text):
        """Read the file once. UserError when all labels are equal: there would be nothing to learn."""
        self.path = path

        def numbers(row) -> tuple[int, int, int]:
            return text_hash(clean(row.query)), text_hash(clean(row.passage)), row.label

        self.file = RowFile(path, parse_cross_row, numbers)
        query_hash, self.passage_hash, self.labels = self.file.numbers.T
        if self.labels.min() == self.labels.max():
            raise UserError(
                f"{path}: every label is {self.labels[0]}; relevant and other passages are both needed"
            )
        self.groups = [self._split(rows) for rows in group_rows(query_hash)]
        self.lists = [(positive, others) for positives, others in self.groups for positive in positives]
        self.lists = [(positive, others) for positive, others in self.lists if len(others)]

    def _split(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return one query's (positive, negative) rows, each text once, no positive among the latter."""
        positives = rows[self.labels[rows] == 1]
        positives = positives[np.unique(self.passage_hash[positives], return_index=True)[1]]
        negatives = rows[self.labels[rows] == 0]
        negatives = negatives[np.unique(self.passage_hash[negatives], return_index=True)[1]]
        return positives, negatives[~np.isin(self.passage_hash[negatives], self.passage_hash[positives])]

    @property
    def rows(self) -> int:
        return len(self.file)

    @property
    def queries(self) -> int:
        """The number of distinct queries."""
        return len(self.groups)

    def short_lists(self, group_size: int) -> int:
        """Return how many positives have fewer than group_size - 1 distinct negatives."""
        return sum(len(negatives) < group_size - 1 for _, negatives in self.lists)

    def steps_per_epoch(self, units: int, listwise: bool) -> int:
        """Return the whole batches in one pass over the pairs, or over the positives when listwise."""
        there, what = (len(self.lists), "positives with negatives") if listwise else (self.rows, "rows")
        if units > there:
            raise UserError(
                f"{self.path}: only {there} {what}, fewer than one batch of {units}; lower the batch"
            )
        return there // units

    def pairs(self, seed: int, epoch: int, step: int, batch_size: int) -> CrossBatch:
        """Return the pairs of (epoch, step), both from 0."""
        order = np.random.default_rng([seed, epoch, 0]).permutation(self.rows)
        return self._batch(order[step * batch_size : (step + 1) * batch_size].tolist())

    def lists_of(self, seed: int, epoch: int, step: int, count: int, group_size: int) -> CrossBatch:
        """Return `count` groups of (epoch, step): a positive and group_size - 1 negatives drawn afresh.

        A query with too few negatives gives some of them more than once.
        """
        order = np.random.default_rng([seed, epoch, 0]).permutation(len(self.lists))
        draw = np.random.default_rng([seed, epoch, 1, step])
        rows = []
        for at in order[step * count : (step + 1) * count]:
            positive, negatives = self.lists[at]
            rows += [int(positive), *draw_negatives(negatives, group_size - 1, draw)]
        return self._batch(rows)

    def _batch(self, rows: list[int]) -> CrossBatch:
        parsed = self.file.read(rows)
        labels = np.array([row.label for row in parsed], dtype=np.float32)
        queries, passages = [row.query for row in parsed], [row.passage for row in parsed]
        return CrossBatch(queries, passages, labels, [row + 1 for row in rows])


def draw_negatives(negatives: np.ndarray, count: int, draw: np.random.Generator) -> list[int]:
    """Return `count` of the rows: each at most once while there are enough, then all again."""
    chosen = [draw.permutation(negatives) for _ in range(-(-count // len(negatives)))]
    return np.concatenate(chosen)[:count].tolist()
