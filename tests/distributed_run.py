"""Not a test: ten updates of a training stage in fp64, in one or several processes; rank 0 writes them.

python -m torch.distributed.run --nproc_per_node 2 tests/distributed_run.py KIND WORLD RESULT JSON_KNOBS
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from test_grad_cache import COMMON

from torch_src.cross_hparams import CrossHparams
from torch_src.cross_train import CrossTraining
from torch_src.dual_hparams import DualHparams
from torch_src.dual_train import DualTraining
from torch_src.training.trainer import Trainer

STEPS = 10


def main(kind: str, world: str, result: str, knobs: str) -> None:
    training, settings = {"dual": (DualTraining, DualHparams), "cross": (CrossTraining, CrossHparams)}[kind]
    where = dict(data_dir=f"{world}/data", output_dir=result, pretrained_model_path=f"{world}/model")
    more = dict(dropout=0.0, max_steps=STEPS, epoch=STEPS, log_every=1, lr=1e-3, threads=1)
    stage = training(settings(**{**COMMON, **where, **more, **json.loads(knobs)}))
    stage.load()
    stage.model.double()
    trainer = Trainer(
        stage.hp, stage.task(), stage.device, "fp32", f"{result}/checkpoint.pt", {}, stage.group
    )
    losses, gradients, note = [], [], trainer._note
    sums = stage.group.sum_gradients

    def summed(model) -> None:
        sums(model)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    def noted(loss: float, accuracy: float, lr: float) -> None:
        losses.append([loss, accuracy])
        note(loss, accuracy, lr)

    stage.group.sum_gradients, trainer._note = summed, noted
    trainer.run()
    if stage.group.rank == 0:
        torch.save(
            {"losses": torch.tensor(losses, dtype=torch.float64), "gradients": torch.stack(gradients)},
            f"{result}/steps.pt",
        )
    stage.group.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
