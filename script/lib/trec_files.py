"""Runs and judgments of other tools: TREC, TSV, JSON; and this project's dev.json and result JSON."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from metric.convert_recall_res_to_json import check_map, find_pids, order_by_rank, read_results
from script.lib.foreign_files import Source, is_json, unique_fields
from script.lib.foreign_judgments import read_judgments
from torch_src.data.formats import read_dev, read_q2qid
from torch_src.data.kinds import ANSWERS, PASSAGE_MAP, QUERIES, QUERY_MAP, RESULT, RUN, kind_of
from torch_src.data.lines import (
    FilePath,
    FormatError,
    finite_number,
    parse_json,
    read_lines,
    shown,
    whole_number,
)
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


NOT_RESULTS = (ANSWERS, QUERY_MAP, PASSAGE_MAP, QUERIES)
NOT_JUDGMENTS = (RESULT, QUERY_MAP, PASSAGE_MAP, QUERIES)


class Hit(NamedTuple):
    """One line of a run."""

    pid: str
    rank: int  # 0: no such column
    score: float
    line: int


def is_own_run(path: FilePath) -> bool:
    """Return whether a file is a run of this project: its first column is a text, not an id."""
    if kind_of(path) != RUN:
        return False
    _, first = next(read_lines(path))
    query = first.partition("\t")[0]
    return " " in query or not query.isascii()


def check_result(path: FilePath, fix: str) -> None:
    """UserError when a file is not a result or a run of another tool; `fix`: for a run of this project."""
    if is_own_run(path):
        raise UserError(f"{path}: {RUN} (expected {RESULT}); {fix}")
    if (found := kind_of(path)) in NOT_RESULTS:
        raise UserError(f"{path}: {found} (expected {RESULT} or a run); check the order of the arguments")


def check_reference(path: FilePath) -> None:
    """UserError when a file is clearly not dev.json or qrels."""
    found = kind_of(path)
    if found in NOT_JUDGMENTS or is_own_run(path):  # qrels with TABs look like a run
        raise UserError(f"{path}: {found} (expected {ANSWERS} or qrels); check the order of the arguments")


def read_ranking(path: Path) -> dict[str, list[str]]:
    """Return {qid: pids, best first} of a result JSON, or of a run in TREC or TSV columns.

    Ranked by score as trec_eval does; equal scores by rank, where trec_eval goes by pid.
    """
    if is_json(path):
        return {qid: [*found] for qid, found in _json_ranking(path).items()}
    return {qid: [hit.pid for hit in hits] for qid, hits in _ranked_hits(path).items()}


def read_scored(path: Path) -> dict[str, dict[str, float]]:
    """Return {qid: {pid: score}}, best first, of the same files; 1 / rank where there are no scores."""
    if not is_json(path):
        ranked = _ranked_hits(path)
        return {qid: {hit.pid: hit.score for hit in hits} for qid, hits in ranked.items()}
    found = _json_ranking(path)
    return {qid: scores if isinstance(scores, dict) else by_rank(scores) for qid, scores in found.items()}


def by_rank(pids: list[str]) -> dict[str, float]:
    """Return {pid: 1 / rank}; a duplicate pid counts once."""
    return {pid: 1 / rank for rank, pid in enumerate(dict.fromkeys(pids), start=1)}


def read_own_run(path: Path, query_map: Path, passage_map: Path) -> dict[str, dict[str, float]]:
    """Return {qid: {pid: score}}, best first, of a run of this project."""
    check_map(str(path), str(passage_map))
    rankings = read_results(str(path), read_q2qid(query_map), sys.maxsize)
    for ranking in rankings.values():
        order_by_rank(str(path), ranking)
    rows, pids = find_pids(str(path), str(passage_map), rankings)
    pid_of = dict(zip(rows.tolist(), pids, strict=True))
    return {
        qid: {pid_of[row]: score for row, score in zip(ranking.rows, ranking.scores, strict=True)}
        for qid, ranking in rankings.items()
    }


def _ranked_hits(path: Path) -> dict[str, list[Hit]]:
    """Return {qid: hits, best first} of a run in TREC or TSV columns."""
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
        runs = {qid: [hit._replace(score=1 / hit.score) for hit in hits] for qid, hits in runs.items()}
    ranked = {qid: sorted(hits, key=lambda hit: (-hit.score, hit.rank)) for qid, hits in runs.items()}
    _warn_about(path, ranked)
    return ranked


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


def _json_ranking(path: Path) -> dict[str, list[str]] | dict[str, dict[str, float]]:
    """Return {qid: [pid, ...]}, or {qid: {pid: score}} as BEIR and ranx write it, best first."""
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
    return {
        qid: {pid: scores[pid] for pid in sorted(scores, key=scores.__getitem__, reverse=True)}
        for qid, scores in value.items()
    }


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
