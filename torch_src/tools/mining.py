"""Negatives from the retriever's own results: drop known positives, denoise by re-ranker scores, write.

Hard negatives as in Xiong et al. 2021 (ANCE, arXiv 2007.00808); dropping candidates that a cross-encoder
takes for relevant is the denoising of Qu et al. 2021 (RocketQA, arXiv 2010.08191, section 4.2). A re-ranker
that was trained listwise has learnt differences alone, its logits have no zero: it is asked for the
probability that a candidate is better than the query's best positive.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.data.formats import RunRow, format_run_row, run_by_query
from torch_src.data.mined_files import COLUMNS, SIDECAR
from torch_src.data.row_file import text_hash
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write

READ_ROWS = 4096  # passages held at once while positives are looked for in the collection
RANK_BINS = (1, 11, 21, 51, 101, 201, 501)  # first ranks of the histogram


def same_text(text: str) -> str:
    """Return what two texts must share to be the same passage: everything but white space."""
    return "".join(text.split())


def open_training_set(path: str) -> DualTrainingSet:
    """Return dual.train.tsv grouped by query."""
    return DualTrainingSet(path, same_text)


def write_train_queries(data: DualTrainingSet, path: Path) -> None:
    """Write each distinct query once, in the format of dev.q.format, in the order of their first rows."""
    with atomic_write(path) as file:
        for group in data.groups:
            file.write(f"{data.file.read([int(group[0])])[0].query}\t-\t-\t0\n")


def locate_positives(data: DualTrainingSet, collection: PassageCollection) -> dict[int, list[int]]:
    """Return {hash of a positive's text: the rows that hold it}, from one pass over the collection."""
    wanted = set(data.positive_hash.tolist())
    found: dict[int, list[int]] = {}
    for start in range(0, len(collection), READ_ROWS):
        texts = collection[start : start + READ_ROWS]
        for row, text in enumerate(texts, start=start):
            if (key := text_hash(same_text(text))) in wanted:
                found.setdefault(key, []).append(row)
    return found


def with_positives(data: DualTrainingSet, located: dict[int, list[int]], run: Path, target: Path) -> None:
    """Write the run with each query's known positives put behind its last rank where it lacks them.

    Their re-ranker scores are wanted, too (a teacher's list needs the positive); their retriever score is set
    to that of the last candidate.
    """
    with atomic_write(target) as file:
        for group, (query, rows) in matched(data, run):
            there = {row.row for row in rows}
            behind = [row for row in known_rows(data, group, located) if row not in there]
            least = rows[-1].score if rows else 0.0
            extra = [RunRow(query, row, len(rows) + at, least) for at, row in enumerate(behind, 1)]
            file.writelines(map(format_run_row, [*rows, *extra]))


def known_rows(data: DualTrainingSet, group: np.ndarray, located: dict[int, list[int]]) -> list[int]:
    """Return the collection's rows that hold a known positive of a query, in ascending order."""
    texts = set(data.positive_hash[group].tolist())
    return sorted(row for text in texts for row in located.get(text, ()))


def matched(data: DualTrainingSet, run: Path) -> Iterator[tuple[np.ndarray, tuple[str, list[RunRow]]]]:
    """Yield (rows of the training file, (query, candidates)); UserError when the two do not fit together.

    A query that the run has not (BM25 may find nothing) has no candidates; one that it has twice, but for
    white space, has those of the first.
    """
    found, seen = run_by_query(run), set()
    query, rows = next(found, ("", []))
    if not rows:
        raise UserError(f"{run}: no results in it")
    for group in data.groups:
        if text_hash(same_text(query)) == int(data.query_hash[group[0]]):
            yield group, (query, rows)
            seen.add(int(data.query_hash[group[0]]))
            while rows and text_hash(same_text(query)) in seen:
                query, rows = next(found, ("", []))
        else:
            yield group, (data.file.read([int(group[0])])[0].query, [])
    if rows:
        raise UserError(f"{run}: its queries are not those of {data.path}, in that order; delete it")


@dataclass(frozen=True)
class Rules:
    """Which candidates become negatives (the knobs of MiningHparams under the same names)."""

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
    """What became of the candidates, for the closing table."""

    queries: int = 0
    candidates: int = 0  # within topk
    known: int = 0  # known positives among them
    false_negatives: int = 0  # too high a re-ranker probability
    promoted: int = 0
    outside: int = 0  # of the rank window
    chosen: int = 0
    filled: int = 0  # negatives of the training file put in
    short_queries: int = 0  # with fewer negatives than asked
    dropped_queries: int = 0
    unjudged_queries: int = 0  # whose positive has no score to hold the others' against: not denoised
    positives: int = 0
    ranks: dict[int, int] = field(
        default_factory=lambda: dict.fromkeys(RANK_BINS, 0)
    )  # bin's first rank -> negatives

    def warning(self) -> str | None:
        """Return a warning when the re-ranker takes most candidates for answers."""
        if self.false_negatives <= 0.5 * max(1, self.candidates - self.known):
            return None
        share = 100 * self.false_negatives / (self.candidates - self.known)
        return (
            f"the re-ranker takes {share:.0f}% of the candidates for answers, and they were dropped: is it "
            "trained (dev MRR@10 of do_cross_infer.py)? If so, raise --max_score"
        )

    def lines(self) -> list[str]:
        """Return the table."""
        share = 100 / max(1, self.candidates)
        rows = [
            ("queries", self.queries, ""),
            ("candidates", self.candidates, ""),
            ("  known positives, dropped", self.known, f"{share * self.known:.1f}%"),
            (
                "  likely false negatives, dropped",
                self.false_negatives,
                f"{share * self.false_negatives:.1f}%",
            ),
            ("  of these promoted to positives", self.promoted, f"{share * self.promoted:.1f}%"),
            ("  outside the ranks asked for", self.outside, f"{share * self.outside:.1f}%"),
            ("  chosen as negatives", self.chosen, f"{share * self.chosen:.1f}%"),
            ("filled up from the training file", self.filled, ""),
            ("queries with too few negatives", self.short_queries, ""),
            ("queries left out", self.dropped_queries, ""),
            ("queries not denoised (no positive found)", self.unjudged_queries, ""),
        ]
        lines = [f"{name:36} {count:>12,}  {more}".rstrip() for name, count, more in rows]
        for first, last in zip(RANK_BINS, [*RANK_BINS[1:], None], strict=True):
            if self.ranks[first]:
                name = f"negatives of rank {first}" + (f" to {last - 1}" if last else " or more")
                bar = "#" * round(40 * self.ranks[first] / max(1, self.chosen))
                lines.append(f"{name:36} {self.ranks[first]:>12,}  {bar}".rstrip())
        return lines


@dataclass(frozen=True)
class Passage:
    """A positive or negative on its way into the new files; what is not known of it is None."""

    text: str
    row: int | None = None  # in the collection
    rank: int | None = None  # in the retriever's result
    score: float | None = None  # the retriever's
    logit: float | None = None  # the re-ranker's


class Miner:
    """Chooses each query's negatives; `counts` says what happened."""

    def __init__(self, data: DualTrainingSet, collection: PassageCollection, located, rules: Rules):
        self.data, self.collection, self.located, self.rules = data, collection, located, rules
        self.counts = Counts()

    def mine(self, run: Path, logits: Iterable[float] | None) -> Iterator[tuple[str, list, list]]:
        """Yield (query, positives, negatives) of each query kept; `logits` go with the run's rows."""
        scores = None if logits is None else iter(logits)
        for number, (group, (query, rows)) in enumerate(matched(self.data, run)):
            if (last := max((row.row for row in rows), default=0)) >= len(self.collection):
                raise UserError(f"{run}: row {last} is outside the collection of {len(self.collection):,}")
            values = [None] * len(rows) if scores is None else [_next(scores, run) for _ in rows]
            yield from self._one(number, group, query, rows, values)
        if scores is not None and next(scores, None) is not None:
            raise UserError(f"{run}: fewer rows than there are re-ranker scores; delete both")

    def _one(self, number: int, group: np.ndarray, query: str, rows: list[RunRow], logits: list):
        counts, known = self.counts, set(known_rows(self.data, group, self.located))
        logit_of = dict(zip((row.row for row in rows), logits, strict=True))
        positives = self._positives(group, logit_of)
        candidates = [row for row in rows if row.rank <= self.rules.topk]
        counts.queries += 1
        counts.candidates += len(candidates)
        left, dropped, base = [], [], self._base(known, logit_of)
        for row in candidates:
            probability = sigmoid(logit_of[row.row], base)
            if row.row in known:
                counts.known += 1
            elif probability is not None and probability >= self.rules.max_score:
                counts.false_negatives += 1
                dropped.append(row.row)
                if self.rules.promote_score and probability > self.rules.promote_score:
                    counts.promoted += self._promote(self._passage(row, logit_of), positives)
            elif not self.rules.rank_from <= row.rank <= (self.rules.rank_to or self.rules.topk):
                counts.outside += 1
            else:
                left.append(row)
        negatives = self._choose(number, left, self.rules.negatives * len(positives), positives, logit_of)
        negatives = self._fill(group, negatives, self.rules.negatives * len(positives), dropped)
        if negatives:
            counts.positives += len(positives)
            yield query, positives, negatives
        else:
            counts.dropped_queries += 1

    def _promote(self, passage: Passage, positives: list[Passage]) -> bool:
        """Add a passage to the positives; False when its text is there already."""
        new = same_text(passage.text) not in {same_text(other.text) for other in positives}
        if new:
            positives.append(passage)
        return new

    def _base(self, known: set[int], logit_of: dict) -> float:
        """Return the logit at which a candidate has probability 0.5; inf where nothing can be said."""
        if not self.rules.against_positive:
            return 0.0
        logits = [logit_of[row] for row in known if logit_of.get(row) is not None]
        self.counts.unjudged_queries += not logits
        return max(logits, default=math.inf)

    def _positives(self, group: np.ndarray, logit_of: dict) -> list[Passage]:
        """Return the query's distinct positives, as the training file has them."""
        at = np.unique(self.data.positive_hash[group], return_index=True)[1]
        found = []
        for training_row in group[np.sort(at)].tolist():
            rows = self.located.get(int(self.data.positive_hash[training_row]), [None])
            text = self.data.file.read([training_row])[0].positive
            found.append(Passage(text, rows[0], None, None, logit_of.get(rows[0])))
        return found

    def _passage(self, row: RunRow, logit_of: dict) -> Passage:
        return Passage(self.collection[row.row], row.row, row.rank, row.score, logit_of[row.row])

    def _choose(self, number: int, left: list[RunRow], wanted: int, positives, logit_of) -> list[Passage]:
        """Return at most `wanted` of the candidates left, each text once and none a positive's."""
        if self.rules.select == "sample":
            order = np.random.default_rng([self.rules.seed, 4, number]).permutation(len(left))
            left = [left[at] for at in order]
        texts = {same_text(passage.text) for passage in positives}
        chosen = []
        for row in left:
            if len(chosen) == wanted:
                break
            passage = self._passage(row, logit_of)
            if (text := same_text(passage.text)) not in texts:
                texts.add(text)
                chosen.append(passage)
        self.counts.chosen += len(chosen)
        for passage in chosen:
            self.counts.ranks[max(first for first in RANK_BINS if first <= passage.rank)] += 1
        return chosen

    def _fill(
        self, group: np.ndarray, chosen: list[Passage], wanted: int, dropped: list[int]
    ) -> list[Passage]:
        """Return the negatives after what `too_few` says of a query that has fewer than `wanted`.

        A text that the re-ranker takes for an answer (rows `dropped`) does not come back by the training
        file.
        """
        if len(chosen) >= wanted:
            return chosen
        self.counts.short_queries += 1
        if self.rules.too_few != "original":
            return [] if self.rules.too_few == "drop" else chosen
        taken = {text_hash(same_text(passage.text)) for passage in chosen}
        taken |= set(self.data.positive_hash[group].tolist())
        taken |= {text_hash(same_text(self.collection[row])) for row in dropped}
        for training_row in group.tolist():
            text = int(self.data.negative_hash[training_row])
            if len(chosen) < wanted and text not in taken:
                taken.add(text)
                chosen = [*chosen, Passage(self.data.file.read([training_row])[0].negative)]
                self.counts.filled += 1
        return chosen


def sigmoid(logit: float | None, base: float = 0.0) -> float | None:
    """Return the probability of a logit above `base`: 0 where that is inf; None stays None."""
    return None if logit is None else 1 / (1 + np.exp(-np.float64(np.clip(logit - base, -700, 700)))).item()


def _next(scores: Iterator[float], run) -> float:
    value = next(scores, None)
    if value is None:
        raise UserError(f"{run}: more rows than there are re-ranker scores; delete both")
    return value


def write_mined(mined: Iterable[tuple[str, list, list]], folder: Path, pid_of) -> None:
    """Write dual.train.tsv, its sidecar of ids line by line, and cross.train.tsv into `folder`.

    Each positive stands with its share of the negatives, at least one; `pid_of(row)` names a passage.
    """
    dual, cross, ids = (folder / name for name in ("dual.train.tsv", "cross.train.tsv", SIDECAR))
    with atomic_write(dual) as dual_file, atomic_write(cross) as cross_file, atomic_write(ids) as id_file:
        id_file.write("\t".join(COLUMNS) + "\n")
        for query, positives, negatives in mined:
            for at, positive in enumerate(positives):
                share = negatives[at :: len(positives)] or [negatives[at % len(negatives)]]
                for negative in share:
                    dual_file.write(f"{query}\t\t{positive.text}\t\t{negative.text}\t0\n")
                    id_file.write("\t".join(_ids(positive, pid_of) + _ids(negative, pid_of)) + "\n")
                cross_file.write(f"{query}\t\t{positive.text}\t1\n")
            for negative in negatives:
                cross_file.write(f"{query}\t\t{negative.text}\t0\n")


def _ids(passage: Passage, pid_of) -> list[str]:
    pid = None if passage.row is None else pid_of(passage.row)
    score, logit = (None if x is None else f"{x:.9g}" for x in (passage.score, passage.logit))
    return ["" if x is None else str(x) for x in (passage.row, pid, passage.rank, score, logit)]
