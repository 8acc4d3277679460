"""Readers of other people's data sets: passages as (id, title, text), queries as Query, line by line.

Every file may be gzipped; what is malformed is named with its line.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from script.lib.official_layout import Query
from torch_src.data.formats import FormatError, decode, parse_json, raw_lines, split_columns
from torch_src.runtime.errors import UserError

ID_NAMES, TEXT_NAMES = ("_id", "id", "docid", "pid", "paragraph_id"), ("text", "contents", "paragraph_text")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of a UTF-8 file, gzipped or not; a broken archive or line is named."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for line, raw in raw_lines(file, path):
                yield line, decode(raw, path, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: a broken or cut archive ({error})") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line, object) of a JSON-lines file, gzipped or not; FormatError for anything else."""
    for line, text in text_lines(path):
        if not text.strip():
            continue
        value = parse_json(text, path, line)
        if not isinstance(value, dict):
            raise FormatError(path, line, f"expected a JSON object, found {type(value).__name__}")
        yield line, value


def first_of(entry: dict, names: Iterable[str], path: Path, line: int) -> str:
    """Return the text of the first of the names that the object has."""
    for name in names:
        if isinstance(entry.get(name), str | int):
            return str(entry[name])
    raise FormatError(path, line, f"none of {', '.join(names)} in it")


def passages_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (id, title, text) of a corpus: JSON lines, or `id TAB text` and `id TAB title TAB text`."""
    if ".tsv" in path.suffixes:
        for line, text in text_lines(path):
            columns = text.removesuffix("\n").split("\t")
            if len(columns) not in (2, 3):
                raise FormatError(path, line, f"{len(columns)} columns, expected id, text or id, title, text")
            yield columns[0], columns[1] if len(columns) == 3 else "", columns[-1]
        return
    for line, entry in json_lines(path):
        title = entry.get("title")
        text = first_of(entry, TEXT_NAMES, path, line)
        yield first_of(entry, ID_NAMES, path, line), title if isinstance(title, str) else "", text


def find(folder: Path, *stems: str) -> Path | None:
    """Return the file of the folder whose name begins with one of the stems, the first stem first."""
    for stem in stems if folder.is_dir() else ():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name.split(".")[0] == stem:
                return path
    return None


def required(folder: Path, *stems: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    path = find(folder, *stems)
    if path is None:
        raise UserError(f"{folder}: no file {' or '.join(stems)} in it")
    return path


def beir_queries(folder: Path) -> Iterator[Query]:
    """Yield the queries of a BEIR folder; test and dev judgements are dev."""
    path = required(folder, "queries")
    texts = {first_of(e, ID_NAMES, path, n): first_of(e, TEXT_NAMES, path, n) for n, e in json_lines(path)}
    judged = [("train", "train"), ("dev", "dev")]
    if find(folder / "qrels", "dev") is None:
        judged[1] = ("test", "dev")
    for name, split in judged:
        path = find(folder / "qrels", name)
        if path is None:
            continue
        judged_of: dict[str, tuple[list[str], list[str]]] = {}  # qid -> its positives, its negatives
        for line, text in text_lines(path):
            qid, pid, grade = split_columns(text, 3, path, line, "query-id, corpus-id, score")
            if line == 1 and grade == "score":
                continue
            judged_of.setdefault(qid, ([], []))[grade_of(grade, path, line) <= 0].append(pid)
        for qid, (positives, negatives) in judged_of.items():
            if qid not in texts:
                raise UserError(f"{path}: the query {qid} is not in queries.jsonl")
            if positives:  # dev files have no place for negatives
                yield Query(qid, texts[qid], positives, negatives if split == "train" else [], split)


def grade_of(text: str, path: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise FormatError(path, line, f"score {text[:20]!r} is not a number") from None


def own_queries(path: Path) -> Iterator[Query]:
    """Yield the queries of a file of one's own."""
    for line, entry in json_lines(path):
        split = entry.get("split", "train")
        positives, negatives = entry.get("positives", []), entry.get("negatives", [])
        if (
            split not in ("train", "dev")
            or not isinstance(positives, list)
            or not isinstance(negatives, list)
        ):
            raise FormatError(path, line, "expected id, text, positives: [id, ...], split: train or dev")
        qid, text = first_of(entry, ID_NAMES, path, line), first_of(entry, TEXT_NAMES, path, line)
        yield Query(qid, text, list(map(str, positives)), list(map(str, negatives)), split)


def hub_queries(folder: Path) -> Iterator[Query]:
    """Yield queries of train.jsonl and dev.jsonl: query_id, query, positive_passages, negative_passages."""
    return _listed_queries(folder, ("query_id", "query", "positive_passages", "docid"), "negative_passages")


def dureader_queries(folder: Path) -> Iterator[Query]:
    """Yield the queries of train.json and dev.json: question_id, question, answer_paragraphs."""
    return _listed_queries(folder, ("question_id", "question", "answer_paragraphs", "paragraph_id"))


def _listed_queries(folder: Path, names: tuple[str, str, str, str], negative: str = "") -> Iterator[Query]:
    """Yield the queries of train.* and dev.*; `names`: of qid, text, list of positives, id in that list."""
    qid, query, positive, pid = names
    for split in ("train", "dev"):
        path = find(folder, split)
        for line, entry in json_lines(path) if path else ():
            try:
                positives = [str(passage[pid]) for passage in entry[positive]]
                negatives = [str(passage[pid]) for passage in entry.get(negative, [])]
                yield Query(str(entry[qid]), str(entry[query]), positives, negatives, split)
            except (KeyError, TypeError) as error:
                raise FormatError(path, line, f"missing or malformed: {error}") from None
