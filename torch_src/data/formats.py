"""Readers and writers of every file of the official layout: one of each a format, a bad line named as
file:line.

Lines end in `\\n` alone. Texts hold characters that Python's splitlines() would cut at (\\x0b, \\x0c,
\\x1c-\\x1e, \\x85, U+2028), and quotes that csv would eat, so lines are cut by hand and nothing is stripped.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch_src.runtime.errors import UserError

CUTS = {"\t", "\n"}  # what would cut a column or a line of a run
ABSENT = (
    "",
    "null",
    "-",
)  # how an empty column is written: real files, the readme, the query and passage files


LONGEST_LINE = 1 << 24  # bytes; a longer one is no line of these files, and would be held in memory whole


class FormatError(UserError):
    """A malformed line: `file:line: what is wrong (what was expected)`."""

    def __init__(self, path, line: int, message: str):
        super().__init__(f"{path}:{line}: {message}")


@dataclass(frozen=True)
class DualRow:
    """One row of dual.train.tsv."""

    query: str
    positive: str
    negative: str


@dataclass(frozen=True)
class CrossRow:
    """One row of cross.train.tsv."""

    query: str
    passage: str
    label: int  # 1 relevant, 0 not


@dataclass(frozen=True)
class RunRow:
    """One row of a run (a ranked result file)."""

    query: str
    row: int  # global, 0-based
    rank: int  # from 1
    score: float


def decode(raw: bytes, path, line: int) -> str:
    """Return the line's text without its final newline; FormatError when it is not UTF-8."""
    try:
        text = raw.removesuffix(b"\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(path, line, f"not UTF-8 (byte {error.start + 1} of the line)") from None
    if line == 1 and text.startswith("\ufeff"):
        raise FormatError(path, line, "starts with a byte order mark; save the file as plain UTF-8")
    return text


def raw_lines(file, path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of a binary file; FormatError for a line above LONGEST_LINE."""
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise FormatError(path, number, f"a line of more than {LONGEST_LINE >> 20} MiB")
        yield number, raw


def read_lines(path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of a UTF-8 file, cutting at `\\n` and nowhere else."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a file") from None
    with file:
        for number, raw in raw_lines(file, path):
            yield number, decode(raw, path, number)


def split_columns(text: str, count: int, path, line: int, names: str) -> list[str]:
    """Return the TAB-separated columns; FormatError unless there are exactly `count`."""
    columns = text.split("\t")
    if len(columns) != count:
        raise FormatError(path, line, f"{len(columns)} TAB-separated columns, expected {count}: {names}")
    return columns


def _query(text: str, path, line: int) -> str:
    if not text.strip():
        raise FormatError(path, line, "the query (column 1) is empty")
    return text


def _no_title(text: str, column: int, path, line: int) -> None:
    # A title that is silently left out would change what is trained on.
    if text not in ABSENT:
        raise FormatError(
            path, line, f"column {column} (title) must be empty or null; put titles into the passage text"
        )


def parse_dual_row(text: str, path, line: int) -> DualRow:
    """Return the row of one line of dual.train.tsv; FormatError when it is malformed."""
    names = "query, null, positive, null, negative, 0"
    query, title, positive, other_title, negative, _ = split_columns(text, 6, path, line, names)
    _no_title(title, 2, path, line)
    _no_title(other_title, 4, path, line)
    if not positive.strip() or positive == "null":
        raise FormatError(path, line, "the positive (column 3) is empty")
    return DualRow(_query(query, path, line), positive, negative)


def parse_cross_row(text: str, path, line: int) -> CrossRow:
    """Return the row of one line of cross.train.tsv; FormatError when it is malformed."""
    query, title, passage, label = split_columns(text, 4, path, line, "query, null, passage, label")
    _no_title(title, 2, path, line)
    if label not in ("0", "1"):
        raise FormatError(path, line, f"label {label[:20]!r} is neither 0 nor 1")
    return CrossRow(_query(query, path, line), passage, int(label))


def parse_passage(text: str, path, line: int) -> str:
    """Return the passage text (third of four columns) of one line of part-0X or all_doc."""
    return split_columns(text, 4, path, line, "-, null, passage, 0")[2]


def parse_json(text: str, path, line: int, **options):
    """Return the JSON value of a text; FormatError when it is malformed, too deep or holds half a surrogate
    pair, which no file could take.
    """
    try:
        value = json.loads(text, **options)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UserError:
        raise  # of a hook among the options
    except json.JSONDecodeError as error:
        raise FormatError(path, line + error.lineno - 1, f"not JSON ({error.msg})") from None
    except UnicodeEncodeError:
        raise FormatError(
            path, line, "an escape that stands for half a character (a lone surrogate)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(path, line, f"not JSON that can be read ({error})") from None


def read_queries(path) -> list[str]:
    """Return the query texts of dev.q.format in file order.

    Two lines of the same text are an error: results and q2qid.dev.json know a query by its text alone.
    """
    seen: dict[str, int] = {}
    for line, text in read_lines(path):
        query = _query(split_columns(text, 4, path, line, "query, -, -, 0")[0], path, line)
        if query in seen:
            raise FormatError(
                path, line, f"the same query as line {seen[query]}: {query[:40]!r}; {MERGE_QUERIES}"
            )
        seen[query] = line
    if not seen:
        raise UserError(f"{path}: no queries in it")
    return list(seen)


def read_question_ids(path) -> dict[str, list[str]]:
    """Return {query text: its qids} of JSON lines with question_id and question (test1.json, dev.json)."""
    found: dict[str, list[str]] = {}
    for line, text in read_lines(path):
        entry = parse_json(text, path, line)
        try:
            qid, query = entry["question_id"], entry["question"]
        except (KeyError, TypeError):
            raise FormatError(path, line, "expected {question_id, question}") from None
        if not isinstance(qid, str) or not isinstance(query, str) or CUTS & {*query, *qid}:
            raise FormatError(path, line, "question_id and question must be texts without TAB or line end")
        found.setdefault(_query(query, path, line), []).append(qid)
    if not found:
        raise UserError(f"{path}: no queries in it")
    return found


MERGE_QUERIES = (
    "results know a query by its text, so merge the two: one line here, one qid in q2qid.dev.json, "
    "and in dev.json one entry with the answers of both"
)


def read_q2qid(path) -> dict[str, str]:
    """Return {query text: qid} of q2qid.dev.json; a repeated text or qid is an error."""

    def unique(pairs: list) -> dict:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in mapping if keys.count(key) > 1)
            raise UserError(f"{path}: the query {twice[:40]!r} stands there twice; {MERGE_QUERIES}")
        return mapping

    mapping = _load_json(path, object_pairs_hook=unique)
    if not isinstance(mapping, dict) or not all(isinstance(qid, str) for qid in mapping.values()):
        raise UserError(f"{path}: expected one JSON object {{query text: qid}}")
    if any(CUTS & {*text} for pair in mapping.items() for text in pair):
        raise UserError(f"{path}: a query or qid with a TAB or a line end in it")
    if len(set(mapping.values())) < len(mapping):
        raise UserError(f"{path}: two queries have the same qid")
    return mapping


def _load_json(path, **options):
    try:
        with open(path, encoding="utf-8") as file:
            return parse_json(file.read(), path, 1, **options)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None


@dataclass(frozen=True)
class DevQuery:
    """One line of dev.json."""

    qid: str
    query: str
    answers: dict[str, str]  # pid -> text of every positive


def parse_dev_query(text: str, path, line: int) -> DevQuery:
    """Return the query of one line of dev.json with its positives."""
    entry = parse_json(text, path, line)
    try:
        answers = {str(a["paragraph_id"]): str(a["paragraph_text"]) for a in entry["answer_paragraphs"]}
        query = DevQuery(str(entry["question_id"]), str(entry["question"]), answers)
    except (KeyError, TypeError) as error:
        fields = "question_id, question, answer_paragraphs: [{paragraph_id, paragraph_text}]"
        raise FormatError(path, line, f"expected {{{fields}}}; missing or malformed: {error}") from None
    _query(query.query, path, line)
    if not answers:
        raise FormatError(path, line, "no answer_paragraphs: such a query can only count 0")
    return query


def read_dev(path) -> list[DevQuery]:
    """Return the queries of dev.json with their positives."""
    found, seen = [], set()
    for line, text in read_lines(path):
        found.append(parse_dev_query(text, path, line))
        if found[-1].qid in seen:
            raise FormatError(path, line, f"question_id {found[-1].qid} stands there twice")
        seen.add(found[-1].qid)
    if not found:
        raise UserError(f"{path}: no queries in it")
    return found


def read_candidates(texts_path, ids_path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (qid, pid, query, passage) of auxiliary/*.res.tsv read beside its *.id_map.tsv."""
    texts, ids = read_lines(texts_path), read_lines(ids_path)
    for line, text in texts:
        query, _, passage, _ = split_columns(text, 4, texts_path, line, "query, null, passage, 0")
        pair = next(ids, None)
        if pair is None:
            raise FormatError(ids_path, line, f"the file ends here, but {texts_path} has more lines")
        qid, pid = split_columns(pair[1], 2, ids_path, line, "qid, pid")
        yield qid, pid, query, passage
    if next(ids, None) is not None:
        raise UserError(f"{ids_path}: more lines than {texts_path}")


def format_run_row(row: RunRow) -> str:
    """Return one line of a run; 9 significant digits give every float32 back exactly."""
    return f"{row.query}\t{row.row}\t{row.rank}\t{row.score:.9g}\n"


def read_run(path) -> Iterator[RunRow]:
    """Yield the rows of a run: query text, global row, rank, score."""
    for line, text in read_lines(path):
        query, row, rank, score = split_columns(text, 4, path, line, "query, row, rank, score")
        try:
            parsed = RunRow(query, int(row), int(rank), float(score))
        except ValueError:
            raise FormatError(path, line, "row and rank must be integers, score a number") from None
        if parsed.row < 0 or parsed.rank < 1 or not math.isfinite(parsed.score):
            raise FormatError(path, line, "expected row >= 0, rank >= 1 and a finite score")
        yield parsed


def run_by_query(path) -> Iterator[tuple[str, list[RunRow]]]:
    """Yield (query, its rows best first) of a run."""
    for query, rows in groupby(read_run(path), key=lambda row: row.query):
        yield query, list(rows)
