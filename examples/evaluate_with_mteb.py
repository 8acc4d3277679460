"""Evaluate an exported model with mteb on a data set of your own, in the official layout.

    python -m pip install -r requirements-mteb.txt
    python examples/evaluate_with_mteb.py --data_dir D --model output/export/dual
    python examples/evaluate_with_mteb.py --data_dir D --model output/export/cross --run output/res.top50

Without --run the model is a SentenceTransformer that searches the whole collection; with it a CrossEncoder
that re-ranks the first --depth passages of each query. Prints the measures of metric/evaluation.py as mteb
computes them, as one JSON line. docs/evaluate_with_mteb.md has the public tasks.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from torch_src.data.collection import PassageCollection
from torch_src.data.formats import read_dev, read_q2qid, run_by_query
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library
from torch_src.runtime.options import OptionParser, positive_int
from torch_src.runtime.program import exit_status

MEASURES = {"MRR@10": "mrr_at_10", "recall@1": "hit_rate_at_1", "recall@50": "hit_rate_at_50"}


def first_pids(run: Path, depth: int, qids: dict[str, str], pids: list[str]) -> dict[str, list[str]]:
    """Return {qid: its first passages} of a run; UserError for a run of other queries or passages."""
    found = {}
    for query, rows in run_by_query(run):
        if query not in qids or max(row.row for row in rows) >= len(pids):
            raise UserError(f"{run}: of other data (query {query!r}); pass a run of the dev queries")
        found[qids[query]] = [pids[row.row] for row in rows[:depth]]
    return found


def make_task(data_dir: Path, run: Path | None = None, depth: int = 50) -> Any:
    """Return the dev queries of a data folder as a task of mteb; of a run, its passages are re-ranked."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class OwnRetrieval(AbsTaskRetrieval):
        k_values = (1, 10, 50)  # a search returns as many passages as the last says
        metadata = TaskMetadata(
            name="OwnRetrieval", description="A data set of my own", type="Retrieval", category="t2t",
            dataset={"path": "local", "revision": "local"}, eval_splits=["dev"], eval_langs=["cmn-Hans"],
            main_score="mrr_at_10",
        )  # fmt: skip

    passages, dev = data_dir / "passage-collection", data_dir / "dev"
    collection, pid_path = PassageCollection(passages), passages / "passage2id.map.json"
    pids = [pid.decode() for pid in read_passage_ids(pid_path).tolist()]
    check_length(pid_path, len(pids), len(collection))
    qids = read_q2qid(dev / "q2qid.dev.json")
    task = OwnRetrieval()
    dev_data = {
        "corpus": Dataset.from_dict({"id": pids, "text": collection[:]}),
        "queries": Dataset.from_dict({"id": list(qids.values()), "text": list(qids)}),
        "relevant_docs": {
            query.qid: dict.fromkeys(query.answers, 1) for query in read_dev(dev / "dev.json", texts=False)
        },
        "top_ranked": first_pids(run, depth, qids, pids) if run else None,
    }
    task.dataset = {"default": {"dev": dev_data}}
    task.data_loaded = True
    return task


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate the model and print its measures."""
    mteb = import_library("mteb", "requirements-mteb.txt")
    from sentence_transformers import CrossEncoder, SentenceTransformer

    task = make_task(args.data_dir, args.run, args.depth)
    model = (CrossEncoder if args.run else SentenceTransformer)(args.model)
    # without a cache of results: there, all models of local folders have the same name
    found = mteb.evaluate(model, task, cache=None, encode_kwargs={"batch_size": args.batch_size})
    (scores,) = found.task_results[0].scores["dev"]
    print(json.dumps({name: scores[key] for name, key in MEASURES.items()}))


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="data set in the official layout")
    parser.add_argument("--model", required=True, help="folder that script/export_model.py wrote")
    parser.add_argument("--run", type=Path, help="run to re-rank, such as output/res.top50")
    parser.add_argument("--depth", type=positive_int, default=50, help="passages of a query to re-rank")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts in a forward pass")
    args = parser.parse_args(argv)
    return exit_status(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
