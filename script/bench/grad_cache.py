"""Memory of one update against the batch size, without GradCache and with it (then the chunk decides).

    python script/bench/grad_cache.py --data_dir D --model M --batches 64 128 256 512 1024 --plain 64 128 256

Each figure comes from its own process: one update of do_dual_train.py's loop (a positive and a hard negative
per query, tied towers). Prints its seconds and the peak of unshared memory minus the memory before the
update, then a JSON line.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from script.bench.common import (
    Figures,
    Variant,
    add_model,
    make_parser,
    measure,
    run_variant,
    unshared_gb,
)
from script.bench.train_step import settings
from torch_src.dual_train import training_stage


def update(args: argparse.Namespace, batch: int, chunk: int) -> Figures:
    """Return the figures of one update."""
    args.batch, args.chunk, args.steps = batch, chunk, 1
    with tempfile.TemporaryDirectory() as output:
        hp = replace(settings(args, output), p_max_seq_len=args.p_max_seq_len)
        stage = training_stage(hp)
        stage.load()
        trainer = stage.trainer(output, {})
        before, prepared = unshared_gb(), stage.task.make_batch((0, 0))
        tokens = len(prepared.queries.ids) + len(prepared.passages.ids)
        return {"seconds": trainer.probe(1)[0], "before_gb": round(before, 3), "tokens": tokens}


def variants_of(args: argparse.Namespace) -> dict[str, Variant]:
    sizes = [("plain", batch, 0) for batch in args.plain]
    sizes += [("cached", batch, args.chunk) for batch in args.batches]
    return {f"{kind}_{batch}": partial(update, batch=batch, chunk=chunk) for kind, batch, chunk in sizes}


def main() -> None:
    parser = make_parser(__doc__)
    add_model(parser)
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[64, 128, 256, 512, 1024], help="batch sizes"
    )
    parser.add_argument(
        "--plain", type=int, nargs="*", default=[64, 128, 256], help="batch sizes without GradCache"
    )
    parser.add_argument("--chunk", type=int, default=16, help="grad_cache_chunk")
    parser.add_argument("--p_max_seq_len", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    variants = variants_of(args)
    if args.variant:
        return run_variant(args, variants)
    args.runs = 1
    with tempfile.TemporaryDirectory() as folder:
        found = {name: runs[0] for name, runs in measure(args, list(variants), Path(folder)).items()}
    print(f"\n{'':12} {'tokens':>8} {'GB before':>10} {'GB at peak':>11} {'GB more':>8} {'seconds':>8}")
    for name, run in found.items():
        more = run["unshared_gb"] - run["before_gb"]
        print(f"{name:12} {run['tokens']:8,} {run['before_gb']:10.2f} {run['unshared_gb']:11.2f} {more:8.2f} "
              f"{run['seconds']:8.1f}")  # fmt: skip
    print(json.dumps({"bench": "grad_cache", "chunk": args.chunk, "figures": found}))


if __name__ == "__main__":
    main()
