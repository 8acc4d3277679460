"""Compare two results: metrics of DuReader and of trec_eval, wins and losses, a paired test.

    python -m pip install -r requirements-tools.txt
    python script/compare_runs.py output/dual_res.json output/cross_res.json --reference D/dev/dev.json

    python script/compare_runs.py run_a.txt run_b.txt --reference qrels.txt

A and B are results ({qid: [pid, ...]}, best first) or runs: TREC, or TSV with qid, pid, rank, score. The
reference is dev.json or qrels: TREC, TSV or JSON lines. All may be gzipped. MRR@10, recall@1 and recall@50
are DuReader's (its recall is a hit rate); RR@10, nDCG@10, AP@50, R@50 and Success@50 are trec_eval's,
computed by ir-measures. nDCG uses the grades; for the other measures a passage is relevant from --min_grade
on. p: paired randomization test, two-sided (Smucker et al. 2007). Interval: 95 %, bootstrap over queries.
--per_query writes one line per query.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np

from metric.evaluation import MEASURES, Reference, compute_metrics, per_query
from script.lib.paired_test import SEED, compare
from script.lib.trec_files import check_reference, check_result, read_grades, read_ranking
from torch_src.runtime.commands import command
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import warn
from torch_src.runtime.options import OptionParser, positive_int, seed
from torch_src.runtime.outputs import Output, begins, check_outputs
from torch_src.runtime.program import exit_status

TREC = ("RR@10", "nDCG@10", "AP@50", "R@50", "Success@50")
PER_QUERY = begins(rb'\{"qid": "(\\.|[^"\\])*", "MRR@10": \[')  # a file of --per_query

Grades = dict[str, dict[str, int]]  # qid -> pid -> grade, from 1


def trec_values(grades: Grades, result: dict[str, list[str]], min_grade: int = 1) -> dict[str, np.ndarray]:
    """Return {metric: (queries,) values} of trec_eval's metrics, in the order of the grades."""
    ir_measures = import_library("ir_measures", "requirements-tools.txt", "ir-measures")
    qrels = [ir_measures.Qrel(qid, pid, grade) for qid, of in grades.items() for pid, grade in of.items()]
    # trec_eval sorts by score: a score that decreases with the rank keeps the order.
    run = [
        ir_measures.ScoredDoc(qid, pid, -float(rank))
        for qid in grades
        for rank, pid in enumerate(unique(result.get(qid, ())))
    ]
    places = {qid: at for at, qid in enumerate(grades)}
    values = {name: np.zeros(len(grades)) for name in TREC}
    names = {name if "DCG" in name else name.replace("@", f"(rel={min_grade})@"): name for name in TREC}
    measures = {ir_measures.parse_measure(text): name for text, name in names.items()}
    for metric in ir_measures.iter_calc([*measures], qrels, run):
        values[measures[metric.measure]][places[metric.query_id]] = metric.value
    return values


def unique(pids: Iterable[str]) -> list[str]:
    """Return the pids without duplicates, which trec_eval rejects; the first one counts."""
    return list(dict.fromkeys(pids))


def all_values(
    reference: Reference, result: dict[str, list[str]], grades: Grades | None = None, min_grade: int = 1
) -> dict[str, np.ndarray]:
    """Return {metric: (queries,) values} under the names of each tool; `grades` default to 1."""
    compute_metrics(reference, result)  # UserError without a common query
    own = per_query(reference, result).values()
    dureader = {name: np.array([values[name] for values in own]) for name in MEASURES}
    known = grades or {qid: dict.fromkeys(pids, 1) for qid, pids in reference.items()}
    return {**dureader, **trec_values(known, result, min_grade)}


def table(first: dict[str, np.ndarray], second: dict[str, np.ndarray], seed: int) -> list[str]:
    """Return the lines of the table."""
    lines = [f"{'':11} {'A':>8} {'B':>8} {'B - A':>8} {'95 % interval':>19} {'p':>7}  better/worse/same"]
    for name in first:
        if name == TREC[0]:
            lines.append("trec_eval:")
        found = compare(first[name], second[name], seed)
        lines.append(
            f"{name:11} {found.first:8.4f} {found.second:8.4f} {found.mean:+8.4f} "
            f"[{found.low:+.4f}, {found.high:+.4f}] {found.p:8.4f}  "
            f"{found.better}/{found.worse}/{found.same}"
        )
    return lines


def run(args: argparse.Namespace) -> None:
    """Compare and print."""
    if args.per_query:
        check_outputs([Output(args.per_query, PER_QUERY)], [args.a, args.b, args.reference])
    maps = ("q2qid.dev.json", "passage2id.map.json")
    for path in (args.a, args.b):
        check_result(path, f"convert it: {command('metric/convert_recall_res_to_json.py', *maps, path, 50)}")
    check_reference(args.reference)
    grades = read_grades(Path(args.reference), args.min_grade)
    reference = {
        qid: {pid for pid, grade in judged.items() if grade >= args.min_grade}
        for qid, judged in grades.items()
    }
    results = [read_ranking(Path(path)) for path in (args.a, args.b)]
    for path, result in zip((args.a, args.b), results, strict=True):
        if result.keys().isdisjoint(reference):
            raise UserError(f"{path}: none of its {len(result):,} queries is in {args.reference}")
        if unknown := len(result.keys() - reference.keys()):
            warn(f"{path}: {unknown:,} queries are not in the reference: not scored")
        if missing := len(reference.keys() - result.keys()):
            warn(f"{path}: {missing:,} of the {len(reference):,} reference queries have no list and score 0")
    first, second = (all_values(reference, result, grades, args.min_grade) for result in results)
    print(f"A {args.a}\nB {args.b}\n{len(reference):,} queries of {args.reference}\nDuReader:")
    print("\n".join(table(first, second, args.seed)))
    if args.per_query:
        with atomic_write(args.per_query) as file:
            for at, qid in enumerate(reference):
                pair = {name: [float(first[name][at]), float(second[name][at])] for name in first}
                file.write(json.dumps({"qid": qid, **pair}, ensure_ascii=False) + "\n")
        print(f"wrote {args.per_query}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("a", metavar="A", help="result or run")
    parser.add_argument("b", metavar="B", help="result or run")
    parser.add_argument("--reference", required=True, help="dev.json, or qrels")
    parser.add_argument("--min_grade", type=positive_int, default=1, help="of a relevant passage")
    parser.add_argument("--per_query", default="", help="file to write, one JSON line per query")
    parser.add_argument("--seed", type=seed, default=SEED, help="of the test and the interval")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
