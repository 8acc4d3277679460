"""Print one table of metrics: python script/show_metrics.py DEV_JSON NAME=RESULT_JSON ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the repository root is not on it

from metric.evaluation import MEASURES, compute_metrics, load_reference, load_result


def table(reference: dict, results: dict[str, dict]) -> list[str]:
    """Return the lines of the table: one result a line, DuReader's measures as columns."""
    width = max(len(name) for name in results)
    lines = [f"{'':{width}}  " + "  ".join(f"{name:>9}" for name in (*MEASURES, "queries"))]
    for name, result in results.items():
        metrics = compute_metrics(reference, result)
        figures = [f"{metrics[measure]:9.4f}" for measure in MEASURES] + [f"{metrics['QueriesRanked']:9d}"]
        lines.append(f"{name:{width}}  " + "  ".join(figures))
    return lines


def main(argv: list[str]) -> int:
    """Return the exit status: 0, or 2 for wrong arguments or files."""
    if len(argv) < 2 or not all("=" in word for word in argv[1:]):
        print("usage: python script/show_metrics.py DEV_JSON NAME=RESULT_JSON ...", file=sys.stderr)
        return 2
    try:
        results = dict(word.split("=", 1) for word in argv[1:])
        loaded = {name: load_result(path) for name, path in results.items()}
        print("\n".join(table(load_reference(argv[0]), loaded)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
