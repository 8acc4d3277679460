"""Score a result against the reference, with the measures of DuReader-retrieval.

    python metric/evaluation.py REFERENCE RESULT

REFERENCE is dev.json, a JSON object a line: {question_id, answer_paragraphs: [{paragraph_id}, ...]}.
RESULT is one JSON object {qid: [pid, ...]}, best first. Prints one JSON line: MRR@10, QueriesRanked,
recall@1, recall@50, the three measures as fractions. recall@k is a hit rate: the share of queries with a
relevant passage among the first k; trec_eval's recall is another measure. Needs numpy and xxhash, but no
torch.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

from torch_src.data.formats import read_dev
from torch_src.data.kinds import ANSWERS, RESULT, check_kinds
from torch_src.data.lines import FilePath
from torch_src.data.results import load_result, warn_if_stale
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import warn
from torch_src.runtime.options import OptionParser
from torch_src.runtime.program import exit_status

MRR_DEPTH = 10  # ranks that MRR uses
DEPTH = 50  # ranks that any measure uses; later ones are ignored
MEASURES = ("MRR@10", "recall@1", "recall@50")

Reference = dict[str, set[str]]  # qid -> relevant pids, at least one
Result = dict[str, list[str]]  # qid -> pids, best first


def load_reference(path: FilePath) -> Reference:
    """Return {qid: relevant pids} of dev.json in file order."""
    return {query.qid: set(query.answers) for query in read_dev(path, texts=False)}


def per_query(reference: Reference, result: Result) -> dict[str, dict[str, float]]:
    """Return {qid: {measure: value}} of every reference query, in that order; 0 without a result."""
    values = {}
    for qid, relevant in reference.items():
        ranks = (rank for rank, pid in enumerate(result.get(qid, [])[:DEPTH], 1) if pid in relevant)
        first = next(ranks, None)
        values[qid] = {
            "MRR@10": 1.0 / first if first and first <= MRR_DEPTH else 0.0,
            "recall@1": 1.0 if first == 1 else 0.0,
            "recall@50": 1.0 if first else 0.0,
        }
    return values


def compute_metrics(reference: Reference, result: Result) -> dict[str, float]:
    """Return {MRR@10, QueriesRanked, recall@1, recall@50}: means over the reference, and the number of lists.

    UserError when no query is in both: that is the result of another query set, not a score of 0.
    """
    if not any(qid in reference for qid in result):
        raise UserError(
            f"none of the {len(result)} queries of the result is among the {len(reference)} of the reference"
        )
    totals = dict.fromkeys(MEASURES, 0.0)
    for values in per_query(reference, result).values():
        for name in MEASURES:  # one by one: sum() rounds differently from Python 3.12 on
            totals[name] += values[name]
    mrr, recall_1, recall_50 = (totals[name] / len(reference) for name in MEASURES)
    return {"MRR@10": mrr, "QueriesRanked": len(result), "recall@1": recall_1, "recall@50": recall_50}


def warn_about(path: FilePath, reference: Reference, result: Result) -> None:
    """Warn of everything that lowers the metrics, or that they ignore."""
    repeats = [len(pids[:DEPTH]) - len(set(pids[:DEPTH])) for pids in result.values()]
    if any(repeats):
        warn(f"{path}: {sum(repeats)} duplicate pids take up ranks in {sum(map(bool, repeats))} queries")
    missing, unknown = len(reference.keys() - result.keys()), len(result.keys() - reference.keys())
    if missing:
        warn(f"{path}: {missing} of the {len(reference)} reference queries have no list and score 0")
    if unknown:
        warn(f"{path}: {unknown} queries are not in the reference; only QueriesRanked counts them")


def evaluate(reference_path: FilePath, result_path: FilePath) -> None:
    """Print the measures as one JSON line."""
    check_kinds((reference_path, ANSWERS), (result_path, RESULT))
    reference, result = load_reference(reference_path), load_result(result_path)
    warn_if_stale(result_path)
    try:
        metrics = compute_metrics(reference, result)
    except UserError as error:
        raise UserError(f"{result_path}: {error}") from None
    warn_about(result_path, reference, result)
    print(json.dumps(metrics))


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, or 2 when an input is wrong."""
    parser = OptionParser("Print MRR@10, recall@1 and recall@50 of a result.")
    parser.add_argument("reference", metavar="REFERENCE", help="dev.json: a JSON object a line")
    parser.add_argument("result", metavar="RESULT", help="JSON object {qid: [pid, ...]}")
    given = parser.parse_args(argv)
    return exit_status(lambda: evaluate(given.reference, given.result))


if __name__ == "__main__":
    sys.exit(main())
