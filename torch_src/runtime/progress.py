"""Progress of a long loop: one live line on a terminal, log lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from torch_src.runtime import log as log_module
from torch_src.runtime.log import duration, log, rank

LINES_GROW = 20  # a log line after 1/20 of the time so far: tens of lines in an hour, a hundred in a day


def line_due(now: float, started: float, logged: float, seconds: float) -> bool:
    """Return whether a log line is due: `seconds` after the last one, later in a long run."""
    return now - logged >= max(seconds, (now - started) / LINES_GROW)


def live_line(total: int, unit: str, done: int = 0) -> "tqdm[Any] | None":
    """Return the live line of a loop, which log lines do not disturb; None without a terminal.

    Close it by close_live_line.
    """
    if not (sys.stdout.isatty() and sys.stderr.isatty()) or rank():
        return None
    sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # 0 in some containers
    width: dict[str, Any] = {"dynamic_ncols": True} if sized else {"ncols": 80, "nrows": 24}
    bar: tqdm[Any] = tqdm(total=total, initial=done, unit=f" {unit}", leave=False, **width)
    log_module.live_lines.append(bar)
    return bar


def close_live_line(bar: "tqdm[Any] | None") -> None:
    """Remove a live line from the terminal."""
    if bar is not None:
        if bar in log_module.live_lines:
            log_module.live_lines.remove(bar)
        bar.close()


class Progress:
    """Counts texts and, if any, tokens; reports rates and the remaining time every `log_every` seconds."""

    def __init__(
        self,
        total: int,
        log_every: float,
        verb: str = "encoded",
        unit: str = "passages",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.log_every, self.clock = total, log_every, clock
        self.verb, self.unit = verb, unit
        self.started = self.logged = clock()
        self.texts = self.tokens = 0
        self.cut: int | None = None  # truncated texts; None: not counted
        self.bar = live_line(total, unit)

    def add(self, texts: int, tokens: int = 0) -> None:
        """Count finished texts and their tokens."""
        self.texts, self.tokens = self.texts + texts, self.tokens + tokens
        now = self.clock()
        if self.bar is not None:
            self.bar.update(texts)
        elif line_due(now, self.started, self.logged, self.log_every):
            self.logged = now
            log(self._line())

    def add_truncated(self, texts: int) -> None:
        """Count truncated texts."""
        self.cut = (self.cut or 0) + texts

    def _line(self) -> str:
        seconds = max(self.clock() - self.started, 1e-9)
        left = (self.total - self.texts) * seconds / max(self.texts, 1)
        done = f"{self.texts:,}/{self.total:,} {self.unit} ({100 * self.texts / max(self.total, 1):.1f}%)"
        rates = f"{self.texts / seconds:,.0f} {self.unit}/s"
        if self.tokens:
            rates += f"  {self.tokens / seconds:,.0f} tokens/s"
        return f"{self.verb} {done}  {rates}  eta {duration(left)}"

    def close(self) -> None:
        """Log the totals and the share of truncated texts."""
        close_live_line(self.bar)
        self.bar = None
        if self.texts:
            seconds = self.clock() - self.started
            done = f"{self.verb} {self.texts:,} {self.unit} in {duration(seconds)}"
            cut = "" if self.cut is None else f"  {100 * self.cut / self.texts:.1f}% truncated"
            log(f"{done}  {self.texts / max(seconds, 1e-9):,.0f} {self.unit}/s{cut}")
