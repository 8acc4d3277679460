"""Batches made by worker processes: those of the thread, errors in one line, no process left behind."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from toy_world import make_world
from training.test_grad_cache import stage

from torch_src.runtime.errors import Stopped, UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), train_queries=24)


def trainer_of(world, kind, folder, workers, **knobs):
    made = stage(world, kind, double=False, batch_size=6, max_steps=3, dropout=0.1, **knobs)
    trainer = made.trainer(folder, {})
    trainer.options = replace(trainer.options, workers=workers)
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in trainer.task.model.parameters()])


@pytest.mark.parametrize("kind", ["dual", "cross"])
def test_workers_make_the_batches_of_the_thread(world, tmp_path, kind):
    knobs = {} if kind == "dual" else dict(loss="listwise", groups_per_step=2, group_size=3)
    trainers = [trainer_of(world, kind, tmp_path / str(n), n, **knobs) for n in (0, 2)]
    for trainer in trainers:
        trainer.run()
    assert weights(trainers[0]).equal(weights(trainers[1]))
    assert not multiprocessing.active_children()


def test_a_stop_signal_to_all_processes_stops_after_the_update(world, tmp_path):
    trainer = trainer_of(world, "dual", tmp_path, 2)
    forward, calls = trainer.task.forward, []

    def interrupted(batch):
        calls.append(batch)
        if len(calls) < 2:  # each worker has made a batch by the second
            return forward(batch)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(batch)

    trainer.task.forward = interrupted
    with pytest.raises(Stopped, match="SIGTERM after step 2 of 3"):
        trainer.run()
    assert not multiprocessing.active_children()
    assert torch.load(trainer.checkpoint, weights_only=True)["progress"]["step"] == 2


def test_an_error_of_a_worker_is_one_line(world, tmp_path):
    trainer = trainer_of(world, "dual", tmp_path, 1)
    path = world / "data/train/dual.train.tsv"
    rows = path.read_bytes()
    try:
        path.write_bytes(b"\n" * len(rows))  # damaged after it was read
        with pytest.raises(UserError, match=r"^[^\n]*dual\.train\.tsv:\d+: [^\n]*$"):
            trainer.run()
    finally:
        path.write_bytes(rows)
    assert not multiprocessing.active_children()
