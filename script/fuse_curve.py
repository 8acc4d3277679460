"""Print MRR@10 against the weight of the retriever's score beside the re-ranker's, and the best weight.

    python script/fuse_curve.py --run output/res.top50 --scores output/cross_scores.txt \\
        --id_map output/cross_id_map.tsv --reference dureader-retrieval-baseline-dataset/dev/dev.json

Pass the best weight to `do_cross_infer.py --fuse_retriever_weight`. The weight is chosen on these same
queries: its MRR@10 is optimistic.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np

from metric.evaluation import compute_metrics, load_reference
from torch_src.data.formats import read_id_map, read_run, read_scores
from torch_src.data.kinds import ANSWERS, ID_MAP, RUN, SCORES, check_kinds
from torch_src.data.results import check_same_candidates
from torch_src.retrieval.fusion import fused_scores
from torch_src.runtime.errors import UserError
from torch_src.runtime.options import OptionParser
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import checksum_files, read_stamp

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)


def read_pairs(run: str, scores: str, id_map: str) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """Return (qids, retriever's scores, logits, pids), aligned; UserError if the files do not match."""
    stamp = read_stamp(scores) or {}
    if stamp.get("candidates") not in (None, checksum_files([run])):
        raise UserError(f"{scores}: not the scores of {run}; run do_cross_infer.py again")
    check_same_candidates(scores, id_map)
    depth = stamp.get("depth") or np.inf  # do_cross_infer.py --depth scores the first of each query
    retriever = np.array([row.score for row in read_run(run) if row.rank <= depth])
    logits = np.array(list(read_scores(scores)))
    ids = list(read_id_map(id_map))
    if not len(retriever) == len(logits) == len(ids):
        raise UserError(f"{len(retriever)} lines in {run}, {len(logits)} in {scores}, {len(ids)} in {id_map}")
    if not ids:
        raise UserError(f"{run}: no results in it")
    return [qid for qid, _ in ids], retriever, logits, [pid for _, pid in ids]


def mrr_by_weight(
    qids: list[str],
    retriever: np.ndarray,
    logits: np.ndarray,
    pids: list[str],
    reference: dict[str, set[str]],
) -> list[tuple[float, float]]:
    """Return (weight, MRR@10) for each weight. The pairs of a query are adjacent."""
    starts = [at for at in range(len(qids)) if not at or qids[at] != qids[at - 1]]
    spans = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(qids)], strict=True)]
    points = []
    for weight in WEIGHTS:
        fused = fused_scores(logits, retriever, spans, weight)
        result = {}
        for span in spans:
            order = span.start + np.argsort(-fused[span], kind="stable")
            result[qids[span.start]] = [pids[at] for at in order]
        points.append((weight, compute_metrics(reference, result)["MRR@10"]))
    return points


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    files = ((args.run, RUN), (args.scores, SCORES), (args.id_map, ID_MAP), (args.reference, ANSWERS))
    check_kinds(*files)
    pairs = read_pairs(args.run, args.scores, args.id_map)
    points = mrr_by_weight(*pairs, load_reference(args.reference))
    best, _ = max(points, key=lambda point: point[1])
    print("weight  MRR@10")
    for weight, value in points:
        mark = "  best" if weight == best else ""
        print(f"{weight:6.2f}  {value:.4f}  {'#' * round(60 * value)}{mark}")
    print(f"use: do_cross_infer.py --fuse_retriever_weight {best}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    for name in ("run", "scores", "id_map", "reference"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
