"""One update of the dual encoder against sentence-transformers: same weights, rows, batch and rate.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/train_step.py --data_dir D --model M --steps 6

Batches of 32 queries with a positive and a hard negative each, at their true lengths; AdamW, 5e-5, tied
towers, mean pooling, normalized, temperature 0.02. `st` is SentenceTransformerTrainer with
MultipleNegativesRankingLoss and its defaults; `st_cached_N` is CachedMultipleNegativesRankingLoss in
mini-batches of N. --dropout 0 (all variants) allows fused attention on a CPU. The first update is not timed.
Losses are printed for comparison.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import torch

from script.bench.common import Figures, Variant, add_model, compare, make_parser
from script.bench.peers import bi_encoder, set_dropout, step_recorder, trainer_arguments
from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.dual_hparams import DualHparams
from torch_src.dual_train import training_stage
from torch_src.runtime.devices import choose_precision
from torch_src.training.stage import TrainingStage
from torch_src.training.trainer import Update

LR, TEMPERATURE, QUERY_LENGTH, PASSAGE_LENGTH = 5e-5, 0.02, 40, 384
CPU = torch.device("cpu")


def train(stage: TrainingStage, output: str) -> tuple[list[float], list[float]]:
    """Train a loaded task; return the end time and the loss of each update."""
    trainer = stage.trainer(output, {})
    times, losses, make_update = [], [], trainer.update

    def timed(step: int, batches: Iterable[Any]) -> Update:
        update = make_update(step, batches)
        times.append(time.perf_counter())
        losses.append(update.loss)
        return update

    trainer.update = timed  # type: ignore[method-assign]  # measured from outside
    trainer.run()
    return times, losses


def figures(times: list[float], losses: list[float], precision: str) -> Figures:
    """Return the seconds per update, without the first."""
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return {"seconds": seconds, "losses": [round(loss, 4) for loss in losses], "precision": precision}


def settings(args: argparse.Namespace, output: str) -> DualHparams:
    return DualHparams(
        pretrained_model_path=args.model, data_dir=args.data_dir, output_dir=output,
        batch_size=args.batch, grad_cache_chunk=args.chunk, seed=args.seed, lr=LR,
        q_max_seq_len=QUERY_LENGTH, p_max_seq_len=PASSAGE_LENGTH, query_prefix="query: ",
        passage_prefix="passage: ", share_encoder=True, pooling="mean", normalize=True,
        temperature=TEMPERATURE, dropout=args.dropout, max_steps=args.steps, warmup_proportion=0.0,
        eval_every=-1, log_every=1, precision=args.precision,
    )  # fmt: skip


def ours(args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as output:
        stage = training_stage(settings(args, output))
        stage.load()
        times, losses = train(stage, output)
    return figures(times, losses, stage.setup.precision)


def triplets(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the texts of our batches in order: anchors, positives, negatives."""
    data = DualTrainingSet(f"{args.data_dir}/train/dual.train.tsv")
    rows: dict[str, list[str]] = {"anchor": [], "positive": [], "negative": []}
    for step in range(args.steps):
        epoch, at = divmod(step, data.steps_per_epoch(args.batch))
        batch = data.batch(args.seed, epoch, at, args.batch, 1)
        own = set(batch.targets.tolist())
        others = [text for at, text in enumerate(batch.passages) if at not in own] or batch.passages
        for at, query in enumerate(batch.queries):
            rows["anchor"].append(f"query: {query}")
            rows["positive"].append(f"passage: {batch.passages[batch.targets[at]]}")
            rows["negative"].append(f"passage: {others[at % len(others)]}")
    return rows


def st_training(args: argparse.Namespace, mini_batch: int) -> tuple[Any, list[float], list[float], str]:
    """Train with sentence-transformers; return (model, times, losses, precision)."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    torch.manual_seed(args.seed)
    model = bi_encoder(args.model, PASSAGE_LENGTH)
    if args.dropout is not None:
        set_dropout(model, args.dropout)
    times: list[float] = []
    seen: list[float] = []
    kind: Any = (
        losses.CachedMultipleNegativesRankingLoss if mini_batch else losses.MultipleNegativesRankingLoss
    )
    more = {"mini_batch_size": mini_batch} if mini_batch else {}
    low = choose_precision(args.precision, CPU) == "bf16" and args.peer_bf16
    with tempfile.TemporaryDirectory() as output:
        arguments = trainer_arguments(SentenceTransformerTrainingArguments, output, args, LR, bf16=low)
        loss, data = kind(model, scale=1 / TEMPERATURE, **more), Dataset.from_dict(triplets(args))
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[step_recorder(times, seen)]
        ).train()
    return model, times, seen, "bf16" if low else "fp32"


def sentence_transformers(mini_batch: int) -> Variant:
    return lambda args: figures(*st_training(args, mini_batch)[1:])


def main() -> None:
    parser = make_parser(__doc__)
    add_model(parser)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=0, help="our grad_cache_chunk")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dropout", type=float, default=None, help="of all variants; default: the model's")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--peer_bf16", action="store_true", help="let the peer train in bf16 if ours does")
    parser.add_argument("--peer_mini_batches", type=int, nargs="*", default=[16])
    args = parser.parse_args()
    variants: dict[str, Variant] = {"ours": ours, "st": sentence_transformers(0)}
    variants |= {f"st_cached_{size}": sentence_transformers(size) for size in args.peer_mini_batches}
    compare(args, variants, list(variants), lambda folder: {"dropout": args.dropout, "steps": args.steps})


if __name__ == "__main__":
    main()
