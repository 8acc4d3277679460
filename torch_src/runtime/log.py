"""Log lines of the programs: `14:02:31 line` on stdout, warnings and errors on stderr with their level."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class LiveLine(Protocol):
    """A line at the end of the terminal that is redrawn, such as tqdm's."""

    def clear(self) -> Any: ...
    def refresh(self) -> Any: ...


live_lines: list[LiveLine] = []  # of runtime/progress.py; log lines are printed above them

logged_once: set[str] = set()
_silent: ContextVar[bool] = ContextVar("silent", default=False)


def rank() -> int:
    """Return the rank of this process under torchrun, else 0."""
    return int(os.getenv("RANK", "0"))


@contextmanager
def silent() -> Iterator[None]:
    """Log only warnings and errors in this block, in this thread: what a library prints."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def log(line: str) -> None:
    if not _silent.get():
        _print(line)


def log_once(line: str) -> None:
    """Log a line unless this process has logged it before: several parts share it."""
    if line not in logged_once and not _silent.get():
        logged_once.add(line)
        log(line)


def warn(line: str) -> None:
    _print(f"WARNING {line}", error_stream=True)


def error(line: str) -> None:
    end_live_lines()
    _print(f"ERROR {line}", error_stream=True)


def end_live_lines() -> None:
    """Remove the live lines for good: the program ends."""
    while live_lines:
        live_lines.pop().clear()


def escape_unprintable() -> None:
    """Print characters that the terminal's encoding lacks (LC_ALL=C, gbk) as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _print(line: str, error_stream: bool = False) -> None:
    prefix = time.strftime("%H:%M:%S ") + (f"[rank {rank()}] " if rank() else "")
    for live in live_lines:
        live.clear()
    # flushed, because buffered lines are lost when the process is killed; in one piece, as threads log, too
    text = prefix + " ".join(line.splitlines()) + "\n"
    print(text, end="", file=sys.stderr if error_stream else sys.stdout, flush=True)
    for live in live_lines:
        live.refresh()


def duration(seconds: float) -> str:
    """Return `1h52m`, `3m07s` or `4.2s`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
