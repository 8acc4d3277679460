"""What script/report.py shows of runs and reference: ranks, kinds of queries, the passages that are named."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from metric.evaluation import DEPTH, load_reference, per_query
from script.lib.report.hparams import NONE, ReportHparams
from torch_src.data.candidates import open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.data.passage_ids import check_length, read_passage_ids, rows_of
from torch_src.inference_stage import read_query_ids
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import require
from torch_src.runtime.stamps import fingerprint_files, read_stamp

CHUNK = 256  # passages in one JSON script of the page: parsed when one of them is shown


@dataclass(frozen=True)
class Stage:
    """A run: its name on the page, its path, and of each query (rows, scores), best first."""

    name: str  # retriever or re-ranker
    path: Path
    ranked: dict[str, tuple[list[int], list[float]]]


@dataclass
class Found:
    """Everything read that the page is about; memory is that of the runs, and of the named rows' ids."""

    collection: PassageCollection
    stages: list[Stage]  # the retriever, then the re-ranker where there is one
    qids: dict[str, list[str]]  # of each query of the retriever's run; [""] where they are not known
    reference: dict[str, set[str]]  # qid -> pids of its gold passages; empty without one
    pids: dict[int, str] = field(default_factory=dict)  # of the rows that the runs name
    rows: dict[str, int] = field(default_factory=dict)  # of gold pids; without those that have no row
    notes: list[str] = field(default_factory=list)  # what is left out, and why

    def result(self, stage: Stage) -> dict[str, list[str]]:
        """Return {qid: [pid, ...]} of a stage, best first, as the converters would write it."""
        ranked = ((qid, stage.ranked.get(query, ([], []))[0]) for query, qid in self.asked())
        return {qid: [self.pids[row] for row in rows] for qid, rows in ranked if rows}

    def asked(self) -> Iterator[tuple[str, str]]:
        """Yield (query, qid) in the order of the retriever's run."""
        for query in self.stages[0].ranked:
            for qid in self.qids[query]:
                yield query, qid


def find(hp: ReportHparams) -> Found:
    """Return the runs and the reference; UserError where they do not fit together."""
    cache = str(Path(hp.output_dir) / "cache")
    collection = PassageCollection(hp.passage_dir_path, cache)
    require(hp.dual_run_path, "the retriever's run", "run do_dual_infer.py first, or pass --dual_run")
    stages, notes = [read_stage("retriever", hp.dual_run_path, collection)], []
    if hp.cross_run and hp.cross_run != NONE:
        require(hp.cross_run_path, "the re-ranked run")
    if hp.cross_run == NONE or not hp.cross_run_path.exists():
        notes.append("No re-ranked run: the page shows the retriever alone.")
    else:
        stages.append(read_stage("re-ranker", hp.cross_run_path, collection))
        notes += foreign_candidates(hp)
    found = Found(collection, stages, query_ids(hp, stages), {}, notes=notes)
    add_reference(hp, found)
    add_ids(hp, found, cache)
    return found


def read_stage(name: str, path: Path, collection: PassageCollection) -> Stage:
    """Return a run; FormatError for a malformed one."""
    candidates = open_candidates(str(path), collection, None)
    if candidates.pids is not None:
        raise UserError(f"{path}: expected a run (query, row, rank, score), not an official file")
    pairs = [(query, candidates.rows[at].tolist(), candidates.scores[at].tolist())
             for query, at in candidates.spans()]  # fmt: skip
    return Stage(name, path, {query: (rows, scores) for query, rows, scores in pairs})


def foreign_candidates(hp: ReportHparams) -> list[str]:
    """Return a line where the re-ranked run was not made of this retriever's run."""
    made_of = (read_stamp(hp.cross_run_path) or {}).get("candidates")
    if made_of in (None, fingerprint_files([hp.dual_run_path])):
        return []
    return [f"{hp.cross_run_path} was made of other candidates than {hp.dual_run_path}: "
            "what is lost and gained below is not the re-ranker's doing alone."]  # fmt: skip


def query_ids(hp: ReportHparams, stages: list[Stage]) -> dict[str, list[str]]:
    """Return {query: its qids} of the retriever's queries; UserError for one that dev_q lacks, or a
    re-ranked one that the retriever's run lacks.
    """
    known = read_query_ids(hp)
    for stage, there, where in zip(
        stages, (known, stages[0].ranked), (hp.dev_q_path, stages[0].path), strict=False
    ):
        for query in stage.ranked:
            if query not in there:
                raise UserError(f"{stage.path}: the query {query[:40]!r} is not in {where}")
    return {query: known[query] or [""] for query in stages[0].ranked}


def add_reference(hp: ReportHparams, found: Found) -> None:
    """Read the reference, or note why there is none."""
    why = f"{hp.dev_set_path} is not there" if hp.dev_set != NONE else "--dev_set none"
    if hp.dev_set and hp.dev_set != NONE:
        require(hp.dev_set_path, "queries with answers", "--dev_set none goes without")
    if hp.dev_set != NONE and os.path.exists(hp.dev_set_path):
        reference, asked = load_reference(hp.dev_set_path), {qid for _, qid in found.asked()}
        absent = len(reference.keys() - asked)
        if absent < len(reference):
            found.reference = reference
            if absent:
                found.notes.append(f"{absent:,} queries of {hp.dev_set_path} are not in the run: they count "
                                   "0 in the measures and are not listed.")  # fmt: skip
            return
        why = f"{hp.dev_set_path} has none of these queries"
    found.notes.append(f"No reference ({why}): nothing is scored, and queries cannot be filtered by outcome.")


def add_ids(hp: ReportHparams, found: Found, cache: str) -> None:
    """Fill in the pids of the named rows and the rows of the gold passages."""
    named = sorted({row for stage in found.stages for rows, _ in stage.ranked.values() for row in rows})
    ids = read_passage_ids(hp.passage_ids_path, cache)
    check_length(hp.passage_ids_path, len(ids), len(found.collection))
    found.pids = {row: pid.decode() for row, pid in zip(named, ids[named].tolist(), strict=True)}
    del ids  # of the whole collection: no longer than for this
    gold = set().union(*(found.reference.get(qid, ()) for _, qid in found.asked()))
    found.rows = {pid: row for row, pid in found.pids.items() if pid in gold}
    others = sorted(pid.encode("utf-8", "replace") for pid in gold - found.rows.keys())
    if others:
        rows = rows_of(hp.passage_ids_path, np.array(others)).tolist()
        found.rows |= {pid.decode(): row for pid, row in zip(others, rows, strict=True) if row >= 0}


def first_ranks(found: Found, stage: Stage) -> dict[str, int]:
    """Return {qid: rank of its first gold passage, 0 where none is in the run} of all reference queries."""
    result = found.result(stage)
    return {qid: next((rank for rank, pid in enumerate(result.get(qid, ()), 1) if pid in gold), 0)
            for qid, gold in found.reference.items()}  # fmt: skip


def hit_rates(ranks: dict[str, int]) -> list[float]:
    """Return the share of queries with a gold passage among the first k, for k = 1..DEPTH."""
    return [sum(0 < rank <= k for rank in ranks.values()) / len(ranks) for k in range(1, DEPTH + 1)]


def split_scores(found: Found, stage: Stage) -> tuple[list[float], list[float]]:
    """Return (scores of gold passages, scores of the others) of the queries that have a reference."""
    split: tuple[list[float], list[float]] = ([], [])
    for query, qid in found.asked():
        gold = found.reference.get(qid)
        for row, score in zip(*stage.ranked.get(query, ([], [])), strict=True) if gold else ():
            split[found.pids[row] not in gold].append(score)
    return split


def kind_of(before: dict[str, float], after: dict[str, float] | None) -> str:
    """Return missed (no gold passage among the retriever's first 50), lost or gained (MRR@10 of the query
    fell or rose by re-ranking), or nothing. `before` and `after` are the query's measures.
    """
    if not before["recall@50"]:
        return "missed"
    change = after["MRR@10"] - before["MRR@10"] if after else 0.0
    return "lost" if change < 0 else "gained" if change > 0 else ""


class Shelf:
    """The passages that the page shows: each row once, numbered as they are first named."""

    def __init__(self):
        self.places: dict[int, int] = {}

    def place(self, row: int) -> int:
        return self.places.setdefault(row, len(self.places))

    def chunks(self, collection: PassageCollection, characters: int) -> Iterator[list]:
        """Yield lists of [row, text], at most CHUNK of them, texts cut after so many characters."""
        rows = list(self.places)
        for start in range(0, len(rows), CHUNK):
            yield [[row, shortened(collection[row], characters)] for row in rows[start : start + CHUNK]]


def shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters] + "…"


def browsed_queries(found: Found, shelf: Shelf, depth: int) -> list[dict]:
    """Return what the page shows of each query, passages by their place on the shelf.

    A query's items are [place, rank and score of the retriever, rank and score of the re-ranker, gold];
    rank 0: not in that run.
    """
    measures = [per_query(found.reference, found.result(stage)) for stage in found.stages]
    ranks = [first_ranks(found, stage) for stage in found.stages]
    entries = []
    for query, qid in found.asked():
        gold = found.reference.get(qid, set())
        entry = {"query": query, "qid": qid, "items": items(found, shelf, query, gold, depth)}
        if gold:
            own = [values[qid] for values in measures]
            entry["kind"] = kind_of(own[0], own[1] if len(own) > 1 else None)
            entry["change"] = round(own[-1]["MRR@10"] - own[0]["MRR@10"], 4)
            entry["first"] = [of_stage[qid] for of_stage in ranks]
            entry["absent"] = sorted(gold - found.rows.keys())
        entries.append(entry)
    return entries


def items(found: Found, shelf: Shelf, query: str, gold: set[str], depth: int) -> list[list]:
    """Return the items of a query: what a stage has among its first `depth`, and the gold passages."""
    ranked = [stage.ranked.get(query, ([], [])) for stage in found.stages]
    rows_of_gold = {found.rows[pid] for pid in gold if pid in found.rows}
    shown = [row for rows, _ in ranked for row in rows[:depth]] + sorted(rows_of_gold)
    places = [{row: (rank, float(f"{score:.5g}"))
               for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)}
              for rows, scores in ranked]  # fmt: skip
    found_at = [(row, [value for of_stage in places for value in of_stage.get(row, (0, 0))])
                for row in dict.fromkeys(shown)]  # fmt: skip
    return [[shelf.place(row), *values, int(row in rows_of_gold or found.pids[row] in gold)]
            for row, values in found_at]  # fmt: skip
