"""Training killed by any signal at any moment, also in the middle of a checkpoint, ends in the same bytes."""

import random
import signal
import time

import pytest
import torch
from toy_world import make_world, options, train_options

from torch_src.runtime.errors import UserError
from torch_src.training.checkpoints import load_checkpoint, previous, save_checkpoint

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def command(world, kind: str, name: str, extra: str = "") -> tuple[str, list[str]]:
    """A run of a second or two that writes a checkpoint after every update: its program and options."""
    clock = f"--save_every_minutes 1e-9 --dropout 0.1 --log_every 1 {extra}"
    if kind == "dual":
        more = "--epoch 6 --ema_decay 0.9 --grad_cache_chunk 4"
        return "do_dual_train.py", [*train_options(world, world / name), *more.split(), *clock.split()]
    more = "--epoch 1 --loss listwise --groups_per_step 4 --group_size 3 --eval_every 3 --lr 1e-3"
    model = ["--pretrained_model_path", str(world / "model")]
    return "do_cross_train.py", [*options(world, world / name), *model, *more.split(), *clock.split()]


def wait_for(process, *words: str) -> None:
    """Wait until one of the words is in the program's output, or it has ended."""
    while process.poll() is None and not any(word in process.output() for word in words):
        time.sleep(0.005)


def results(folder, kind: str) -> list[bytes]:
    """The best weights, and the last weights and optimizer state in the checkpoint."""
    state = load_checkpoint(folder / f"{kind}_checkpoint.pt")
    tensors = [*state["model"].values(), *state["ema"].values()]
    tensors += [
        t for s in state["optimizer"]["state"].values() for t in s.values() if isinstance(t, torch.Tensor)
    ]
    return [(folder / f"{kind}_params.bin").read_bytes(), *(tensor.numpy().tobytes() for tensor in tensors)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "extra"), [("dual", ""), ("cross", ""), ("dual", "--lora_rank 4 --no_share_encoder")]
)
@pytest.mark.parametrize("kills", [3])
def test_killed_at_random_moments(programs, world, kind, extra, kills):
    lora = "-lora" if extra else ""
    whole, name, log = f"{kind}{lora}-whole", f"{kind}{lora}-{kills}", world / "log"
    if not (world / whole).exists():
        assert programs.run(*command(world, kind, whole, extra), log).returncode == 0
    draw, statuses = random.Random(kills), []
    for at in range(kills):
        process = programs.start(*command(world, kind, name, extra), log)
        wait_for(process, "epoch ", "dev step")  # the run's first update, or evaluation
        time.sleep(draw.random() * 0.15)
        process.send_signal(SIGNALS[at % 3])
        statuses.append(process.wait())
    done = programs.run(*command(world, kind, name, extra), log)
    assert done.returncode == 0, done.output()
    assert "starting from the beginning" not in done.output()
    assert results(world / name, kind) == results(world / whole, kind)
    # -SIGTERM: received before or after the training loop, where there is nothing to save
    assert set(statuses) <= {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT, 0}
    assert "up to date" in programs.run(*command(world, kind, name, extra), log).output()


@pytest.mark.slow
def test_a_signal_saves_and_reports_how_to_resume(programs, world):
    process = programs.start(*command(world, "dual", "asked"), world / "log")
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    out = process.output()
    assert "stopped by SIGTERM" in out and "the same command" in out and "Traceback" not in out
    assert load_checkpoint(world / "asked/dual_checkpoint.pt")["progress"]["step"] >= 3


def state(step: int) -> dict:
    return {"stamp": {}, "progress": {"step": step}, "model": {"w": torch.full((1000,), float(step))}}


def test_the_last_two_are_kept_and_a_damaged_one_is_skipped(tmp_path, capsys):
    path = tmp_path / "dual_checkpoint.pt"
    assert load_checkpoint(path) is None
    for step in (1, 2, 3):
        save_checkpoint(path, state(step))
    assert load_checkpoint(path)["progress"]["step"] == 3
    assert {p.name for p in tmp_path.iterdir()} == {path.name, previous(path).name}
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert load_checkpoint(path)["progress"]["step"] == 2
    assert "damaged" in capsys.readouterr().err
    path.unlink()  # killed between the two renames: only the previous one exists
    assert load_checkpoint(path)["progress"]["step"] == 2
    previous(path).write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged checkpoint; delete it"):
        load_checkpoint(path)


def test_a_failed_write_changes_neither_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "dual_checkpoint.pt"
    save_checkpoint(path, state(1)), save_checkpoint(path, state(2))

    def full(_, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="is the disk full"):
        save_checkpoint(path, state(3))
    assert load_checkpoint(path)["progress"]["step"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {path.name, previous(path).name}
