"""SIGTERM and SIGINT ask a run to stop at the next good moment; a second one ends it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from torch_src.runtime.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While in its `with` block, `asked` is the number of the signal that came, 0 before one has."""

    def __init__(self):
        self.asked, self.at_once, self.before = 0, False, {}

    def __enter__(self) -> "StopSignals":
        try:
            self.before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        except ValueError:
            self.before = {}  # not the main thread: whoever runs us there stops us in his own way
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _frame) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)  # the next one is not for us
        self.asked = number
        if self.at_once:
            raise self.stopped("before the end of an evaluation")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal within this block raises Stopped at once: nothing would be lost."""
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def stopped(self, where: str) -> Stopped:
        """Return what is raised to end the run."""
        name = signal.Signals(self.asked).name
        return Stopped(
            self.asked, f"stopped by {name} {where}; the same command carries on from here (without --force)"
        )
