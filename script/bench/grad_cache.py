"""Memory of one update against the batch, plain and with GradCache, where it follows the chunk instead.

    python script/bench/grad_cache.py --data_dir D --model M --batches 64 128 256 512 1024 --plain 64 128 256

Every figure is of a process of its own: one update of do_dual_train.py's loop (a positive and a hard negative
a query, tied towers), unshared memory at its peak less that before the update, and seconds. Last a JSON line.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

from common import in_turn, parser, run_side, unshared_gb
from train_step import settings

from torch_src.dual_train import DualTraining
from torch_src.training.trainer import Trainer


def update(given, batch: int, chunk: int) -> dict:
    """Return the figures of one update."""
    given.batch, given.chunk, given.steps = batch, chunk, 1
    with tempfile.TemporaryDirectory() as output:
        hp = replace(settings(given, output), p_max_seq_len=given.p_max_seq_len)
        stage = DualTraining(hp)
        stage.load()
        trainer = Trainer(hp, stage.task(), stage.device, stage.precision, f"{output}/checkpoint.pt", {})
        before, batch = unshared_gb(), stage.prepare(0, 0)
        tokens = sum(map(len, batch.queries)) + sum(map(len, batch.passages))
        return {"seconds": trainer.probe(1)[0], "before_gb": round(before, 3), "tokens": tokens}


def sides_of(given: argparse.Namespace) -> dict:
    """Return {name: side} of all batches."""
    sizes = [("plain", batch, 0) for batch in given.plain]
    sizes += [("cached", batch, given.chunk) for batch in given.batches]
    return {
        f"{kind}_{batch}": lambda given, batch=batch, chunk=chunk: update(given, batch, chunk)
        for kind, batch, chunk in sizes
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data_dir", required=True)
    options.add_argument("--model", required=True, help="folder of an encoder")
    options.add_argument("--batches", type=int, nargs="*", default=[64, 128, 256, 512, 1024])
    options.add_argument("--plain", type=int, nargs="*", default=[64, 128, 256], help="batches without it")
    options.add_argument("--chunk", type=int, default=16, help="grad_cache_chunk")
    options.add_argument("--p_max_seq_len", type=int, default=64)
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--precision", default="auto")
    options.add_argument("--seed", type=int, default=42)
    given = options.parse_args()
    sides = sides_of(given)
    if given.side:
        return run_side(given, sides)
    given.runs = 1
    with tempfile.TemporaryDirectory() as folder:
        found = {name: runs[0] for name, runs in in_turn(given, list(sides), Path(folder)).items()}
    print(f"\n{'':12} {'tokens':>8} {'GB before':>10} {'GB at peak':>11} {'GB more':>8} {'seconds':>8}")
    for name, run in found.items():
        more = run["unshared_gb"] - run["before_gb"]
        print(f"{name:12} {run['tokens']:8,} {run['before_gb']:10.2f} {run['unshared_gb']:11.2f} {more:8.2f} "
              f"{run['seconds']:8.1f}")  # fmt: skip
    print(json.dumps({"bench": "grad_cache", "chunk": given.chunk, "figures": found}))


if __name__ == "__main__":
    main()
