"""Encoding of passages against sentence-transformers.encode: same weights, texts, length and threads.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/encode.py --data_dir D --model M --count 512
    python script/bench/encode.py --data_dir D --model M --random_hidden 768 --count 128

`ours` reads the collection, tokenizes, encodes and writes fp16 blocks. `st` is SentenceTransformer.encode
with its defaults (fp32, batches of 32, sorted by length); `st_N` is the same in batches of N, at our
precision.
--random_hidden H uses a 12-layer BERT of that width with random weights and the model's vocabulary. Mean
pooling, normalized vectors, 384 tokens. With --openvino the first variant encodes with OpenVINO
(requirements-openvino.txt), and the ratios are relative to it.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

from script.bench.common import Figures, Variant, add_model, compare, make_parser
from script.bench.peers import bi_encoder, peer_autocast
from script.bench.synthetic import open_store
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import format_passage
from torch_src.inference_de_hparams import OPENVINO
from torch_src.models.dual_encoder import load_backbone
from torch_src.models.tokenization import TextRules, load_tokenizer
from torch_src.retrieval.encoding import Encoder, encode_collection
from torch_src.retrieval.engines.openvino import TOKENS, OpenVinoTower
from torch_src.runtime.devices import choose_precision, set_threads, token_budget

LENGTH, PREFIX = 384, "passage: "
CPU = torch.device("cpu")


def texts(args: argparse.Namespace) -> list[str]:
    """Return `count` passages at equal distances in the collection."""
    collection = PassageCollection(Path(args.data_dir) / "passage-collection")
    rows = np.linspace(0, len(collection) - 1, args.count).astype(int)
    return [collection[int(row)] for row in rows]


def ours(args: argparse.Namespace, engine: str = "torch") -> Figures:
    set_threads(0)
    precision = choose_precision(args.precision, CPU)
    config = AutoConfig.from_pretrained(args.model)
    tower: Any = load_backbone(args.model, config, "mean", 0).eval()
    budget = token_budget(args.tokens_per_batch, CPU)
    if engine == OPENVINO:
        tower, budget = OpenVinoTower(tower, precision), args.tokens_per_batch or TOKENS
    rules, tokenizer = TextRules(LENGTH, PREFIX), load_tokenizer(args.model)
    encoder = Encoder(tower, tokenizer, rules, "mean", True, CPU, precision, 512, budget)
    encoder.encode(texts(args)[:8])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with open(folder / "part-00", "w", encoding="utf-8", newline="") as file:
            file.writelines(map(format_passage, texts(args)))
        start = time.perf_counter()
        collection = PassageCollection(folder)
        store = open_store(folder / "emb", {}, len(collection), config.hidden_size, 65536)
        encode_collection(encoder, encoder.texts_of(collection), store, 1e9)
        took = time.perf_counter() - start
        np.save(args.result, store.vectors_at(np.arange(store.rows)))
    rate = args.count / took
    return {"seconds": took, "passages_per_s": rate, "precision": precision, "tokens_per_batch": budget}


def sentence_transformers(batch_size: int) -> Variant:
    def run(args: argparse.Namespace) -> Figures:
        model = bi_encoder(args.model, LENGTH)
        passages = [PREFIX + text for text in texts(args)]
        context, precision = peer_autocast(args.precision if batch_size != 32 else "fp32")
        with context:
            model.encode(passages[:8], batch_size=batch_size)
            start = time.perf_counter()
            vectors = model.encode(passages, batch_size=batch_size, show_progress_bar=False)
            took = time.perf_counter() - start
        np.save(args.result, vectors)
        return {"seconds": took, "passages_per_s": args.count / took, "precision": precision}

    return run


def write_random_bert(args: argparse.Namespace, folder: Path) -> None:
    """Write a 12-layer BERT of --random_hidden with random weights and the model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    hidden = args.random_hidden
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = make_parser(__doc__)
    add_model(parser)
    parser.add_argument("--random_hidden", type=int, default=0, help="width of a random model; 0: --model")
    parser.add_argument("--count", type=int, default=512, help="passages")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tokens_per_batch", type=int, default=0)
    parser.add_argument("--openvino", action="store_true", help="add a variant with OpenVINO")
    parser.add_argument("--peer_batches", type=int, nargs="*", default=[8, 16, 64])
    args = parser.parse_args()
    variants: dict[str, Variant] = {OPENVINO: partial(ours, engine=OPENVINO)} if args.openvino else {}
    variants |= {"ours": ours, "st": sentence_transformers(32)}
    variants |= {f"st_{size}": sentence_transformers(size) for size in args.peer_batches}
    names = list(variants)

    def cosine(folder: Path) -> dict[str, Any]:
        one, other = (np.load(folder / f"{name}.npy").astype(np.float64) for name in (names[0], "st"))
        both = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        return {"cosine_min": float(both.min()), "count": args.count, "threads": torch.get_num_threads()}

    with tempfile.TemporaryDirectory() as temporary:
        if args.random_hidden and not args.variant:
            write_random_bert(args, Path(temporary))
            at = sys.argv.index("--random_hidden")
            sys.argv[at : at + 2] = ["--model", temporary]  # the last --model counts
        compare(args, variants, names, cosine)


if __name__ == "__main__":
    main()
