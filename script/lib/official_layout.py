"""Writes the official layout: collection, ids, titles, training and dev files.

layout = OfficialLayoutWriter(folder, seed=42)
layout.write_collection((pid, title, text) for ...)
layout.write_queries(Query(...) for ...)
layout.finish()
"""

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.data.formats import (
    CrossRow,
    DualRow,
    format_cross_row,
    format_dual_row,
    format_passage,
    format_query,
)
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import log

TITLES = "titles.tsv"  # beside the collection: row and title of each passage that had a title
RANDOM_NEGATIVES = 4  # of a training query without negatives


@dataclass
class Query:
    """One query with the ids of its passages."""

    qid: str
    text: str
    positives: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    split: str = "train"


class OfficialLayoutWriter:
    """Writes the official layout to `folder`. Write the collection first: it assigns a row to each id."""

    def __init__(self, folder: Path, seed: int):
        if folder.exists():
            raise UserError(f"{folder}: already exists; name another folder")
        self.target, self.folder = folder, folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(self.folder, ignore_errors=True)  # from a run that failed
        self.seed = seed
        self.rows: dict[str, int] = {}
        self.unknown_negatives = self.changed_texts = 0

    def finish(self) -> None:
        """Delete empty files and give the folder its final name."""
        for path in self.folder.rglob("*.tsv"):
            if not path.stat().st_size:
                path.unlink()  # no titles, or no training queries
        self.folder.rename(self.target)

    def write_collection(self, passages: Iterable[tuple[str, str, str]]) -> None:
        """Write part-00, passage2id.map.json and, when there are titles, titles.tsv."""
        folder = self.folder / "passage-collection"
        with ExitStack() as stack:
            names = ("part-00", "passage2id.map.json", TITLES)
            part, ids, titles = (stack.enter_context(atomic_write(folder / name)) for name in names)
            ids.write("{")
            for row, (pid, title, text) in enumerate(passages):
                if not pid or {"\t", "\n", "\0"} & set(pid):
                    raise UserError(f"passage id {pid!r}: empty, or contains a TAB, line break or NUL")
                if pid in self.rows:
                    raise UserError(f"passage id {pid}: duplicate (ids must be unique)")
                self.rows[pid] = row
                title, text = self._one_line(title), self._one_line(text)
                part.write(format_passage(f"{title} {text}" if title else text))
                comma = "," if row else ""
                ids.write(f"{comma}\n{json.dumps(str(row))}: {json.dumps(pid, ensure_ascii=False)}")
                if title:
                    titles.write(f"{row}\t{title}\n")
            ids.write("\n}\n")
        if not self.rows:
            raise UserError("no passages found")
        log(f"{len(self.rows):,} passages")

    def write_queries(self, queries: Iterable[Query]) -> None:
        """Write train/ and dev/, with the texts of the collection written before."""
        collection = PassageCollection(self.folder / "passage-collection")
        counts = {"train": 0, "dev": 0, "random": 0}
        dev: dict[str, Query] = {}
        with ExitStack() as stack:
            names = ("train/dual.train.tsv", "train/cross.train.tsv")
            dual, cross = (stack.enter_context(atomic_write(self.folder / name)) for name in names)
            for number, query in enumerate(queries):
                self._check(query)
                counts[query.split] += 1
                if query.split == "dev":
                    self._add_dev(dev, query)
                    continue
                if not query.negatives:
                    counts["random"] += 1
                self._write_training(dual, cross, collection, number, query)
        if dev:
            self._write_dev(dev, collection)
        log(f"{counts['train']:,} training and {counts['dev']:,} dev queries")
        if counts["random"]:
            log(f"{counts['random']:,} training queries had no negatives: random passages were added")
        if self.unknown_negatives:
            log(f"{self.unknown_negatives:,} negatives are not in the corpus: omitted")
        if self.changed_texts:
            log(f"{self.changed_texts:,} texts had TABs or line breaks: replaced by spaces")

    def _one_line(self, text: str) -> str:
        """Return the text as it fits into a column, and count the texts that this changes."""
        clean = text.replace("\t", " ").replace("\r\n", " ").replace("\n", " ")
        self.changed_texts += clean != text
        return clean

    def _check(self, query: Query) -> None:
        known = [pid for pid in query.negatives if pid in self.rows]
        self.unknown_negatives += len(query.negatives) - len(known)
        query.negatives = known
        unknown = [pid for pid in query.positives if pid not in self.rows]
        if unknown:
            raise UserError(f"query {query.qid}: passage {unknown[0]} is not in the corpus")
        if not query.text.strip():
            raise UserError(f"query {query.qid}: empty text")
        if not query.positives:
            raise UserError(f"query {query.qid}: no positive passage")

    def _write_training(
        self, dual: IO[str], cross: IO[str], collection: PassageCollection, number: int, query: Query
    ) -> None:
        text, positives = self._one_line(query.text), [self.rows[pid] for pid in query.positives]
        negatives = [self.rows[pid] for pid in query.negatives] or self._random_rows(number, positives)
        for positive in positives:
            for negative in negatives:
                dual.write(format_dual_row(DualRow(text, collection[positive], collection[negative])))
            cross.write(format_cross_row(CrossRow(text, collection[positive], 1)))
        for negative in negatives:
            cross.write(format_cross_row(CrossRow(text, collection[negative], 0)))

    def _random_rows(self, number: int, positives: list[int]) -> list[int]:
        generator = np.random.default_rng([self.seed, number])
        count = min(len(self.rows), RANDOM_NEGATIVES + len(positives))
        rows = generator.choice(len(self.rows), count, replace=False).tolist()
        return [row for row in rows if row not in positives][:RANDOM_NEGATIVES]

    def _add_dev(self, dev: dict[str, Query], query: Query) -> None:
        text = self._one_line(query.text)
        if text in dev:  # results identify queries by text: one entry with the answers of both
            known = dev[text]
            known.positives += [pid for pid in query.positives if pid not in known.positives]
        else:
            dev[text] = query

    def _write_dev(self, dev: dict[str, Query], collection: PassageCollection) -> None:
        folder = self.folder / "dev"
        with atomic_write(folder / "dev.json") as file:
            for text, query in dev.items():
                answers = [
                    {"paragraph_id": pid, "paragraph_text": collection[self.rows[pid]]}
                    for pid in query.positives
                ]
                entry = {"question_id": query.qid, "question": text, "answer_paragraphs": answers}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        with atomic_write(folder / "dev.q.format") as file:
            file.writelines(map(format_query, dev))
        with atomic_write(folder / "q2qid.dev.json") as file:
            json.dump({text: query.qid for text, query in dev.items()}, file, ensure_ascii=False)
