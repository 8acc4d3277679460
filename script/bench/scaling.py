"""Encoding and search at 1x, 2x, 4x and 8x rows: time a row and peak memory, which should not move.

    python script/bench/scaling.py encode --data_dir D --rows 20000      # a 2-layer, 64-wide model, 32 tokens
    python script/bench/scaling.py search --rows 250000 --queries 200

Each size runs in a process of its own; blocks of a quarter of the smallest size, so that every size has
several. Prints a table, last a JSON line with both figures of the largest size against those of the smallest.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import numpy as np
import torch
from common import in_turn, parser, run_side
from memory import make_model, repeat_collection

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


def encode(size: int):
    def side(given) -> dict:
        set_threads(0)
        rows, model = given.rows * size, str(given.folder / "model")
        tower = load_backbone(model, load_config(model), "mean", 0).eval()
        rules, tokenizer = TextRules(32), load_tokenizer(model)
        encoder = Encoder(tower, tokenizer, rules, "mean", True, CPU, "fp32", 512, 4096)
        collection = PassageCollection(given.folder / f"passages{size}", given.folder / "cache")
        with tempfile.TemporaryDirectory() as folder:
            store = VectorStore.create_or_continue(folder, {}, rows, 64, given.rows // 4, print)
            begun = time.perf_counter()
            encode_collection(encoder, collection, store, 1e9)
        return {"seconds": time.perf_counter() - begun, "rows": rows}

    return side


def search_rows(size: int):
    def side(given) -> dict:
        set_threads(0)
        rows = given.rows * size
        store = VectorStore.create_or_continue(
            given.folder / f"v{size}", {}, rows, HIDDEN, given.rows // 4, print
        )
        draw = np.random.default_rng(0)
        queries = draw.standard_normal((given.queries, HIDDEN), dtype=np.float32)
        begun = time.perf_counter()
        search(store, queries, 50, [CPU], memory_gb=0.5)
        return {"seconds": time.perf_counter() - begun, "rows": rows}

    return side


def make(given) -> None:
    """Write what the sizes need."""
    if given.what == "encode":
        make_model(given.folder / "model")
        for size in SIZES:
            passages = Path(given.data_dir) / "passage-collection"
            repeat_collection(passages, given.folder / f"passages{size}", given.rows * size)
        return
    for size in SIZES:
        rows = given.rows * size
        store = VectorStore.create_or_continue(
            given.folder / f"v{size}", {}, rows, HIDDEN, given.rows // 4, print
        )
        for block in store.missing_blocks():
            first, last = store.block_range(block)
            draw = torch.Generator().manual_seed(block)
            store.write_block(block, torch.randn(last - first, HIDDEN, generator=draw).half().numpy())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=["encode", "search"])
    options.add_argument("--data_dir", default=str(Path(__file__).resolve().parents[1] / "sample_data"))
    options.add_argument("--rows", type=int, default=20_000, help="of the smallest size")
    options.add_argument("--queries", type=int, default=200)
    options.add_argument("--folder", type=Path, help="where the files are kept; default: a temporary folder")
    given = options.parse_args()
    made = encode if given.what == "encode" else search_rows
    sides = {f"{size}x": made(size) for size in SIZES}
    if given.side:
        return run_side(given, sides)
    with tempfile.TemporaryDirectory() as temporary:
        if given.folder is None:
            given.folder = Path(temporary)
            sys.argv += ["--folder", temporary]
        make(given)
        found = in_turn(given, list(sides), Path(temporary))
    micros = {
        name: statistics.median(1e6 * r["seconds"] / r["rows"] for r in runs) for name, runs in found.items()
    }
    memory = {name: statistics.median(r["unshared_gb"] for r in runs) for name, runs in found.items()}
    print(f"\n{'':4} {'us a row':>10} {'against 1x':>10} {'unshared GB':>12} {'against 1x':>10}")
    for name in sides:
        time_ratio, memory_ratio = micros[name] / micros["1x"], memory[name] / memory["1x"]
        print(f"{name:4} {micros[name]:10.1f} {time_ratio:10.3f} {memory[name]:12.3f} {memory_ratio:10.3f}")
    print(json.dumps({
        "bench": f"scaling {given.what}", "rows": given.rows, "runs": given.runs, "us_a_row": micros,
        "unshared_gb": memory, "ratio": round(micros["8x"] / micros["1x"], 3),
        "memory_ratio": round(memory["8x"] / memory["1x"], 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
