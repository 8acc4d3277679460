"""Print one table of metrics: python script/show_metrics.py DEV_JSON NAME=RESULT_JSON ..."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from metric.evaluation import MEASURES, compute_metrics, load_reference, load_result
from torch_src.runtime.options import OptionParser
from torch_src.runtime.program import exit_status


def table(reference: dict[str, set[str]], results: dict[str, dict[str, list[str]]]) -> list[str]:
    """Return the lines of the table: one result per line, DuReader's metrics as columns."""
    width = max(len(name) for name in results)
    lines = [f"{'':{width}}  " + "  ".join(f"{name:>9}" for name in (*MEASURES, "queries"))]
    for name, result in results.items():
        metrics = compute_metrics(reference, result)
        figures = [f"{metrics[measure]:9.4f}" for measure in MEASURES] + [f"{metrics['QueriesRanked']:9d}"]
        lines.append(f"{name:{width}}  " + "  ".join(figures))
    return lines


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    results = {name: load_result(path) for name, path in args.results}
    print("\n".join(table(load_reference(args.reference), results)))


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("reference", metavar="DEV_JSON", help="queries with answers")
    parser.add_argument(
        "results", nargs="+", metavar="NAME=RESULT_JSON", type=named_path, help="a name and a result"
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
