"""What the benchmarks share: sides in turn, each in a process of its own; medians; a table; a JSON line."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help is the program's docstring, with --runs and what a side is given."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=int, default=3, help="runs of each side, in turn; medians are printed")
    made.add_argument("--side", help=argparse.SUPPRESS)
    made.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return made


def seeded_parser(doc: str, steps: int) -> argparse.ArgumentParser:
    """Return the parser of a training that is run once a seed (by_seed)."""
    made = parser(doc)
    made.add_argument("--data_dir", required=True)
    made.add_argument("--model", required=True, help="folder of an encoder")
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return made


class PeakMemory(threading.Thread):
    """The most unshared memory (RssAnon) of this process so far, in 10^9 bytes; looked at every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, unshared_gb())


def unshared_gb() -> float:
    """Return the unshared memory of this process now, in 10^9 bytes (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e9


def run_side(given, sides: dict[str, Callable]) -> None:
    """Run one side in this process; its figures, `seconds` among them, go to standard output."""
    memory = PeakMemory()
    figures = sides[given.side](given)
    memory.done.set()
    print(json.dumps({**figures, "unshared_gb": round(memory.peak, 3)}))


def in_turn(given, names: list[str], folder: Path) -> dict[str, list[dict]]:
    """Run each side `given.runs` times, A B A B ..., this program again with --side; return their figures."""
    found: dict[str, list[dict]] = {name: [] for name in names}
    for at in range(given.runs):
        for name in names:
            command = [sys.executable, *sys.argv, "--side", name, "--result", str(folder / f"{name}.npy")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stdout}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"run {at + 1}  {name:12} {json.dumps(found[name][-1])}", flush=True)
    return found


def report(given, found: dict[str, list[dict]], ours: str = "ours", **more) -> None:
    """Print a table of medians, then one JSON line with the ratio of ours to every peer, run by run."""
    medians = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    memory = {name: max(run["unshared_gb"] for run in runs) for name, runs in found.items()}
    ratios = {name: _ratio(found[ours], runs) for name, runs in found.items() if name != ours}
    print(f"\n{'':14} {'median s':>9} {'unshared GB':>12} {'ours / it':>10}")
    for name in found:
        print(f"{name:14} {medians[name]:9.3f} {memory[name]:12.2f} {ratios.get(name, 1.0):10.3f}")
    first = next(iter(ratios.values()), None)
    print(json.dumps({
        "bench": Path(sys.argv[0]).stem, "ratio": first, "ratios": ratios, "seconds": medians,
        "unshared_gb": memory, "runs": given.runs, **more,
    }))  # fmt: skip


def _ratio(ours: list[dict], its: list[dict]) -> float:
    """Return the median of our time over its, run by run: the machine's drift falls out."""
    return round(statistics.median(a["seconds"] / b["seconds"] for a, b in zip(ours, its, strict=True)), 3)


def compare(
    given, sides: dict[str, Callable], names: list[str], more: Callable[[Path], dict] = lambda folder: {}
):
    """Run one side (its own process does that), or all of them and the report; `more` looks at results."""
    if given.side:
        return run_side(given, sides)
    with tempfile.TemporaryDirectory() as folder:
        found = in_turn(given, names, Path(folder))
        report(given, found, names[0], **more(Path(folder)))


def by_seed(given, sides: dict[str, Callable], more: dict) -> None:
    """Run each side once a seed of `given.seeds`, in turn; print MRR@10 and seconds of each, then a JSON
    line.
    """
    names = {f"{name}_{seed}": (name, seed) for seed in given.seeds for name in sides}
    if given.side:
        name, given.seed = names[given.side]
        return run_side(given, {given.side: sides[name]})
    given.runs = 1
    with tempfile.TemporaryDirectory() as folder:
        found = in_turn(given, list(names), Path(folder))
    line: dict = {"bench": Path(sys.argv[0]).stem, **more}
    for name in sides:
        runs = [found[f"{name}_{seed}"][0] for seed in given.seeds]
        quality = [run["MRR@10"] for run in runs]
        error = statistics.stdev(quality) / len(quality) ** 0.5 if len(quality) > 1 else 0.0
        seconds, memory = statistics.median(r["seconds"] for r in runs), max(r["unshared_gb"] for r in runs)
        print(f"{name:5} MRR@10 {statistics.mean(quality):.4f} +- {error:.4f} (standard error)  "
              f"{seconds:.2f} s an update  {memory:.2f} GB")  # fmt: skip
        line[name] = {"MRR@10": quality, "mean": statistics.mean(quality), "standard_error": error,
                      "seconds": seconds, "unshared_gb": memory}  # fmt: skip
    line["ratio"] = round(line["ours"]["seconds"] / line["st"]["seconds"], 3)
    print(json.dumps(line))
