"""One pass over a data folder of the official layout: every fault with file and line, in bounded memory."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torch_src.data.collection import collection_files
from torch_src.data.formats import (
    parse_candidate,
    parse_cross_row,
    parse_dev_query,
    parse_dual_row,
    parse_id_pair,
    parse_passage,
    parse_query,
    read_q2qid,
)
from torch_src.data.lines import FormatError, decode, raw_lines
from torch_src.data.passage_ids import read_passage_ids
from torch_src.data.row_file import text_hash
from torch_src.runtime.errors import UserError

KEPT = 1000  # faults in memory, whatever their number
PERCENTILES = (50, 90, 99, 100)
LONGEST = 1 << 16  # characters; longer texts are counted as this long


@dataclass
class Lengths:
    """How long the texts of one kind are, in characters: a histogram, whatever their number."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(LONGEST + 1, dtype=np.int64))

    def add(self, text: str) -> None:
        self.counts[min(len(text), LONGEST)] += 1

    def percentile(self, percent: float) -> int:
        """Return the smallest length that so many percent of the texts do not exceed."""
        return int(np.searchsorted(np.cumsum(self.counts), percent / 100 * self.counts.sum()))

    def share_above(self, limit: int) -> float:
        """Return the share of texts longer than `limit`."""
        return float(self.counts[limit + 1 :].sum() / max(1, self.counts.sum()))


@dataclass
class Findings:
    """What was found: faults (file, line, what), notes, counts and lengths.

    Only the first `KEPT` faults stay in memory; `report(file, line, what)` is told of every one.
    """

    report: Callable[[str, int, str], object] | None = None
    fault_count: int = 0
    faults: list[tuple[str, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, Lengths] = field(default_factory=dict)

    def fault(self, path, line: int, what: str) -> None:
        self.fault_count += 1
        if len(self.faults) < KEPT:
            self.faults.append((str(path), line, what))
        if self.report is not None:
            self.report(str(path), line, what)

    def length(self, kind: str, text: str) -> None:
        self.lengths.setdefault(kind, Lengths()).add(text)


class DataCheck:
    """Checks one folder; `run()` returns what it found. Files that are not there are notes, not faults."""

    def __init__(self, folder: str, report: Callable | None = None):
        self.folder, self.found = Path(folder), Findings(report)
        self.pids: np.ndarray | None = None
        self.dev_queries: set[int] = set()
        self.dev_qids: dict[str, int] = {}  # qid -> line of dev.json
        self.answers: dict[bytes, int] = {}  # pid -> hash of its text in dev.json

    def run(self) -> Findings:
        """Return the findings."""
        self.check_ids()
        self.check_dev()
        self.check_queries()
        self.check_passages()
        self.check_training("dual.train.tsv", parse_dual_row, ("positive", "negative"))
        self.check_training("cross.train.tsv", parse_cross_row, ("passage",))
        self.check_candidates()
        return self.found

    def rows_of(self, path: Path, parse: Callable) -> Iterator[tuple[int, object]]:
        """Yield (line, parsed row) of the sound lines of a file; the others are faults."""
        rows = 0
        if not path.exists():
            self.found.notes.append(f"{path}: not there")
            return
        with open(path, "rb") as file:
            lines = raw_lines(file, path)
            while True:
                rows += 1
                try:
                    line, raw = next(lines)
                    yield line, parse(decode(raw, path, line), path, line)
                except StopIteration:
                    rows -= 1
                    break
                except FormatError as error:  # after a line that is too long there is no next one
                    self.found.fault(path, rows, str(error).removeprefix(f"{path}:{rows}: "))
        self.found.rows[str(path.relative_to(self.folder))] = rows
        if not rows:
            self.found.fault(path, 1, "the file is empty")

    def whole(self, path: Path, read: Callable, nothing):
        """Return read(path) of a file that is sound or not; its one fault is noted."""
        if not path.exists():
            self.found.notes.append(f"{path}: not there")
            return nothing
        try:
            return read(path)
        except FormatError as error:
            place, _, what = str(error).partition(": ")
            line = place.rpartition(":")[2]
            self.found.fault(path, int(line) if line.isdecimal() else 1, what)
        except UserError as error:
            self.found.fault(path, 1, str(error).removeprefix(f"{path}: "))
        return nothing

    def check_ids(self) -> None:
        path = self.folder / "passage-collection/passage2id.map.json"
        self.pids = self.whole(path, read_passage_ids, None)
        if self.pids is not None:
            self.found.rows[str(path.relative_to(self.folder))] = len(self.pids)
            order = np.argsort(self.pids, kind="stable")
            self.sorted_pids = self.pids[order]
            for at in np.flatnonzero(self.sorted_pids[1:] == self.sorted_pids[:-1]).tolist():
                pid, one, other = self.sorted_pids[at].decode(errors="replace"), order[at], order[at + 1]
                self.found.fault(path, 1, f"the pid {pid} stands for row {one} and for row {other}")

    def is_unknown(self, pid: str) -> bool:
        """Return whether a pid is not in the id map; False without a map."""
        if self.pids is None or not len(self.pids):
            return False
        at = int(np.searchsorted(self.sorted_pids, pid.encode()))
        return at == len(self.sorted_pids) or bytes(self.sorted_pids[at]) != pid.encode()

    def check_dev(self) -> None:
        path = self.folder / "dev/dev.json"
        for line, query in self.rows_of(path, parse_dev_query):
            if query.qid in self.dev_qids:
                first = self.dev_qids[query.qid]
                self.found.fault(path, line, f"question_id {query.qid} stands in line {first} already")
                continue
            self.dev_qids[query.qid] = line
            self.found.length("dev query", query.query)
            for pid, text in query.answers.items():
                self.answers[pid.encode()] = text_hash(text)
                if self.is_unknown(pid):
                    self.found.fault(path, line, f"the positive {pid} is not in passage2id.map.json")

    def check_queries(self) -> None:
        path, q2qid_path = self.folder / "dev/dev.q.format", self.folder / "dev/q2qid.dev.json"
        qids = self.whole(q2qid_path, read_q2qid, {})
        set_of_qids = set(qids.values())
        seen: dict[str, int] = {}
        for line, query in self.rows_of(path, parse_query):
            self.dev_queries.add(text_hash(query))
            if query in seen:
                self.found.fault(path, line, f"the same query as line {seen[query]}: {query[:40]!r}")
            seen.setdefault(query, line)
            if qids and query not in qids:
                self.found.fault(path, line, f"{query[:40]!r} has no qid in q2qid.dev.json")
        for qid, line in self.dev_qids.items() if qids else ():
            if qid not in set_of_qids:
                self.found.fault(
                    self.folder / "dev/dev.json", line, f"question_id {qid} is not in q2qid.dev.json"
                )
        others = len(set(qids) - set(seen))
        if seen and others:
            self.found.notes.append(f"{q2qid_path}: {others} of its queries are not in dev.q.format")

    def check_passages(self) -> None:
        folder = self.folder / "passage-collection"
        try:
            files = collection_files(folder)
        except UserError as error:
            self.found.fault(folder, 1, str(error).removeprefix(f"{folder}: "))
            return
        hashes: list[np.ndarray] = []
        places: list[array] = []  # of each file: the line of each hash
        row, empty = 0, 0
        for path in files:
            part, lines = array("Q"), array("I")
            first = row
            for line, text in self.rows_of(path, parse_passage):
                row = first + line - 1
                self.found.length("passage", text)
                empty += not text.strip()
                key = text_hash(text)
                part.append(key)
                lines.append(line)
                self._check_answer(path, line, row, key)
            row = first + self.found.rows[str(path.relative_to(self.folder))]
            hashes.append(np.array(part, dtype=np.uint64))
            places.append(lines)
        self._check_counts(row, empty)
        self._note_repeats(np.concatenate(hashes), files, places)

    def _check_answer(self, path: Path, line: int, row: int, key: int) -> None:
        """A dev positive must have the text that the collection has at its row: else the ids are off."""
        if self.pids is None or row >= len(self.pids):
            return
        expected = self.answers.get(bytes(self.pids[row]))
        if expected is not None and expected != key:
            pid = bytes(self.pids[row]).decode(errors="replace")
            self.found.fault(
                path, line, f"row {row} is {pid}, whose text in dev.json is another one: are the ids off?"
            )

    def _check_counts(self, rows: int, empty: int) -> None:
        if self.pids is not None and len(self.pids) != rows:
            ids = self.folder / "passage-collection/passage2id.map.json"
            self.found.fault(ids, 1, f"{len(self.pids):,} ids, but the collection has {rows:,} passages")
        if empty:
            self.found.notes.append(f"{empty:,} passages have no visible text (kept: rows must not move)")

    def _note_repeats(self, hashes: np.ndarray, files: list[Path], places: list[array]) -> None:
        order = np.argsort(hashes, kind="stable")
        later = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
        if not len(later):
            return
        starts = np.cumsum([0, *map(len, places)])
        again = int(order[later].min())
        before = int(order[np.searchsorted(hashes[order], hashes[again])])
        one, other = (
            f"{files[part].name}:{places[part][at - starts[part]]}"
            for at in (again, before)
            for part in [int(np.searchsorted(starts, at, side="right")) - 1]
        )
        self.found.notes.append(
            f"{len(later):,} passages repeat the text of an earlier one; the first: {one}, as {other}"
        )

    def check_training(self, name: str, parse: Callable, texts: tuple[str, ...]) -> None:
        path = self.folder / "train" / name
        queries: set[int] = set()
        leaked: set[int] = set()
        first_leak = 0
        for line, row in self.rows_of(path, parse):
            key = text_hash(row.query)
            if key not in queries:
                self.found.length("train query", row.query)
                queries.add(key)
            if key in self.dev_queries:
                leaked.add(key)
                first_leak = first_leak or line
            for kind in texts:
                self.found.length(f"{name} {kind}", getattr(row, kind))
        if queries:
            self.found.rows[f"train/{name}, distinct queries"] = len(queries)
        if leaked:
            self.found.notes.append(
                f"{path}: {len(leaked):,} of its queries are dev queries, too (the first in line "
                f"{first_leak}): dev figures flatter"
            )

    def check_candidates(self) -> None:
        texts = self.folder / "auxiliary/dev.retrieval.top50.res.tsv"
        ids = self.folder / "auxiliary/dev.retrieval.top50.res.id_map.tsv"
        if not texts.exists() and not ids.exists():
            self.found.notes.append(f"{texts}: not there")
            return
        rows = sum(1 for _ in self.rows_of(texts, parse_candidate))
        pairs = 0
        for line, (_, pid) in self.rows_of(ids, parse_id_pair):
            pairs += 1
            if self.is_unknown(pid):
                self.found.fault(ids, line, f"the candidate {pid} is not in passage2id.map.json")
        if rows != pairs:
            self.found.fault(ids, pairs, f"{pairs:,} lines, but {texts.name} has {rows:,}")
