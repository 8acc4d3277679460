"""Hard negatives from a retriever's results: selection, denoising by a re-ranker, new training files.

Hard negatives follow ANCE (Xiong et al. 2021, arXiv 2007.00808). Denoising, which drops candidates that a
cross-encoder considers relevant, follows RocketQA (Qu et al. 2021, arXiv 2010.08191, section 4.2). Listwise
training determines the logits of a query up to a constant only: a candidate of such a re-ranker is judged by
its probability to beat the best positive of the query.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.data.formats import CrossRow, DualRow, RunRow, format_cross_row, format_dual_row
from torch_src.data.mined_files import COLUMNS, SIDECAR, MinedIds, format_mined_ids
from torch_src.data.row_file import text_hash
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.tools.mining_inputs import Located, candidates_by_group, positive_rows, without_spaces

RANK_BINS = (1, 11, 21, 51, 101, 201, 501)  # first ranks of the histogram


@dataclass(frozen=True)
class Rules:
    """Which candidates become negatives: the knobs of MiningHparams with the same names."""

    topk: int
    negatives: int
    max_score: float
    against_positive: bool
    select: str
    rank_from: int
    rank_to: int
    too_few: str
    promote_score: float
    seed: int


@dataclass
class Counts:
    """What happened to the queries and candidates; saved in mining.json and printed as a table."""

    queries: int = 0
    candidates: int = 0  # within topk
    known: int = 0  # known positives
    false_negatives: int = 0  # re-ranker probability of max_score or more
    promoted: int = 0
    outside: int = 0  # not in the rank window
    chosen: int = 0
    filled: int = 0  # negatives from the training file
    short_queries: int = 0  # with fewer negatives than requested
    dropped_queries: int = 0
    unjudged_queries: int = 0  # without a scored positive to compare with: not denoised
    positives: int = 0
    ranks: dict[int, int] = field(default_factory=lambda: dict.fromkeys(RANK_BINS, 0))  # bin -> negatives

    def warning(self) -> str | None:
        """Return a warning if the re-ranker considers most candidates relevant."""
        if self.false_negatives <= 0.5 * max(1, self.candidates - self.known):
            return None
        share = 100 * self.false_negatives / (self.candidates - self.known)
        return (
            f"the re-ranker considers {share:.0f}% of the candidates relevant, and they were dropped; check "
            "that it is trained (dev MRR@10 of do_cross_infer.py), or raise --max_score"
        )

    def table(self) -> list[str]:
        """Return the lines of the table."""
        lines = [_line("queries", self.queries), _line("candidates", self.candidates)]
        for name, count in (
            ("known positives, dropped", self.known),
            ("likely false negatives, dropped", self.false_negatives),
            ("of these promoted to positives", self.promoted),
            ("outside the rank window", self.outside),
            ("chosen as negatives", self.chosen),
        ):
            share = 100 / max(1, self.candidates) * count
            lines.append(_line(f"  {name}", count, f"{share:.1f}%"))
        lines += [
            _line("added from the training file", self.filled),
            _line("queries with too few negatives", self.short_queries),
            _line("queries omitted", self.dropped_queries),
            _line("queries not denoised (no positive)", self.unjudged_queries),
        ]
        for first, last in zip(RANK_BINS, [*RANK_BINS[1:], None], strict=True):
            if self.ranks[first]:
                ranks = f"{first} to {last - 1}" if last else f"{first} or more"
                bar = "#" * round(40 * self.ranks[first] / max(1, self.chosen))
                lines.append(_line(f"negatives of rank {ranks}", self.ranks[first], bar))
        return lines


def _line(name: str, count: int, more: str = "") -> str:
    return f"{name:36} {count:>12,}  {more}".rstrip()


@dataclass(frozen=True)
class Passage:
    """A positive or negative for the new files; None: unknown."""

    text: str
    row: int | None = None  # in the collection
    rank: int | None = None  # in the retriever's run
    score: float | None = None  # of the retriever
    logit: float | None = None  # of the re-ranker


MinedQuery = tuple[str, list[Passage], list[Passage]]  # query, positives, negatives
Logits = dict[int, float | None]  # row -> logit of the re-ranker; None without a re-ranker


class Miner:
    """Chooses the negatives of each query, and counts what happened in `counts`."""

    def __init__(self, data: DualTrainingSet, collection: PassageCollection, located: Located, rules: Rules):
        self.data, self.collection, self.located, self.rules = data, collection, located, rules
        self.counts = Counts()

    def mine(self, run: Path, logits: Iterable[float] | None) -> Iterator[MinedQuery]:
        """Yield (query, positives, negatives) of each query kept; `logits` are aligned with the run."""
        scores = None if logits is None else iter(logits)
        for number, (group, (query, rows)) in enumerate(candidates_by_group(self.data, run)):
            if (last := max((row.row for row in rows), default=0)) >= len(self.collection):
                raise UserError(f"{run}: row {last} is outside the collection of {len(self.collection):,}")
            logit_of: Logits = dict.fromkeys(row.row for row in rows)
            if scores is not None:
                values = [value for _, value in zip(rows, scores, strict=False)]
                if len(values) < len(rows):
                    raise UserError(f"{run}: more rows than re-ranker scores; delete both files")
                logit_of = dict(zip((row.row for row in rows), values, strict=True))
            yield from self._mine_query(number, group, query, rows, logit_of)
        if scores is not None and next(scores, None) is not None:
            raise UserError(f"{run}: fewer rows than re-ranker scores; delete both files")

    def _mine_query(
        self, number: int, group: np.ndarray, query: str, rows: list[RunRow], logit_of: Logits
    ) -> Iterator[MinedQuery]:
        counts, rules = self.counts, self.rules
        known = set(positive_rows(self.data, group, self.located))
        positives, base = self._positives(group, logit_of), self._base_logit(known, logit_of)
        eligible: list[RunRow] = []
        dropped: list[int] = []
        counts.queries += 1
        for row in (row for row in rows if row.rank <= rules.topk):
            counts.candidates += 1
            probability = sigmoid(logit_of[row.row], base)
            if row.row in known:
                counts.known += 1
            elif probability is not None and probability >= rules.max_score:
                counts.false_negatives += 1
                dropped.append(row.row)
                if rules.promote_score and probability > rules.promote_score:
                    self._promote(self._passage(row, logit_of), positives)
            elif rules.rank_from <= row.rank <= (rules.rank_to or rules.topk):
                eligible.append(row)
            else:
                counts.outside += 1
        wanted = rules.negatives * len(positives)
        negatives = self._choose(number, eligible, wanted, positives, logit_of)
        negatives = self._fill(group, negatives, wanted, dropped)
        if negatives:
            counts.positives += len(positives)
            yield query, positives, negatives
        else:
            counts.dropped_queries += 1

    def _promote(self, passage: Passage, positives: list[Passage]) -> None:
        """Add a passage to the positives unless one of them has the same text."""
        if without_spaces(passage.text) not in {without_spaces(other.text) for other in positives}:
            positives.append(passage)
            self.counts.promoted += 1

    def _base_logit(self, known: set[int], logit_of: Logits) -> float:
        """Return the logit of probability 0.5; inf (all probabilities 0) without a scored positive."""
        if not self.rules.against_positive:
            return 0.0
        logits = [logit for row in known if (logit := logit_of.get(row)) is not None]
        self.counts.unjudged_queries += not logits
        return max(logits, default=math.inf)

    def _positives(self, group: np.ndarray, logit_of: Logits) -> list[Passage]:
        """Return the distinct positives of a query, with their texts in the training file."""
        at = np.unique(self.data.positive_hash[group], return_index=True)[1]
        found = []
        for training_row in group[np.sort(at)].tolist():
            rows = self.located.get(int(self.data.positive_hash[training_row]))
            text = self.data.file.read([training_row])[0].positive
            row = rows[0] if rows else None
            found.append(Passage(text, row, logit=None if row is None else logit_of.get(row)))
        return found

    def _passage(self, row: RunRow, logit_of: Logits) -> Passage:
        return Passage(self.collection[row.row], row.row, row.rank, row.score, logit_of[row.row])

    def _choose(
        self, number: int, eligible: list[RunRow], wanted: int, positives: list[Passage], logit_of: Logits
    ) -> list[Passage]:
        """Return at most `wanted` negatives with distinct texts, none that of a positive."""
        if self.rules.select == "sample":
            order = np.random.default_rng([self.rules.seed, 4, number]).permutation(len(eligible))
            eligible = [eligible[at] for at in order]
        texts = {without_spaces(passage.text) for passage in positives}
        chosen: list[Passage] = []
        for row in eligible:
            if len(chosen) == wanted:
                break
            passage = self._passage(row, logit_of)
            if (text := without_spaces(passage.text)) not in texts:
                texts.add(text)
                chosen.append(passage)
                self.counts.ranks[max(first for first in RANK_BINS if first <= row.rank)] += 1
        self.counts.chosen += len(chosen)
        return chosen

    def _fill(
        self, group: np.ndarray, chosen: list[Passage], wanted: int, dropped: list[int]
    ) -> list[Passage]:
        """Return the negatives after the rule `too_few`.

        Texts that denoising dropped (rows `dropped`) are not added back from the training file.
        """
        if len(chosen) >= wanted:
            return chosen
        self.counts.short_queries += 1
        if self.rules.too_few != "original":
            return [] if self.rules.too_few == "drop" else chosen
        excluded = {text_hash(without_spaces(passage.text)) for passage in chosen}
        excluded |= set(self.data.positive_hash[group].tolist())
        excluded |= {text_hash(without_spaces(self.collection[row])) for row in dropped}
        for training_row in group.tolist():
            text = int(self.data.negative_hash[training_row])
            if len(chosen) < wanted and text not in excluded:
                excluded.add(text)
                chosen = [*chosen, Passage(self.data.file.read([training_row])[0].negative)]
                self.counts.filled += 1
        return chosen


def sigmoid(logit: float | None, base: float = 0.0) -> float | None:
    """Return the probability of a logit relative to `base`; None for None."""
    return None if logit is None else 1 / (1 + np.exp(-np.float64(np.clip(logit - base, -700, 700)))).item()


def write_mined(mined: Iterable[MinedQuery], folder: Path, pid_of: Callable[[int], str]) -> None:
    """Write dual.train.tsv, its ids and scores line by line, and cross.train.tsv to `folder`.

    The negatives of a query are divided among its positives, at least one each. `pid_of(row)` returns a pid.
    """
    dual, cross, sidecar = (folder / name for name in ("dual.train.tsv", "cross.train.tsv", SIDECAR))
    with atomic_write(dual) as dual_file, atomic_write(cross) as cross_file, atomic_write(sidecar) as id_file:
        id_file.write("\t".join(COLUMNS) + "\n")
        for query, positives, negatives in mined:
            for at, positive in enumerate(positives):
                for negative in negatives[at :: len(positives)] or [negatives[at % len(negatives)]]:
                    dual_file.write(format_dual_row(DualRow(query, positive.text, negative.text)))
                    ids = mined_ids(positive, pid_of), mined_ids(negative, pid_of)
                    id_file.write(format_mined_ids(*ids))
                cross_file.write(format_cross_row(CrossRow(query, positive.text, 1)))
            for negative in negatives:
                cross_file.write(format_cross_row(CrossRow(query, negative.text, 0)))


def mined_ids(passage: Passage, pid_of: Callable[[int], str]) -> MinedIds:
    """Return what the sidecar holds of a passage."""
    pid = None if passage.row is None else pid_of(passage.row)
    return MinedIds(passage.row, pid, passage.rank, passage.score, passage.logit)
