"""An update of the dual encoder, ours against sentence-transformers' trainer: same weights, rows, batch,
rate.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/train_step.py --data_dir D --model M --steps 6

Batches of 32 queries with a positive and a hard negative each, at their real lengths; AdamW, 5e-5, tied
towers, mean pooling, normalised, temperature 0.02. `st` is SentenceTransformerTrainer with
MultipleNegativesRankingLoss as people call it; `st_cached_N` CachedMultipleNegativesRankingLoss in mini-
batches of N. --dropout 0 (both sides) lets a CPU use its fused attention. The first update is not timed.
Losses are printed side by side.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import torch
from common import compare, parser
from peers import bi_encoder, clock, set_dropout, trainer_arguments

from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.dual_hparams import DualHparams
from torch_src.dual_train import DualTraining
from torch_src.runtime.devices import choose_precision
from torch_src.training.trainer import Trainer

LR, TEMPERATURE, QUERY_LENGTH, PASSAGE_LENGTH = 5e-5, 0.02, 40, 384
CPU = torch.device("cpu")


class TimedTrainer(Trainer):
    """The trainer with a note of when each update was done."""

    def __init__(self, *given):
        super().__init__(*given)
        self.times, self.losses = [], []

    def _note(self, loss: float, accuracy: float, lr: float) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(loss)
        super()._note(loss, accuracy, lr)


def figures(times: list[float], losses: list[float], precision: str) -> dict:
    """Return seconds an update, the first left out."""
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return {"seconds": seconds, "losses": [round(loss, 4) for loss in losses], "precision": precision}


def settings(given, output: str) -> DualHparams:
    return DualHparams(
        pretrained_model_path=given.model, data_dir=given.data_dir, output_dir=output,
        batch_size=given.batch, grad_cache_chunk=given.chunk, seed=given.seed, lr=LR,
        q_max_seq_len=QUERY_LENGTH, p_max_seq_len=PASSAGE_LENGTH, query_prefix="query: ",
        passage_prefix="passage: ", share_encoder=True, pooling="mean", normalize=True,
        temperature=TEMPERATURE, dropout=given.dropout, max_steps=given.steps, warmup_proportion=0.0,
        eval_every=-1, log_every=1, precision=given.precision,
    )  # fmt: skip


def ours(given) -> dict:
    with tempfile.TemporaryDirectory() as output:
        hp = settings(given, output)
        stage = DualTraining(hp)
        stage.load()
        trainer = TimedTrainer(hp, stage.task(), stage.device, stage.precision, f"{output}/checkpoint.pt", {})
        trainer.run()
    return figures(trainer.times, trainer.losses, stage.precision)


def triplets(given) -> dict[str, list[str]]:
    """Return the texts of our batches, step after step: anchors, positives, negatives."""
    data = DualTrainingSet(f"{given.data_dir}/train/dual.train.tsv")
    rows: dict[str, list[str]] = {"anchor": [], "positive": [], "negative": []}
    for step in range(given.steps):
        epoch, at = divmod(step, data.steps_per_epoch(given.batch))
        batch = data.batch(given.seed, epoch, at, given.batch, 1)
        own = set(batch.targets.tolist())
        others = [text for at, text in enumerate(batch.passages) if at not in own] or batch.passages
        for at, query in enumerate(batch.queries):
            rows["anchor"].append(f"query: {query}")
            rows["positive"].append(f"passage: {batch.passages[batch.targets[at]]}")
            rows["negative"].append(f"passage: {others[at % len(others)]}")
    return rows


def st_training(given, mini_batch: int):
    """Train by sentence-transformers' trainer; return (model, times, losses, precision)."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    torch.manual_seed(given.seed)
    model = bi_encoder(given.model, PASSAGE_LENGTH)
    if given.dropout is not None:
        set_dropout(model, given.dropout)
    times, seen = [], []
    kind = losses.CachedMultipleNegativesRankingLoss if mini_batch else losses.MultipleNegativesRankingLoss
    more = {"mini_batch_size": mini_batch} if mini_batch else {}
    low = choose_precision(given.precision, CPU) == "bf16" and given.peer_bf16
    with tempfile.TemporaryDirectory() as output:
        arguments = trainer_arguments(SentenceTransformerTrainingArguments, output, given, LR, bf16=low)
        loss, data = kind(model, scale=1 / TEMPERATURE, **more), Dataset.from_dict(triplets(given))
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[clock(times, seen)]
        ).train()
    return model, times, seen, "bf16" if low else "fp32"


def sentence_transformers(mini_batch: int):
    def side(given) -> dict:
        return figures(*st_training(given, mini_batch)[1:])

    return side


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data_dir", required=True)
    options.add_argument("--model", required=True, help="folder of an encoder")
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--chunk", type=int, default=0, help="our grad_cache_chunk")
    options.add_argument("--seed", type=int, default=42)
    options.add_argument(
        "--dropout", type=float, default=None, help="of both sides; default: the model's own"
    )
    options.add_argument("--precision", default="auto")
    options.add_argument("--peer_bf16", action="store_true", help="let the peer train in bf16 where we do")
    options.add_argument("--peer_mini_batches", type=int, nargs="*", default=[16])
    given = options.parse_args()
    sides = {"ours": ours, "st": sentence_transformers(0)}
    sides |= {f"st_cached_{size}": sentence_transformers(size) for size in given.peer_mini_batches}
    compare(given, sides, list(sides), lambda folder: {"dropout": given.dropout, "steps": given.steps})


if __name__ == "__main__":
    main()
