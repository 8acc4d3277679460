"""Pairs to logits, ours against sentence-transformers' CrossEncoder.predict: same weights, pairs and threads.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/rerank.py --data_dir D --model M --run output/res.top50 --queries 60 --depth 20

`ce` is CrossEncoder.predict as people call it (fp32, batches of 32); `ce_N` the same in batches of N. The
head is drawn at random, the same for all sides: what is measured is the time, and that the scores agree.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import numpy as np
import torch
from common import compare, parser
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from torch_src.data.candidates import Candidates, open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.models.cross_encoder import load_cross_encoder
from torch_src.models.tokenization import TextRules, load_tokenizer
from torch_src.retrieval.reranking import PairScorer
from torch_src.runtime.devices import choose_precision, set_threads, token_budget

LENGTH = 384
CPU = torch.device("cpu")


def candidates(given) -> Candidates:
    collection = PassageCollection(Path(given.data_dir) / "passage-collection")
    return open_candidates(given.run, collection, None).head(given.queries, given.depth)


def ours(given) -> dict:
    set_threads(0)
    precision = choose_precision(given.precision, CPU)
    model = load_cross_encoder(given.model, AutoConfig.from_pretrained(given.model), 0, trained=True)
    scorer = PairScorer(
        model, load_tokenizer(given.model), TextRules(LENGTH), CPU, precision, 512, token_budget(0, CPU)
    )
    pairs = candidates(given)
    scorer.score_all(pairs.head(1, 8))
    begun = time.perf_counter()
    scores = scorer.score_all(pairs)
    took = time.perf_counter() - begun
    np.save(given.result, scores)
    return {"seconds": took, "pairs_per_s": len(pairs) / took, "precision": precision}


def cross_encoder(batch_size: int):
    def side(given) -> dict:
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(
            given.model, max_length=LENGTH, device="cpu", activation_fn=torch.nn.Identity(),
            model_kwargs={"dtype": torch.float32},
        )  # fmt: skip
        pairs = candidates(given)
        texts = pairs.passages(0, len(pairs))
        rows = [(pairs.queries[at], text) for at, text in zip(pairs.query_of, texts, strict=True)]
        # As people call it is fp32; its other settings run at our precision.
        low = batch_size != 32 and choose_precision(given.precision, CPU) == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            model.predict(rows[:8], batch_size=batch_size)
            begun = time.perf_counter()
            scores = model.predict(rows, batch_size=batch_size, show_progress_bar=False)
            took = time.perf_counter() - begun
        np.save(given.result, np.asarray(scores, dtype=np.float32).reshape(-1))
        return {"seconds": took, "pairs_per_s": len(rows) / took, "precision": "bf16" if low else "fp32"}

    return side


def with_head(model: str, folder: Path) -> None:
    """Write the model with a head of one logit, drawn from seed 0, so that every side has the same."""
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data_dir", required=True)
    options.add_argument("--model", required=True, help="folder of an encoder")
    options.add_argument("--run", required=True, help="candidates: a run, or an official .res.tsv")
    options.add_argument("--queries", type=int, default=60)
    options.add_argument("--depth", type=int, default=20)
    options.add_argument("--precision", default="auto")
    options.add_argument("--peer_batches", type=int, nargs="*", default=[8, 16])
    given = options.parse_args()
    sides = {"ours": ours, "ce": cross_encoder(32)}
    sides |= {f"ce_{size}": cross_encoder(size) for size in given.peer_batches}
    with tempfile.TemporaryDirectory() as temporary:
        if not given.side:
            with_head(given.model, Path(temporary))
            sys.argv += ["--model", temporary]  # the last --model counts

        def difference(folder: Path) -> dict:
            one, other = (np.load(folder / f"{name}.npy") for name in ("ours", "ce"))
            largest = float(np.abs(one - other).max())
            return {"largest_difference": largest, "pairs": len(one), "threads": torch.get_num_threads()}

        compare(given, sides, list(sides), difference)


if __name__ == "__main__":
    main()
