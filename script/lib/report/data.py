"""What the report shows of the runs and the reference: ranks, outcomes of queries, passages."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metric.evaluation import DEPTH, load_reference, per_query
from script.lib.report.hparams import ReportHparams
from script.lib.report.words import Both, same
from torch_src.data.candidates import open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.data.passage_ids import check_length, read_passage_ids, rows_of
from torch_src.data.results import searched_collection
from torch_src.hparams import NONE
from torch_src.query_ids import read_query_ids
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import require
from torch_src.runtime.stamps import checksum_files, read_stamp

RETRIEVER, RERANKER = Both("retriever", "检索"), Both("re-ranker", "重排")
FUSED, BM25 = Both("fused", "融合"), same("BM25")
CHUNK = 256  # passages in one JSON script of the page, which is parsed when one of them is shown


@dataclass(frozen=True)
class Stage:
    """A run: its name on the page, its path and its ranking of each query."""

    name: Both
    path: Path
    ranked: dict[str, tuple[list[int], list[float]]]  # query -> (rows, scores), best first


@dataclass
class Report:
    """What the page is about. Memory: the runs, and the ids of their rows."""

    collection: PassageCollection
    # the retriever first; then the re-ranker, the fused run and BM25, as far as they exist
    stages: list[Stage]
    qids: dict[str, list[str]]  # of each query in the retriever's run; [""] if unknown
    reference: dict[str, set[str]]  # qid -> pids of its gold passages; empty without a reference
    pids: dict[int, str] = field(default_factory=dict)  # of the rows in the runs
    rows: dict[str, int] = field(default_factory=dict)  # of the gold pids that are in the collection
    notes: list[Both] = field(default_factory=list)  # what is omitted, and why

    def result(self, stage: Stage) -> dict[str, list[str]]:
        """Return {qid: [pid, ...]} of a stage, best first, as the converters would write it."""
        ranked = ((qid, stage.ranked.get(query, ([], []))[0]) for query, qid in self.queries())
        return {qid: [self.pids[row] for row in rows] for qid, rows in ranked if rows}

    def queries(self) -> Iterator[tuple[str, str]]:
        """Yield (query, qid) in the order of the retriever's run."""
        for query in self.stages[0].ranked:
            for qid in self.qids[query]:
                yield query, qid

    def stage(self, name: Both) -> Stage | None:
        """Return the stage of this name, None if there is none."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_report(hp: ReportHparams) -> Report:
    """Return the runs and the reference; UserError if they do not belong together."""
    cache = str(Path(hp.output_dir) / "cache")
    require(hp.dual_run_path, "the retriever's run", "run do_dual_infer.py first, or pass --dual_run")
    collection = PassageCollection(hp.passage_dir_path, cache)
    stages, notes = [read_stage(RETRIEVER, hp.dual_run_path, collection)], []
    if hp.cross_run and hp.cross_run != NONE:
        require(hp.cross_run_path, "the re-ranked run")
    if hp.cross_run == NONE or not hp.cross_run_path.exists():
        notes.append(
            Both("No re-ranked run: the page shows the retriever alone.", "没有重排结果：只看检索。")
        )
    else:
        stages.append(read_stage(RERANKER, hp.cross_run_path, collection))
        notes += other_candidates(hp)
    for name, option, places in ((FUSED, hp.fused_run, hp.fused_places), (BM25, hp.bm25_run, hp.bm25_places)):
        stages += other_run(name, option, places, collection, stages[0])
    report = Report(collection, stages, query_ids(hp, stages), {}, notes=notes)
    add_reference(hp, report)
    add_ids(hp, report, cache)
    return report


def read_stage(name: Both, path: Path, collection: PassageCollection) -> Stage:
    """Return a run; FormatError for a malformed one."""
    candidates = open_candidates(str(path), collection, None)
    if candidates.pids is not None:
        raise UserError(f"{path}: an official candidate file (expected a run: query, row, rank, score)")
    ranked = {query: (candidates.rows[at].tolist(), candidates.scores[at].tolist())
              for query, at in candidates.spans()}  # fmt: skip
    return Stage(name, path, ranked)


def other_run(
    name: Both, option: str, places: Sequence[Path], collection: PassageCollection, retriever: Stage
) -> list[Stage]:
    """Return the run that the option names, or else the first of `places` with a run of the same data.

    The stamp of a run names its collection; without a stamp a run is only used if the option names it.
    """
    if option == NONE:
        return []
    if option:
        require(option, "a run")
        return [read_stage(name, Path(option), collection)]
    for path in places:
        if searched_collection(path) == collection.checksum:
            stage = read_stage(name, path, collection)
            if stage.ranked.keys() <= retriever.ranked.keys():
                return [stage]
    return []


def other_candidates(hp: ReportHparams) -> list[Both]:
    """Return a note if the re-ranked run was made from another retriever's run."""
    made_from = (read_stamp(hp.cross_run_path) or {}).get("candidates")
    if made_from in (None, checksum_files([hp.dual_run_path])):
        return []
    return [
        Both(
            f"{hp.cross_run_path} was not made from {hp.dual_run_path}: "
            "the changes shown below are not those of the re-ranker alone.",
            f"{hp.cross_run_path} 不是由 {hp.dual_run_path} 重排得到的：下面的变化不全是重排带来的。",
        )
    ]


def query_ids(hp: ReportHparams, stages: list[Stage]) -> dict[str, list[str]]:
    """Return {query: its qids}; UserError for a query that dev_q or the retriever's run lacks."""
    known = read_query_ids(hp)
    expected = [(known.keys(), hp.dev_q_path)] + [(stages[0].ranked.keys(), stages[0].path)] * len(stages)
    for stage, (queries, path) in zip(stages, expected, strict=False):
        for query in stage.ranked:
            if query not in queries:
                raise UserError(f"{stage.path}: query {query[:40]!r} is not in {path}")
    return {query: known[query] or [""] for query in stages[0].ranked}


def add_reference(hp: ReportHparams, report: Report) -> None:
    """Read the reference, or add a note why there is none."""
    path = hp.dev_set_path
    reason = (
        Both(f"{path} does not exist", f"{path} 不存在") if hp.dev_set != NONE else same("--dev_set none")
    )
    if hp.dev_set and hp.dev_set != NONE:
        require(path, "queries with answers", "--dev_set none omits the metrics")
    if hp.dev_set != NONE and os.path.exists(path):
        reference, qids = load_reference(path), {qid for _, qid in report.queries()}
        missing = len(reference.keys() - qids)
        if missing < len(reference):
            report.reference = reference
            if missing:
                report.notes.append(
                    Both(
                        f"{missing:,} queries of {path} are not in the run: "
                        "they count as 0 in the metrics and are not listed.",
                        f"{path} 里有 {missing:,} 个问题不在结果中：指标里按 0 计，下面不列出。",
                    )
                )
            return
        reason = Both(f"{path} contains none of these queries", f"{path} 里没有这些问题")
    report.notes.append(
        Both(
            f"No reference ({reason.en}): no metrics, and no filters by outcome.",
            f"没有标注（{reason.zh}）：不计算指标，也不能按结果筛选。",
        )
    )


def add_ids(hp: ReportHparams, report: Report, cache: str) -> None:
    """Fill in the pids of the rows in the runs, and the rows of the gold passages."""
    named = sorted({row for stage in report.stages for rows, _ in stage.ranked.values() for row in rows})
    ids = read_passage_ids(hp.passage_ids_path, cache)
    check_length(hp.passage_ids_path, len(ids), len(report.collection))
    report.pids = {row: pid.decode() for row, pid in zip(named, ids[named].tolist(), strict=True)}
    del ids  # of the whole collection: freed before rows_of reads them again
    gold: set[str] = set().union(*(report.reference.get(qid, ()) for _, qid in report.queries()))
    report.rows = {pid: row for row, pid in report.pids.items() if pid in gold}
    others = sorted(pid.encode("utf-8", "replace") for pid in gold - report.rows.keys())
    if others:
        rows = rows_of(hp.passage_ids_path, np.array(others)).tolist()
        report.rows |= {pid.decode(): row for pid, row in zip(others, rows, strict=True) if row >= 0}


def first_ranks(report: Report, stage: Stage) -> dict[str, int]:
    """Return {qid: rank of its first gold passage, or 0} for all queries of the reference."""
    result = report.result(stage)
    return {qid: next((rank for rank, pid in enumerate(result.get(qid, ()), 1) if pid in gold), 0)
            for qid, gold in report.reference.items()}  # fmt: skip


def hit_rates(ranks: dict[str, int]) -> list[float]:
    """Return the share of queries with a gold passage in the top k, for k = 1..DEPTH."""
    return [sum(0 < rank <= k for rank in ranks.values()) / len(ranks) for k in range(1, DEPTH + 1)]


def split_scores(report: Report, stage: Stage) -> tuple[list[float], list[float]]:
    """Return (scores of gold passages, other scores) for the queries that have a reference."""
    gold_scores: list[float] = []
    other_scores: list[float] = []
    for query, qid in report.queries():
        gold = report.reference.get(qid)
        if gold:
            for row, score in zip(*stage.ranked.get(query, ([], [])), strict=True):
                (gold_scores if report.pids[row] in gold else other_scores).append(score)
    return gold_scores, other_scores


def outcome(before: dict[str, float], after: dict[str, float]) -> str:
    """Return missed, lost, gained or nothing, from a query's metrics before and after re-ranking.

    missed: no gold passage in the retriever's top 50; lost, gained: re-ranking lowered or raised MRR@10.
    """
    if not before["recall@50"]:
        return "missed"
    change = after["MRR@10"] - before["MRR@10"]
    return "lost" if change < 0 else "gained" if change > 0 else ""


class Passages:
    """The passages on the page: each row once, numbered in the order of first use."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def number(self, row: int) -> int:
        return self.numbers.setdefault(row, len(self.numbers))

    def chunks(self, collection: PassageCollection, characters: int) -> Iterator[list[tuple[int, str]]]:
        """Yield lists of (row, text), at most CHUNK each, texts truncated to so many characters."""
        rows = list(self.numbers)
        for start in range(0, len(rows), CHUNK):
            yield [(row, shortened(collection[row], characters)) for row in rows[start : start + CHUNK]]


def shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "…"


def query_entries(
    report: Report, passages: Passages, depth: int, chosen: set[str] | None = None
) -> list[dict[str, Any]]:
    """Return what the page shows of each query (of the `chosen` ones); passages are numbers on the page.

    An item is [number, rank and score in each stage, gold]; rank 0: not in that run.
    """
    ranks = [first_ranks(report, stage) for stage in report.stages]
    kinds = outcomes(report)
    entries = []
    for query, qid in report.queries():
        if chosen is not None and query not in chosen:
            continue
        gold = report.reference.get(qid, set())
        entry: dict[str, Any] = {"query": query, "qid": qid}
        entry["items"] = query_items(report, passages, query, gold, depth)
        if gold:
            entry["kind"], entry["change"] = kinds[qid]
            entry["first"] = [of_stage[qid] for of_stage in ranks]
            entry["absent"] = sorted(gold - report.rows.keys())
        entries.append(entry)
    return entries


def outcomes(report: Report) -> dict[str, tuple[str, float]]:
    """Return {qid: (outcome, change of MRR@10 by re-ranking)} of the reference."""
    reranker = report.stage(RERANKER)
    before = per_query(report.reference, report.result(report.stages[0]))
    after = per_query(report.reference, report.result(reranker)) if reranker else before
    return {qid: (outcome(values, after[qid]), round(after[qid]["MRR@10"] - values["MRR@10"], 4))
            for qid, values in before.items()}  # fmt: skip


def query_items(
    report: Report, passages: Passages, query: str, gold: set[str], depth: int
) -> list[list[float]]:
    """Return the items of a query: the top `depth` passages of each stage, and the gold passages."""
    rankings = [stage.ranked.get(query, ([], [])) for stage in report.stages]
    gold_rows = {report.rows[pid] for pid in gold if pid in report.rows}
    shown = dict.fromkeys([*(row for rows, _ in rankings for row in rows[:depth]), *sorted(gold_rows)])
    return items_of(report, passages, query, list(shown), gold)


def items_of(
    report: Report, passages: Passages, query: str, rows: list[int], gold: set[str]
) -> list[list[float]]:
    """Return [number on the page, rank and score in each stage, gold] of passages of a query."""
    gold_rows = {report.rows[pid] for pid in gold if pid in report.rows}
    places = [{row: (rank, float(f"{score:.5g}"))
               for rank, (row, score) in enumerate(zip(*stage.ranked.get(query, ([], [])), strict=True), 1)}
              for stage in report.stages]  # fmt: skip
    items = []
    for row in rows:
        values = [value for of_stage in places for value in of_stage.get(row, (0, 0))]
        items.append([passages.number(row), *values, int(row in gold_rows or report.pids[row] in gold)])
    return items
