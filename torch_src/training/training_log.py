"""The log lines of a training run."""

import time

from torch_src.runtime.devices import peak_memory_gb
from torch_src.runtime.log import duration


class Log:
    """Means over the updates since the last line, and the line itself."""

    def __init__(self, trainer):
        self.trainer, self.first_step, self.begun = trainer, trainer.progress.step, time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self.loss = self.accuracy = 0.0
        self.count, self.since = 0, time.monotonic()

    def pause(self, seconds: float) -> None:
        """Leave an evaluation out of the rate."""
        self.since += seconds

    def add(self, loss: float, accuracy: float) -> None:
        self.loss, self.accuracy, self.count = self.loss + loss, self.accuracy + accuracy, self.count + 1

    def line(self, step: int, lr: float) -> tuple[float, float]:
        """Print one line; return the mean loss and accuracy since the last one."""
        trainer, task, hp, now = self.trainer, self.trainer.task, self.trainer.hp, time.monotonic()
        loss, accuracy = self.loss / self.count, self.accuracy / self.count
        rate = self.count * task.queries_per_step * hp.accumulation_steps / max(now - self.since, 1e-9)
        left = (now - self.begun) / (step - self.first_step) * (trainer.total_steps - step)
        epoch = (step - 1) // trainer.steps_per_epoch + 1
        skipped = f"  skipped {trainer.progress.skipped_in_all}" if trainer.progress.skipped_in_all else ""
        trainer.say(
            f"epoch {epoch}/{hp.epoch}  step {step}/{trainer.total_steps} "
            f"({100 * step / trainer.total_steps:.1f}%)  loss {loss:.3f}  in-batch acc {accuracy:.3f}  "
            f"lr {lr:.1e}  {rate:.1f} {task.unit}/s  mem {peak_memory_gb(trainer.device):.1f} GB  "
            f"eta {duration(left)}{skipped}"
        )
        self._clear()
        return loss, accuracy
