"""Writes the official layout: collection, ids, titles, training and dev files.

layout = OfficialLayoutWriter(folder, seed=42, counts=Counts())
layout.write_collection(Passage(...) for ...)
layout.write_queries(Query(...) for ...)
"""

import json
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from script.lib.foreign_files import Counts
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import (
    CrossRow,
    DualRow,
    format_cross_row,
    format_dual_row,
    format_passage,
    format_query,
)
from torch_src.data.lines import FormatError, shown
from torch_src.data.mined_files import COLUMNS, SIDECAR, MinedIds, format_mined_ids
from torch_src.data.passage_ids import LONGEST_PID
from torch_src.data.row_file import text_hash
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import log, warn

TITLES = "titles.tsv"  # beside the collection: row and title of each passage that had a title
MERGED = "merged_qids.tsv"  # in dev/: qid of a query with the text of an earlier one, qid of that one
Texts = PassageCollection | list[str]  # by row
RANDOM_NEGATIVES = 4  # of a training query without negatives


class Passage(NamedTuple):
    """One passage, and where it was read."""

    pid: str
    title: str
    text: str
    path: Path = Path("-")
    line: int = 0


@dataclass
class Query:
    """One query, where it was read, and its judged passages."""

    qid: str
    text: str
    split: str = "train"  # or dev
    path: Path = Path("-")
    line: int = 0
    grades: dict[str, int] = field(default_factory=dict)  # pid -> grade
    logits: dict[str, float] = field(default_factory=dict)  # pid -> a teacher's score
    number: int = 0  # in the order of reading: the seed of its random negatives

    def judge(self, pid: str, grade: int, min_grade: int) -> str:
        """Add a judgment, the higher grade counts; return what is merged, empty for a new passage."""
        known = self.grades.get(pid)
        self.grades[pid] = grade if known is None else max(grade, known)
        if known is None:
            return ""
        if known == grade:
            return "duplicate judgments: merged"
        if min(known, grade) < min_grade <= max(known, grade):
            return "negatives are also positives of their query: dropped"
        return "passages have two grades for one query: the higher counts"


def joined(title: str, text: str) -> str:
    """Return a passage as the collection holds it: the title before the text, in one line."""
    return one_line(f"{title} {text}" if title else text)


def one_line(text: str) -> str:
    """Return the text with TABs and line breaks replaced by spaces, as it fits into a column."""
    return text.replace("\t", " ").replace("\r\n", " ").replace("\n", " ").replace("\r", " ")


class OfficialLayoutWriter:
    """Writes the official layout to `folder`. Write the collection first: it assigns a row to each id."""

    def __init__(
        self, folder: Path, seed: int, counts: Counts, min_grade: int = 1, skip_duplicates: bool = False
    ):
        self.folder, self.seed, self.counts, self.min_grade = folder, seed, counts, min_grade
        self.skip_duplicates = skip_duplicates
        self.rows: dict[str, int] = {}
        self.hashes = array("Q")  # of the text of each row
        self.row_by_text: dict[int, int] = {}  # filled when it is needed
        self.pids: list[str] = []
        self.texts: list[str] = []  # of a collection that is linked
        self.empty: set[int] = set()  # rows without a text that training accepts
        self.random = 0

    # ---- passages

    def write_collection(self, passages: Iterable[Passage], source: Path | str = "the corpus") -> None:
        """Write part-00, passage2id.map.json and, when there are titles, titles.tsv."""
        folder, titled = self.folder / "passage-collection", 0
        with ExitStack() as stack:
            names = ("part-00", "passage2id.map.json", TITLES)
            part, ids, titles = (stack.enter_context(atomic_write(folder / name)) for name in names)
            ids.write("{")
            for passage in passages:
                row = len(self.rows)
                text = self._add_passage(passage, row)
                if text is None:
                    continue
                part.write(format_passage(text))
                comma = "," if row else ""
                ids.write(f"{comma}\n{json.dumps(str(row))}: {json.dumps(passage.pid, ensure_ascii=False)}")
                if passage.title:
                    titled += 1
                    titles.write(f"{row}\t{one_line(passage.title)}\n")
            ids.write("\n}\n")
        if not titled:
            (folder / TITLES).unlink()
        if not self.rows:
            raise UserError(f"{source}: contains no passages")
        log(f"{len(self.rows):,} passages")

    def link_collection(self, folder: Path, passages: Iterable[Passage]) -> None:
        """Link an existing collection instead of writing one; queries may name only these of its passages."""
        (self.folder / "passage-collection").symlink_to(folder.resolve(), target_is_directory=True)
        for passage in passages:
            self.texts.append(self._add_passage(passage, len(self.rows)) or "")

    def _add_passage(self, passage: Passage, row: int) -> str | None:
        """Check a passage and return its text as one line; None for a duplicate that is skipped."""
        pid, title, text, path, line = passage
        if len(pid) > LONGEST_PID:
            raise FormatError(path, line, f"passage id {shown(pid)}: over {LONGEST_PID} characters")
        clean = joined(title, text)
        hashed = text_hash(clean)
        if pid in self.rows:
            same = self.hashes[self.rows[pid]] == hashed
            if same and self.skip_duplicates:
                self.counts.add("passages have the id and text of an earlier one: dropped", path, line)
                return None
            what = (
                "the same text; --skip_duplicates drops it" if same else "another text (ids must be unique)"
            )
            raise FormatError(path, line, f"passage id {pid}: duplicate, with {what}")
        self.rows[pid] = row
        self.hashes.append(hashed)
        changed = clean != (f"{title} {text}" if title else text)
        self.counts.add("texts had TABs or line breaks: replaced by spaces", path, line, changed)
        if not clean.strip() or clean == "null":
            self.empty.add(row)
            self.counts.add("passages are empty: kept, so that every id has a row", path, line)
        return clean

    def pid_of_text(self, text: str) -> str | None:
        """Return the id of the first passage with this text, None without one."""
        if not self.row_by_text:
            self.pids = list(self.rows)
            for row in range(len(self.hashes) - 1, -1, -1):
                self.row_by_text[self.hashes[row]] = row
        row_found = self.row_by_text.get(text_hash(text))
        return None if row_found is None else self.pids[row_found]

    def has_text(self, pid: str, text: str) -> bool:
        """Return whether a passage of the collection has this text."""
        return self.hashes[self.rows[pid]] == text_hash(text)

    # ---- queries

    def write_queries(self, queries: Iterable[Query], source: Path | str = "the queries") -> int:
        """Write train/ and dev/, with the texts of the collection written before; return the dev queries."""
        collection: Texts = self.texts or PassageCollection(self.folder / "passage-collection")
        found: dict[str, dict[str, Query]] = {"train": {}, "dev": {}}  # split -> text -> query
        line_of: dict[tuple[str, str], Query] = {}
        merged: list[tuple[str, str]] = []
        read = 0
        for query in queries:
            query.number, read = read, read + 1
            self._check(query, line_of)
            known = found[query.split].setdefault(query.text, query)
            if known is not query:
                self._merge(query, known, merged)
        dev, train = self._with_positives(found["dev"]), self._with_positives(found["train"])
        if read and not dev and not train:
            raise UserError(f"{source}: no query has a positive passage (grade {self.min_grade} or above)")
        if train:
            self._write_train(train, collection)
        if dev:
            self._write_dev(dev, collection, merged)
        log(f"{len(train):,} training and {len(dev):,} dev queries")
        if self.random:
            log(f"{self.random:,} training queries had no negatives: random passages were added")
        both = sum(query.text in found["train"] for query in dev)
        if both:
            warn(f"{both:,} dev queries are also training queries: dev figures will be too high")
        return len(dev)

    def _check(self, query: Query, seen: dict[tuple[str, str], Query]) -> None:
        """Turn the text into one line; FormatError for an empty text, or one id with two texts."""
        clean = one_line(query.text)
        changed = clean != query.text
        self.counts.add("texts had TABs or line breaks: replaced by spaces", query.path, query.line, changed)
        query.text = clean
        if not clean.strip():
            raise FormatError(query.path, query.line, f"query {query.qid}: empty text")
        first = seen.setdefault((query.split, query.qid), query)
        if first.text != clean:
            message = f"query id {query.qid}: another text than in {first.path}:{first.line}"
            raise FormatError(query.path, query.line, message)

    def _merge(self, query: Query, known: Query, merged: list[tuple[str, str]]) -> None:
        """Add the judgments of a query to an earlier one with its text: a run identifies queries by text."""
        same = query.qid == known.qid
        what = "duplicate queries: merged"
        if not same:
            what = f"{query.split} queries have the text of an earlier query: merged into it"
        self.counts.add(what, query.path, query.line)
        if not same and query.split == "dev":
            merged.append((query.qid, known.qid))
        for pid, grade in query.grades.items():
            if what := known.judge(pid, grade, self.min_grade):
                self.counts.add(what, query.path, query.line)
        known.logits = {**query.logits, **known.logits}

    def _with_positives(self, queries: dict[str, Query]) -> list[Query]:
        """Return the queries with a positive passage; count the others."""
        kept = []
        for query in queries.values():
            if query.split == "train":
                self._drop_unusable(query)
                graded = sum(grade > 1 for grade in query.grades.values())
                what = "training judgments have a grade above 1: training files hold no grades"
                self.counts.add(what, query.path, query.line, graded)
            if any(grade >= self.min_grade for grade in query.grades.values()):
                kept.append(query)
            else:
                self.counts.add("queries have no positive passage: dropped", query.path, query.line)
        return kept

    def _drop_unusable(self, query: Query) -> None:
        """Drop empty passages, which training refuses, and negatives with the text of a positive."""
        positives = {
            self.hashes[self.rows[pid]] for pid, grade in query.grades.items() if grade >= self.min_grade
        }
        for pid, grade in [*query.grades.items()]:
            what = ""
            if self.rows[pid] in self.empty:
                what = "training judgments of empty passages: dropped"
            elif grade < self.min_grade and self.hashes[self.rows[pid]] in positives:
                what = "negatives have the text of a positive: dropped"
            if what:
                self.counts.add(what, query.path, query.line)
                del query.grades[pid]

    # ---- training files

    def _write_train(self, queries: list[Query], collection: Texts) -> None:
        folder, has_logits = self.folder / "train", any(query.logits for query in queries)
        with ExitStack() as stack:
            names = ("dual.train.tsv", "cross.train.tsv", SIDECAR)
            dual, cross, sidecar = (stack.enter_context(atomic_write(folder / name)) for name in names)
            sidecar.write("\t".join(COLUMNS) + "\n")
            for query in queries:
                self._write_training_rows(dual, cross, sidecar, collection, query)
        if not has_logits:
            (folder / SIDECAR).unlink()

    def _write_training_rows(
        self, dual: IO[str], cross: IO[str], sidecar: IO[str], collection: Texts, query: Query
    ) -> None:
        positives = [pid for pid, grade in query.grades.items() if grade >= self.min_grade]
        negatives = [pid for pid, grade in query.grades.items() if grade < self.min_grade]
        if not negatives:
            negatives = self._random_negatives(query, positives)
            self.random += 1
        if not negatives:
            what = "training queries have no negative in so small a collection: only in cross.train.tsv"
            self.counts.add(what, query.path, query.line)
        texts = {pid: collection[self.rows[pid]] for pid in (*positives, *negatives)}
        for positive in positives:
            for negative in negatives:
                dual.write(format_dual_row(DualRow(query.text, texts[positive], texts[negative])))
                sidecar.write(format_mined_ids(self._ids(query, positive), self._ids(query, negative)))
            cross.write(format_cross_row(CrossRow(query.text, texts[positive], 1)))
        for negative in negatives:
            cross.write(format_cross_row(CrossRow(query.text, texts[negative], 0)))

    def _ids(self, query: Query, pid: str) -> MinedIds:
        return MinedIds(self.rows[pid], pid, None, None, query.logits.get(pid))

    def _random_negatives(self, query: Query, positives: list[str]) -> list[str]:
        """Return random passages that are neither empty nor a positive's text."""
        if not self.pids:
            self.pids = list(self.rows)
        generator = np.random.default_rng([self.seed, query.number])
        count = min(len(self.rows), RANDOM_NEGATIVES + len(positives))
        drawn = generator.choice(len(self.rows), count, replace=False).tolist()
        answers = {self.hashes[self.rows[pid]] for pid in positives}
        usable = [row for row in drawn if row not in self.empty and self.hashes[row] not in answers]
        return [self.pids[row] for row in usable[:RANDOM_NEGATIVES]]

    # ---- dev files

    def _write_dev(self, queries: list[Query], collection: Texts, merged: list[tuple[str, str]]) -> None:
        folder = self.folder / "dev"
        with atomic_write(folder / "dev.json") as file:
            for query in queries:
                answers = [self._answer(pid, grade, collection) for pid, grade in query.grades.items()]
                entry = {"question_id": query.qid, "question": query.text, "answer_paragraphs": answers}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        with atomic_write(folder / "dev.q.format") as file:
            file.writelines(format_query(query.text) for query in queries)
        with atomic_write(folder / "q2qid.dev.json") as file:
            json.dump({query.text: query.qid for query in queries}, file, ensure_ascii=False)
        if merged:
            with atomic_write(folder / MERGED) as file:
                file.writelines(f"{qid}\t{kept}\n" for qid, kept in merged)

    def _answer(self, pid: str, grade: int, collection: Texts) -> dict[str, object]:
        """Return a positive as dev.json holds it, with a grade above 1."""
        answer: dict[str, object] = {"paragraph_id": pid, "paragraph_text": collection[self.rows[pid]]}
        return answer | ({"grade": grade} if grade > 1 else {})
