"""The one training loop of both models: schedule, accumulation, several processes, log, evaluation,
checkpoints.
"""

import math
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from torch_src.runtime.errors import UserError
from torch_src.runtime.log import duration, log, warn
from torch_src.runtime.signals import StopSignals
from torch_src.runtime.stamps import differences
from torch_src.training.checkpoints import load_checkpoint, save_checkpoint
from torch_src.training.distributed import ProcessGroup
from torch_src.training.ema import Ema
from torch_src.training.optimizer import lr_factor, parameter_groups
from torch_src.training.training_log import Log

MAX_SKIPS = 50  # fp16 updates in a row that the scaler skips end the run: its scale will not recover then


@dataclass
class Task:
    """What one model brings to the loop.

    prepare(epoch, micro_step) -> batch      runs ahead in a thread: reading and tokenising
    backward(batch, begin) -> accuracy       adds the gradient of begin(loss); loss and accuracy are this
                                             process's parts, whose sums over all processes are the batch's
    describe(batch) -> str                   names the batch's rows in an error
    evaluate() -> {metric: value}            on the dev set; empty when there is none
    save_best() -> checksum               writes the weights
    best_checksum() -> checksum        of the weights that lie there, None without any
    """

    model: nn.Module
    micro_steps_per_epoch: int
    prepare: Callable[[int, int], object]
    backward: Callable[[object, Callable[[Tensor], Tensor]], Tensor]
    describe: Callable[[object], str]
    evaluate: Callable[[], dict[str, float]]
    save_best: Callable[[], str]
    best_checksum: Callable[[], str | None] = lambda: None
    main_metric: str = "MRR@10"
    queries_per_step: int = 1  # of one micro-batch, for the rate in the log
    unit: str = "queries"  # what that counts
    own_lr: dict[str, float] = field(default_factory=dict)  # parameter name -> its peak learning rate
    negatives: int = 0  # that each query is held against in a step


@dataclass
class Progress:
    """Where the run stands; saved in every checkpoint."""

    step: int = 0  # updates done
    evaluated: int = -1  # the step of the last dev evaluation
    best: float = -1.0
    best_step: int = -1
    best_weights: str = ""  # checksum of the weights kept
    untrained: float = -1.0  # the main metric before the first update
    evaluations_without_gain: int = 0
    processes: int = 1  # that the last updates were shared by
    skipped: int = 0  # fp16 updates skipped in a row
    skipped_in_all: int = 0
    negatives: int = 0  # that each query was held against
    history: list = field(default_factory=list)  # {step, loss} and {step, metrics...}


class Trainer:
    """Runs a Task to the end of its last epoch; `hp` holds the shared knobs of the training programs."""

    def __init__(
        self, hp, task: Task, device: torch.device, precision: str, checkpoint: str, stamp: dict,
        group: ProcessGroup | None = None,
    ):  # fmt: skip
        self.hp, self.task, self.device, self.precision = hp, task, device, precision
        self.checkpoint, self.stamp = Path(checkpoint), stamp
        self.group = group or ProcessGroup(device)
        self.is_first = self.group.rank == 0  # the one that writes, logs and evaluates
        if hp.accumulation_steps > task.micro_steps_per_epoch:
            raise UserError(
                f"--accumulation_steps {hp.accumulation_steps}: an epoch has only "
                f"{task.micro_steps_per_epoch} batches; lower it or the batch"
            )
        self.steps_per_epoch = task.micro_steps_per_epoch // hp.accumulation_steps
        total = hp.epoch * self.steps_per_epoch
        self.total_steps = min(total, hp.max_steps) if hp.max_steps else total
        self.progress = Progress(negatives=task.negatives, processes=self.group.world)
        self.saved_step = -1  # of the checkpoint on disk
        self.batches: list = []  # of this update so far, to name their rows in an error
        self.lr = 0.0  # of this update
        self.log: Log | None = None
        groups = parameter_groups(task.model, hp.weight_decay, task.own_lr)
        self.optimizer = torch.optim.AdamW(groups, lr=hp.lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.ema = Ema(task.model, hp.ema_decay) if hp.ema_decay else None
        self.saved_at = time.monotonic()

    def run(self) -> Progress:
        """Train, evaluate, keep the best and the last weights; return how it went.

        Stopped when a signal asked for it; what is needed to carry on has been saved by then.
        """
        self._resume()
        if self.is_first:
            self.board = SummaryWriter(
                Path(self.hp.output_dir) / "tensorboard", purge_step=self.progress.step
            )
        with StopSignals() as self.signals:
            if self._evaluation_due():
                self._evaluate()
            self.log = Log(self)
            with ThreadPoolExecutor(max_workers=1) as ahead:
                self._loop(ahead)
        if self.is_first:
            self.board.close()
        return self.progress

    def probe(self, updates: int) -> list[float]:
        """Make some updates, nothing being written or measured on dev; return seconds of each."""
        seconds = []
        for step in range(updates):
            begun = time.perf_counter()
            self.loss, self.batches, self.lr = 0.0, [], self._set_lr(step)
            for micro in range(self.hp.accumulation_steps):
                at = step * self.hp.accumulation_steps + micro
                self._backward(self.task.prepare(0, at % self.task.micro_steps_per_epoch))
            self._update()
            seconds.append(time.perf_counter() - begun)
        return seconds

    def evaluations(self) -> int:
        """Return how often the run will measure on dev."""
        every = self.hp.eval_every or self.steps_per_epoch
        return 0 if every < 0 else 1 + -(-self.total_steps // every)

    def _loop(self, ahead: ThreadPoolExecutor) -> None:
        waiting = self._submit(ahead, self.progress.step, 0)
        try:
            while self.progress.step < self.total_steps and not self._stopped_early():
                self.loss, accuracy, self.batches = 0.0, 0.0, []
                self.lr = self._set_lr(self.progress.step)
                for micro in range(self.hp.accumulation_steps):
                    batch, waiting = waiting.result(), self._submit(ahead, *self._next(micro))
                    accuracy += self._backward(batch)
                self._update()
                self.progress.step += 1
                self._note(self.loss, accuracy / self.hp.accumulation_steps, self.lr)
                self._save_when_due()
                if self._evaluation_due():
                    self._evaluate()
        finally:
            waiting.cancel()
        if self._stopped_early():
            self.say(f"early stop: no better {self.task.main_metric} in {self.hp.early_stop} evaluations")
        if self.hp.eval_every < 0:
            self._keep_weights()
            self._save_checkpoint()

    def _next(self, micro: int) -> tuple[int, int]:
        """Return (step, micro-step) of the batch after this one."""
        last = micro + 1 == self.hp.accumulation_steps
        return (self.progress.step + 1, 0) if last else (self.progress.step, micro + 1)

    def _submit(self, ahead: ThreadPoolExecutor, step: int, micro: int):
        epoch, at = divmod(step, self.steps_per_epoch)
        return ahead.submit(self.task.prepare, epoch, at * self.hp.accumulation_steps + micro)

    def _set_lr(self, step: int) -> float:
        factor = lr_factor(step, self.total_steps, self.hp.warmup_proportion)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("peak_lr", self.hp.lr) * factor
        return self.hp.lr * factor

    def _backward(self, batch) -> float:
        """Add one micro-batch's gradient; return its accuracy."""
        self.task.model.train()
        self.batches.append(batch)

        def begin(loss: Tensor) -> Tensor:
            """Return what is differentiated, once the loss of all processes is known to be finite."""
            value = self.group.sum_(loss.detach().double().clone()).item()
            if not math.isfinite(value):
                raise self._not_finite(f"the loss is {value}", [batch])
            self.loss += value / self.hp.accumulation_steps
            return self.scaler.scale(loss / self.hp.accumulation_steps)

        return self.group.sum_(self.task.backward(batch, begin).detach().double().clone()).item()

    def _not_finite(self, what: str, batches: list) -> UserError:
        rows = "; ".join(map(self.task.describe, batches))
        best, kept = self.progress.best_step, []
        if best > 0:
            kept.append(f"the weights of step {best}, best on dev, are kept")
        if self.saved_step > 0:
            kept.append(f"the checkpoint of step {self.saved_step} is whole")
        return UserError(
            f"{what} at step {self.progress.step + 1}, lr {self.lr:.2g}, {rows}; stopped, "
            f"{' and '.join(kept) or 'no weights were saved yet'}. "
            "Try a lower --lr, --precision fp32, or look at those rows"
        )

    def _update(self) -> None:
        self.group.sum_gradients(self.task.model)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.task.model.parameters(), self.hp.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if not self.scaler.is_enabled() and not finite:
            raise self._not_finite("the gradient is not finite", self.batches)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and finite:
            self.ema.update()
        self.progress.skipped = 0 if finite else self.progress.skipped + 1
        self.progress.skipped_in_all += not finite
        if self.progress.skipped >= MAX_SKIPS:
            what = f"fp16: {MAX_SKIPS} updates in a row overflowed, the last one"
            raise self._not_finite(what, self.batches)

    def _note(self, loss: float, accuracy: float, lr: float) -> None:
        step = self.progress.step
        self.log.add(loss, accuracy)
        if step % self.hp.log_every and step != self.total_steps:
            return
        mean_loss, mean_accuracy = self.log.line(step, lr)
        self.progress.history.append({"step": step, "loss": round(mean_loss, 5), "lr": lr})
        for name, value in (("loss", mean_loss), ("in_batch_accuracy", mean_accuracy), ("lr", lr)):
            self._plot(f"train/{name}", value)

    def _plot(self, name: str, value: float) -> None:
        if self.is_first:
            self.board.add_scalar(name, value, self.progress.step)

    def say(self, line: str) -> None:
        """Print a log line, once for all processes."""
        if self.is_first:
            log(line)

    def _evaluation_due(self) -> bool:
        return self.hp.eval_every >= 0 and self._keeps_weights_at(self.progress)

    def _keeps_weights_at(self, progress: Progress) -> bool:
        """Return whether what follows this progress at once may write the best weights."""
        step, every = progress.step, self.hp.eval_every or self.steps_per_epoch
        due = step == self.total_steps or (every > 0 and step % every == 0)
        return due and progress.evaluated != step

    def _stopped_early(self) -> bool:
        return 0 < self.hp.early_stop <= self.progress.evaluations_without_gain

    def _save_when_due(self) -> None:
        """Save on the clock, before an evaluation, after an epoch, and when a signal asked to stop."""
        step, minutes = self.progress.step, self.hp.save_every_minutes
        asked = self.group.sum_(torch.tensor([float(self.signals.asked)], device=self.device)).item()
        due = minutes and time.monotonic() - self.saved_at >= 60 * minutes
        if asked or due or self._evaluation_due() or step % self.steps_per_epoch == 0:
            self._save_checkpoint()
        if asked:
            self.signals.asked = self.signals.asked or signal.SIGTERM  # another process heard it
            raise self.signals.stopped(f"after step {step} of {self.total_steps}")

    def _evaluate(self) -> None:
        """Measure on dev; keep the weights when they are the best so far. Before training nothing is kept."""
        begun, progress = time.monotonic(), self.progress
        metrics = {}
        if self.is_first:
            with self.signals.interruptible():
                metrics = self._averaged(self.task.evaluate)
        # Without a dev set the last weights are the best.
        value = metrics.get(self.task.main_metric, float(progress.step))
        value = self.group.from_first_(torch.tensor([value], dtype=torch.float64, device=self.device)).item()
        better = progress.step > 0 and value > progress.best
        if metrics:
            self._say_metrics(metrics, duration(time.monotonic() - begun), better)
            progress.history.append({"step": progress.step, **metrics})
        if self.log is not None:
            self.log.pause(time.monotonic() - begun)
        progress.evaluated = progress.step
        if not progress.step:
            progress.untrained = value
            return
        progress.evaluations_without_gain = 0 if better else progress.evaluations_without_gain + 1
        if better:
            progress.best = value
            self._keep_weights()
        self._save_checkpoint()

    def _say_metrics(self, metrics: dict[str, float], took: str, better: bool) -> None:
        when = f"step {self.progress.step}" if self.progress.step else "before training"
        figures = "  ".join(f"{name} {figure:.4f}" for name, figure in metrics.items())
        log(f"dev {when}: {figures}  ({took})" + ("  best so far" if better else ""))
        for name, figure in metrics.items():
            self._plot(f"dev/{name}", figure)

    def _averaged(self, program: Callable):
        """Return program() with the averaged weights in place of the live ones, where there are any."""
        if self.ema is None:
            return program()
        with self.ema.applied():
            return program()

    def _keep_weights(self) -> None:
        self.progress.best_step = self.progress.step
        if self.is_first:
            self.progress.best_weights = self._averaged(self.task.save_best)

    def _save_checkpoint(self) -> None:
        """Write everything that the run needs to go on: the last weights, not the best ones.

        No state of a random generator is in it: every draw is a function of seed, step and place in the
        batch.
        """
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        if self.is_first:
            save_checkpoint(self.checkpoint, {
                "stamp": self.stamp, "progress": vars(self.progress), "model": self.task.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "ema": self.ema.state() if self.ema else {},
            })  # fmt: skip

    def _resume(self) -> None:
        state = self._usable(load_checkpoint(self.checkpoint))
        # The first process decides for all: on a shared folder they see the same, elsewhere they may not.
        step = state["progress"]["step"] if state else -1
        agreed = int(self.group.from_first_(torch.tensor([step], device=self.device)).item())
        if agreed != step:
            raise UserError(
                f"{self.checkpoint}: the first process carries on after step {agreed}, this one sees {step}; "
                "--output_dir must be one folder that all machines share"
            )
        if state is None:
            return
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load(state["ema"])
        self.progress, self.saved_step = Progress(**state["progress"]), step
        if self.progress.processes != self.group.world:
            warn(
                f"{self.group.world} processes, {self.progress.processes} before: each draws dropout of its "
                "own, so the weights will not be those of a run that kept its number"
            )
            self.progress.processes = self.group.world
        self.say(f"{self.checkpoint}: carrying on after step {self.progress.step} of {self.total_steps}")

    def _usable(self, state: dict | None) -> dict | None:
        """Return the checkpoint if it is one of this run; None, said why, otherwise."""
        if state is None:
            return None
        if state["stamp"] != self.stamp:
            self.say(
                f"{self.checkpoint}: a checkpoint of other settings "
                f"({'; '.join(differences(state['stamp'], self.stamp))}); starting from the beginning"
            )
            before = state["progress"].get("negatives", 0)
            if before != self.task.negatives and self.is_first:
                warn(f"negatives a query in a step: {before} -> {self.task.negatives}: another training")
            return None
        kept, there = state["progress"]["best_weights"], self.task.best_checksum()
        # Killed after the best weights were written and before that was noted: the evaluation of this step
        # comes once more and writes the same again.
        pending = there is not None and self._keeps_weights_at(Progress(**state["progress"]))
        if kept and kept != there and not pending:
            self.say(
                f"{self.checkpoint}: the best weights it speaks of are not there; starting from the beginning"
            )
            return None
        return state
