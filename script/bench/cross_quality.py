"""Training of a re-ranker against sentence-transformers: same model and head, pairs, rate and updates.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/cross_quality.py --data_dir D --model M --steps 60 --seeds 1 2 3

Ours is the loop of do_cross_train.py, pointwise; the peer is CrossEncoderTrainer with
BinaryCrossEntropyLoss and the same pairs in the same batches. Both re-rank the same dev candidates at the
end. Prints dev MRR@10 per seed, mean and standard error, seconds per update and peak unshared memory, then a
JSON line.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import torch

from script.bench.common import Figures, compare_by_seed, seeded_parser
from script.bench.peers import cross_encoder, set_dropout, step_recorder, trainer_arguments
from script.bench.rerank import with_head
from script.bench.train_step import figures, train
from torch_src.cross_hparams import CrossHparams
from torch_src.cross_train import CrossTask, training_stage
from torch_src.training.stage import TrainingStage

LR, LENGTH = 5e-5, 384


def settings(args: argparse.Namespace, output: str) -> CrossHparams:
    return CrossHparams(
        pretrained_model_path=args.model, data_dir=args.data_dir, output_dir=output, seed=args.seed, lr=LR,
        train_set=args.train_set, dev_candidates=args.run, loss="pointwise", batch_size=args.batch,
        max_seq_len=LENGTH, dropout=0.0, weight_decay=0.0, warmup_proportion=0.0, max_steps=args.steps,
        log_every=1, dev_queries=args.queries, dev_depth=args.depth, precision="fp32",
    )  # fmt: skip


def loaded(args: argparse.Namespace, output: str) -> tuple[TrainingStage, CrossTask]:
    """Return a stage and its task with dev candidates, without evaluation during training."""
    stage = training_stage(settings(args, output))
    stage.load()
    stage.hp = replace(stage.hp, eval_every=-1)
    assert isinstance(stage.task, CrossTask)
    return stage, stage.task


def ours(args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as output:
        stage, task = loaded(args, output)
        times, losses = train(stage, output)
        return {**figures(times, losses, "fp32"), **task.evaluate()}


def peer(args: argparse.Namespace) -> Figures:
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses

    with tempfile.TemporaryDirectory() as output:
        _, task = loaded(args, output)
        rows: dict[str, list] = {"query": [], "passage": [], "label": []}
        for step in range(args.steps):
            epoch, at = divmod(step, task.data.steps_per_epoch(args.batch, False))
            batch = task.data.pair_batch(args.seed, epoch, at, args.batch)
            rows["query"] += batch.queries
            rows["passage"] += batch.passages
            rows["label"] += batch.labels.tolist()
        model = cross_encoder(args.model, LENGTH)
        set_dropout(model, 0.0)
        times: list[float] = []
        seen: list[float] = []
        arguments = trainer_arguments(CrossEncoderTrainingArguments, output, args, LR)
        CrossEncoderTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(rows),
            loss=losses.BinaryCrossEntropyLoss(model), callbacks=[step_recorder(times, seen)],
        ).train()  # fmt: skip
        task.model.model.load_state_dict(trained_weights(model))
        return {**figures(times, seen, "fp32"), **task.evaluate()}


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of the transformers model inside a CrossEncoder."""
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel)).state_dict()


def main() -> None:
    parser = seeded_parser(__doc__, steps=60)
    parser.add_argument("--train_set", default="", help="default: data_dir/train/cross.train.tsv")
    parser.add_argument("--run", default="", help="dev candidates; default: the official file in data_dir")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--depth", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if not args.variant:
            with_head(args.model, Path(temporary))
            sys.argv += ["--model", temporary]  # the last --model counts
        compare_by_seed(args, {"ours": ours, "st": peer}, {"steps": args.steps, "batch": args.batch})


if __name__ == "__main__":
    main()
