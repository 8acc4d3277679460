"""Scoring of pairs against sentence-transformers' CrossEncoder.predict: same weights, pairs and threads.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/rerank.py --data_dir D --model M --run output/res.top50 --queries 60 --depth 20

`ce` is CrossEncoder.predict with its defaults (fp32, batches of 32); `ce_N` is the same in batches of N, at
our precision. All variants share a randomly initialized head: the benchmark measures time, and checks that
the scores agree.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from script.bench.common import Figures, Variant, add_model, compare, make_parser
from script.bench.peers import cross_encoder, peer_autocast
from torch_src.data.candidates import Candidates, open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.models.cross_encoder import load_cross_encoder
from torch_src.models.tokenization import TextRules, load_tokenizer
from torch_src.retrieval.reranking import PairScorer
from torch_src.runtime.devices import choose_precision, set_threads, token_budget

LENGTH = 384
CPU = torch.device("cpu")


def candidates(args: argparse.Namespace) -> Candidates:
    collection = PassageCollection(Path(args.data_dir) / "passage-collection")
    return open_candidates(args.run, collection, None).head(args.queries, args.depth)


def ours(args: argparse.Namespace) -> Figures:
    set_threads(0)
    precision = choose_precision(args.precision, CPU)
    model = load_cross_encoder(args.model, AutoConfig.from_pretrained(args.model), 0, trained=True)
    scorer = PairScorer(
        model, load_tokenizer(args.model), TextRules(LENGTH), CPU, precision, 512, token_budget(0, CPU)
    )
    pairs = candidates(args)
    scorer.score_all(pairs.head(1, 8))
    start = time.perf_counter()
    scores = scorer.score_all(pairs)
    took = time.perf_counter() - start
    np.save(args.result, scores)
    return {"seconds": took, "pairs_per_s": len(pairs) / took, "precision": precision}


def sentence_transformers(batch_size: int) -> Variant:
    def run(args: argparse.Namespace) -> Figures:
        model, pairs = cross_encoder(args.model, LENGTH), candidates(args)
        texts = pairs.passages(0, len(pairs))
        rows = [(pairs.queries[at], text) for at, text in zip(pairs.query_of, texts, strict=True)]
        context, precision = peer_autocast(args.precision if batch_size != 32 else "fp32")
        with context:
            model.predict(rows[:8], batch_size=batch_size)
            start = time.perf_counter()
            scores = model.predict(rows, batch_size=batch_size, show_progress_bar=False)
            took = time.perf_counter() - start
        np.save(args.result, np.asarray(scores, dtype=np.float32).reshape(-1))
        return {"seconds": took, "pairs_per_s": len(rows) / took, "precision": precision}

    return run


def with_head(model: str, folder: Path) -> None:
    """Write the model with a head of one logit, initialized from seed 0, the same for all variants."""
    torch.manual_seed(0)
    with_logit = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    with_logit.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def main() -> None:
    parser = make_parser(__doc__)
    add_model(parser)
    parser.add_argument("--run", required=True, help="candidates: a run, or an official .res.tsv")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--peer_batches", type=int, nargs="*", default=[8, 16])
    args = parser.parse_args()
    variants: dict[str, Variant] = {"ours": ours, "ce": sentence_transformers(32)}
    variants |= {f"ce_{size}": sentence_transformers(size) for size in args.peer_batches}

    def difference(folder: Path) -> dict[str, Any]:
        one, other = (np.load(folder / f"{name}.npy") for name in ("ours", "ce"))
        largest = float(np.abs(one - other).max())
        return {"largest_difference": largest, "pairs": len(one), "threads": torch.get_num_threads()}

    with tempfile.TemporaryDirectory() as temporary:
        if not args.variant:
            with_head(args.model, Path(temporary))
            sys.argv += ["--model", temporary]  # the last --model counts
        compare(args, variants, list(variants), difference)


if __name__ == "__main__":
    main()
