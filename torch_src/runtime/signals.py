"""Stop on SIGTERM or SIGINT after saving; a second signal ends the process at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch_src.runtime.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """In its `with` block, `received` is the number of the received signal, 0 before one arrives."""

    def __init__(self) -> None:
        self.received, self.immediate = 0, False
        self.previous: dict[signal.Signals, Any] = {}  # the handlers outside the block

    def __enter__(self) -> "StopSignals":
        try:
            self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        except ValueError:
            self.previous = {}  # not the main thread: signals cannot be handled here
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._restore()  # a second signal ends the process
        self.received = number
        if self.immediate:
            raise self.stopped("before the end of an evaluation")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise Stopped as soon as a signal arrives in this block, which has no work to save."""
        self.immediate = True
        try:
            yield
        finally:
            self.immediate = False

    def stopped(self, where: str) -> Stopped:
        """Return the error that ends the run."""
        name = signal.Signals(self.received).name
        message = f"stopped by {name} {where}; the same command, without --force, resumes"
        return Stopped(self.received, message)
