"""One pass over a data folder of the official layout: every fault with file and line, in bounded memory."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from torch_src.data.collection import collection_files
from torch_src.data.encodings import GZIPPED_FILE
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
from torch_src.data.lines import (
    EncodingError,
    FilePath,
    FormatError,
    decode,
    is_gzipped,
    open_file,
    raw_lines,
    shown,
)
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.data.row_file import text_hash
from torch_src.runtime.errors import UserError

MAX_FAULTS = 1000  # kept in memory; all are counted and reported
PLAIN_FOLDERS = ("train", "passage-collection")  # their files are read by offsets: not gzipped
PERCENTILES = (50, 90, 99, 100)
MAX_LENGTH = 1 << 16  # characters; longer texts count as this long

Row = TypeVar("Row")
Parse = Callable[[str, FilePath, int], Row]
Report = Callable[[str, int, str], object]  # called with file, line, what is wrong


@dataclass
class Lengths:
    """Histogram of text lengths in characters."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(MAX_LENGTH + 1, dtype=np.int64))

    def add(self, text: str) -> None:
        self.counts[min(len(text), MAX_LENGTH)] += 1

    def percentile(self, percent: float) -> int:
        """Return the smallest length that is not below `percent` percent of the texts."""
        return int(np.searchsorted(np.cumsum(self.counts), percent / 100 * self.counts.sum()))

    def share_above(self, limit: int) -> float:
        """Return the share of texts longer than `limit`."""
        return int(self.counts[limit + 1 :].sum()) / max(1, int(self.counts.sum()))


@dataclass
class Findings:
    """Faults (file, line, what is wrong), notes, row counts and text lengths.

    Only the first MAX_FAULTS faults stay in memory; `report` gets every one.
    """

    report: Report | None = None
    fault_count: int = 0
    faults: list[tuple[str, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)  # file -> number of rows
    lengths: dict[str, Lengths] = field(default_factory=dict)  # kind of text -> its lengths

    def fault(self, path: FilePath, line: int, what: str) -> None:
        self.fault_count += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append((str(path), line, what))
        if self.report is not None:
            self.report(str(path), line, what)

    def error(self, path: FilePath, error: UserError) -> None:
        """Add the error of a reader as a fault."""
        if isinstance(error, FormatError):
            self.fault(path, error.line, error.message)
        else:
            self.fault(path, 1, str(error).removeprefix(f"{path}: "))

    def length(self, kind: str, text: str) -> None:
        self.lengths.setdefault(kind, Lengths()).add(text)


class PidIndex:
    """Looks pids up in the id map; without a map every pid counts as known."""

    def __init__(self, pids: np.ndarray):
        self.order = np.argsort(pids, kind="stable")
        self.sorted = pids[self.order]

    def __contains__(self, pid: str) -> bool:
        if not len(self.sorted):
            return True
        index = min(int(np.searchsorted(self.sorted, pid.encode())), len(self.sorted) - 1)
        return bytes(self.sorted[index]) == pid.encode()

    def duplicates(self) -> Iterator[tuple[str, int, int]]:
        """Yield (pid, row, other row) of every pid that two rows have."""
        for index in np.flatnonzero(self.sorted[1:] == self.sorted[:-1]).tolist():
            pid = self.sorted[index].decode(errors="replace")
            yield pid, int(self.order[index]), int(self.order[index + 1])


class TextIndex:
    """Finds passages with equal texts: 12 bytes per passage."""

    def __init__(self) -> None:
        self.hashes, self.lines = array("Q"), array("I")
        self.files: list[str] = []
        self.starts: list[int] = []  # number of passages before each file

    def start_file(self, path: Path) -> None:
        self.files.append(path.name)
        self.starts.append(len(self.hashes))

    def add(self, hashed: int, line: int) -> None:
        self.hashes.append(hashed)
        self.lines.append(line)

    def repeats(self) -> tuple[int, str, str] | None:
        """Return (number of repeated texts, place of the first one, place of the text that it repeats)."""
        hashes = np.frombuffer(self.hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        later = order[1:][hashes[order][1:] == hashes[order][:-1]]
        if not len(later):
            return None
        again = int(later.min())
        earlier = int(np.flatnonzero(hashes == hashes[again])[0])
        return len(later), self._place(again), self._place(earlier)

    def _place(self, passage: int) -> str:
        number = int(np.searchsorted(self.starts, passage, side="right")) - 1
        return f"{self.files[number]}:{self.lines[passage]}"


class DataCheck:
    """Checks one folder; `run()` returns the findings. A missing file is a note, not a fault."""

    def __init__(self, folder: str, report: Report | None = None):
        self.folder, self.found = Path(folder), Findings(report)
        self.ids_path = self.folder / "passage-collection/passage2id.map.json"
        self.pids = np.zeros(0, dtype="S1")
        self.known = PidIndex(self.pids)
        self.dev_queries: set[int] = set()  # text hashes
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

    def rows_of(self, path: Path, parse: Parse[Row]) -> Iterator[tuple[int, Row]]:
        """Yield (line, parsed row) of the valid lines of a file; the others are faults.

        Counts the rows, except of a file that is missing, gzipped or in another encoding.
        """
        if not self._exists(path):
            return
        rows = 0
        try:
            with open_file(path) as file:
                for rows, raw in raw_lines(file, path):
                    try:
                        yield rows, parse(decode(raw, path, rows), path, rows)
                    except FormatError as error:
                        self.found.error(path, error)
                        if isinstance(error, EncodingError) and error.encoding:
                            return  # every line would be the same fault
        except FormatError as error:  # a line that is too long: the rest of the file cannot be read
            self.found.error(path, error)
            rows += 1
        self.found.rows[self._name(path)] = rows
        if not rows:
            self.found.fault(path, 1, "the file is empty")

    def _exists(self, path: Path) -> bool:
        if not path.exists():
            self.found.notes.append(f"{path}: no such file")
        elif path.parent.name in PLAIN_FOLDERS and is_gzipped(path):
            self.found.fault(path, 1, GZIPPED_FILE)
            return False
        return path.exists()

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def check_ids(self) -> None:
        if not self._exists(self.ids_path):
            return
        try:
            self.pids = read_passage_ids(self.ids_path)
        except UserError as error:
            return self.found.error(self.ids_path, error)
        self.found.rows[self._name(self.ids_path)] = len(self.pids)
        self.known = PidIndex(self.pids)
        for pid, row, other in self.known.duplicates():
            self.found.fault(self.ids_path, 1, f"the rows {row} and {other} have the same pid {pid}")

    def check_dev(self) -> None:
        path = self.folder / "dev/dev.json"
        for line, query in self.rows_of(path, parse_dev_query):
            if query.qid in self.dev_qids:
                first = self.dev_qids[query.qid]
                self.found.fault(path, line, f"duplicate question_id {query.qid} (first in line {first})")
                continue
            self.dev_qids[query.qid] = line
            self.found.length("dev query", query.query)
            for pid, text in query.answers.items():
                self.answers[pid.encode()] = text_hash(text)
                if pid not in self.known:
                    self.found.fault(path, line, f"the positive {pid} is not in passage2id.map.json")

    def check_queries(self) -> None:
        folder = self.folder / "dev"
        path, q2qid_path = folder / "dev.q.format", folder / "q2qid.dev.json"
        qid_of: dict[str, str] = {}
        if self._exists(q2qid_path):
            try:
                qid_of = read_q2qid(q2qid_path)
            except UserError as error:
                self.found.error(q2qid_path, error)
        seen: dict[str, int] = {}
        for line, query in self.rows_of(path, parse_query):
            self.dev_queries.add(text_hash(query))
            if query in seen:
                self.found.fault(path, line, f"the same query as line {seen[query]}: {shown(query)}")
            seen.setdefault(query, line)
            if qid_of and query not in qid_of:
                self.found.fault(path, line, f"{shown(query)} has no qid in q2qid.dev.json")
        qids = set(qid_of.values())
        for qid, line in self.dev_qids.items() if qids else ():
            if qid not in qids:
                self.found.fault(folder / "dev.json", line, f"question_id {qid} is not in q2qid.dev.json")
        unused = len(set(qid_of) - set(seen))
        if seen and unused:
            self.found.notes.append(f"{q2qid_path}: {unused} of its queries are not in dev.q.format")

    def check_passages(self) -> None:
        folder = self.folder / "passage-collection"
        try:
            files = collection_files(folder)
        except UserError as error:
            return self.found.error(folder, error)
        texts, row, empty, all_read = TextIndex(), 0, 0, True
        for path in files:
            texts.start_file(path)
            for line, text in self.rows_of(path, parse_passage):
                self.found.length("passage", text)
                empty += not text.strip()
                hashed = text_hash(text)
                texts.add(hashed, line)
                if all_read:
                    self._check_answer(path, line, row + line - 1, hashed)
            rows = self.found.rows.get(self._name(path))
            all_read = all_read and rows is not None  # the rows after an unread part are unknown
            row += rows or 0
        if all_read and self._name(self.ids_path) in self.found.rows:
            try:
                check_length(self.ids_path, len(self.pids), row)
            except UserError as error:
                self.found.error(self.ids_path, error)
        if empty:
            self.found.notes.append(
                f"{empty:,} passages are empty or blank (kept, so that row numbers do not change)"
            )
        if repeats := texts.repeats():
            count, place, earlier = repeats
            note = f"{count:,} passages repeat the text of an earlier one; the first: {place}, as {earlier}"
            self.found.notes.append(note)

    def _check_answer(self, path: Path, line: int, row: int, hashed: int) -> None:
        """A dev positive must have the text of its row in the collection; otherwise the ids are shifted."""
        if row >= len(self.pids):
            return
        expected = self.answers.get(bytes(self.pids[row]))
        if expected is not None and expected != hashed:
            pid = bytes(self.pids[row]).decode(errors="replace")
            message = f"row {row} is {pid}, which has another text in dev.json; are the ids shifted?"
            self.found.fault(path, line, message)

    def check_training(self, name: str, parse: Parse[Any], texts: tuple[str, ...]) -> None:
        path = self.folder / "train" / name
        queries: set[int] = set()
        leaked: set[int] = set()
        first_leak = 0
        for line, row in self.rows_of(path, parse):
            hashed = text_hash(row.query)
            if hashed not in queries:
                self.found.length("train query", row.query)
                queries.add(hashed)
            if hashed in self.dev_queries:
                leaked.add(hashed)
                first_leak = first_leak or line
            for kind in texts:
                self.found.length(f"{name} {kind}", getattr(row, kind))
        if queries:
            self.found.rows[f"train/{name}, distinct queries"] = len(queries)
        if leaked:
            self.found.notes.append(
                f"{path}: {len(leaked):,} of its queries are dev queries, too (the first in line "
                f"{first_leak}): dev figures are too high"
            )

    def check_candidates(self) -> None:
        texts = self.folder / "auxiliary/dev.retrieval.top50.res.tsv"
        ids = texts.with_name("dev.retrieval.top50.res.id_map.tsv")
        if not ids.exists() and not self._exists(texts):
            return
        rows = sum(1 for _ in self.rows_of(texts, parse_candidate))
        pairs = 0
        for line, (_, pid) in self.rows_of(ids, parse_id_pair):
            pairs += 1
            if pid not in self.known:
                self.found.fault(ids, line, f"the candidate {pid} is not in passage2id.map.json")
        if rows != pairs:
            self.found.fault(ids, pairs, f"{pairs:,} valid lines, but {texts.name} has {rows:,}")
