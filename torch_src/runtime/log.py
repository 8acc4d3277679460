"""Log lines of the programs."""

import os


def rank() -> int:
    """Return the number of this process among those that torchrun started; 0 for a single one."""
    return int(os.getenv("RANK", "0"))


def log(line: str) -> None:
    """Print one log line at once: under nohup a line kept in a buffer is a line lost when the run
    is killed. Processes but the first put their number before it.
    """
    print(f"[rank {rank()}] {line}" if rank() else line, flush=True)


def warn(line: str) -> None:
    """Print one warning; the word stands first so that `grep WARNING train.log` finds all of them."""
    log(f"WARNING: {line}")


def duration(seconds: float) -> str:
    """`1h52m`, `3m07s` or `4.2s`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
