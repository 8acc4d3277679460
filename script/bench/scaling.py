"""Encoding and search at 1x, 2x, 4x and 8x rows: time per row and peak memory, which should stay constant.

    python script/bench/scaling.py encode --data_dir D --rows 20000      # a 2-layer, 64-wide model, 32 tokens
    python script/bench/scaling.py search --rows 250000 --queries 200

A block holds a quarter of the rows of the smallest size, so that every size has several blocks. Prints a
table, then a JSON line with the figures of the largest size relative to the smallest.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np
import torch

from script.bench.common import ROOT, Figures, Variant, make_parser, measure, run_variant, work_folder
from script.bench.synthetic import fill_random, open_store, repeat_collection, write_small_model
from torch_src.data.collection import PassageCollection
from torch_src.models.backbones import load_config
from torch_src.models.dual_encoder import load_backbone
from torch_src.models.tokenization import TextRules, load_tokenizer
from torch_src.retrieval.encoding import Encoder, encode_collection
from torch_src.retrieval.search import search
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import set_threads

SIZES = (1, 2, 4, 8)
CPU = torch.device("cpu")
HIDDEN = 768


def random_store(args: argparse.Namespace, size: int) -> VectorStore:
    return open_store(args.folder / f"v{size}", {}, args.rows * size, HIDDEN, args.rows // 4)


def encode_variant(args: argparse.Namespace, size: int) -> Figures:
    set_threads(0)
    rows, model = args.rows * size, str(args.folder / "model")
    tower = load_backbone(model, load_config(model), "mean", 0).eval()
    rules, tokenizer = TextRules(32), load_tokenizer(model)
    encoder = Encoder(tower, tokenizer, rules, "mean", True, CPU, "fp32", 512, 4096)
    collection = PassageCollection(args.folder / f"passages{size}", args.folder / "cache")
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder), {}, rows, 64, args.rows // 4)
        start = time.perf_counter()
        encode_collection(encoder, encoder.texts_of(collection), store, 1e9)
    return {"seconds": time.perf_counter() - start, "rows": rows}


def search_variant(args: argparse.Namespace, size: int) -> Figures:
    set_threads(0)
    store, generator = random_store(args, size), np.random.default_rng(0)
    queries = generator.standard_normal((args.queries, HIDDEN), dtype=np.float32)
    start = time.perf_counter()
    search(store, queries, 50, [CPU], memory_gb=0.5)
    return {"seconds": time.perf_counter() - start, "rows": store.rows}


def prepare(args: argparse.Namespace) -> None:
    """Write the inputs of all sizes."""
    if args.stage == "encode":
        write_small_model(args.folder / "model")
    for size in SIZES:
        if args.stage == "encode":
            passages = Path(args.data_dir) / "passage-collection"
            repeat_collection(passages, args.folder / f"passages{size}", args.rows * size)
        else:
            fill_random(random_store(args, size))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("stage", choices=["encode", "search"])
    parser.add_argument("--data_dir", default=str(ROOT / "script/sample_data"))
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the smallest size")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="folder for the files; default: a temporary folder")
    args = parser.parse_args()
    variant = encode_variant if args.stage == "encode" else search_variant
    variants: dict[str, Variant] = {f"{size}x": partial(variant, size=size) for size in SIZES}
    if args.variant:
        return run_variant(args, variants)
    with work_folder(args) as folder:
        prepare(args)
        found = measure(args, list(variants), folder)
    micros = {
        name: statistics.median(1e6 * r["seconds"] / r["rows"] for r in runs) for name, runs in found.items()
    }
    memory = {name: statistics.median(r["unshared_gb"] for r in runs) for name, runs in found.items()}
    print(f"\n{'':4} {'us per row':>10} {'vs 1x':>10} {'unshared GB':>12} {'vs 1x':>10}")
    for name in variants:
        time_ratio, memory_ratio = micros[name] / micros["1x"], memory[name] / memory["1x"]
        print(f"{name:4} {micros[name]:10.1f} {time_ratio:10.3f} {memory[name]:12.3f} {memory_ratio:10.3f}")
    print(json.dumps({
        "bench": f"scaling {args.stage}", "rows": args.rows, "runs": args.runs, "us_a_row": micros,
        "unshared_gb": memory, "ratio": round(micros["8x"] / micros["1x"], 3),
        "memory_ratio": round(memory["8x"] / memory["1x"], 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
