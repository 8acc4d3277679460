"""Not a test: ten updates of training stages in fp64, in one or several processes; rank 0 writes them.

python -m torch.distributed.run --nproc_per_node 2 tests/distributed_run.py WORLD RESULTS JSON

JSON: {name of a stage: {"kind": "dual" or "cross", knob: value}}; its result is RESULTS/name/steps.pt.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "training"))

import torch
from test_grad_cache import COMMON

from metric.evaluation import MEASURES
from torch_src.cross_hparams import CrossHparams
from torch_src.cross_train import training_stage as cross_stage
from torch_src.dual_hparams import DualHparams
from torch_src.dual_train import training_stage as dual_stage

STEPS = 10


def run(world: str, result: Path, kind: str, **knobs: object) -> None:
    build, settings = {"dual": (dual_stage, DualHparams), "cross": (cross_stage, CrossHparams)}[kind]
    where = dict(data_dir=f"{world}/data", output_dir=str(result), pretrained_model_path=f"{world}/model")
    more = dict(dropout=0.0, max_steps=STEPS, epoch=STEPS, log_every=1, lr=1e-3, threads=1)
    stage = build(settings(**{**COMMON, **where, **more, **knobs}))
    stage.load()
    stage.task.model.double()
    trainer, processes = stage.trainer(result, {}), stage.processes
    losses, gradients = [], []
    real_update, real_sum = trainer.update, processes.all_reduce_gradients

    def update(*given):
        found = real_update(*given)
        losses.append([found.loss, found.accuracy])
        return found

    def summed(model) -> None:
        real_sum(model)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))

    trainer.update, processes.all_reduce_gradients = update, summed
    history = trainer.run().history
    metrics = [[entry[name] for name in MEASURES] for entry in history if "MRR@10" in entry]
    if processes.is_first:
        found = {"losses": torch.tensor(losses, dtype=torch.float64), "gradients": torch.stack(gradients)}
        torch.save({**found, "metrics": metrics}, result / "steps.pt")


if __name__ == "__main__":
    world, results, stages = sys.argv[1:]
    if int(os.getenv("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")  # once for all stages
    for name, knobs in json.loads(stages).items():
        folder = Path(results) / name
        folder.mkdir(parents=True, exist_ok=True)
        run(world, folder, **knobs)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
