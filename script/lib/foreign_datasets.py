"""Readers of other data sets: passages as (id, title, text), queries as Query, one line at a time.

Every file may be gzipped. FormatError names the line of a malformed entry.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from script.lib.official_layout import Query
from torch_src.data.lines import FormatError, decode, parse_json, raw_lines, split_columns
from torch_src.runtime.errors import UserError

ID_NAMES = ("_id", "id", "docid", "pid", "paragraph_id")
TEXT_NAMES = ("text", "contents", "paragraph_text")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of a UTF-8 file, gzipped or not; UserError for a damaged archive."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for line, raw in raw_lines(cast(BinaryIO, file), path):
                yield line, decode(raw, path, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated archive ({error})") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of a JSON-lines file, gzipped or not."""
    for line, text in text_lines(path):
        if not text.strip():
            continue
        value = parse_json(text, path, line)
        if not isinstance(value, dict):
            raise FormatError(path, line, f"expected a JSON object, found {type(value).__name__}")
        yield line, value


def first_of(entry: dict[str, Any], names: Iterable[str], path: Path, line: int) -> str:
    """Return the value of the first of the names that the object has, as text."""
    for name in names:
        if isinstance(entry.get(name), str | int):
            return str(entry[name])
    raise FormatError(path, line, f"expected one of the fields {', '.join(names)}")


def read_passages(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (id, title, text) of a corpus: JSON lines, or tsv with columns id, text or id, title, text."""
    if ".tsv" in path.suffixes:
        for line, text in text_lines(path):
            columns = text.removesuffix("\n").split("\t")
            if len(columns) not in (2, 3):
                raise FormatError(
                    path, line, f"{len(columns)} columns (expected id, text or id, title, text)"
                )
            yield columns[0], columns[1] if len(columns) == 3 else "", columns[-1]
        return
    for line, entry in json_lines(path):
        title = entry.get("title")
        text = first_of(entry, TEXT_NAMES, path, line)
        yield first_of(entry, ID_NAMES, path, line), title if isinstance(title, str) else "", text


def find(folder: Path, *stems: str) -> Path | None:
    """Return the first file of the folder whose name up to its first dot is one of the stems."""
    for stem in stems if folder.is_dir() else ():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name.split(".")[0] == stem:
                return path
    return None


def require_file(folder: Path, *stems: str) -> Path:
    """Return what `find` returns; UserError when the folder or the file does not exist."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    path = find(folder, *stems)
    if path is None:
        raise UserError(f"{folder}: no file {' or '.join(stems)} in this folder")
    return path


def beir_queries(folder: Path) -> Iterator[Query]:
    """Yield the queries of a BEIR folder; the dev split comes from qrels/dev, or else from qrels/test."""
    path = require_file(folder, "queries")
    texts = {first_of(e, ID_NAMES, path, n): first_of(e, TEXT_NAMES, path, n) for n, e in json_lines(path)}
    dev_name = "test" if find(folder / "qrels", "dev") is None else "dev"
    for name, split in (("train", "train"), (dev_name, "dev")):
        qrels = find(folder / "qrels", name)
        if qrels is None:
            continue
        for qid, (positives, negatives) in read_qrels(qrels).items():
            if qid not in texts:
                raise UserError(f"{qrels}: query {qid} is not in {path}")
            if positives:  # dev files cannot hold negatives
                yield Query(qid, texts[qid], positives, negatives if split == "train" else [], split)


def read_qrels(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Return {qid: (pids with a score above 0, other pids)} of a BEIR judgment file."""
    judged: dict[str, tuple[list[str], list[str]]] = {}
    for line, text in text_lines(path):
        qid, pid, score = split_columns(text, 3, path, line, "query-id, corpus-id, score")
        if line == 1 and score == "score":
            continue
        try:
            relevant = float(score) > 0
        except ValueError:
            raise FormatError(path, line, f"score {score[:20]!r} is not a number") from None
        judged.setdefault(qid, ([], []))[not relevant].append(pid)
    return judged


def jsonl_queries(path: Path) -> Iterator[Query]:
    """Yield the queries of a JSON-lines file: id, text, positives, and optionally negatives and split."""
    for line, entry in json_lines(path):
        split = entry.get("split", "train")
        positives, negatives = entry.get("positives", []), entry.get("negatives", [])
        lists = isinstance(positives, list) and isinstance(negatives, list)
        if split not in ("train", "dev") or not lists:
            raise FormatError(path, line, "expected id, text, positives: [id, ...], split: train or dev")
        qid, text = first_of(entry, ID_NAMES, path, line), first_of(entry, TEXT_NAMES, path, line)
        yield Query(qid, text, list(map(str, positives)), list(map(str, negatives)), split)


def hub_queries(folder: Path) -> Iterator[Query]:
    """Yield queries of train.jsonl and dev.jsonl: query_id, query, positive_passages, negative_passages."""
    return _nested_queries(folder, ("query_id", "query", "positive_passages", "docid"), "negative_passages")


def dureader_queries(folder: Path) -> Iterator[Query]:
    """Yield the queries of train.json and dev.json: question_id, question, answer_paragraphs."""
    return _nested_queries(folder, ("question_id", "question", "answer_paragraphs", "paragraph_id"))


def _nested_queries(folder: Path, names: tuple[str, str, str, str], negative: str = "") -> Iterator[Query]:
    """Yield the queries of train.* and dev.*; `names`: fields of qid, text, positives, pid of those."""
    qid, query, positive, pid = names
    for split in ("train", "dev"):
        path = find(folder, split)
        if path is None:
            continue
        for line, entry in json_lines(path):
            try:
                positives = [str(passage[pid]) for passage in entry[positive]]
                negatives = [str(passage[pid]) for passage in entry.get(negative, [])]
                yield Query(str(entry[qid]), str(entry[query]), positives, negatives, split)
            except (KeyError, TypeError) as error:
                raise FormatError(path, line, f"missing or malformed field ({error})") from None
