"""Hundreds of faults in the four programs, each followed by the same command.

The results must have the same bytes as without the fault, or an error must name the damaged file.

    python tests/faults/fault_run.py --kills 500 --flips 100 --truncations 50 --disks 20 --changes 200

`--changes`: kills while a changed collection is encoded, and half as many damaged old blocks (changes.py).
The HTTP service is killed in tests/tools/test_serve_process.py.

Prints the number of faults of each kind and of failures (wrong results, lost work, tracebacks); exit status 1
with failures.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # run by path: neither the root nor tests/ is on it
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from chain import Chain, SmallDisk, Stage, files, steps
from changes import CollectionChanges
from preloaded import Preloaded, Running

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
# results that are up to date, so that damage to their inputs would not be read
FINAL_RESULTS = ("res.", "cross_res", "cross_scores.txt", "cross_id_map")
WORDS = ("ERROR", "WARNING", "rebuilding", "damaged", "checksum", "out of date", "not the file", "changed")
# -SIGTERM, -SIGINT: before or after the work, when there is nothing to save
ENDS = {0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT, 2}


class FaultRun:
    """Injects faults; `counts` of each kind and descriptions of the `failures`."""

    def __init__(self, chain: Chain, seed: int):
        self.chain, self.draw = chain, random.Random(seed)
        self.counts, self.failures = Counter(), []

    def fail(self, kind: str, what: str) -> None:
        self.failures.append(f"{kind}: {what}")
        print(f"FAILED {kind}: {what}", flush=True)

    def look(self, kind: str, running: Running) -> None:
        """Fail on a traceback or an unexpected exit status."""
        if "Traceback" in running.output():
            self.fail("traceback", f"{kind}: {running.output()[-3000:]}")
        if running.returncode not in ENDS:
            self.fail("status", f"{kind}: {running.returncode}\n{running.output()[-2000:]}")

    def finish(self, kind: str, stage: Stage, done: dict[str, int] | None = None) -> Running:
        """Run the stage to its end; results must be those without faults, finished work must be kept."""
        running = self.chain.run(stage)
        self.look(kind, running)
        if running.returncode:
            self.fail(kind, f"{stage.name} does not resume: {running.output()[-2000:]}")
        self.compare(kind, stage)
        if done:
            self.compare_work(kind, stage, done, running.output())
        return running

    def compare(self, kind: str, stage: Stage) -> bool:
        found, expected = self.chain.contents(), stage.results
        wrong = sorted(n for n in {**found, **expected} if found.get(n) != expected.get(n))
        if wrong:
            self.fail(kind, f"{stage.name}: other results: {', '.join(wrong)}")
        return not wrong

    def compare_work(self, kind: str, stage: Stage, done: dict[str, int], log: str) -> None:
        """Fail when work that was finished before the fault is repeated."""
        again = [p for p, at in done.items() if p != "step" and Path(p).stat().st_mtime_ns != at]
        if again:
            self.fail("lost work", f"{kind} {stage.name}: rebuilt: {', '.join(again)}")
        first = min(steps(log), default=None)
        if "step" in done and first is not None and first <= done["step"]:
            self.fail("lost work", f"{kind} {stage.name}: step {first} again, {done['step']} were saved")

    # ---- kills

    def kills(self, count: int) -> None:
        """Kill a stage once to three times, mostly after its first write, then let it finish.

        A signal after the program's end is not counted; another moment is drawn.
        """
        while self.counts["kills"] < count:
            stage, left = self.draw.choice(self.chain.stages), self.draw.randint(1, 3)
            self.chain.restore(self.chain.before(stage))
            done: dict[str, int] = {}
            for _ in range(min(left, count - self.counts["kills"])):
                hit = self.kill(stage, done)
                done = self.chain.done_work(stage)
                if not hit:
                    break
            self.finish("kill", stage, done)

    def kill(self, stage: Stage, done: dict[str, int]) -> bool:
        """Start the stage and send it a signal at a random moment; return whether it was still running."""
        running, number = self.chain.start(stage), self.draw.choice(SIGNALS)
        while running.poll() is None and not running.log.stat().st_size:
            time.sleep(0.002)  # before its first line a signal would interrupt the start of Python
        late, share = self.draw.random() < 0.75, self.draw.random() * stage.pace
        if late:
            seen = files(self.chain.out)
            while running.poll() is None and files(self.chain.out) == seen:
                time.sleep(0.002)
            time.sleep(share * (stage.seconds - stage.first_write))
        else:
            time.sleep(share * stage.seconds)
        alive = running.poll() is None
        running.send_signal(number)
        running.wait()
        # a resumed run is shorter than a complete one, and the speed of the machine varies
        stage.pace = min(1.0, stage.pace * (1.1 if alive else 0.8))
        self.counts["kills"] += alive
        self.counts["kills after the first write"] += late and alive
        self.counts["kills drawn again (the program had ended)"] += not alive
        self.look("kill", running)
        self.compare_work("kill", stage, done, running.output())
        saved, logged = self.chain.done_work(stage).get("step"), max(steps(running.output()), default=0)
        if stage.name.endswith("_train") and logged > 1 and (saved or 0) < logged - 1:
            self.fail("lost work", f"{stage.name}: {logged} updates, {saved} of them saved")
        return alive

    # ---- damaged files

    def damages(self, count: int, kind: str) -> None:
        """Damage one file of a finished chain, delete the results that hide it, run the chain again."""
        for _ in range(count):
            self.chain.restore(self.chain.folder / "after")
            victims = [p for p in sorted(self.chain.out.rglob("*")) if self._can_be_damaged(p)]
            victim = self.draw.choice(victims)
            name, data = str(victim.relative_to(self.chain.out)), victim.read_bytes()
            victim.write_bytes(damaged(data, kind, self.draw))
            self.counts[kind] += 1
            self._delete_results(victim)
            self._run_again(kind, name, victim)

    def _can_be_damaged(self, path: Path) -> bool:
        return path.is_file() and "tensorboard" not in path.parts and path.stat().st_size > 0

    def _delete_results(self, victim: Path) -> None:
        """Delete what was made from the victim, so that it is read; of a checkpoint, the weights' stamp."""
        for path in self.chain.out.iterdir():
            if path != victim and path.name.startswith(FINAL_RESULTS) and path.is_file():
                path.unlink()
        if "checkpoint" in victim.name:
            stamp = self.chain.out / f"{victim.name.split('_')[0]}_params.bin.stamp.json"
            stamp.unlink()

    def _run_again(self, kind: str, name: str, victim: Path) -> None:
        logs, blocks = [], self._other_blocks(victim)
        for stage in self.chain.stages:
            running = self.chain.run(stage)
            self.look(kind, running)
            logs.append(running.output())
            if running.returncode:  # the message says which file to delete
                self.counts[f"{kind}: refused by name"] += 1
                if not any(word in running.output() for word in (victim.name, f"{victim.parent}:")):
                    self.fail(kind, f"{name}: {stage.name} does not name it: {running.output()[-1500:]}")
                victim.unlink(missing_ok=True)
                again = self.chain.run(stage)
                logs.append(again.output())
                if again.returncode:
                    self.fail(kind, f"{name}: {stage.name} does not resume: {again.output()[-1500:]}")
        if again := sorted(str(p) for p, at in blocks.items() if self._other_blocks(victim).get(p) != at):
            self.fail("lost work", f"{kind} of {name}: rebuilt: {', '.join(again)}")
        found, expected = self.chain.contents(), self.chain.stages[-1].results
        wrong = sorted(n for n in {**found, **expected} if found.get(n) != expected.get(n))
        self.counts[f"{kind}: same bytes in the end"] += not wrong
        if wrong:
            lines = [line for log in logs for line in log.splitlines() if any(w in line for w in WORDS)]
            self.fail(kind, f"{name}: other results: {', '.join(wrong)}\n" + "\n".join(lines[-20:]))

    def _other_blocks(self, victim: Path) -> dict[Path, int]:
        """Return {block that is not damaged: when it was written}."""
        blocks = self.chain.out.rglob("block-*.npy")
        others = [path for path in blocks if path.with_suffix("") != victim.with_suffix("")]
        return {path: path.stat().st_mtime_ns for path in others}

    # ---- disks

    def disks(self, count: int) -> None:
        """Run on a full or read-only disk, then on a good one."""
        small = SmallDisk.can_mount(self.chain.out)
        for at in range(count):
            stage = self.draw.choice(self.chain.stages)
            if not small:
                self.limited_file(stage)
                continue
            shutil.rmtree(self.chain.out)
            self.chain.out.mkdir()
            with SmallDisk(self.chain.out) as disk:
                shutil.copytree(self.chain.before(stage), self.chain.out, dirs_exist_ok=True)
                if at % 4 == 3:
                    disk.read_only(True)
                    self.must_fail("read-only", stage, self.chain.run(stage))
                    disk.read_only(False)
                else:
                    disk.leave_free(self.draw.randrange(4096, self.written(stage)))
                    self.must_fail("full disk", stage, self.chain.run(stage))
                    disk.grow()
                self.finish("disk", stage, self.chain.done_work(stage))

    def written(self, stage: Stage) -> int:
        """Return about how many bytes the stage writes."""
        before = sum(p.stat().st_size for p in self.chain.before(stage).rglob("*") if p.is_file())
        return max(16384, sum(map(len, stage.results.values())) - before)

    def must_fail(self, kind: str, stage: Stage, running: Running) -> None:
        self.counts[kind] += 1
        self.look(kind, running)
        if running.returncode == 0:
            self.counts[f"{kind}: was enough"] += 1
        elif running.returncode != 2 or " ERROR " not in running.output():
            self.fail(kind, f"{stage.name}: status {running.returncode}: {running.output()[-1500:]}")

    def limited_file(self, stage: Stage) -> None:
        """Without permission to mount: limit the size of files, which fails like a full disk."""
        self.chain.restore(self.chain.before(stage))
        largest = max(map(len, stage.results.values()))
        limit = self.draw.randrange(min(16384, largest - 1), largest)
        self.must_fail("file limit", stage, self.chain.run(stage, file_limit=limit))
        self.finish("disk", stage, self.chain.done_work(stage))


def damaged(data: bytes, kind: str, draw: random.Random) -> bytes:
    """Return the bytes with one flipped bit, or truncated, at a random position."""
    at = draw.randrange(len(data))
    if kind == "truncation":
        return data[:at]
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def run(folder: Path, programs: Preloaded, given) -> FaultRun:
    """Prepare the chain in `folder` and inject all faults."""
    chain = Chain(folder, programs)
    chain.prepare()
    faults = FaultRun(chain, given.seed)
    faults.kills(given.kills)
    faults.damages(given.flips, "byte flip")
    faults.damages(given.truncations, "truncation")
    faults.disks(given.disks)
    if given.changes:
        changes = CollectionChanges(faults, chain)
        changes.prepare(given.changes)
        changes.kills(given.changes)
        changes.damages(given.changes // 4, "byte flip", damaged)
        changes.damages(given.changes // 4, "truncation", damaged)
    return faults


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    counts = {"kills": 500, "flips": 100, "truncations": 50, "disks": 20, "changes": 200}
    for name, default in {**counts, "seed": 1}.items():
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, Preloaded() as programs:
        faults = run(Path(folder), programs, given)
    for kind, count in sorted(faults.counts.items()):
        print(f"{count:6d}  {kind}")
    print(f"{len(faults.failures):6d}  failures (wrong results, lost work, tracebacks)")
    return 1 if faults.failures else 0


if __name__ == "__main__":
    sys.exit(main())
