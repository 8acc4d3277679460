"""How gpu.py runs its sections: a process for each with a time limit, measured calls, profiles, a table."""

import gc
import json
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import torch

from script.bench.common import Figures
from script.bench.synthetic import write_base_model
from torch_src.runtime.devices import choose_device, choose_precision, peak_memory_gb, set_threads
from torch_src.runtime.errors import first_line, is_out_of_memory
from torch_src.runtime.log import log

Result = TypeVar("Result")

OURS, PEER, PART = (
    "ours",
    "peer",
    "part",
)  # the side of a measurement; PART: neither, e.g. the tokenizer alone
PROFILED_OPS = 25
BUSY_SECONDS = 0.1  # between two readings of the GPU's utilization


@dataclass(frozen=True)
class Sizes:
    """What the sections measure. `gpu.py --tiny` makes all of it small."""

    hidden: int = 768
    layers: int = 12
    dropout: float = 0.1
    matmul: int = 8192  # rows and columns
    copy_bytes: int = 4 << 30
    train_queries: int = 512  # in an update, each with a positive and a hard negative
    updates: int = 3  # timed, after one warm-up
    # (texts, tokens) of a forward pass; the first is the default
    chunks: tuple[tuple[int, int], ...] = ((-1, 0), (64, 16384), (256, 65536))
    peer_chunks: tuple[int, ...] = (64, 128)  # texts
    texts: int = 65536  # to encode
    tokens: tuple[int, ...] = (0, 32768, 65536)  # padded, in a forward pass of ours; 0: the default
    block_rows: int = 16384  # of encoded vectors
    pairs: int = 65536  # to re-rank
    peer_batches: tuple[int, ...] = (64, 128, 256)
    rows: int = 8_096_668  # to search
    queries: tuple[int, ...] = (2000, 86395)
    queries_at_once: int = 2000
    topk: tuple[int, ...] = (50, 200)  # for each number of queries: a run, and a run to mine negatives from
    index: str = "IVF4096,SQfp16"
    index_rows: int = 1_000_000


TINY = Sizes(
    hidden=64, layers=2, dropout=0.0, matmul=128, copy_bytes=1 << 16, train_queries=4, updates=1,
    chunks=((-1, 0), (2, 0)), peer_chunks=(2,), texts=24, tokens=(0,), block_rows=8, pairs=12,
    peer_batches=(8,),
    rows=4000, queries=(8, 24), queries_at_once=8, topk=(10, 20), index="IVF4,SQfp16",
    index_rows=2000,
)  # fmt: skip


@dataclass
class Section:
    """A section of the benchmark."""

    run: Callable[["Bench"], None]
    weight: int  # its part of the time, relative to the other sections
    least_seconds: int  # skipped when it has less


class Bench:
    """The measurements of one section, in its process; every figure is printed and sent at once."""

    def __init__(
        self,
        name: str,
        device: str,
        sizes: Sizes,
        folder: Path,
        end: float,
        profiling: bool,
        pipe: Connection,
    ):
        self.name, self.sizes, self.folder, self.end = name, sizes, folder, end
        self.profiling, self.pipe = profiling, pipe
        set_threads(0)
        self.device = choose_device(device)
        self.on_gpu = self.device.type == "cuda"
        self.precision = choose_precision("auto", self.device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]
        card = torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"
        self.send({"card": card, "precision": self.precision})

    def send(self, message: dict[str, Any]) -> None:
        self.pipe.send_bytes(json.dumps(message).encode())

    def left(self) -> float:
        """Return the seconds that this section has left."""
        return self.end - time.monotonic()

    def record(self, name: str, side: str, figures: Figures) -> None:
        """Print and keep one measurement. `figures`: seconds, and with them count and unit, flops, ..."""
        if "count" in figures:
            figures["per_s"] = figures["count"] / figures["seconds"]
        if "flops" in figures:
            figures["tflops"] = figures.pop("flops") / figures["seconds"] / 1e12
            figures["share_of_ceiling"] = figures["tflops"] / self.matmul_tflops
        rounded = {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in figures.items()
        }
        log(f"{self.name}  {name}  " + "  ".join(f"{key} {value}" for key, value in rounded.items()))
        self.send({"name": name, "figures": {"side": side, **rounded}})

    def skip(self, name: str, reason: str) -> None:
        """Report a measurement that is not made."""
        log(f"{self.name}  {name}  skipped: {reason}")
        self.send({"skipped": {name: reason}})

    def attempt(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        """Run work() if `seconds` are left; an error ends this measurement only."""
        if self.left() < seconds:
            return self.skip(name, f"needs about {seconds:.0f} s, {self.left():.0f} s are left")
        try:
            work()
        except Exception as error:
            if not is_out_of_memory(error):
                traceback.print_exc()
            self.skip(name, f"failed: {type(error).__name__}: {first_line(error)}")
        self.free_memory()

    def time(self, work: Callable[[], Result]) -> tuple[Result, Figures]:
        """Return (work(), its seconds, peak memory and the share of the time in which the GPU was busy)."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.synchronize()
        busy = BusyShare(self.device)
        started = time.perf_counter()
        result = work()
        self.synchronize()
        seconds = time.perf_counter() - started
        return result, {"seconds": seconds, "peak_gb": peak_memory_gb(self.device), **busy.stop()}

    def profile(self, work: Callable[[], object]) -> None:
        """With --profile, run work() once more and print the operations that take the most time."""
        if self.profiling:
            self.attempt("profile", 5 * self.on_gpu, lambda: print_profile(work, self.synchronize, self.name))

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        """Return the memory of deleted tensors to the GPU."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    @cached_property
    def matmul_tflops(self) -> float:
        """The rate of a large matrix product in the precision of the model, in 10^12 operations a second."""
        size = self.sizes.matmul
        one, other = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        return 2 * size**3 / self.seconds_of(lambda: one @ other) / 1e12

    def seconds_of(self, work: Callable[[], object], runs: int = 10) -> float:
        """Return the seconds of one work(), the mean of several runs after a warm-up."""
        work()
        self.synchronize()
        started = time.perf_counter()
        for _ in range(runs):
            work()
        self.synchronize()
        return (time.perf_counter() - started) / runs

    @cached_property
    def model(self) -> str:
        """The folder of an encoder with random weights, which all sections share."""
        folder = self.folder / "model"
        if not folder.exists():
            unfinished = self.folder / "unfinished"
            write_base_model(unfinished, self.sizes.hidden, self.sizes.layers, self.sizes.dropout)
            unfinished.rename(folder)
        return str(folder)


class BusyShare(Thread):
    """Reads the utilization of a GPU until stop(); without NVML it reads nothing."""

    def __init__(self, device: torch.device):
        super().__init__(daemon=True)
        self.device, self.done = device, Event()
        self.readings: list[int] = []
        self.start()

    def run(self) -> None:
        while self.device.type == "cuda" and not self.done.wait(BUSY_SECONDS):
            try:
                self.readings.append(torch.cuda.utilization(self.device))
            except Exception:  # NVML's errors have no common class in torch; the share is left out
                return

    def stop(self) -> Figures:
        """Return the mean utilization, {} when it was not read."""
        self.done.set()
        self.join()
        return {"busy": sum(self.readings) / len(self.readings) / 100} if self.readings else {}


def print_profile(work: Callable[[], object], synchronize: Callable[[], None], title: str) -> None:
    """Print the operations of work() with the most GPU time and with the most CPU time."""
    from torch.autograd import DeviceType
    from torch.profiler import profile

    started = time.perf_counter()
    with profile() as profiler:
        work()
        synchronize()
    wall, events = time.perf_counter() - started, profiler.key_averages()
    on_gpu = sum(e.self_device_time_total for e in events if e.device_type == DeviceType.CUDA) / 1e6
    print(f"\nprofile of {title}: {wall:.2f} s, of which the GPU computed {on_gpu:.2f} s")
    for side, attribute in (("GPU", "self_device_time_total"), ("CPU", "self_cpu_time_total")):
        rows = [(getattr(e, attribute) / 1e3, e) for e in events if e.device_type == DeviceType.CPU]
        rows = sorted((row for row in rows if row[0]), key=lambda row: -row[0])[:PROFILED_OPS]
        if rows:
            print(f"{'operation, by its own ' + side + ' time':52} {'calls':>8} {'ms':>10}")
        for milliseconds, event in rows:
            print(f"{event.key[:52]:52} {event.count:8} {milliseconds:10.2f}")
    print(flush=True)


@dataclass
class Outcome:
    """What a section reported until it ended or was stopped."""

    section: str
    about: dict[str, str] = field(default_factory=dict)  # card and precision
    rows: dict[str, Figures] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    error: str = ""

    def add(self, message: dict[str, Any]) -> None:
        if "figures" in message:
            self.rows[message["name"]] = message["figures"]
        elif "skipped" in message:
            self.skipped |= message["skipped"]
        elif "error" in message:
            self.error = message["error"]
        else:
            self.about |= message

    def ratios(self) -> dict[str, float]:
        """Return our time per unit over that of the best peer, for each `work` that both sides did."""
        found = {}
        for work in dict.fromkeys(row.get("work", "") for row in self.rows.values()):
            best = {
                side: [
                    row["seconds"] / row.get("count", 1)
                    for row in self.rows.values()
                    if (row["side"], row.get("work", "")) == (side, work)
                ]
                for side in (OURS, PEER)
            }
            if all(best.values()):
                found[work or self.section] = round(min(best[OURS]) / min(best[PEER]), 3)
        return found

    def print(self) -> None:
        """Print the table and the JSON line."""
        heads = ("seconds", "per s", "TFLOP/s", "ceiling", "peak GB", "busy")
        print(f"\n{self.section:42}" + "".join(f"{head:>10}" for head in heads))
        for name, row in self.rows.items():
            rate = f"{row['gb_per_s']:,.0f} GB" if "gb_per_s" in row else _cell(row, "per_s", ",.0f")
            cells = [_cell(row, "seconds", ".4g"), rate, _cell(row, "tflops", ".0f")]
            cells += [_cell(row, "share_of_ceiling", ".0%"), _cell(row, "peak_gb", ".2f")]
            cells += [_cell(row, "busy", ".0%")]
            print(f"{name:42}" + "".join(f"{cell:>10}" for cell in cells))
        for name, reason in self.skipped.items():
            print(f"{name:42}skipped: {reason}")
        for work, ratio in self.ratios().items():
            print(f"ours / best peer, {work}: {ratio}")
        line = {"bench": "gpu", "section": self.section, **self.about, "ratios": self.ratios()}
        print(
            json.dumps({**line, "rows": self.rows, "skipped": self.skipped, "error": self.error}), flush=True
        )


def _cell(row: Figures, name: str, form: str) -> str:
    return format(row[name], form) if name in row else ""


def run_sections(
    sections: dict[str, Section], sizes: Sizes, device: str, end: float, profiled: list[str]
) -> list[Outcome]:
    """Run each section in a process of its own, within its part of the time; print the results at once.

    end: when all of them must be done, as time.monotonic().
    """
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for at, (name, section) in enumerate(sections.items()):
            weights = [other.weight for other in list(sections.values())[at:]]
            left = end - time.monotonic()
            seconds = left * section.weight / sum(weights)
            outcome = Outcome(name)
            if seconds < section.least_seconds:
                reason = f"needs at least {section.least_seconds} s, {seconds:.0f} s are left for it"
                outcome.skipped[name] = reason
            else:
                log(f"{name}: up to {seconds:.0f} s")
                stop = time.monotonic() + seconds
                bench = partial(Bench, name, device, sizes, Path(folder), stop, name in profiled)
                _run_process(section, bench, outcome, min(left, 1.5 * seconds))
            outcome.print()
            outcomes.append(outcome)
    return outcomes


def _run_process(
    section: Section, bench: Callable[[Connection], Bench], outcome: Outcome, limit: float
) -> None:
    """Run a section in a process until it ends; stop it after `limit` seconds."""
    # A fork shares the imported libraries. This process uses no GPU and no thread pool before it.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(section, bench, sender))
    process.start()
    sender.close()
    stop, done = time.monotonic() + limit, False
    while not done:
        ready = wait([receiver, process.sentinel], max(0.0, stop - time.monotonic()))
        if receiver in ready:
            try:
                message = json.loads(receiver.recv_bytes())
            except EOFError:
                break
            done = message.get("done", False)
            if not done:
                outcome.add(message)
        elif not ready:
            process.kill()
            outcome.error = f"stopped after {limit:.0f} s"
            break
        else:
            break  # the process ended without a word
    process.join()
    if not done and not outcome.error:
        outcome.error = f"the process ended with status {process.exitcode}"
    if outcome.error:
        log(f"{outcome.section}: {outcome.error}")


def _work(section: Section, bench: Callable[[Connection], Bench], sender: Connection) -> None:
    try:
        section.run(bench(sender))
        sender.send_bytes(b'{"done": true}')
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {first_line(error)}"
        sender.send_bytes(json.dumps({"error": message}).encode())
