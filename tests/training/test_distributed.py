"""One process and several with shares of the same batch: the same losses, gradients and weights."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from toy_world import ROOT, lines, make_world, train_options, write

LAUNCH = ("-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"), dev_queries=5, train_queries=24)
    queries = [line.split("\t")[0] for line in lines(world / "data/dev/dev.q.format")]
    # an odd number of dev queries and of pairs: the shards differ in size
    run = [
        f"{query}\t{7 * at + rank}\t{rank}\t{-rank}"
        for at, query in enumerate(queries)
        for rank in range(1, 12)
    ]
    write(world / "run", run)
    return world


WORLDS = {
    "dual": dict(kind="dual", batch_size=7, normalize=True, temperature=0.05, pooling="mean"),
    "dual-untied-cached": dict(kind="dual", batch_size=8, grad_cache_chunk=2, accumulation_steps=2),
    "cross": dict(kind="cross", batch_size=7, loss="pointwise", fgm_epsilon=0.1),
    "cross-lora": dict(kind="cross", batch_size=7, loss="pointwise", fgm_epsilon=0.1, lora_rank=4),
    "dual-lora": dict(kind="dual", batch_size=7, lora_rank=4, grad_cache_chunk=2),
    "cross-listwise-cached": dict(
        kind="cross", loss="listwise", groups_per_step=3, group_size=3, grad_cache_chunk=2
    ),
}


@pytest.fixture(scope="module")
def steps(world, programs) -> dict[int, dict]:
    """{processes: {name: {losses (10, 2), gradients (10, n), metrics}}} of all WORLDS; each start is slow."""
    dev = {"dev_candidates": str(world / "run"), "dev_depth": 11}
    jobs = {
        name: {**knobs, "eval_every": 5, **(dev if knobs["kind"] == "cross" else {})}
        for name, knobs in WORLDS.items()
    }
    found = {}
    for processes in (1, 2):
        folder = world / f"steps{processes}"
        words = [str(world), str(folder), json.dumps(jobs)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # the variables that torchrun sets
        common = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        started = [
            programs.start("tests/distributed_run.py", words, world / f"log{rank}", RANK=str(rank), **common)
            for rank in range(processes)
        ]
        assert not any([process.wait() for process in started]), [process.output() for process in started]
        found[processes] = {name: torch.load(folder / name / "steps.pt", weights_only=True) for name in jobs}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WORLDS))
def test_two_processes_take_the_steps_of_one(steps, name):
    one, two = steps[1][name], steps[2][name]
    assert torch.allclose(one["losses"], two["losses"], rtol=1e-9, atol=0)
    for mine, theirs in zip(one["gradients"], two["gradients"], strict=True):
        assert (mine - theirs).norm() / mine.norm() < 1e-9
    assert (one["losses"][0] - one["losses"][-1]).abs().max() > 1e-3  # it did learn
    assert len(one["metrics"]) == 3 and one["metrics"] == two["metrics"]  # also before training


@pytest.mark.slow
def test_the_program_under_torchrun(world, programs):
    """Only the first process writes and logs; the weights are those of one process up to rounding."""
    weights = []
    for processes in (1, 2):
        words = [*train_options(world, world / f"run{processes}"), "--dropout", "0"]
        if processes == 1:
            done = programs.run("do_dual_train.py", words, world / "log")
            assert done.returncode == 0, done.output()
            printed = done.output()
        else:
            command = [sys.executable, *LAUNCH, "--nproc_per_node=2", str(ROOT / "do_dual_train.py"), *words]
            torchrun = subprocess.run(command, capture_output=True, text=True)
            assert torchrun.returncode == 0, torchrun.stdout + torchrun.stderr
            printed = torchrun.stdout
        weights.append(torch.load(world / f"run{processes}/dual_params.bin", weights_only=True))
        assert printed.count("dev step") == 2
    assert "process 2 of 2; they share each batch" in printed
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=2e-3), name


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_instead_of_a_hang(world):
    words = [
        *train_options(world, world / "dies"),
        "--epoch",
        "400",
        "--eval_every",
        "-1",
        "--log_every",
        "1",
    ]
    command = [sys.executable, *LAUNCH, "--nproc_per_node=2", str(ROOT / "do_dual_train.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "step 3/" in line:
            break
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), 9)
    begun = time.monotonic()
    rest = process.stdout.read()
    assert process.wait() != 0 and "exitcode" in rest
    assert time.monotonic() - begun < 120


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_run_with_its_line(world):
    """Only the first process writes the settings: the other is waiting for it in a collective."""
    bad = world / "errs/dual_hparams.json"
    bad.mkdir(parents=True)
    words = train_options(world, world / "errs")
    command = [sys.executable, *LAUNCH, "--nproc_per_node=2", str(ROOT / "do_dual_train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"ERROR {bad}" in done.stderr and "torch_src/training/trainer.py" not in done.stderr
