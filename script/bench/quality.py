"""Training quality, ours against sentence-transformers': the same model, rows, batch, rate and updates,
several seeds.

    python -m pip install -r script/bench/requirements.txt
    python script/bench/quality.py --data_dir D --model M --batch 32 --steps 40 --seeds 1 2 3

Ours is do_dual_train.py's loop with grad_cache_chunk; theirs SentenceTransformerTrainer with
CachedMultipleNegativesRankingLoss in mini-batches of the same size, fed the same batches in the same order.
Both end in the dev retrieval of do_dual_train.py (all dev queries over the whole collection). Prints dev
MRR@10 of each seed, mean and standard error, seconds an update and peak unshared memory; last a JSON line.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

from common import by_seed, seeded_parser
from train_step import TimedTrainer, figures, settings, st_training

from torch_src.dual_train import DualTraining
from torch_src.retrieval.encoding import Encoder


def dev_figures(stage: DualTraining, tower) -> float:
    """Return dev MRR@10 of a tied tower, by the dev retrieval of the training program."""
    hp = stage.hp
    encoders = [
        Encoder(
            tower,
            stage.tokenizer,
            stage.rules[side],
            hp.pooling,
            hp.normalize,
            stage.device,
            "fp32",
            512,
            4096,
        )
        for side in ("query", "passage")
    ]
    from metric.evaluation import compute_metrics

    return compute_metrics(stage.dev.reference, stage.dev.retrieve(*encoders))["MRR@10"]


def loaded(given, output: str) -> DualTraining:
    """Return a stage with its dev set, which the training itself does not look at."""
    stage = DualTraining(replace(settings(given, output), eval_every=10**9))
    stage.load()
    return stage


def ours(given) -> dict:
    with tempfile.TemporaryDirectory() as output:
        stage = loaded(given, output)
        hp = replace(stage.hp, eval_every=-1)
        trainer = TimedTrainer(hp, stage.task(), stage.device, stage.precision, f"{output}/checkpoint.pt", {})
        trainer.run()
        quality = dev_figures(stage, stage.model.query_encoder)
    return {**figures(trainer.times, trainer.losses, stage.precision), "MRR@10": quality}


def theirs(given) -> dict:
    model, times, losses, precision = st_training(given, given.chunk)
    with tempfile.TemporaryDirectory() as output:
        quality = dev_figures(loaded(given, output), model[0].auto_model)
    return {**figures(times, losses, precision), "MRR@10": quality}


def main() -> None:
    options = seeded_parser(__doc__, steps=40)
    options.add_argument("--chunk", type=int, default=16)
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--precision", default="auto")
    options.add_argument("--peer_bf16", action="store_true")
    given = options.parse_args()
    more = {"steps": given.steps, "batch": given.batch, "chunk": given.chunk}
    by_seed(given, {"ours": ours, "st": theirs}, more)


if __name__ == "__main__":
    main()
