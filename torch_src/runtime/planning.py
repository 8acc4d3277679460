"""Estimates of time, memory and disk (--plan), from a short probe of the same code on this machine."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_src.runtime.devices import USABLE_FRACTION, free_gpu_memory, free_memory, peak_memory_gb
from torch_src.runtime.log import duration, log

PROBED_TEXTS = 96  # texts or pairs of the measured forward pass
UNPROBED_GB = 0.25  # memory that a long inference keeps but a short probe does not show (measured)


@dataclass
class Plan:
    """Estimated seconds of each part of a run, and its peak memory and disk space in 10^9 bytes."""

    program: str
    parts: list[tuple[str, float]] = field(default_factory=list)
    ram_gb: float = 0.0
    gpu_gb: float = 0.0
    disk_gb: float = 0.0
    advice: str = ""  # how to make it fit
    too_large: bool = False  # the probe ran out of memory, and smaller settings were measured

    def add(self, what: str, seconds: float) -> None:
        self.parts.append((what, seconds))

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    def lines(self, folder: str, device: torch.device) -> list[str]:
        """Return the lines to log; `folder` is where the results will be written."""
        lines = [f"plan of {self.program}: estimates from a short probe on this machine"]
        lines += [f"  {what:58} {duration(seconds):>9}" for what, seconds in self.parts]
        lines.append(f"  {'total time':58} {duration(self.seconds):>9}")
        resources = [("memory", self.ram_gb, (free_memory() + _own_memory()) / 1e9)]
        if device.type == "cuda":
            resources.append(("GPU memory", self.gpu_gb, free_gpu_memory(device) / 1e9))
        resources.append(("disk", self.disk_gb, free_disk(folder) / 1e9))
        exceeded = [name for name, needed, free in resources if needed > free]
        exceeded += ["these settings"] if self.too_large and not exceeded else []
        lines += [f"  {name:12} {needed:8.2f} GB of {free:,.1f} GB free" for name, needed, free in resources]
        if not exceeded:
            return [*lines, "  it fits"]
        advice = f": {self.advice}" if self.advice else ""
        return [*lines, f"  IT DOES NOT FIT ({', '.join(exceeded)}){advice}"]

    def report(self, folder: str, device: torch.device) -> None:
        for line in self.lines(folder, device):
            log(line)


def free_disk(folder: str | Path) -> int:
    """Return the free bytes of the disk that holds `folder`, which need not exist."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _own_memory() -> int:
    """Return the bytes of memory that this process already uses."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that work() takes, including queued CUDA work."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds_per_text(work: Callable[[list[Any]], object], texts: list[Any]) -> float:
    """Return the seconds per text of work(texts), after a warm-up."""
    work(texts[: max(1, len(texts) // 8)])
    return seconds_of(lambda: work(texts)) / len(texts)


def evenly_spaced(count: int, wanted: int = PROBED_TEXTS) -> list[int]:
    """Return `wanted` evenly spaced row numbers of 0..count-1, or all of them."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int)).tolist()


def memory_gb(device: torch.device) -> tuple[float, float]:
    """Return the peaks of (resident memory, GPU memory) in 10^9 bytes."""
    gpu = peak_memory_gb(device) if device.type == "cuda" else 0.0
    return peak_memory_gb(torch.device("cpu")), gpu


def checkpoint_gb(saved: int, trained: int, averaged: bool) -> float:
    """Return the disk space of a training in 10^9 bytes: weights, two checkpoints, one being written.

    saved, trained: bytes of all weights and of those that a checkpoint holds with their moments.
    """
    return (saved + 3 * trained * (4 if averaged else 3)) / 1e9


def fitting_fraction(base_gb: float, peak_gb: float, free_gb: float) -> float:
    """Return the fraction, at most 1, of a forward pass whose peak stays within `free_gb`.

    The whole needs `peak_gb`; memory above `base_gb` is assumed to be proportional to its size.
    """
    return min(1.0, max(0.0, USABLE_FRACTION * free_gb - base_gb) / max(1e-9, peak_gb - base_gb))
