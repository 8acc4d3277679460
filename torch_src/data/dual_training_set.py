"""Training data of the dual encoder: a batch is a pure function of (seed, epoch, step)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torch_src.data.formats import parse_dual_row
from torch_src.data.row_file import RowFile, group_rows, text_hash
from torch_src.runtime.errors import UserError


@dataclass(frozen=True)
class DualBatch:
    """Texts of one micro-batch: queries (B), passages (P, repeats removed), and how they belong together."""

    queries: list[str]
    passages: list[str]
    targets: np.ndarray  # (B,) int64: the column of each query's positive
    masked: np.ndarray  # (B, P) bool: True where a passage must not count as a negative
    lists: np.ndarray  # (B, 1 + N) int64: columns of each query's positive and own hard negatives; -1: none
    teacher: np.ndarray  # (B, 1 + N) float32: the re-ranker's logits of these; NaN: none
    rows: list[int]  # line numbers of the training file, from 1, to name them in an error


class DualTrainingSet:
    """dual.train.tsv grouped by query. Holds hashes and offsets (about 40 bytes a row), never the texts."""

    def __init__(
        self, path, clean: Callable[[str], str] = lambda text: text, teacher: np.ndarray | None = None
    ):
        """Read the file once. `clean` is what makes two texts the same for the model (no spaces, say).

        teacher (rows, 2) float32: a re-ranker's logits of each row's positive and negative, NaN where
        unknown.
        """
        self.path = path

        def hashes(row) -> tuple[int, ...]:
            return tuple(text_hash(clean(text)) for text in (row.query, row.positive, row.negative))

        self.file = RowFile(path, parse_dual_row, hashes)
        self.query_hash, self.positive_hash, self.negative_hash = self.file.numbers.T
        self.groups = group_rows(self.query_hash)
        self.teacher = teacher
        if teacher is not None and len(teacher) != len(self.file):
            raise UserError(
                f"{path}: {len(self.file):,} rows, but {len(teacher):,} of a teacher's scores beside it"
            )

    @property
    def rows(self) -> int:
        return len(self.file)

    @property
    def queries(self) -> int:
        """The number of distinct queries."""
        return len(self.groups)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the whole batches in one pass; the few queries left over are drawn in other epochs."""
        if batch_size > self.queries:
            raise UserError(
                f"--batch_size {batch_size}: {self.path} has only {self.queries} distinct queries, "
                "and a batch never holds a query twice"
            )
        return self.queries // batch_size

    def batch(self, seed: int, epoch: int, step: int, batch_size: int, hard_negatives: int) -> DualBatch:
        """Return the batch of (epoch, step), both from 0: distinct queries, texts drawn afresh."""
        order = np.random.default_rng([seed, epoch, 0]).permutation(self.queries)
        chosen = [self.groups[group] for group in order[step * batch_size : (step + 1) * batch_size]]
        draw = np.random.default_rng([seed, epoch, 1, step])
        return self._assemble(chosen, [self._draw(group, draw, hard_negatives) for group in chosen])

    def _draw(self, group: np.ndarray, draw: np.random.Generator, wanted: int) -> tuple[int, list[int]]:
        """Return (row of the positive, rows of the negatives): distinct texts, none a known positive.

        A query with fewer distinct negatives than asked gives what it has: in-batch negatives make up for it.
        """
        positives = np.unique(self.positive_hash[group], return_index=True)[1]
        positive = group[positives[draw.integers(len(positives))]]
        texts, negatives = np.unique(self.negative_hash[group], return_index=True)
        negatives = negatives[~np.isin(texts, self.positive_hash[group])]
        chosen = draw.permutation(len(negatives))[:wanted]
        return int(positive), [int(group[negatives[at]]) for at in chosen]

    def _assemble(self, chosen: list[np.ndarray], picks: list[tuple[int, list[int]]]) -> DualBatch:
        positives = [positive for positive, _ in picks]
        negatives = [row for _, rows in picks for row in rows]
        parsed = self.file.read(positives)
        texts = {int(self.positive_hash[row]): at.positive for row, at in zip(positives, parsed, strict=True)}
        for row, at in zip(negatives, self.file.read(negatives), strict=True):
            texts.setdefault(int(self.negative_hash[row]), at.negative)  # a text drawn twice is encoded once
        column = {text: at for at, text in enumerate(texts)}
        targets = np.array([column[int(self.positive_hash[row])] for row in positives], dtype=np.int64)
        masked = np.zeros((len(picks), len(texts)), dtype=bool)
        for at, group in enumerate(chosen):
            known = {int(text) for text in self.positive_hash[group]}
            masked[at, [column[text] for text in known if text in column]] = True
        masked[np.arange(len(picks)), targets] = False
        lists, teacher = self._lists(picks, column)
        queries, rows = [at.query for at in parsed], [row + 1 for row in positives]
        return DualBatch(queries, list(texts.values()), targets, masked, lists, teacher, rows)

    def _lists(
        self, picks: list[tuple[int, list[int]]], column: dict[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return each query's own passages as (columns, teacher's logits)."""
        width = 1 + max((len(negatives) for _, negatives in picks), default=0)
        lists = np.full((len(picks), width), -1, dtype=np.int64)
        teacher = np.full(lists.shape, np.nan, dtype=np.float32)
        for at, (positive, negatives) in enumerate(picks):
            texts = [self.positive_hash[positive], *self.negative_hash[negatives]]
            lists[at, : len(texts)] = [column[int(text)] for text in texts]
            if self.teacher is not None:
                teacher[at, : len(texts)] = [self.teacher[positive, 0], *self.teacher[negatives, 1]]
        return lists, teacher
