"""Runs and judgments of other tools: TREC, TSV, JSON; and this project's dev.json and result JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from script.lib.foreign_files import Source, is_json, unique_fields
from script.lib.foreign_judgments import read_judgments
from torch_src.data.formats import read_dev
from torch_src.data.lines import FormatError, finite_number, parse_json, shown, whole_number
from torch_src.data.results import load_result
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log, warn

RUN_COLUMNS = {  # number of columns -> their values
    3: ("qid", "pid", "score"),  # or the rank
    4: ("qid", "pid", "rank", "score"),
    5: ("qid", "", "pid", "rank", "score"),
    6: ("qid", "", "pid", "rank", "score", ""),
}
EXPECTED = "6: qid, Q0, pid, rank, score, name; 4: qid, pid, rank, score; or 3: qid, pid, rank or score"
QID_NAMES = ("qid", "query_id", "query-id", "question_id")


class Hit(NamedTuple):
    """One line of a run."""

    pid: str
    rank: int  # 0: no such column
    score: float
    line: int


def read_ranking(path: Path) -> dict[str, list[str]]:
    """Return {qid: pids, best first} of a result JSON, or of a run in TREC or TSV columns.

    Ranked by score as trec_eval does; equal scores by rank, where trec_eval goes by pid.
    """
    if is_json(path):
        return _json_ranking(path)
    found: dict[str, dict[str, Hit]] = {}
    for qid, hit in _run_lines(path):
        hits = found.setdefault(qid, {})
        if hit.pid in hits:
            message = f"duplicate passage {shown(hit.pid)} of the query {shown(qid)}"
            raise FormatError(path, hit.line, f"{message} (first in line {hits[hit.pid].line})")
        hits[hit.pid] = hit
    if not found:
        raise UserError(f"{path}: no results in it")
    runs = {qid: [*hits.values()] for qid, hits in found.items()}
    ranks = all(sorted(hit.score for hit in hits) == [*range(1, len(hits) + 1)] for hits in runs.values())
    if ranks and not any(hit.rank for hits in runs.values() for hit in hits):
        log(f"{path}: the third column is read as the rank")
        runs = {qid: [hit._replace(score=-hit.score) for hit in hits] for qid, hits in runs.items()}
    ranked = {qid: sorted(hits, key=lambda hit: (-hit.score, hit.rank)) for qid, hits in runs.items()}
    _warn_about(path, ranked)
    return {qid: [hit.pid for hit in hits] for qid, hits in ranked.items()}


def _run_lines(path: Path) -> Iterator[tuple[str, Hit]]:
    """Yield (qid, hit) of each line; columns are separated by TABs or blanks, a header is skipped."""
    width = 0
    for line, text in Source().lines(path):
        columns = text.split("\t") if "\t" in text else text.split()
        if not text.strip() or (not width and columns[0].lower() in QID_NAMES):
            continue
        width = width or len(columns)
        if len(columns) != width or width not in RUN_COLUMNS:
            raise FormatError(path, line, f"{len(columns)} columns (expected {EXPECTED})")
        values = dict(zip(RUN_COLUMNS[width], columns, strict=True))
        rank, score = whole_number(values.get("rank", "0"), 9), finite_number(values["score"])
        if rank is None or score is None:
            what = "the rank is not an integer" if rank is None else "the score is not a finite number"
            raise FormatError(path, line, f"{what}: {shown(text)}")
        if not values["qid"] or not values["pid"]:
            raise FormatError(path, line, f"an empty qid or pid: {shown(text)}")
        yield values["qid"], Hit(values["pid"], rank, score, line)


def _json_ranking(path: Path) -> dict[str, list[str]]:
    """Return {qid: pids} of {qid: [pid, ...]}, or of {qid: {pid: score}} as BEIR and ranx write it."""
    value = parse_json("\n".join(text for _, text in Source().lines(path)), path, 1, unique_fields)
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(found, dict) for found in value.values())
    ):
        result = load_result(path)
        if repeated := sum(len(pids) - len(set(pids)) for pids in result.values()):
            warn(f"{path}: {repeated:,} duplicate pids of a query: trec_eval's measures use the first")
        return result
    for qid, scores in value.items():
        for pid, score in scores.items():
            if finite_number(json.dumps(score)) is None:
                raise UserError(f"{path}: the score of {shown(pid)} for {shown(qid)} is not a finite number")
    return {qid: sorted(scores, key=scores.__getitem__, reverse=True) for qid, scores in value.items()}


def _warn_about(path: Path, ranked: dict[str, list[Hit]]) -> None:
    """Warn of ranks that contradict the scores, and of equal scores, which trec_eval orders by pid."""
    contrary = equal = 0
    for hits in ranked.values():
        pairs = [*zip(hits, hits[1:], strict=False)]
        contrary += any(first.score > second.score and first.rank > second.rank for first, second in pairs)
        equal += any(first.score == second.score for first, second in pairs)
    if contrary:
        warn(f"{path}: in {contrary:,} queries the ranks contradict the scores; the scores are used")
    if equal:
        warn(f"{path}: {equal:,} queries have equal scores: ordered by rank, trec_eval orders them by pid")


def read_grades(path: Path, min_grade: int = 1) -> dict[str, dict[str, int]]:
    """Return {qid: {pid: grade}} of dev.json, or of qrels in TREC, TSV or JSON lines.

    Queries without a passage of `min_grade` are omitted, and counted.
    """
    source = Source()
    if is_json(path) and "answer_paragraphs" in next((entry for _, entry in source.entries(path)), {}):
        dev = read_dev(path, texts=False)
        grades = {query.qid: {pid: query.grades.get(pid, 1) for pid in query.answers} for query in dev}
    else:
        grades = {}
        for line, qid, pid, grade in read_judgments(path, source):
            known = grades.setdefault(qid, {}).setdefault(pid, grade)
            source.counts.add(
                "judgments of one passage with two grades: the higher counts", path, line, known != grade
            )
            grades[qid][pid] = max(known, grade)
    source.counts.log()
    answered = {qid: found for qid, found in grades.items() if max(found.values()) >= min_grade}
    if len(answered) < len(grades):
        omitted = len(grades) - len(answered)
        log(f"{path}: {omitted:,} queries without a passage of grade {min_grade}: not scored")
    if not answered:
        raise UserError(f"{path}: no query with a passage of grade {min_grade}")
    return answered
