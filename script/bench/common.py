"""Shared by the benchmarks: variants measured in turn, each run in its own process; tables; a JSON line."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Figures = dict[str, Any]  # what one run measured, `seconds` among them
Variant = Callable[[argparse.Namespace], Figures]


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of the program, with --runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each variant, in turn; reports medians")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # run only this one, in this process
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # file for its arrays
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", required=True, help="data set in the official layout")
    parser.add_argument("--model", required=True, help="folder of an encoder")


def seeded_parser(doc: str | None, steps: int) -> argparse.ArgumentParser:
    """Return the parser of a benchmark that trains once per seed (compare_by_seed)."""
    parser = make_parser(doc)
    add_model(parser)
    parser.add_argument("--steps", type=int, default=steps, help="updates")
    parser.add_argument("--batch", type=int, default=32, help="rows per update")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return parser


@contextmanager
def work_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Yield args.folder, or a temporary folder that the processes of the variants get as --folder."""
    with tempfile.TemporaryDirectory() as temporary:
        if args.folder is None:
            args.folder = Path(temporary)
            sys.argv += ["--folder", temporary]
        yield args.folder


class PeakMemory(threading.Thread):
    """Samples the unshared memory (RssAnon) of this process every 20 ms; `peak` in 10^9 bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, unshared_gb())


def unshared_gb() -> float:
    """Return the unshared memory of this process in 10^9 bytes (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e9


def run_program(*words: object, stdout: int | None = subprocess.PIPE) -> tuple[float, float, str]:
    """Run a program of the repository; return (seconds, peak resident memory in 10^9 bytes, its output)."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        target = out if stdout == subprocess.PIPE else stdout
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=target)
        _, status, usage = os.wait4(process.pid, 0)  # the memory of this process alone
        out.seek(0)
        output = out.read()
    if status:
        raise SystemExit(f"{words[0]} ended with status {os.waitstatus_to_exitcode(status)}:\n{output}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9, output


def run_variant(args: argparse.Namespace, variants: dict[str, Variant]) -> None:
    """Run one variant in this process and print its figures as JSON."""
    memory = PeakMemory()
    figures = variants[args.variant](args)
    memory.done.set()
    print(json.dumps({**figures, "unshared_gb": round(memory.peak, 3)}))


def measure(args: argparse.Namespace, names: list[str], folder: Path) -> dict[str, list[Figures]]:
    """Run each variant `args.runs` times, A B A B ..., as this program with --variant; return the figures."""
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for at in range(args.runs):
        for name in names:
            command = [sys.executable, *sys.argv, "--variant", name, "--result", str(folder / f"{name}.npy")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stdout}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"run {at + 1}  {name:12} {json.dumps(found[name][-1])}", flush=True)
    return found


def report(runs: int, found: dict[str, list[Figures]], ours: str, more: dict[str, Any]) -> None:
    """Print a table of medians, then one JSON line with the ratio of our time to that of each peer."""
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    memory = {name: max(run["unshared_gb"] for run in runs) for name, runs in found.items()}
    ratios = {name: _ratio(found[ours], runs) for name, runs in found.items() if name != ours}
    print(f"\n{'':14} {'median s':>9} {'unshared GB':>12} {'ours/peer':>10}")
    for name in found:
        print(f"{name:14} {seconds[name]:9.3f} {memory[name]:12.2f} {ratios.get(name, 1.0):10.3f}")
    first = next(iter(ratios.values()), None)
    line = {"bench": Path(sys.argv[0]).stem, "ratio": first, "ratios": ratios, "seconds": seconds}
    print(json.dumps({**line, "unshared_gb": memory, "runs": runs, **more}))


def _ratio(ours: list[Figures], peer: list[Figures]) -> float:
    """Return the median ratio of times, run by run, so that a slow drift of the machine cancels out."""
    return round(statistics.median(a["seconds"] / b["seconds"] for a, b in zip(ours, peer, strict=True)), 3)


def compare(
    args: argparse.Namespace,
    variants: dict[str, Variant],
    names: list[str],
    extra: Callable[[Path], dict[str, Any]],
) -> None:
    """Run one variant (in its own process), or all of them and report. `extra` reads their result files."""
    if args.variant:
        return run_variant(args, variants)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report(args.runs, measure(args, names, folder), names[0], extra(folder))


def compare_by_seed(args: argparse.Namespace, variants: dict[str, Variant], more: dict[str, Any]) -> None:
    """Run each variant once per seed, in turn; print MRR@10 and seconds, then a JSON line."""
    names = {f"{name}_{seed}": (name, seed) for seed in args.seeds for name in variants}
    if args.variant:
        name, args.seed = names[args.variant]
        return run_variant(args, {args.variant: variants[name]})
    args.runs = 1
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, list(names), Path(folder))
    line: dict[str, Any] = {"bench": Path(sys.argv[0]).stem, **more}
    for name in variants:
        runs = [found[f"{name}_{seed}"][0] for seed in args.seeds]
        quality = [run["MRR@10"] for run in runs]
        error = statistics.stdev(quality) / len(quality) ** 0.5 if len(quality) > 1 else 0.0
        seconds, memory = statistics.median(r["seconds"] for r in runs), max(r["unshared_gb"] for r in runs)
        print(f"{name:5} MRR@10 {statistics.mean(quality):.4f} +- {error:.4f} (standard error)  "
              f"{seconds:.2f} s per update  {memory:.2f} GB")  # fmt: skip
        line[name] = {"MRR@10": quality, "mean": statistics.mean(quality), "standard_error": error,
                      "seconds": seconds, "unshared_gb": memory}  # fmt: skip
    line["ratio"] = round(line["ours"]["seconds"] / line["st"]["seconds"], 3)
    print(json.dumps(line))
