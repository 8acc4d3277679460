"""Queries and their judgments in files of their own: BEIR, MTEB, T2Ranking, MS MARCO, TREC."""

import re
from collections.abc import Iterator
from pathlib import Path

from script.lib.foreign_datasets import (
    PIDS,
    QIDS,
    QUERIES,
    Conversion,
    choose_split,
    data_files,
    find_file,
    only,
)
from script.lib.foreign_files import Fields, Source, id_of, text_of
from script.lib.official_layout import Query
from torch_src.data.lines import FormatError, finite_number, shown
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import warn

QRELS = re.compile(
    r"qrels[-_.](?P<retrieval>retrieval[-_.])?(?P<after>[\w.-]+)|(?P<before>[\w.-]+)[-_.]qrels"
)
QUERY = Fields({"id": QIDS, "text": QUERIES}, ("id", "text"), {2: ("id", "text")})
JUDGMENT = Fields(
    {
        "qid": ("query-id", "query_id", "qid", "question_id", "topic", "topic_id"),
        "pid": ("corpus-id", "corpus_id", *PIDS[2:], "document"),
        "grade": ("score", "relevance", "rel", "label", "grade", "relevancy", "judgment"),
    },
    ("qid", "pid"),
    {2: ("qid", "pid"), 3: ("qid", "pid", "grade"), 4: ("qid", "", "pid", "grade")},
    blanks=True,
)

Judged = list[tuple[Path, str]]  # files of judgments with their split, train or dev


def read_query_texts(path: Path, source: Source) -> dict[str, tuple[str, int]]:
    """Return {qid: (text, line)}; FormatError when one id has two texts."""
    found: dict[str, tuple[str, int]] = {}
    for line, record in source.records(path, QUERY):
        qid = id_of(record["id"], path, line, source.counts, "query id")
        text = text_of(record["text"], path, line, "query")
        known = found.setdefault(qid, (text, line))
        if known[0] != text:
            raise FormatError(path, line, f"query id {qid}: another text than in line {known[1]}")
        source.counts.add("duplicate lines of queries: merged", path, line, known[1] != line)
    return found


def read_judgments(path: Path, source: Source, no_grade: int = 1) -> Iterator[tuple[int, str, str, int]]:
    """Yield (line, qid, pid, grade) of qrels: TREC, TSV with or without header, or JSON lines.

    `no_grade`: the grade in files that list positives without one.
    """
    for line, record in source.records(path, JUDGMENT):
        qid = id_of(record["qid"], path, line, source.counts, "query id")
        pid = id_of(record["pid"], path, line, source.counts, "passage id")
        grade = finite_number(str(record.get("grade", no_grade)))
        if grade is None or not grade.is_integer():
            raise FormatError(path, line, f"grade {shown(str(record['grade']))} (expected an integer)")
        yield line, qid, pid, int(grade)


def judged_queries(queries: Path, judged: Judged, conversion: Conversion) -> Iterator[Query]:
    """Yield the queries of a file that the judgments of its splits name, in that order."""
    texts = read_query_texts(queries, conversion.source)
    seen: set[str] = set()
    for qrels, split in judged:
        found = judged_split(queries, texts, qrels, split, conversion)
        seen |= found.keys()
        yield from found.values()
    unjudged = [line for qid, (_, line) in texts.items() if qid not in seen]
    if unjudged:
        names = " and ".join(qrels.name for qrels, _ in judged)
        conversion.count(f"queries have no judgment in {names}: omitted", queries, unjudged[0], len(unjudged))


def judged_split(
    queries: Path, texts: dict[str, tuple[str, int]], qrels: Path, split: str, conversion: Conversion
) -> dict[str, Query]:
    """Return {qid: query} of one file of judgments."""
    found: dict[str, Query] = {}
    for line, qid, pid, grade in read_judgments(qrels, conversion.source, conversion.min_grade):
        if qid not in texts:
            conversion.dangling(qrels, line, f"query {qid} is not in {queries}")
            continue
        if qid not in found:
            found[qid] = Query(qid, texts[qid][0], split, queries, texts[qid][1])
        conversion.judge(found[qid], pid, grade, qrels, line)
    return found


def qrels_files(folder: Path) -> dict[str, Path]:
    """Return {split: judgments} of a folder: qrels/SPLIT.tsv, qrels.SPLIT.tsv or SPLIT_qrels.jsonl."""
    found, retrieval = data_files(folder / "qrels"), dict[str, list[Path]]()
    for stem, paths in data_files(folder).items():
        if match := QRELS.fullmatch(stem):
            kind = retrieval if match["retrieval"] else found
            kind.setdefault(match["after"] or match["before"], []).extend(paths)
        elif stem == "qrels":
            found.setdefault("dev", []).extend(paths)
    # T2Ranking has both: those for retrieval name the positives, the others have grades for re-ranking
    return {name: only(paths) for name, paths in (found | retrieval).items()}


def folder_queries(folder: Path, conversion: Conversion) -> Iterator[Query]:
    """Yield the queries of a folder with judgments: the training split and one other as dev."""
    splits = qrels_files(folder)
    chosen = choose_split(splits, conversion, folder)
    if not chosen:
        warn(f"{folder}: no judgments (qrels/train.tsv, qrels/dev.tsv, ...): only the passages are converted")
    queries_of: dict[Path, Judged] = {}
    for qrels, target in chosen:
        split = next(name for name, path in splits.items() if path == qrels)
        names = [f"queries{mark}{split}" for mark in "._-"] + [f"{split}{mark}queries" for mark in "._-"]
        queries = find_file(folder, *names) or find_file(folder, "queries", "topics")
        if queries is None:
            raise UserError(f"{folder}: no file queries or queries.{split} in this folder")
        queries_of.setdefault(queries, []).append((qrels, target))
    for queries, judged in queries_of.items():
        yield from judged_queries(queries, judged, conversion)
