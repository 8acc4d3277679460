"""The one training loop of both models: optimiser, schedule, precision, accumulation, log, evaluation,
checkpoints.
"""

import math
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from torch_src.devices import autocast
from torch_src.errors import UserError
from torch_src.helpers import atomic_write, duration, say
from torch_src.optimisation import lr_factor, parameter_groups
from torch_src.training_log import Log

MAX_SKIPS = 50  # fp16 updates in a row that the scaler may skip: beyond that the loss scale will not recover


@dataclass
class Task:
    """What one model brings to the loop.

    prepare(epoch, micro_step) -> batch     runs ahead in a thread: reading and tokenising
    loss(batch) -> (loss, in-batch accuracy) under autocast, differentiable
    describe(batch) -> str                   names the batch's rows in an error
    evaluate() -> {metric: value}            on the dev set; empty when there is none
    save_best() -> fingerprint               writes the weights
    best_fingerprint() -> fingerprint        of the weights that lie there, None without any
    """

    model: nn.Module
    micro_steps_per_epoch: int
    prepare: Callable[[int, int], object]
    loss: Callable[[object], tuple[Tensor, Tensor]]
    describe: Callable[[object], str]
    evaluate: Callable[[], dict[str, float]]
    save_best: Callable[[], str]
    best_fingerprint: Callable[[], str | None] = lambda: None
    main_metric: str = "MRR@10"
    queries_per_step: int = 1  # of one micro-batch, for the rate in the log
    unit: str = "queries"  # what that counts
    own_lr: dict[str, float] = field(default_factory=dict)  # parameter name -> its peak learning rate


@dataclass
class Progress:
    """Where the run stands; saved in every checkpoint."""

    step: int = 0  # updates done
    best: float = -1.0
    best_step: int = -1
    best_weights: str = ""  # fingerprint of the weights kept
    untrained: float = -1.0  # the main metric before the first update
    evaluations_without_gain: int = 0
    skipped: int = 0  # fp16 updates skipped in a row
    history: list = field(default_factory=list)  # {step, loss} and {step, metrics...}


class Trainer:
    """Runs a Task to the end of its last epoch; `hp` holds the shared knobs of the training programs."""

    def __init__(self, hp, task: Task, device: torch.device, precision: str, checkpoint: str, stamp: dict):
        self.hp, self.task, self.device, self.precision = hp, task, device, precision
        self.checkpoint, self.stamp = Path(checkpoint), stamp
        if hp.accumulation_steps > task.micro_steps_per_epoch:
            raise UserError(
                f"--accumulation_steps {hp.accumulation_steps}: an epoch has only "
                f"{task.micro_steps_per_epoch} "
                "batches; lower it or the batch"
            )
        self.steps_per_epoch = task.micro_steps_per_epoch // hp.accumulation_steps
        total = hp.epoch * self.steps_per_epoch
        self.total_steps = min(total, hp.max_steps) if hp.max_steps else total
        self.progress = Progress()
        self.log: Log | None = None
        groups = parameter_groups(task.model, hp.weight_decay, task.own_lr)
        self.optimizer = torch.optim.AdamW(groups, lr=hp.lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def run(self) -> Progress:
        """Train, evaluate, keep the best and the last weights; return how it went."""
        torch.manual_seed(self.hp.seed)
        self._resume()
        self.board = SummaryWriter(Path(self.hp.output_dir) / "tensorboard", purge_step=self.progress.step)
        if self.progress.step == 0 and self.hp.eval_every >= 0:
            self._evaluate("before training")
        self.log = Log(self)
        with ThreadPoolExecutor(max_workers=1) as ahead:
            self._loop(ahead)
        self.board.close()
        return self.progress

    def _loop(self, ahead: ThreadPoolExecutor) -> None:
        waiting = self._submit(ahead, self.progress.step, 0)
        while self.progress.step < self.total_steps and not self._stopped_early():
            step, loss, accuracy = self.progress.step, 0.0, 0.0
            lr = self._set_lr(step)
            for micro in range(self.hp.accumulation_steps):
                batch = waiting.result()
                last = micro + 1 == self.hp.accumulation_steps
                waiting = self._submit(ahead, step + last, 0 if last else micro + 1)
                part, right = self._backward(batch, lr)
                loss, accuracy = loss + part, accuracy + right
            self._update()
            self.progress.step += 1
            self._note(loss, accuracy / self.hp.accumulation_steps, lr)
            if self._evaluation_due():
                self._evaluate(f"step {self.progress.step}")
            elif self.hp.eval_every < 0 and self.progress.step % self.steps_per_epoch == 0:
                self._save_checkpoint()
        waiting.cancel()
        if self._stopped_early():
            say(f"early stop: no better {self.task.main_metric} in {self.hp.early_stop} dev retrievals")
        if self.hp.eval_every < 0:
            self.progress.best_step = self.progress.step
            self.progress.best_weights = self.task.save_best()
            self._save_checkpoint()

    def _submit(self, ahead: ThreadPoolExecutor, step: int, micro: int):
        epoch, at = divmod(step, self.steps_per_epoch)
        return ahead.submit(self.task.prepare, epoch, at * self.hp.accumulation_steps + micro)

    def _set_lr(self, step: int) -> float:
        factor = lr_factor(step, self.total_steps, self.hp.warmup_proportion)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("peak_lr", self.hp.lr) * factor
        return self.hp.lr * factor

    def _backward(self, batch, lr: float) -> tuple[float, float]:
        """Add one micro-batch's gradient; return its share of the loss and its accuracy."""
        self.task.model.train()
        with autocast(self.device, self.precision):
            loss, accuracy = self.task.loss(batch)
        value = loss.item()
        if not math.isfinite(value):
            kept = f"the weights of step {self.progress.best_step}, best on dev, are kept"
            raise UserError(
                f"the loss is {value} at step {self.progress.step + 1}, lr {lr:.2g}, "
                f"{self.task.describe(batch)}; "
                f"stopped, {kept if self.progress.best_step > 0 else 'no weights were saved yet'}. "
                "Try a lower --lr, --precision fp32, or look at those rows"
            )
        self.scaler.scale(loss / self.hp.accumulation_steps).backward()
        return value / self.hp.accumulation_steps, accuracy.item()

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.task.model.parameters(), self.hp.max_grad_norm)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise UserError(f"the gradient is not finite at step {self.progress.step + 1}; try a lower --lr")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.skipped = 0 if torch.isfinite(norm) else self.progress.skipped + 1
        if self.progress.skipped > MAX_SKIPS:
            raise UserError(f"fp16: {MAX_SKIPS} updates in a row overflowed; use --precision bf16 or fp32")

    def _note(self, loss: float, accuracy: float, lr: float) -> None:
        step = self.progress.step
        self.log.add(loss, accuracy)
        if step % self.hp.log_every and step != self.total_steps:
            return
        mean_loss, mean_accuracy = self.log.line(step, lr)
        self.progress.history.append({"step": step, "loss": round(mean_loss, 5), "lr": lr})
        for name, value in (("loss", mean_loss), ("in_batch_accuracy", mean_accuracy), ("lr", lr)):
            self.board.add_scalar(f"train/{name}", value, step)

    def _evaluation_due(self) -> bool:
        every = self.hp.eval_every or self.steps_per_epoch
        return every > 0 and (self.progress.step % every == 0 or self.progress.step == self.total_steps)

    def _stopped_early(self) -> bool:
        return 0 < self.hp.early_stop <= self.progress.evaluations_without_gain

    def _evaluate(self, when: str) -> None:
        """Measure on dev; keep the weights when they are the best so far. Before training nothing is kept."""
        begun, progress = time.monotonic(), self.progress
        metrics = self.task.evaluate()
        value = metrics.get(
            self.task.main_metric, float(progress.step)
        )  # without a dev set the last is the best
        better = progress.step > 0 and value > progress.best
        if metrics:
            figures = "  ".join(f"{name} {figure:.4f}" for name, figure in metrics.items())
            say(
                f"dev {when}: {figures}  ({duration(time.monotonic() - begun)})"
                + ("  best so far" if better else "")
            )
            for name, figure in metrics.items():
                self.board.add_scalar(f"dev/{name}", figure, progress.step)
            progress.history.append({"step": progress.step, **metrics})
        if self.log is not None:
            self.log.pause(time.monotonic() - begun)
        if not progress.step:
            progress.untrained = value
            return
        progress.evaluations_without_gain = 0 if better else progress.evaluations_without_gain + 1
        if better:
            progress.best, progress.best_step = value, progress.step
            progress.best_weights = self.task.save_best()
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        """Write everything that the run needs to go on: the last weights, not the best ones."""
        state = {
            "stamp": self.stamp, "progress": vars(self.progress), "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
        }  # fmt: skip
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        with atomic_write(self.checkpoint, "wb") as file:
            torch.save(state, file)

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.checkpoint}: damaged; delete it to start from the beginning") from error
        if state["stamp"] != self.stamp:
            old = state["stamp"]
            different = [name for name in {**old, **self.stamp} if old.get(name) != self.stamp.get(name)]
            say(
                f"{self.checkpoint}: a checkpoint of other settings ({', '.join(different)}); "
                "starting from the beginning"
            )
            return
        kept = state["progress"]["best_weights"]
        if kept and kept != self.task.best_fingerprint():
            say(
                f"{self.checkpoint}: the best weights it speaks of are not there; starting from the beginning"
            )
            return
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.progress = Progress(**state["progress"])
        say(f"{self.checkpoint}: carrying on after step {self.progress.step} of {self.total_steps}")
