"""The training loop on a toy task: schedule, groups, clipping, accumulation, resuming, the best weights."""

import math
import threading

import pytest
import torch
from torch import nn
from toy_world import SAMPLE, make_model

from torch_src.dual_hparams import DualHparams
from torch_src.dual_train import training_stage
from torch_src.runtime.errors import UserError
from torch_src.training import trainer
from torch_src.training.checkpoints import save_checkpoint
from torch_src.training.distributed import Processes
from torch_src.training.grad_cache import Chunking, seed_of
from torch_src.training.optimizer import lr_factor, parameter_groups
from torch_src.training.trainer import Output, Trainer, TrainerOptions, TrainingTask

CPU = torch.device("cpu")


class Toy(TrainingTask):
    """A small classifier with dropout that records every call of the trainer."""

    def __init__(self, folder, micro_steps=4, dropout=0.2, metrics=(), seed=42, precision="fp32", **knobs):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Linear(8, 4))
        self.batches_per_epoch, self.metrics, self.seed = micro_steps, list(metrics), seed
        self.chunking = Chunking(0, 100, seed, CPU, precision)
        self.drawn, self.saved, self.gradients, self.fail_at = [], [], [], None
        self.scale = 1.0  # of the loss, by (epoch, step) where it is a function
        options = TrainerOptions(**{"epochs": 3, "lr": 0.05, "log_every": 1, **knobs})
        stamp = {"lr": options.lr}
        self.trainer = Trainer(self, options, Processes(CPU), precision, folder / "checkpoint.pt", stamp)
        step = self.trainer.optimizer.step
        self.trainer.optimizer.step = lambda: (self.gradients.append(self.gradient()), step())

    def make_batch(self, place):
        epoch, step = place
        self.drawn.append((epoch, step))
        if self.fail_at == (epoch, step):
            raise ConnectionError("stopped by the test")
        draw = torch.Generator().manual_seed(1000 * epoch + step)
        x = torch.randn(5, 6, generator=draw)
        return x, torch.randint(4, (5,), generator=draw), (epoch, step)

    def forward(self, batch):
        torch.manual_seed(seed_of(self.seed, *batch[2]))
        return Output(*self.loss(batch), deferred=[])

    def describe(self, batch):
        return f"rows {batch[2]}"

    def loss(self, batch):
        scores = self.model(batch[0])
        loss = nn.functional.cross_entropy(scores, batch[1])
        scale = self.scale(batch[2]) if callable(self.scale) else self.scale
        return loss * scale, (scores.argmax(1) == batch[1]).float().mean()

    def evaluate(self):
        return {"MRR@10": self.metrics.pop(0)} if self.metrics else {}

    def save(self):
        self.saved.append((self.trainer.progress.step, self.weights()))
        return ""

    def saved_checksum(self):
        return None

    def weights(self):
        return b"".join(value.numpy().tobytes() for value in self.model.state_dict().values())

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def run(self):
        return self.trainer.run()


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [
        (10, 0.3, [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        (4, 0.0, [1, 3 / 4, 1 / 2, 1 / 4]),
        (4, 1.0, [1 / 4, 1 / 2, 3 / 4, 1]),
        (1, 0.0, [1]),
        (1, 1.0, [1]),
        (5, 0.1, [1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
    ],
)
def test_lr_factor_at_its_corners(total, warmup, expected):
    factors = [lr_factor(step, total, warmup) for step in range(total)]
    assert factors == pytest.approx(expected, rel=1e-12) and lr_factor(total, total, warmup) == 0


def test_the_loop_follows_the_schedule_over_the_epochs(tmp_path):
    toy = Toy(tmp_path, epochs=2, micro_steps=5, accumulation_steps=2, warmup_proportion=0.5)
    progress = toy.run()
    rates = [entry["lr"] for entry in progress.history]
    assert rates == pytest.approx([0.025, 0.05, 0.05, 0.025], rel=1e-9)
    assert progress.step == 4
    assert toy.drawn[:8] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]


def test_max_steps_shortens_run_and_schedule(tmp_path):
    progress = Toy(tmp_path, max_steps=2, warmup_proportion=0.0).run()
    assert [entry["lr"] for entry in progress.history] == pytest.approx([0.05, 0.025])
    assert Toy(tmp_path / "b", max_steps=100).run().step == 12


def test_weight_decay_on_matrices_only_and_tied_weights_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    frozen = nn.Linear(3, 3).requires_grad_(False)
    model = nn.Sequential(first, nn.LayerNorm(3), second, nn.Embedding(5, 3), frozen)
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(first.weight), id(model[3].weight)]
    norm = model[1]
    assert [id(p) for p in others["params"]] == [
        id(p) for p in (first.bias, norm.weight, norm.bias, second.bias)
    ]


def test_a_learning_rate_of_its_own(tmp_path):
    toy = Toy(tmp_path, epochs=1, warmup_proportion=0.5)
    groups = parameter_groups(toy.model, 0.1, {"3.weight": 0.5, "3.bias": 0.5})
    assert [(len(g["params"]), g["weight_decay"], g.get("peak_lr")) for g in groups] == [
        (1, 0.1, None), (3, 0.0, None), (1, 0.1, 0.5), (1, 0.0, 0.5),
    ]  # fmt: skip
    toy.trainer.optimizer = torch.optim.AdamW(groups, lr=0.05)
    current = toy.trainer.optimizer.param_groups
    seen = [(toy.trainer._set_lr(step), [g["lr"] for g in current])
            for step in range(4)]  # fmt: skip
    assert [lr for lr, _ in seen] == pytest.approx([0.025, 0.05, 0.05, 0.025])
    assert [rates for _, rates in seen] == [pytest.approx([lr, lr, 10 * lr, 10 * lr]) for lr, _ in seen]


def test_weight_decay_shrinks_matrices_and_leaves_vectors(tmp_path):
    toy = Toy(tmp_path, epochs=1, micro_steps=1, weight_decay=0.1)
    toy.scale = 0.0  # no gradient: what moves is the decay
    before = {name: p.detach().clone() for name, p in toy.model.named_parameters()}
    toy.run()
    for name, p in toy.model.named_parameters():
        kept = 1 - 0.05 * 0.1 if p.ndim > 1 else 1.0
        assert torch.allclose(p, before[name] * kept, rtol=1e-6, atol=0), name


def test_the_gradient_is_clipped_to_its_norm_and_keeps_its_direction(tmp_path):
    plain = Toy(tmp_path / "a", epochs=1, micro_steps=1, max_grad_norm=1e9)
    clipped = Toy(tmp_path / "b", epochs=1, micro_steps=1, max_grad_norm=0.01)
    plain.run(), clipped.run()
    norm = plain.gradients[0].norm().item()
    assert norm > 0.1 and clipped.gradients[0].norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(clipped.gradients[0] / 0.01, plain.gradients[0] / norm, rtol=1e-3, atol=1e-6)


def test_accumulation_gives_the_mean_gradient(tmp_path):
    both = Toy(tmp_path, epochs=1, micro_steps=2, accumulation_steps=2, dropout=0.0, max_grad_norm=1e9)
    parts, losses = [], []
    for micro in range(2):
        loss, _ = both.loss(both.make_batch((0, micro)))
        losses.append(loss.item())
        parts.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, both.model.parameters())]))
    assert (parts[0] - parts[1]).norm() > 0.1
    progress = both.run()
    assert len(both.gradients) == progress.step == 1
    assert torch.allclose(both.gradients[0], (parts[0] + parts[1]) / 2, rtol=1e-5, atol=1e-7)
    assert progress.history[0]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_more_accumulation_steps_than_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match="--accumulation_steps 3: an epoch has only 1 batches"):
        Toy(tmp_path, micro_steps=1, accumulation_steps=3, epochs=2).run()


def test_the_seed_decides_the_bytes(tmp_path):
    runs = [Toy(tmp_path / str(at), seed=seed) for at, seed in enumerate((42, 42, 43))]
    for toy in runs:
        torch.rand(7)  # the state of the generator before the run must not matter
        toy.run()
    assert runs[0].weights() == runs[1].weights() != runs[2].weights()


@pytest.mark.parametrize(("eval_every", "accumulation"), [(0, 1), (3, 1), (1, 2)])
def test_resuming_gives_the_bytes_of_the_uninterrupted_run(tmp_path, eval_every, accumulation):
    knobs = dict(eval_every=eval_every, accumulation_steps=accumulation, weight_decay=0.01, micro_steps=4)
    scores = [0.0, 0.3, 0.9, 0.1, 0.2, 0.5, 0.4]
    whole = Toy(tmp_path / "whole", metrics=scores, **knobs)
    expected = whole.run()
    broken = Toy(tmp_path / "broken", metrics=scores, **knobs)
    broken.fail_at = (1, 2)
    with pytest.raises(ConnectionError):
        broken.run()
    assert (tmp_path / "broken" / "checkpoint.pt").exists()
    saved = torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)["progress"]["step"]
    done = len(scores) - len(broken.metrics)  # evaluations so far, one of them before training
    assert 0 < saved < whole.trainer.schedule.total_steps
    again = Toy(tmp_path / "broken", metrics=scores[done:], **knobs)
    torch.rand(3)
    progress = again.run()
    assert again.weights() == whole.weights() and len(again.gradients) == progress.step - saved
    assert vars(progress) == vars(expected)
    assert (broken.saved + again.saved)[-1] == whole.saved[-1]
    finished = Toy(tmp_path / "broken", **knobs)
    finished.run()
    assert finished.weights() == whole.weights() and finished.gradients == []


@pytest.mark.parametrize("fail_at", [(0, 2), (1, 0), (1, 2), (2, 1)])
def test_the_curves_of_a_resumed_run_have_every_point_once(tmp_path, monkeypatch, fail_at):
    boards = {}

    class Board:
        """Keeps points as TensorBoard shows them: those from `purge_step` on are dropped."""

        def __init__(self, folder, purge_step):
            kept = [point for point in boards.get(folder, []) if point[1] < purge_step]
            self.points = boards[folder] = kept

        def add_scalar(self, tag, value, step):
            self.points.append((tag, step, pytest.approx(value, abs=1e-5)))

        def close(self):
            pass

    monkeypatch.setattr(trainer, "SummaryWriter", Board)
    scores = [0.0, 0.3, 0.9, 0.1]
    Toy(tmp_path / "whole", metrics=scores).run()
    broken = Toy(tmp_path / "broken", metrics=scores)
    broken.fail_at = fail_at
    with pytest.raises(ConnectionError):
        broken.run()
    resumes = (tmp_path / "broken/checkpoint.pt").exists()
    Toy(tmp_path / "broken", metrics=broken.metrics if resumes else scores).run()
    whole, resumed = (boards[tmp_path / name / "tensorboard/checkpoint"] for name in ("whole", "broken"))
    assert len(whole) == 3 * 12 + 4
    assert sorted(resumed, key=lambda point: point[:2]) == sorted(whole, key=lambda point: point[:2])


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path, capsys):
    Toy(tmp_path).run()
    fresh = Toy(tmp_path / "b", lr=0.01)
    fresh.run()
    again = Toy(tmp_path, lr=0.01)
    again.run()
    assert "settings differ (lr: 0.05 -> 0.01)" in capsys.readouterr().out
    assert again.weights() == fresh.weights() and len(again.gradients) == 12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_names_step_and_rows_and_keeps_the_best(tmp_path, bad):
    toy = Toy(tmp_path, metrics=[0.1, 0.5])
    toy.scale = lambda rows: bad if rows == (1, 1) else 1.0
    with pytest.raises(
        UserError, match=r"the loss is (nan|inf) at step 6, .*rows \(1, 1\).*best weights \(step 4\)"
    ):
        toy.run()
    assert [step for step, _ in toy.saved] == [4] and len(toy.gradients) == 5
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["progress"]["step"] == 4 and all(value.isfinite().all() for value in kept["model"].values())


def test_a_non_finite_loss_before_any_weights_are_saved(tmp_path):
    toy = Toy(tmp_path, metrics=[0.1])
    toy.scale = math.nan
    with pytest.raises(UserError, match="at step 1, ") as caught:
        toy.run()
    assert toy.saved == [] and "step -1" not in str(caught.value)
    assert "no weights are saved" in str(caught.value)


def test_a_non_finite_loss_names_the_checkpoint(tmp_path):
    toy = Toy(tmp_path, metrics=[0.1], eval_every=-1)
    toy.scale = lambda rows: math.nan if rows == (2, 1) else 1.0
    with pytest.raises(UserError, match="at step 10, .*last checkpoint is of step 8"):
        toy.run()
    again = Toy(tmp_path, eval_every=-1)
    again.scale = math.nan
    with pytest.raises(UserError, match="at step 9, .*last checkpoint is of step 8"):
        again.run()


def test_fp16_skips_are_counted_logged_and_too_many_stop(tmp_path, capsys):
    def overflow(rows):
        return 1.0 if rows[0] != 1 else 1e38  # times the scaler's 2**16: beyond fp32

    toy = Toy(tmp_path / "some", precision="fp16", ema_decay=0.5, eval_every=-1)
    toy.scale = overflow
    before, shadows, update = toy.weights(), [], toy.trainer.ema.update
    toy.trainer.ema.update = lambda: (shadows.append(toy.trainer.progress.step), update())
    progress = toy.run()
    assert (progress.skipped, progress.skipped_total) == (0, 4) and "skipped 4" in capsys.readouterr().out
    assert len(toy.gradients) == 8 and shadows == [0, 1, 2, 3, 8, 9, 10, 11] and toy.weights() != before
    assert all(gradient.isfinite().all() for gradient in toy.gradients)
    plain = Toy(tmp_path / "plain", eval_every=-1, epochs=1)
    plain.run()  # the loss is scaled and its gradient scaled back: the same direction and size
    assert toy.gradients[0].allclose(plain.gradients[0], rtol=1e-4, atol=1e-7)

    endless = Toy(tmp_path / "endless", precision="fp16", epochs=30, eval_every=-1)
    endless.scale = 1e38
    before = endless.weights()
    with pytest.raises(UserError, match="fp16: 50 updates in a row overflowed.*at step 50, lr"):
        endless.run()
    assert endless.weights() == before and endless.trainer.progress.skipped == 50


def test_a_resumed_fp16_run_keeps_its_scaler_and_skip_counts(tmp_path):
    def overflow(rows):
        return 1e38 if rows[0] == 0 else 1.0

    knobs = dict(precision="fp16", eval_every=-1)
    whole = Toy(tmp_path / "whole", **knobs)
    whole.scale = overflow
    expected = whole.run()
    broken = Toy(tmp_path / "broken", **knobs)
    broken.scale, broken.fail_at = overflow, (1, 2)
    with pytest.raises(ConnectionError):
        broken.run()
    again = Toy(tmp_path / "broken", **knobs)
    again.scale = overflow
    assert vars(again.run()) == vars(expected) and again.weights() == whole.weights()
    assert again.trainer.scaler.state_dict() == whole.trainer.scaler.state_dict()


def test_another_number_of_processes_is_reported(tmp_path, capsys):
    Toy(tmp_path).run()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state = {key: value for key, value in saved.items() if key != "xxh3"}
    save_checkpoint(tmp_path / "checkpoint.pt", {**state, "progress": {**state["progress"], "processes": 2}})
    Toy(tmp_path).run()
    assert "WARNING 1 processes now, 2 before" in capsys.readouterr().err


def test_a_non_finite_gradient_of_a_finite_loss_stops(tmp_path):
    toy = Toy(tmp_path)
    real = toy.loss
    toy.loss = lambda batch: (real(batch)[0] + (toy.model[0].bias * 0).sum().sqrt(), torch.ones(()))
    before = toy.weights()
    with pytest.raises(UserError, match=r"gradient is not finite at step 1, lr .*rows \(0, 0\).*no weights"):
        toy.run()
    assert toy.weights() == before


def test_the_best_weights_are_kept_rather_than_the_last(tmp_path, capsys):
    toy = Toy(tmp_path, epochs=4, metrics=[0.9, 0.2, 0.6, 0.6, 0.4])
    progress = toy.run()
    assert [step for step, _ in toy.saved] == [4, 8]  # 12 is as good, not better
    assert (progress.best, progress.best_step, progress.untrained, progress.step) == (0.6, 8, 0.9, 16)
    assert toy.saved[-1][1] != toy.weights()
    found = [line.partition("s)")[2] for line in capsys.readouterr().out.splitlines() if " dev " in line]
    assert [line.split(";")[0].strip() for line in found] == ["", "saved", "saved", "", ""]
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert b"".join(value.numpy().tobytes() for value in last.values()) == toy.weights()


def test_early_stop_counts_evaluations_without_gain(tmp_path):
    toy = Toy(tmp_path, epochs=10, early_stop=2, metrics=[0.0, 0.3, 0.2, 0.5, 0.4, 0.5, 0.9])
    progress = toy.run()
    assert (progress.step, progress.best_step, toy.metrics) == (20, 12, [0.9])
    toy = Toy(tmp_path / "never", epochs=5, early_stop=0, metrics=[0.0, 0.3, 0.2, 0.1, 0.1, 0.1])
    assert toy.run().step == 20


def test_slow_updates_log_lines_that_change_no_curve(tmp_path, monkeypatch, capsys):
    quick = Toy(tmp_path / "quick", log_every=5).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    monkeypatch.setattr(trainer, "line_due", lambda now, started, logged, seconds: True)
    slow = Toy(tmp_path / "slow", log_every=5).run()
    assert len(lines) == 3  # 5, 10, 12
    assert sum(" step " in line for line in capsys.readouterr().out.splitlines()) == 12
    assert slow.history == quick.history


@pytest.mark.parametrize(("eval_every", "steps"), [(0, [0, 4, 8, 12]), (5, [0, 5, 10, 12]), (-1, [])])
def test_when_dev_is_evaluated(tmp_path, eval_every, steps):
    toy = Toy(tmp_path, eval_every=eval_every, metrics=[0.1] * 9)
    progress = toy.run()
    assert [entry["step"] for entry in progress.history if "MRR@10" in entry] == steps
    if not steps:
        assert [(12, toy.weights())] == toy.saved


def test_without_a_dev_set_the_last_weights_are_kept(tmp_path):
    toy = Toy(tmp_path)
    toy.run()
    assert toy.saved[-1] == (12, toy.weights())


@pytest.mark.slow
def test_tokenizing_ahead_is_not_disturbed_by_an_evaluation(tmp_path, monkeypatch):
    # The thread that prepares the next batch waits between setting its length limit and tokenizing, until the
    # evaluation has tokenized to another limit, or for 0.3 s when the two never meet.
    make_model(tmp_path / "model")
    hp = DualHparams(
        data_dir=str(SAMPLE), pretrained_model_path=str(tmp_path / "model"), output_dir=str(tmp_path),
        batch_size=2, q_max_seq_len=8, p_max_seq_len=40, max_steps=2, eval_every=1, precision="fp32",
        device="cpu",
    )  # fmt: skip
    stage = training_stage(hp)
    task, kind, drawn = stage.task, type(stage.setup.tokenizer), {}
    evaluated = threading.Event()
    real_set = kind.set_truncation_and_padding

    def delayed(self, *args, **kwargs):
        real_set(self, *args, **kwargs)
        if threading.current_thread() is not threading.main_thread():
            evaluated.wait(0.3)

    def evaluate():
        task.encoder("passage").tokenize(["银杏从小苗到挂果得等多少年" * 9])
        evaluated.set()
        return {}

    def make_batch(place):
        evaluated.clear()
        drawn[place] = real_batch(place)
        return drawn[place]

    monkeypatch.setattr(kind, "set_truncation_and_padding", delayed)
    monkeypatch.setattr("torch_src.dual_train.open_dev_retrieval", lambda *_: None)
    task.load()
    real_batch = task.make_batch
    task.evaluate, task.make_batch = evaluate, make_batch
    stage.trainer(tmp_path, {}).run()
    for place, found in drawn.items():
        again = real_batch(place)
        for side in ("queries", "passages"):
            assert getattr(found, side).ids.tolist() == getattr(again, side).ids.tolist()
