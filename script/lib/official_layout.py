"""The official layout as it is written: collection, ids, titles, training and dev files.

layout = Layout(folder, seed=42)
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

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import log

TITLES = "titles.tsv"  # beside the collection: row and title of each passage that had one


@dataclass
class Query:
    """One query with the ids of its passages."""

    qid: str
    text: str
    positives: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    split: str = "train"


class Cleaner:
    """Makes texts fit into a column; counts those that it had to change."""

    def __init__(self):
        self.changed = 0

    def __call__(self, text: str) -> str:
        clean = text.replace("\t", " ").replace("\r\n", " ").replace("\n", " ")
        self.changed += clean != text
        return clean


class Layout:
    """Writes the official layout into `folder`; the collection first, which gives each id its row."""

    def __init__(self, folder: Path, seed: int):
        if folder.exists():
            raise UserError(f"{folder}: is there already; name another folder")
        self.target, self.folder = folder, folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that failed
        self.seed, self.clean = seed, Cleaner()
        self.rows: dict[str, int] = {}
        self.absent = 0  # negatives that are not in the corpus

    def finish(self) -> None:
        """Give the folder its name: it is whole."""
        for path in self.folder.rglob("*.tsv"):
            if not path.stat().st_size:
                path.unlink()  # no titles, no training queries
        self.folder.rename(self.target)

    def write_collection(self, passages: Iterable[tuple[str, str, str]]) -> None:
        """Write part-00, passage2id.map.json and, where there are titles, titles.tsv."""
        folder = self.folder / "passage-collection"
        with ExitStack() as stack:
            names = ("part-00", "passage2id.map.json", TITLES)
            part, ids, titles = (stack.enter_context(atomic_write(folder / name)) for name in names)
            ids.write("{")
            for row, (pid, title, text) in enumerate(passages):
                if not pid or {"\t", "\n", "\0"} & set(pid):
                    raise UserError(f"the id {pid!r}: empty, or with a TAB, a line end or a NUL in it")
                if pid in self.rows:
                    raise UserError(f"the passage {pid} is there twice; ids must be unique")
                self.rows[pid] = row
                title, text = self.clean(title), self.clean(text)
                part.write(f"-\t\t{title} {text}\t0\n" if title else f"-\t\t{text}\t0\n")
                ids.write(
                    f"{',' if row else ''}\n{json.dumps(str(row))}: {json.dumps(pid, ensure_ascii=False)}"
                )
                if title:
                    titles.write(f"{row}\t{title}\n")
            ids.write("\n}\n")
        if not self.rows:
            raise UserError("no passages found")
        log(f"{len(self.rows):,} passages")

    def write_queries(self, queries: Iterable[Query]) -> None:
        """Write train/ and dev/ of the queries, texts taken from the collection that was written."""
        collection = PassageCollection(self.folder / "passage-collection")
        counts = {"train": 0, "dev": 0, "drawn": 0}
        dev: dict[str, Query] = {}
        with ExitStack() as stack:
            names = ("train/dual.train.tsv", "train/cross.train.tsv")
            dual, cross = (stack.enter_context(atomic_write(self.folder / name)) for name in names)
            for number, query in enumerate(queries):
                self._check(query)
                counts[query.split] += 1
                if query.split == "dev":
                    self._add_dev(dev, query)
                else:
                    counts["drawn"] += self._write_training(dual, cross, collection, number, query)
        if dev:
            self._write_dev(dev, collection)
        log(f"{counts['train']:,} training and {counts['dev']:,} dev queries")
        if counts["drawn"]:
            log(f"{counts['drawn']:,} training queries had no negatives: some were drawn at random")
        if self.absent:
            log(f"{self.absent:,} negatives are not in the corpus: left out")
        if self.clean.changed:
            log(f"{self.clean.changed:,} texts had TABs or line ends, which became blanks")

    def _check(self, query: Query) -> None:
        known = [pid for pid in query.negatives if pid in self.rows]
        self.absent += len(query.negatives) - len(known)
        query.negatives = known
        unknown = [pid for pid in query.positives if pid not in self.rows]
        if unknown:
            raise UserError(f"query {query.qid}: the passage {unknown[0]} is not in the corpus")
        if not query.text.strip():
            raise UserError(f"query {query.qid}: its text is empty")
        if not query.positives:
            raise UserError(f"query {query.qid}: no positive passage")

    def _write_training(self, dual, cross, collection, number: int, query: Query) -> bool:
        text, positives = self.clean(query.text), [self.rows[pid] for pid in query.positives]
        negatives = [self.rows[pid] for pid in query.negatives] or self._draw(number, positives)
        for positive in positives:
            for negative in negatives:
                dual.write(f"{text}\t\t{collection[positive]}\t\t{collection[negative]}\t0\n")
            cross.write(f"{text}\t\t{collection[positive]}\t1\n")
        cross.writelines(f"{text}\t\t{collection[negative]}\t0\n" for negative in negatives)
        return not query.negatives

    def _draw(self, number: int, positives: list[int]) -> list[int]:
        draw = np.random.default_rng([self.seed, number])
        rows = draw.choice(len(self.rows), min(len(self.rows), 4 + len(positives)), replace=False).tolist()
        return [row for row in rows if row not in positives][:4]

    def _add_dev(self, dev: dict[str, Query], query: Query) -> None:
        text = self.clean(query.text)
        if text in dev:  # results know a query by its text: one entry with the answers of both
            known = dev[text]
            known.positives += [pid for pid in query.positives if pid not in known.positives]
        else:
            dev[text] = query

    def _write_dev(self, dev: dict[str, Query], collection) -> None:
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
            file.writelines(f"{text}\t-\t-\t0\n" for text in dev)
        with atomic_write(folder / "q2qid.dev.json") as file:
            json.dump({text: query.qid for text, query in dev.items()}, file, ensure_ascii=False)
