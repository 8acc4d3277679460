"""The training loop of both models and the interface of a task: the data and the loss that it trains on."""

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from torch_src.runtime.devices import peak_memory_gb
from torch_src.runtime.errors import UserError, first_line, is_out_of_memory
from torch_src.runtime.log import duration, log, warn
from torch_src.runtime.prefetch import one_ahead, prepared_by_workers
from torch_src.runtime.progress import close_live_line, line_due, live_line
from torch_src.runtime.signals import StopSignals
from torch_src.runtime.stamps import differences
from torch_src.training.checkpoints import (
    load_checkpoint,
    load_trained_state,
    save_checkpoint,
    trained_state,
)
from torch_src.training.distributed import Processes
from torch_src.training.grad_cache import ChunkedForward, Chunking
from torch_src.training.optimizer import Ema, lr_factor, parameter_groups

MAIN_METRIC = "MRR@10"  # decides which weights are the best
LOG_SECONDS = 30  # without a line, after which the next update logs one
MAX_SKIPS = 50  # fp16 updates skipped in a row that end the run: its loss scale will not recover


@dataclass
class Output:
    """A forward pass. The losses and accuracies of all processes sum to those of the batch."""

    loss: Tensor  # scalar
    accuracy: Tensor  # scalar, without a graph
    deferred: list[ChunkedForward]  # to back-propagate after the loss


class TrainingTask(ABC):
    """Data, loss and dev evaluation of one model: the interface for Trainer and TrainingStage."""

    model: nn.Module
    # (epoch, step), both from 0, to a batch read and tokenized: called in a thread or copied to workers
    make_batch: Callable[[tuple[int, int]], Any]
    chunking: Chunking
    batches_per_epoch: int
    unit = "queries"  # of the rate in the log
    units_per_batch = 1
    texts_per_batch = 1  # texts or pairs in the forward passes of a batch
    max_batch_tokens = 1  # padded tokens whose activations a batch of this process needs at once
    accuracy_name = "accuracy"  # in the log
    peak_lr: dict[str, float] = {}  # parameter name -> peak learning rate that replaces the common one

    @abstractmethod
    def forward(self, batch: Any) -> Output:
        """Return loss and accuracy of a batch."""

    @abstractmethod
    def describe(self, batch: Any) -> str:
        """Return which rows of which file are in the batch, for an error message."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return the dev metrics, equal in all processes; empty without a dev set."""

    @abstractmethod
    def save(self) -> str:
        """Write the weights; return their checksum."""

    @abstractmethod
    def saved_checksum(self) -> str | None:
        """Return the checksum of the weights on disk, None when there are none."""

    # Called by TrainingStage.

    def inputs(self) -> dict[str, Any]:
        """Return what decides the weights besides the common settings and files; part of the stamp."""
        return {}

    def load(self) -> None:  # noqa: B027 (these methods need not be overridden)
        """Load data, dev set and model."""

    def probe(self, texts: int) -> tuple[Tensor, int]:
        """Return the outputs of a forward pass of texts or pairs of the greatest length, and its tokens."""
        raise NotImplementedError

    def shrink_batches(self, units: int) -> float:
        """Make batches of at most `units` queries, groups or pairs; return the fraction of a batch."""
        raise NotImplementedError

    def evaluation_seconds(self) -> float:
        """Return a measured estimate of one dev evaluation."""
        return 0.0

    def finish(self, progress: "TrainingProgress") -> None:  # noqa: B027
        """Log the quality of the finished run; warn when it is poor."""

    def restore_files(self, weights: str) -> None:  # noqa: B027
        """Rewrite missing or damaged files beside finished weights with this checksum."""


@dataclass(frozen=True)
class TrainerOptions:
    """Settings of the loop."""

    epochs: int
    lr: float  # peak learning rate
    warmup_proportion: float = 0.1  # share of the updates
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulation_steps: int = 1  # batches in an update
    max_steps: int = 0  # updates; 0: all epochs
    ema_decay: float = 0.0  # of averaged weights; 0: none
    eval_every: int = 0  # updates between evaluations; 0: an epoch; -1: never
    early_stop: int = 0  # patience in evaluations; 0: no early stop
    save_every_minutes: float = 0.0  # between checkpoints; 0: only at epochs and evaluations
    log_every: int = 20  # updates between log lines
    workers: int = 0  # processes that tokenize ahead; 0: a thread


@dataclass
class TrainingProgress:
    """State of the run, saved in every checkpoint."""

    step: int = 0  # updates done
    evaluated: int = -1  # step of the last dev evaluation
    best: float = -1.0  # main metric of the saved weights
    best_step: int = -1
    best_weights: str = ""  # checksum of the saved weights
    untrained: float = -1.0  # main metric before the first update
    evaluations_without_gain: int = 0
    processes: int = 1  # number of distributed processes
    skipped: int = 0  # fp16 updates skipped in a row
    skipped_total: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # {step, loss, ...} and {step, metrics...}


class Schedule:
    """The updates of a run, their learning rates, and when it evaluates."""

    def __init__(self, options: TrainerOptions, batches_per_epoch: int):
        if options.accumulation_steps > batches_per_epoch:
            raise UserError(
                f"--accumulation_steps {options.accumulation_steps}: an epoch has only "
                f"{batches_per_epoch} batches; lower it or the batch size"
            )
        self.steps_per_epoch = batches_per_epoch // options.accumulation_steps
        steps = options.epochs * self.steps_per_epoch
        self.total_steps = min(steps, options.max_steps) if options.max_steps else steps
        self.eval_every = options.eval_every or self.steps_per_epoch
        self.warmup_proportion = options.warmup_proportion

    def lr_factor(self, step: int) -> float:
        """Return the factor on the peak learning rate of update `step`, from 0."""
        return lr_factor(step, self.total_steps, self.warmup_proportion)

    @property
    def evaluations(self) -> int:
        """The number of dev evaluations, with the one before the first update."""
        return 0 if self.eval_every < 0 else 1 + math.ceil(self.total_steps / self.eval_every)

    def evaluation_due(self, progress: TrainingProgress) -> bool:
        """Return whether the run evaluates after this step and has not done so."""
        due = progress.step == self.total_steps or progress.step % self.eval_every == 0
        return self.eval_every > 0 and due and progress.evaluated != progress.step


@dataclass
class Update:
    """Figures of one update over all processes."""

    loss: float
    accuracy: float
    lr: float
    seconds: float
    stop: bool  # whether a process has received a stop signal


class Trainer:
    """Trains a task: schedule, precision, accumulation, evaluation, checkpoints, log, stop signals."""

    def __init__(
        self,
        task: TrainingTask,
        options: TrainerOptions,
        processes: Processes,
        precision: str,
        checkpoint: Path,
        stamp: dict[str, Any],
    ):
        self.task, self.options, self.processes = task, options, processes
        self.checkpoint, self.stamp = checkpoint, stamp
        self.schedule = Schedule(options, task.batches_per_epoch)
        groups = parameter_groups(task.model, options.weight_decay, task.peak_lr)
        # One kernel for all weights. On a CPU it would round differently from earlier runs.
        self.fused = True if processes.device.type == "cuda" else None
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=self.fused)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=precision == "fp16")
        self.ema = Ema(task.model, options.ema_decay) if options.ema_decay else None
        self.progress = TrainingProgress(processes=processes.world)
        self.signals = StopSignals()
        self.saved_step, self.saved_at = -1, time.monotonic()  # of the last checkpoint

    def run(self) -> TrainingProgress:
        """Train to the last update, evaluate, save the best weights; return the final progress.

        After a stop signal: save a checkpoint and raise Stopped. The same run then resumes from it.
        """
        options, total = self.options, self.schedule.total_steps
        self._resume()
        self.log = TrainingLog(self)
        with closing(self.log), self.signals, closing(self._batches()) as batches:
            if self.schedule.evaluation_due(self.progress):
                self.evaluate()
            for step in range(self.progress.step, total):
                if 0 < options.early_stop <= self.progress.evaluations_without_gain:
                    self.log.line(
                        f"early stop: {options.early_stop} evaluations without a better {MAIN_METRIC}"
                    )
                    break
                with out_of_memory_named(self, step):
                    update = self.update(step, islice(batches, options.accumulation_steps))
                self.progress.step = step + 1
                self.log.update(update)
                if update.stop or self._checkpoint_due():
                    self._save_checkpoint()
                if update.stop:
                    # the signal may have reached another process only
                    self.signals.received = self.signals.received or signal.SIGTERM
                    raise self.signals.stopped(f"after step {step + 1} of {total}")
                if self.schedule.evaluation_due(self.progress):
                    self.evaluate()
        if options.eval_every < 0:
            self._save_weights()
            self._save_checkpoint()
        return self.progress

    def prepared(self, places: Iterable[tuple[int, int]]) -> Iterator[Any]:
        """Yield the batches of these (epoch, step), in order, prepared ahead."""
        if self.options.workers:
            return prepared_by_workers(self.task.make_batch, places, self.options.workers)
        return one_ahead(self.task.make_batch, places)

    def _batches(self) -> Generator[Any, None, None]:
        """Yield the batches from the current step on."""
        count, schedule = self.options.accumulation_steps, self.schedule
        steps = range(self.progress.step, schedule.total_steps)
        places = (divmod(step, schedule.steps_per_epoch) for step in steps)
        yield from self.prepared(
            (epoch, at * count + micro) for epoch, at in places for micro in range(count)
        )

    def update(self, step: int, batches: Iterable[Any]) -> Update:
        """Make one update from `accumulation_steps` batches.

        A GPU works ahead of this process, which waits for it once, before the weights change; and
        transformers reads each padded attention mask, one more wait per forward pass.
        """
        begun, count, used, sums = time.perf_counter(), self.options.accumulation_steps, [], []
        lr = self._set_lr(step)
        self.task.model.train()
        for batch in batches:
            used.append(batch)
            out = self.task.forward(batch)
            self.scaler.scale(out.loss / count).backward()
            for chunked in out.deferred:
                chunked.backward()
            sums += [out.loss.detach().double(), out.accuracy.double()]
        self.processes.all_reduce_gradients(self.task.model)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.task.model.parameters(), self.options.max_grad_norm)
        sums.append(norm.new_full((), float(self.signals.received), dtype=torch.float64))
        summed = self.processes.all_reduce_sum_(torch.stack(sums))
        *figures, stop, norm_value = torch.cat([summed, norm.double().view(1)]).tolist()
        losses, accuracies = figures[::2], figures[1::2]
        for batch, loss in zip(used, losses, strict=True):
            if not math.isfinite(loss):
                raise not_finite(self, f"the loss is {loss}", [batch], step, lr)
        finite = math.isfinite(norm_value)
        if not finite and not self.scaler.is_enabled():
            raise not_finite(self, "the gradient is not finite", used, step, lr)
        if finite:  # in fp16 a gradient may overflow: the scaler lowers its scale, the weights stay
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and finite:
            self.ema.update()
        self.progress.skipped = 0 if finite else self.progress.skipped + 1
        self.progress.skipped_total += not finite
        if self.progress.skipped >= MAX_SKIPS:
            raise not_finite(self, f"fp16: {MAX_SKIPS} updates in a row overflowed, the last", used, step, lr)
        loss, accuracy = (sum(values) / count for values in (losses, accuracies))
        return Update(loss, accuracy, lr, time.perf_counter() - begun, stop > 0)

    def probe(self, updates: int) -> list[float]:
        """Make some updates without evaluating or writing anything; return the seconds of each."""
        count = self.options.accumulation_steps
        places = ((0, at % self.task.batches_per_epoch) for at in range(updates * count))
        batches = self.prepared(places)
        return [self.update(step, islice(batches, count)).seconds for step in range(updates)]

    def evaluate(self) -> None:
        """Evaluate on dev; after the first update save the weights when they are the best so far."""
        begun, progress = time.monotonic(), self.progress
        self.log.show("dev evaluation")
        with self.signals.interruptible(), self._averaged_weights():
            metrics = self.task.evaluate()
        self.log.show("training")
        value = metrics.get(
            MAIN_METRIC, float(progress.step)
        )  # without a dev set the last weights are the best
        better = progress.step > 0 and value > progress.best
        if metrics:
            self.log.evaluation(metrics, time.monotonic() - begun, better)
        progress.evaluated = progress.step
        if not progress.step:
            progress.untrained = value
            return
        progress.evaluations_without_gain = 0 if better else progress.evaluations_without_gain + 1
        if better:
            progress.best = value
            self._save_weights()
        self._save_checkpoint()

    def _checkpoint_due(self) -> bool:
        """Return whether the interval has passed, an epoch has ended or an evaluation follows."""
        seconds = 60 * self.options.save_every_minutes
        late = seconds > 0 and time.monotonic() - self.saved_at >= seconds
        return (
            late
            or self.progress.step % self.schedule.steps_per_epoch == 0
            or self.schedule.evaluation_due(self.progress)
        )

    def _set_lr(self, step: int) -> float:
        factor = self.schedule.lr_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("peak_lr", self.options.lr) * factor
        return self.options.lr * factor

    def _averaged_weights(self) -> AbstractContextManager[None]:
        return self.ema.applied() if self.ema is not None else nullcontext()

    def _save_weights(self) -> None:
        self.progress.best_step = self.progress.step
        if self.processes.is_first:
            with self._averaged_weights():
                self.progress.best_weights = self.task.save()

    def _save_checkpoint(self) -> None:
        """Save all that a resumed run needs: the last weights, not the best ones.

        No state of random generators: every draw is a function of seed, step and position in the batch.
        """
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        if self.processes.is_first:
            state = {
                "stamp": self.stamp,
                "progress": asdict(self.progress),
                "model": trained_state(self.task.model),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.shadow if self.ema is not None else {},
                "chunk": {"texts": self.task.chunking.texts, "tokens": self.task.chunking.tokens},
            }
            save_checkpoint(self.checkpoint, state)

    def _resume(self) -> None:
        """Continue from the checkpoint when it belongs to this run."""
        state = load_checkpoint(self.checkpoint)
        if state is not None and (reason := reason_to_restart(self, state)):
            if self.processes.is_first:
                log(f"{self.checkpoint}: {reason}; starting from the beginning")
            state = None
        step = state["progress"]["step"] if state else -1
        self.processes.require_same(
            step,
            f"{self.checkpoint}: step {step} here, another one in the first process; "
            "--output_dir must be one folder that all machines share",
        )
        if state is None:
            return
        load_trained_state(self.task.model, state["model"])
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = self.fused  # the device may be another one
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load(state["ema"])
        self.progress = TrainingProgress(**state["progress"])
        self.saved_step, before = self.progress.step, self.progress.processes
        if before != self.processes.world:
            warn(
                f"{self.processes.world} processes now, {before} before: each draws its own dropout, so the "
                "weights will differ from those of a run with a constant number"
            )
            self.progress.processes = self.processes.world
        # free memory may differ now, and the dropout of a text depends on its chunk
        chunking = replace(self.task.chunking, **state["chunk"])
        if chunking != self.task.chunking and self.processes.is_first:
            log(f"{self.checkpoint}: keeping the chunks of the checkpoint: {chunking}")
        self.task.chunking = chunking
        if self.processes.is_first:
            log(f"{self.checkpoint}: resuming after step {self.progress.step} of {self.schedule.total_steps}")


def reason_to_restart(trainer: Trainer, state: dict[str, Any]) -> str | None:
    """Return why the run cannot resume from this checkpoint, None when it can."""
    if state["stamp"] != trainer.stamp:
        return f"its settings differ ({'; '.join(differences(state['stamp'], trainer.stamp))})"
    progress, on_disk = TrainingProgress(**state["progress"]), trainer.task.saved_checksum()
    # A run killed between saving the best weights and the checkpoint that follows repeats the evaluation
    # and saves the same weights again.
    repeats = on_disk is not None and trainer.schedule.evaluation_due(progress)
    if progress.best_weights and progress.best_weights != on_disk and not repeats:
        return "the best weights of its run are missing or replaced"
    return None


@contextmanager
def out_of_memory_named(trainer: Trainer, step: int) -> Iterator[None]:
    """Turn out of memory in update `step` into a UserError that names knobs."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        chunking, resumes = trainer.task.chunking, "starts over"
        if trainer.saved_step > 0:
            resumes = f"resumes after step {trainer.saved_step}"
        smaller = chunking.scaled(0.5, trainer.task.texts_per_batch).options
        raise UserError(
            f"out of memory at step {step + 1} ({first_line(error).split('. ')[0]}; {chunking}); free "
            f"memory and repeat the command, which {resumes}; or start over with {smaller}"
        ) from error


def not_finite(trainer: Trainer, what: str, batches: list[Any], step: int, lr: float) -> UserError:
    """Return the error of a loss or gradient of these batches that is not finite."""
    rows = "; ".join(map(trainer.task.describe, batches))
    kept = []
    if trainer.progress.best_step > 0:
        kept.append(f"the best weights (step {trainer.progress.best_step}) are saved")
    if trainer.saved_step > 0:
        kept.append(f"the last checkpoint is of step {trainer.saved_step}")
    saved = " and ".join(kept) or "no weights are saved"
    return UserError(
        f"{what} at step {step + 1}, lr {lr:.2g}, {rows}; {saved}; "
        "try a lower --lr or --precision fp32, or check those rows"
    )


class TrainingLog:
    """Log lines, tensorboard curves and history of a run; the first process writes them."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.first_step, self.begun = trainer, trainer.progress.step, time.monotonic()
        self.logged = self.begun
        self.recent: list[Update] = []  # since the last point of the curves
        self.board: SummaryWriter | None = None
        self.bar = live_line(trainer.schedule.total_steps, "updates", self.first_step)
        if trainer.processes.is_first:
            folder = trainer.checkpoint.parent / "tensorboard" / trainer.checkpoint.stem.partition("_")[0]
            # a killed run may have written points after its checkpoint, which the resumed run writes again
            self.board = SummaryWriter(folder, purge_step=self.first_step)
            for entry in trainer.progress.history:
                if entry["step"] == self.first_step:  # purged as well
                    self._plot("train" if "loss" in entry else "dev", entry)

    def update(self, update: Update) -> None:
        """Log the means since the last point, every `log_every` updates and after the last one.

        Slow updates log lines in between, which add nothing to curves and history: those do not depend on
        the speed of the machine.
        """
        trainer, task, options = self.trainer, self.trainer.task, self.trainer.options
        step, total = trainer.progress.step, trainer.schedule.total_steps
        self.recent.append(update)
        if self.bar is not None:
            self.bar.update()
        is_point, now = step % options.log_every == 0 or step == total, time.monotonic()
        if not is_point and (self.bar is not None or not line_due(now, self.begun, self.logged, LOG_SECONDS)):
            return
        count = len(self.recent)
        loss = sum(each.loss for each in self.recent) / count
        accuracy = sum(each.accuracy for each in self.recent) / count
        seconds = max(sum(each.seconds for each in self.recent), 1e-9)
        rate = count * options.accumulation_steps * task.units_per_batch / seconds
        left = (now - self.begun) / (step - self.first_step) * (total - step)
        skipped = f"  skipped {trainer.progress.skipped_total}" if trainer.progress.skipped_total else ""
        epoch = (step - 1) // trainer.schedule.steps_per_epoch + 1
        epochs = f"epoch {epoch}/{options.epochs}"
        figures = f"loss {loss:.3f}  {task.accuracy_name} acc {accuracy:.3f}"
        if self.bar is not None and step != total:
            self.bar.set_postfix_str(f"{epochs}  {figures}{skipped}")
        else:
            self.line(
                f"{epochs}  step {step}/{total} ({100 * step / total:.1f}%)  {figures}  "
                f"lr {update.lr:.1e}  {rate:.1f} {task.unit}/s  "
                f"mem {peak_memory_gb(trainer.processes.device):.1f} GB  eta {duration(left)}{skipped}"
            )
        if not is_point:
            return
        name = f"{task.accuracy_name.replace('-', '_')}_accuracy"
        self._plot("train", {"loss": loss, name: accuracy, "lr": update.lr})
        rounded = {"loss": round(loss, 5), name: round(accuracy, 5), "lr": update.lr}
        trainer.progress.history.append({"step": step, **rounded})
        self.recent = []

    def show(self, doing: str) -> None:
        """Name what happens now in the live line."""
        if self.bar is not None:
            self.bar.set_description(doing)

    def evaluation(self, metrics: dict[str, float], seconds: float, better: bool) -> None:
        """Log the metrics of a dev evaluation."""
        step = self.trainer.progress.step
        when = f"step {step}" if step else "before training"
        figures = "  ".join(f"{name} {figure:.4f}" for name, figure in metrics.items())
        untrained, kept = self.trainer.progress.untrained, "best so far"
        if metrics.get(MAIN_METRIC, math.inf) <= untrained:
            kept = f"saved; not better than before training ({untrained:.4f})"
        self.line(f"dev {when}: {figures}  ({duration(seconds)})" + (f"  {kept}" if better else ""))
        self._plot("dev", metrics)
        self.trainer.progress.history.append({"step": step, **metrics})

    def _plot(self, group: str, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                if name != "step":
                    self.board.add_scalar(f"{group}/{name}", value, self.trainer.progress.step)

    def line(self, line: str) -> None:
        """Log a line once for all processes."""
        self.logged = time.monotonic()
        if self.trainer.processes.is_first:
            log(line)

    def close(self) -> None:
        """Write the last curves; remove the live line."""
        close_live_line(self.bar)
        if self.board is not None:
            self.board.close()
