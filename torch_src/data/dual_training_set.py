"""Training data of the dual encoder: a batch is a pure function of (seed, epoch, step)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torch_src.data.formats import DualRow, parse_dual_row
from torch_src.data.lines import FilePath
from torch_src.data.row_file import RowFile, group_rows, text_hash
from torch_src.runtime.errors import UserError


@dataclass(frozen=True)
class DualBatch:
    """B queries, P distinct passages, and which of them belong to which query."""

    queries: list[str]
    passages: list[str]
    targets: np.ndarray  # (B,) int64: the column of each query's positive
    masked: np.ndarray  # (B, P) bool: True where a passage must not count as a negative
    lists: np.ndarray  # (B, 1 + N) int64: columns of each query's positive and own hard negatives; -1: none
    teacher: np.ndarray  # (B, 1 + N) float32: the re-ranker's logits of these; NaN: none
    rows: list[int]  # line numbers of the training file, from 1, to name them in an error


class DualTrainingSet:
    """dual.train.tsv grouped by query. Holds hashes and offsets (about 40 bytes per row), not texts.

    teacher (rows, 2) float32: a re-ranker's logits of each row's positive and negative, NaN if unknown.
    """

    teacher: np.ndarray | None = None

    def __init__(self, path: FilePath, clean: Callable[[str], str] = lambda text: text):
        """Read the file once; texts are compared after `clean`."""
        self.path = path

        def hashes(row: DualRow) -> tuple[int, ...]:
            return tuple(text_hash(clean(text)) for text in row)

        self.file = RowFile(path, parse_dual_row, hashes)
        self.query_hash, self.positive_hash, self.negative_hash = self.file.numbers.T
        self.groups = group_rows(self.query_hash)
        self.rows = len(self.file)
        self.queries = len(self.groups)  # distinct

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of full batches; the queries that are left over differ in each epoch."""
        if batch_size > self.queries:
            raise UserError(
                f"--batch_size {batch_size}: {self.path} has only {self.queries} distinct queries, "
                f"and a batch never has a query twice; use at most {self.queries}"
            )
        return self.queries // batch_size

    def short_queries(self, hard_negatives: int) -> int:
        """Return how many queries have fewer distinct negatives than `hard_negatives`."""
        return sum(len(self._negatives(group)) < hard_negatives for group in self.groups)

    def batch(self, seed: int, epoch: int, step: int, batch_size: int, hard_negatives: int) -> DualBatch:
        """Return the batch of (epoch, step), both from 0: distinct queries, each with random passages."""
        order = np.random.default_rng([seed, epoch, 0]).permutation(self.queries)
        chosen = [self.groups[group] for group in order[step * batch_size : (step + 1) * batch_size]]
        random = np.random.default_rng([seed, epoch, 1, step])
        return self._assemble(chosen, [self._draw(group, random, hard_negatives) for group in chosen])

    def _draw(self, group: np.ndarray, random: np.random.Generator, wanted: int) -> tuple[int, list[int]]:
        """Return (row of the positive, rows of up to `wanted` distinct negatives, no known positives)."""
        positives = np.unique(self.positive_hash[group], return_index=True)[1]
        positive = group[positives[random.integers(len(positives))]]
        negatives = self._negatives(group)
        chosen = random.permutation(len(negatives))[:wanted]
        return int(positive), [int(group[negatives[index]]) for index in chosen]

    def _negatives(self, group: np.ndarray) -> np.ndarray:
        """Return the places in the group of its negatives, each text once; a positive is never a negative."""
        texts, negatives = np.unique(self.negative_hash[group], return_index=True)
        return negatives[~np.isin(texts, self.positive_hash[group])]

    def _assemble(self, groups: list[np.ndarray], drawn: list[tuple[int, list[int]]]) -> DualBatch:
        positives = [positive for positive, _ in drawn]
        negatives = [row for _, rows in drawn for row in rows]
        parsed = self.file.read(positives)
        texts = {int(self.positive_hash[row]): at.positive for row, at in zip(positives, parsed, strict=True)}
        for row, at in zip(negatives, self.file.read(negatives), strict=True):
            texts.setdefault(int(self.negative_hash[row]), at.negative)  # a repeated text is encoded once
        column = {text: index for index, text in enumerate(texts)}
        targets = np.array([column[int(self.positive_hash[row])] for row in positives], dtype=np.int64)
        masked = np.zeros((len(drawn), len(texts)), dtype=bool)
        for query, group in enumerate(groups):
            known = {int(text) for text in self.positive_hash[group]}
            masked[query, [column[text] for text in known if text in column]] = True
        masked[np.arange(len(drawn)), targets] = False
        lists, teacher = self._lists(drawn, column)
        queries, rows = [row.query for row in parsed], [row + 1 for row in positives]
        return DualBatch(queries, list(texts.values()), targets, masked, lists, teacher, rows)

    def _lists(
        self, drawn: list[tuple[int, list[int]]], column: dict[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return each query's own passages as (columns, teacher's logits)."""
        width = 1 + max((len(negatives) for _, negatives in drawn), default=0)
        lists = np.full((len(drawn), width), -1, dtype=np.int64)
        teacher = np.full(lists.shape, np.nan, dtype=np.float32)
        for query, (positive, negatives) in enumerate(drawn):
            texts = [self.positive_hash[positive], *self.negative_hash[negatives]]
            lists[query, : len(texts)] = [column[int(text)] for text in texts]
            if self.teacher is not None:
                logits = [self.teacher[positive, 0], *self.teacher[negatives, 1]]
                teacher[query, : len(texts)] = logits
        return lists, teacher
