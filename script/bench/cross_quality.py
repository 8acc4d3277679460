"""Training of a re-ranker, ours against sentence-transformers': the same model and head, pairs, rate and
updates.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/cross_quality.py --data_dir D --model M --steps 60 --seeds 1 2 3

Ours is do_cross_train.py's loop, pointwise; theirs CrossEncoderTrainer with BinaryCrossEntropyLoss, fed the
same pairs in the same batches. Both re-rank the same dev candidates in the end. Prints dev MRR@10 of each
seed, mean and standard error, seconds an update and peak unshared memory; last a JSON line.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import torch
from common import by_seed, seeded_parser
from peers import clock, set_dropout, trainer_arguments
from rerank import with_head
from train_step import TimedTrainer, figures

from torch_src.cross_hparams import CrossHparams
from torch_src.cross_train import CrossTraining

LR, LENGTH = 5e-5, 384


def settings(given, output: str) -> CrossHparams:
    return CrossHparams(
        pretrained_model_path=given.model, data_dir=given.data_dir, output_dir=output, seed=given.seed, lr=LR,
        train_set=given.train_set, dev_candidates=given.run, batch_size=given.batch, max_seq_len=LENGTH,
        dropout=0.0, weight_decay=0.0, warmup_proportion=0.0, max_steps=given.steps, log_every=1,
        dev_queries=given.queries, dev_depth=given.depth, precision="fp32",
    )  # fmt: skip


def loaded(given, output: str) -> CrossTraining:
    stage = CrossTraining(settings(given, output))
    stage.load()
    return stage


def ours(given) -> dict:
    with tempfile.TemporaryDirectory() as output:
        stage = loaded(given, output)
        hp = replace(stage.hp, eval_every=-1)
        trainer = TimedTrainer(hp, stage.task(), stage.device, stage.precision, f"{output}/checkpoint.pt", {})
        trainer.run()
        return {**figures(trainer.times, trainer.losses, "fp32"), **stage.evaluate()}


def theirs(given) -> dict:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses

    with tempfile.TemporaryDirectory() as output:
        stage = loaded(given, output)
        rows: dict[str, list] = {"query": [], "passage": [], "label": []}
        for step in range(given.steps):
            epoch, at = divmod(step, stage.data.steps_per_epoch(given.batch, False))
            batch = stage.data.pairs(given.seed, epoch, at, given.batch)
            rows["query"] += batch.queries
            rows["passage"] += batch.passages
            rows["label"] += batch.labels.tolist()
        model = CrossEncoder(
            given.model, max_length=LENGTH, device="cpu", activation_fn=torch.nn.Identity(),
            model_kwargs={"dtype": torch.float32},
        )  # fmt: skip
        set_dropout(model, 0.0)
        times, seen = [], []
        arguments = trainer_arguments(CrossEncoderTrainingArguments, output, given, LR)
        CrossEncoderTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(rows),
            loss=losses.BinaryCrossEntropyLoss(model), callbacks=[clock(times, seen)],
        ).train()  # fmt: skip
        stage.model.model.load_state_dict(trained_weights(model))
        return {**figures(times, seen, "fp32"), **stage.evaluate()}


def trained_weights(model) -> dict[str, torch.Tensor]:
    """Return the state dict of the transformers model inside a CrossEncoder."""
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel)).state_dict()


def main() -> None:
    options = seeded_parser(__doc__, steps=60)
    options.add_argument("--train_set", default="", help="default: the data folder's own cross.train.tsv")
    options.add_argument("--run", default="", help="dev candidates: default the data folder's official file")
    options.add_argument("--queries", type=int, default=100)
    options.add_argument("--depth", type=int, default=20)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if not given.side:
            with_head(given.model, Path(temporary))
            sys.argv += ["--model", temporary]  # the last --model counts
        by_seed(given, {"ours": ours, "st": theirs}, {"steps": given.steps, "batch": given.batch})


if __name__ == "__main__":
    main()
