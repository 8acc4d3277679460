"""Training quality against sentence-transformers: same model, rows, batch, rate and updates, several seeds.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/quality.py --data_dir D --model M --batch 32 --steps 40 --seeds 1 2 3

Ours is the loop of do_dual_train.py with grad_cache_chunk; the peer is SentenceTransformerTrainer with
CachedMultipleNegativesRankingLoss in mini-batches of the same size, with the same batches in the same order.
Both are evaluated by the dev retrieval of do_dual_train.py (all dev queries, the whole collection). Prints
dev MRR@10 per seed, mean and standard error, seconds per update and peak unshared memory, then a JSON line.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from transformers import PreTrainedModel

from script.bench.common import Figures, compare_by_seed, seeded_parser
from script.bench.train_step import figures, settings, st_training, train
from torch_src.dual_train import DualTask, training_stage
from torch_src.retrieval.encoding import Encoder
from torch_src.training.stage import TrainingStage


def dev_mrr(stage: TrainingStage, tower: PreTrainedModel | None = None) -> float:
    """Return dev MRR@10 of a tied tower (default: the trained one), by the dev retrieval of the program."""
    hp, task = stage.hp, stage.task
    assert isinstance(task, DualTask) and task.dev is not None
    encoder = partial(Encoder, tower or task.model.query_encoder, stage.setup.tokenizer)
    more = (hp.pooling, hp.normalize, stage.device, "fp32", 512, 4096)
    query_encoder, passage_encoder = (encoder(task.rules[side], *more) for side in ("query", "passage"))
    return task.dev.evaluate(query_encoder, passage_encoder, stage.processes)["MRR@10"]


def loaded(args: argparse.Namespace, output: str) -> TrainingStage:
    """Return a stage with its dev set, without evaluation during training."""
    stage = training_stage(replace(settings(args, output), eval_every=10**9))
    stage.load()
    stage.hp = replace(stage.hp, eval_every=-1)
    return stage


def ours(args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as output:
        stage = loaded(args, output)
        times, losses = train(stage, output)
        quality = dev_mrr(stage)
    return {**figures(times, losses, stage.setup.precision), "MRR@10": quality}


def peer(args: argparse.Namespace) -> Figures:
    model, times, losses, precision = st_training(args, args.chunk)
    with tempfile.TemporaryDirectory() as output:
        quality = dev_mrr(loaded(args, output), model[0].auto_model)
    return {**figures(times, losses, precision), "MRR@10": quality}


def main() -> None:
    parser = seeded_parser(__doc__, steps=40)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--peer_bf16", action="store_true")
    args = parser.parse_args()
    more = {"steps": args.steps, "batch": args.batch, "chunk": args.chunk}
    compare_by_seed(args, {"ours": ours, "st": peer}, more)


if __name__ == "__main__":
    main()
