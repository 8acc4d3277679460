"""Progress of a long loop: a bar on a terminal, log lines elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from torch_src.runtime.log import duration, log


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
        self.texts = self.tokens = self.cut = 0
        self.bar = tqdm(total=total, unit=f" {unit}") if sys.stderr.isatty() else None

    def add(self, texts: int, tokens: int = 0) -> None:
        """Count finished texts and their tokens."""
        self.texts, self.tokens = self.texts + texts, self.tokens + tokens
        if self.bar is not None:
            self.bar.update(texts)
        elif self.clock() - self.logged >= self.log_every:
            self.logged = self.clock()
            log(self._line())

    def add_truncated(self, texts: int) -> None:
        """Count truncated texts."""
        self.cut += texts

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
        if self.bar is not None:
            self.bar.close()
        if self.texts:
            seconds = self.clock() - self.started
            done = f"{self.verb} {self.texts:,} {self.unit} in {duration(seconds)}"
            cut = f"  {100 * self.cut / self.texts:.1f}% truncated" if self.tokens else ""
            log(f"{done}  {self.texts / max(seconds, 1e-9):,.0f} {self.unit}/s{cut}")
