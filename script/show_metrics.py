"""Print one table of metrics of several results, the tests of their differences, and a verdict.

    python script/show_metrics.py D/dev/dev.json BM25=output/bm25/dual_res.json dense=output/dual_res.json \\
        re-ranked=output/cross_res.json --test dense re-ranked

--test A B compares MRR@10 of two of the results over the same queries, B - A, as compare_runs.py does: 95 %
interval and paired randomization test. The last line says which differences are more than chance.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from metric.evaluation import MEASURES, Reference, compute_metrics, load_reference, load_result, per_query
from torch_src.data.kinds import ANSWERS, RESULT, check_kinds
from torch_src.runtime.errors import UserError
from torch_src.runtime.options import OptionParser
from torch_src.runtime.program import exit_status

Results = dict[str, dict[str, list[str]]]  # name -> qid -> pids, best first
TESTED = "MRR@10"


def table(reference: Reference, results: Results) -> list[str]:
    """Return the lines of the table: one result per line, DuReader's metrics as columns."""
    width = max(len(name) for name in results)
    lines = [f"{'':{width}}  " + "  ".join(f"{name:>9}" for name in (*MEASURES, "queries"))]
    for name, result in results.items():
        metrics = compute_metrics(reference, result)
        figures = [f"{metrics[measure]:9.4f}" for measure in MEASURES] + [f"{metrics['QueriesRanked']:9d}"]
        lines.append(f"{name:{width}}  " + "  ".join(figures))
    return lines


def tests(reference: Reference, results: Results, pairs: list[tuple[str, str]]) -> list[str]:
    """Return the lines of the tests of (first, second) names, and the verdict."""
    import numpy as np

    from script.lib.paired_test import compare

    width = max(len(f"{second} - {first}") for first, second in pairs)
    lines = [
        f"{TESTED:{width}}  {'difference':>10}  {'95 % interval':>18}  {'p':>6}  better/worse/same queries"
    ]
    verdicts = []
    for first, second in pairs:
        values = [per_query(reference, results[name]).values() for name in (first, second)]
        before, after = (np.array([of[TESTED] for of in each]) for each in values)
        found = compare(before, after)
        interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
        lines.append(
            f"{f'{second} - {first}':{width}}  {found.mean:+10.4f}  {interval:>18}  {found.p:6.4f}  "
            f"{found.better}/{found.worse}/{found.same}"
        )
        relation = "is better than" if found.mean > 0 else "is worse than"
        if not found.is_significant:
            relation = "does not differ significantly from"
        verdicts.append(f"{second} {relation} {first}")
    return [*lines, "verdict: " + "; ".join(verdicts)]


def run(args: argparse.Namespace) -> None:
    """Print the table, the tests and the verdict."""
    check_kinds((args.reference, ANSWERS), *((path, RESULT) for _, path in args.results))
    results = {name: load_result(path) for name, path in args.results}
    reference = load_reference(args.reference)
    for name in (name for pair in args.test for name in pair):
        if name not in results:
            raise UserError(f"--test {name}: not one of the results ({', '.join(results)})")
    print("\n".join(table(reference, results)))
    if args.test:
        print("\n" + "\n".join(tests(reference, results, args.test)))


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("reference", metavar="DEV_JSON", help="queries with answers")
    parser.add_argument(
        "results", nargs="+", metavar="NAME=RESULT_JSON", type=named_path, help="a name and a result"
    )
    parser.add_argument(
        "--test", nargs=2, action="append", default=[], metavar=("A", "B"), help="names to compare"
    )
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


def named_path(word: str) -> tuple[str, str]:
    """Return (name, path) of NAME=PATH."""
    name, equals, path = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{word}: expected NAME=RESULT_JSON")
    return name, path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
