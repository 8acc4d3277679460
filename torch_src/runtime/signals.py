"""SIGTERM and SIGINT ask a run to stop when it has saved its work; a second signal ends it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch_src.runtime.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """In its `with` block, `asked` is the number of the signal that was received, 0 before."""

    def __init__(self) -> None:
        self.asked, self.at_once = 0, False
        self.before: dict[signal.Signals, Any] = {}  # the handlers outside the block

    def __enter__(self) -> "StopSignals":
        try:
            self.before = {number: signal.signal(number, self._received) for number in SIGNALS}
        except ValueError:
            self.before = {}  # not the main thread: signals cannot be handled here
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        self._restore()  # a second signal ends the process
        self.asked = number
        if self.at_once:
            raise self.stopped("before the end of an evaluation")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise Stopped at once on a signal within this block, where no work would be lost."""
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def stopped(self, where: str) -> Stopped:
        """Return the error that ends the run."""
        name = signal.Signals(self.asked).name
        return Stopped(self.asked, f"stopped by {name} {where}; the same command resumes (without --force)")
