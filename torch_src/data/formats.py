"""The only reader and writer of each official file format and of runs.

docs/formats.md describes the files. A malformed line is a FormatError that names file and line.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeVar

from torch_src.data.json_pairs import read_json_pairs
from torch_src.data.lines import (
    FilePath,
    FormatError,
    finite_number,
    parse_json,
    read_lines,
    read_together,
    shown,
    split_columns,
    whole_number,
)
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log

SEPARATORS = {"\t", "\n"}  # not allowed in a query or qid: they end the columns and lines of a run
QID_FIELDS = ("question_id", "query_id", "qid", "_id", "id")  # of a file of queries with ids
QUERY_FIELDS = ("question", "query", "text")
EMPTY_TITLES = ("", "null", "-")  # spellings in the published files, their readme and the query files
MERGE_QUERIES = (
    "a run identifies a query by its text; merge the two: one line in dev.q.format, one qid in "
    "q2qid.dev.json, one entry with the answers of both in dev.json"
)


class DualRow(NamedTuple):
    """One row of dual.train.tsv."""

    query: str
    positive: str
    negative: str


class CrossRow(NamedTuple):
    """One row of cross.train.tsv."""

    query: str
    passage: str
    label: int  # 1 relevant, 0 not


class DevQuery(NamedTuple):
    """One line of dev.json."""

    qid: str
    query: str
    answers: dict[str, str]  # pid -> text of every positive
    grades: dict[str, int] = {}  # pid -> grade of the positives whose grade is above 1


class RunRow(NamedTuple):
    """One row of a run (a ranked result file)."""

    query: str
    row: int  # global, 0-based
    rank: int  # from 1
    score: float


class CandidateRow(NamedTuple):
    """One line of auxiliary/*.res.tsv with its line of *.res.id_map.tsv."""

    qid: str
    pid: str
    query: str
    passage: str


class FeedbackHit(NamedTuple):
    """A passage of the collection that the search page showed."""

    pid: str  # empty where the collection has no ids
    row: int  # global, 0-based
    passage: str


class FeedbackRow(NamedTuple):
    """One line of feedback.jsonl: a passage marked as the answer on the search page."""

    time: str  # ISO 8601, UTC
    query: str
    hit: FeedbackHit
    relevant: bool  # False retracts an earlier line with the same query and row
    column: str  # bm25, dense, hybrid or reranked
    rank: int  # in that column, from 1
    above: list[FeedbackHit]  # shown above it, best first: likely negatives


# ---- training rows and passages


def parse_dual_row(text: str, path: FilePath, line: int) -> DualRow:
    """Return the row of one line of dual.train.tsv."""
    names = "query, null, positive, null, negative, 0"
    query, title, positive, other_title, negative, _ = split_columns(text, 6, path, line, names)
    _require_no_title(title, 2, path, line)
    _require_no_title(other_title, 4, path, line)
    if not positive.strip() or positive == "null":
        raise FormatError(path, line, "the positive (column 3) is empty")
    return DualRow(_require_query(query, path, line), positive, negative)


def parse_cross_row(text: str, path: FilePath, line: int) -> CrossRow:
    """Return the row of one line of cross.train.tsv."""
    query, title, passage, label = split_columns(text, 4, path, line, "query, null, passage, label")
    _require_no_title(title, 2, path, line)
    if label not in ("0", "1"):
        raise FormatError(path, line, f"label {shown(label)} (expected 0 or 1)")
    return CrossRow(_require_query(query, path, line), passage, int(label))


def format_dual_row(row: DualRow) -> str:
    """Return one line of dual.train.tsv."""
    return f"{row.query}\t\t{row.positive}\t\t{row.negative}\t0\n"


def format_cross_row(row: CrossRow) -> str:
    """Return one line of cross.train.tsv."""
    return f"{row.query}\t\t{row.passage}\t{row.label}\n"


def parse_passage(text: str, path: FilePath, line: int) -> str:
    """Return the passage (third of four columns) of one line of part-0X, all_doc or auxiliary/*.res.tsv."""
    return split_columns(text, 4, path, line, "-, null, passage, 0")[2]


def format_passage(passage: str) -> str:
    """Return one line of part-0X."""
    return f"-\t\t{passage}\t0\n"


def _require_query(query: str, path: FilePath, line: int) -> str:
    if not query.strip():
        raise FormatError(path, line, "the query is empty")
    return query


def _require_no_title(text: str, column: int, path: FilePath, line: int) -> None:
    # ignoring a title would silently change the training data
    if text not in EMPTY_TITLES:
        message = f"column {column} (title) is not empty or null; move titles into the passage text"
        raise FormatError(path, line, message)


# ---- queries


def parse_query(text: str, path: FilePath, line: int) -> str:
    """Return the query of one line of dev.q.format."""
    return _require_query(split_columns(text, 4, path, line, "query, -, -, 0")[0], path, line)


def format_query(query: str) -> str:
    """Return one line of dev.q.format."""
    return f"{query}\t-\t-\t0\n"


def read_queries(path: FilePath) -> list[str]:
    """Return the distinct query texts of dev.q.format in file order; a repeated text is a FormatError."""
    seen: dict[str, int] = {}
    for line, text in read_lines(path):
        query = parse_query(text, path, line)
        if query in seen:
            message = f"the same query as line {seen[query]}: {shown(query)}; {MERGE_QUERIES}"
            raise FormatError(path, line, message)
        seen[query] = line
    return list(_require_not_empty(seen, path))


def has_query_ids(path: FilePath) -> bool:
    """Return whether a query file has ids (JSON lines, or qid TAB query), unlike dev.q.format."""
    name = str(path).removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        return True
    if name.endswith(".q.format"):
        return False
    return next((text.count("\t") == 1 for _, text in read_lines(path)), False)


def read_query_texts(path: FilePath) -> list[str]:
    """Return the distinct query texts of dev.q.format or of a file with ids, in file order."""
    return list(read_question_ids(path)) if has_query_ids(path) else read_queries(path)


def read_question_ids(path: FilePath) -> dict[str, list[str]]:
    """Return {query text: its qids} of JSON lines (test1.json, dev.json) or of lines `qid TAB query`."""
    found: dict[str, list[str]] = {}
    line_of: dict[str, int] = {}  # by qid
    is_json = str(path).removesuffix(".gz").endswith((".json", ".jsonl"))
    for line, text in read_lines(path):
        qid, query = (_json_question if is_json else _tsv_question)(text, path, line)
        if line == 1 and not is_json:
            if qid.lower() in QID_FIELDS and query.lower() in QUERY_FIELDS:
                continue
            log(f"{path}: no header line, columns read as qid, query: {shown(text)}")
        if not qid or SEPARATORS & {*query, *qid}:
            raise FormatError(path, line, "the qid is empty, or a TAB or line end in qid or query")
        if qid in line_of:
            raise FormatError(path, line, f"the qid {shown(qid)} is also in line {line_of[qid]}")
        line_of[qid] = line
        found.setdefault(_require_query(query, path, line), []).append(qid)
    return _require_not_empty(found, path)


def _json_question(text: str, path: FilePath, line: int) -> tuple[str, str]:
    entry = parse_json(text, path, line)
    fields = entry if isinstance(entry, dict) else {}
    qid = next((as_id(fields[name]) for name in QID_FIELDS if name in fields), None)
    query = next((fields[name] for name in QUERY_FIELDS if name in fields), None)
    if qid is None or not isinstance(query, str):
        raise FormatError(path, line, "expected {question_id, question}: an id and a string")
    return qid, query


def _tsv_question(text: str, path: FilePath, line: int) -> tuple[str, str]:
    qid, query = split_columns(text, 2, path, line, "qid, query")
    if query.endswith("\r"):
        raise FormatError(path, line, r"ends in \r\n (expected \n); the \r would become part of the query")
    return qid, query


def _required_id(value: object) -> str:
    if (text := as_id(value)) is None:
        raise TypeError("an id is not a string or an integer")
    return text


def as_id(value: object) -> str | None:
    """Return the id that a JSON value holds, a string or an integer; None for any other value."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def read_q2qid(path: FilePath) -> dict[str, str]:
    """Return {query text: qid} of q2qid.dev.json; a repeated text or qid is a FormatError."""
    qid_of: dict[str, str] = {}
    qids: set[str] = set()
    for chunk in read_json_pairs(path):
        for at, (query, qid) in enumerate(chunk.pairs):
            message = ""
            if query in qid_of:
                message = f"duplicate query {shown(query)}; {MERGE_QUERIES}"
            elif qid in qids:
                message = f"the qid {shown(qid)} belongs to an earlier query (expected each qid once)"
            elif SEPARATORS & {*query, *qid}:
                message = f"TAB or line end in the query {shown(query)} or its qid {shown(qid)}"
            if message:
                raise FormatError(path, chunk.line_of(at), message)
            qid_of[query] = qid
            qids.add(qid)
    return qid_of


def parse_dev_query(text: str, path: FilePath, line: int, texts: bool = True) -> DevQuery:
    """Return the query of one line of dev.json with its positives.

    Without `texts` only question_id and paragraph_id are required, which suffices to score a result.
    """
    entry = parse_json(text, path, line)
    try:
        qid, query = _required_id(entry["question_id"]), entry["question"] if texts else ""
        paragraphs = [(_required_id(a["paragraph_id"]), a) for a in entry["answer_paragraphs"]]
        answers = {pid: a["paragraph_text"] if texts else "" for pid, a in paragraphs}
        grades = {pid: a["grade"] for pid, a in paragraphs if a.get("grade", 1) != 1}
        if not _are_strings(query, *answers.values()):
            raise TypeError("a value is not a string")
        if not all(isinstance(grade, int) and grade > 1 for grade in grades.values()):
            raise TypeError("a grade is not an integer from 1")
    except (KeyError, TypeError) as error:
        fields = "question_id, question, answer_paragraphs: [{paragraph_id, paragraph_text}]"
        raise FormatError(path, line, f"expected {{{fields}}}; missing or malformed: {error}") from None
    if texts:
        _require_query(query, path, line)
    if not answers:
        raise FormatError(path, line, "no answer_paragraphs (expected at least one)")
    return DevQuery(qid, query, answers, grades)


def read_dev(path: FilePath, texts: bool = True) -> list[DevQuery]:
    """Return the queries of dev.json with their positives; `texts` as in parse_dev_query."""
    found: dict[str, DevQuery] = {}
    for line, text in read_lines(path):
        query = parse_dev_query(text, path, line, texts)
        if query.qid in found:
            raise FormatError(path, line, f"duplicate question_id {shown(query.qid)}")
        found[query.qid] = query
    return list(_require_not_empty(found, path).values())


Found = TypeVar("Found", bound=dict)


def _require_not_empty(found: Found, path: FilePath) -> Found:
    if not found:
        raise UserError(f"{path}: contains no queries")
    return found


def _are_strings(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)


# ---- runs, candidates, scores


def format_run_row(row: RunRow) -> str:
    """Return one line of a run; 9 significant digits restore every float32 exactly."""
    return f"{row.query}\t{row.row}\t{row.rank}\t{row.score:.9g}\n"


def read_run(path: FilePath) -> Iterator[RunRow]:
    """Yield the rows of a run: query text, global row, rank, score."""
    for line, text in read_lines(path):
        query, *columns = split_columns(text, 4, path, line, "query, row, rank, score")
        row, rank, score = whole_number(columns[0]), whole_number(columns[1], 9), finite_number(columns[2])
        if row is None:
            raise FormatError(path, line, f"row {shown(columns[0])} (expected an integer from 0)")
        if not rank:
            raise FormatError(path, line, f"rank {shown(columns[1])} (expected an integer from 1)")
        if score is None:
            raise FormatError(path, line, f"score {shown(columns[2])} (expected a finite number)")
        yield RunRow(query, row, rank, score)


def run_by_query(path: FilePath) -> Iterator[tuple[str, list[RunRow]]]:
    """Yield (query, its rows best first) of a run.

    FormatError when a query's lines are scattered, its ranks are not 1, 2, 3, ..., or a row is a duplicate.
    """
    for line, query, rows in _by_query(path, read_run(path), lambda row: row.row):
        for at, row in enumerate(rows):
            if row.rank != at + 1:
                raise FormatError(path, line + at, f"rank {row.rank} (expected {at + 1})")
        yield query, rows


def read_candidates(texts_path: FilePath, ids_path: FilePath) -> Iterator[CandidateRow]:
    """Yield the lines of auxiliary/*.res.tsv together with those of its *.id_map.tsv."""
    texts = (parse_candidate(text, texts_path, line) for line, text in read_lines(texts_path))
    pairs = read_together(texts, texts_path, read_id_map(ids_path), ids_path)
    for _, (query, passage), (qid, pid) in pairs:
        yield CandidateRow(qid, pid, query, passage)


def parse_candidate(text: str, path: FilePath, line: int) -> tuple[str, str]:
    """Return (query, passage) of one line of auxiliary/*.res.tsv."""
    query, _, passage, _ = split_columns(text, 4, path, line, "query, null, passage, 0")
    return query, passage


def candidates_by_query(texts_path: FilePath, ids_path: FilePath) -> Iterator[tuple[str, list[CandidateRow]]]:
    """Yield (query, its candidates); FormatError when its lines are scattered or a pid is a duplicate."""
    for _, query, rows in _by_query(texts_path, read_candidates(texts_path, ids_path), lambda row: row.pid):
        yield query, rows


class _HasQuery(Protocol):
    @property
    def query(self) -> str: ...


Row = TypeVar("Row", bound=_HasQuery)


def _by_query(
    path: FilePath, rows: Iterable[Row], key: Callable[[Row], object]
) -> Iterator[tuple[int, str, list[Row]]]:
    """Yield (first line number, query, its rows); `rows` are the parsed lines of `path`."""
    seen, line = set(), 1
    for query, group in groupby(rows, key=lambda row: row.query):
        found, keys = list(group), set()
        if query in seen:
            message = f"the query {shown(query)} appeared before (expected its lines to be adjacent)"
            raise FormatError(path, line, message)
        seen.add(query)
        for at, row in enumerate(found):
            if key(row) in keys:
                raise FormatError(path, line + at, f"duplicate passage {key(row)} of {shown(query)}")
            keys.add(key(row))
        yield line, query, found
        line += len(found)


def parse_id_pair(text: str, path: FilePath, line: int) -> tuple[str, str]:
    """Return (qid, pid) of one line of *.id_map.tsv."""
    qid, pid = split_columns(text, 2, path, line, "qid, pid")
    if not qid or not pid:
        raise FormatError(path, line, "an empty column (expected qid, pid)")
    if pid.endswith("\r"):
        raise FormatError(path, line, r"ends in \r\n (expected \n); the \r would become part of the pid")
    return qid, pid


def read_id_map(path: FilePath) -> Iterator[tuple[str, str]]:
    """Yield (qid, pid) of *.id_map.tsv."""
    for line, text in read_lines(path):
        yield parse_id_pair(text, path, line)


def read_scores(path: FilePath) -> Iterator[float]:
    """Yield the numbers of a file with one per line (cross_scores.txt)."""
    for line, text in read_lines(path):
        score = finite_number(text)
        if score is None:
            raise FormatError(path, line, f"{shown(text)} (expected one finite number)")
        yield score


# ---- feedback of the search page


def format_feedback(row: FeedbackRow) -> str:
    """Return one line of feedback.jsonl."""
    above = [hit._asdict() for hit in row.above]
    given = {"relevant": row.relevant, "column": row.column, "rank": row.rank, "above": above}
    entry = {"time": row.time, "query": row.query, **row.hit._asdict(), **given}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def read_feedback(path: FilePath) -> Iterator[FeedbackRow]:
    """Yield the lines of feedback.jsonl, oldest first."""
    for line, text in read_lines(path):
        yield parse_feedback(text, path, line)


def parse_feedback(text: str, path: FilePath, line: int) -> FeedbackRow:
    """Return the row of one line of feedback.jsonl."""
    entry = parse_json(text, path, line)
    try:
        hit, above = _feedback_hit(entry), [_feedback_hit(other) for other in entry["above"]]
        row = FeedbackRow(
            entry["time"], entry["query"], hit, entry["relevant"], entry["column"], entry["rank"], above
        )
    except (KeyError, TypeError) as error:
        message = f"not a line of the search page's feedback; missing or malformed: {error}"
        raise FormatError(path, line, message) from None
    if not _are_strings(row.time, row.query, row.column) or type(row.relevant) is not bool:
        raise FormatError(path, line, "time, query, column (expected strings), relevant (true or false)")
    return row


def _feedback_hit(entry: dict[str, Any]) -> FeedbackHit:
    hit = FeedbackHit(entry["pid"], entry["row"], entry["passage"])
    if not _are_strings(hit.pid, hit.passage) or type(hit.row) is not int:
        raise TypeError("pid, passage (expected strings), row (expected a number)")
    return hit
