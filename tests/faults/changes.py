"""Faults while do_dual_infer.py encodes a changed collection beside the vectors of the old one.

It is killed at a random moment or just before a random operation on files (while it moves the old blocks,
looks up, copies and deletes), also with one changed collection after another; or an old block is damaged. The
result must have the bytes of an encoding from scratch, and no text is encoded whose vector is on disk.
"""

import json
import re
from pathlib import Path

import numpy as np
import xxhash
from chain import Chain, Stage
from toy_world import lines, write

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.stamps import checksum_json, read_checked_json

OPERATION = re.compile(r"^operation (\d+): (\S+) (.*)$", re.MULTILINE)  # tests/preloaded.py logs them
CHANGES = ("rows added", "rows removed", "rows edited", "rows reordered", "all of these")
KILLS = "kills with a changed collection"


def changed_rows(rows: list[str], change: str) -> list[str]:
    """Return the rows of a collection after a change; new texts are old ones reversed."""

    def new(row: str) -> str:
        first, title, text, last = row.split("\t")
        return "\t".join((first, title, text[::-1], last))

    if change in ("rows added", "all of these"):
        rows = [*rows[:17], *map(new, rows[:9]), *rows[17:], new(rows[11]), rows[3]]
    if change in ("rows removed", "all of these"):
        rows = [*rows[:4], *rows[13:44], *rows[45:]]
    if change in ("rows edited", "all of these"):
        rows = [new(row) if at % 8 == 3 else row for at, row in enumerate(rows)]
    if change in ("rows reordered", "all of these"):
        rows = rows[::-1][::2] + rows[::2]
    return rows


class CollectionChanges:
    """The stages with a changed collection, and the faults in them."""

    def __init__(self, faults, chain: Chain):
        self.faults, self.chain, self.draw = faults, chain, faults.draw
        self.stages: list[Stage] = []
        self.operations: dict[str, dict[str, list[int]]] = {}  # by stage and what it does: their numbers

    @property
    def before(self) -> Path:
        """The output folder with the vectors, the run and the index of the first collection."""
        return self.chain.folder / "before-cross_train"

    def prepare(self, count: int) -> None:
        """Encode up to `count` changed collections from scratch, which gives the expected results."""
        collection = self.chain.world / "data/passage-collection"
        rows = [row for part in sorted(collection.glob("part-*")) for row in lines(part)]
        by_name = {stage.name: stage for stage in self.chain.stages}
        for number, change in enumerate(CHANGES[-count:]):
            data = self.chain.folder / f"changed-{number}"
            changed, half = changed_rows(rows, change), 23
            write(data / "passage-collection/part-00", changed[:half])
            write(data / "passage-collection/part-01", changed[half:])
            ids = json.dumps({str(row): f"p{row}" for row in range(len(changed))})
            write(data / "passage-collection/passage2id.map.json", [ids])
            for folder in ("dev", "train"):
                (data / folder).symlink_to(self.chain.world / "data" / folder)
            like = by_name["index" if number % 2 else "dual_infer"]
            old = str(self.chain.world / "data")
            words = [str(data) if word == old else word for word in like.words]
            self._from_scratch(Stage(change, like.program, words))

    def _from_scratch(self, stage: Stage) -> None:
        self.chain.restore(self.before)
        self.chain.remove_vectors()
        self.chain.measure(stage)
        self.chain.restore(self.before)
        running = self.chain.run(stage, kill_at=-1)
        assert running.returncode == 0, running.output()
        found, numbers = OPERATION.findall(running.output()), {}
        for at in range(len(found)):
            numbers.setdefault(doing(found[: at + 1]), []).append(at + 1)
        self.operations[stage.name] = numbers
        self.stages.append(stage)
        self.faults.compare("a changed collection", stage)

    # ---- kills

    def kills(self, count: int) -> None:
        """Kill it once to four times, also with several changed collections, then let it finish."""
        counts = self.faults.counts
        while counts[KILLS] < count:
            self.chain.restore(self.before)
            stage, done = self.draw.choice(self.stages), {}
            for _ in range(min(self.draw.randint(1, 4), count - counts[KILLS])):
                if self.draw.random() < 0.3:
                    stage, done = self._another(stage), {}
                before = counts["kills"]
                hit = self._kill_at_operation(stage, done) if self.draw.random() < 0.7 else (
                    self.faults.kill(stage, done)
                )  # fmt: skip
                counts[KILLS] += hit
                counts["kills"] = before  # those of the other stages
                done = self.chain.done_work(stage)
                if not hit:
                    break
            unknown = self._unknown(stage, done)
            running = self.faults.finish(KILLS, stage, done)
            if self._encoded(running.output()) > unknown:
                self.faults.fail("lost work", f"{stage.name}: {running.output()[-1500:]}; {unknown} are new")

    def _another(self, stage: Stage) -> Stage:
        """Return a stage with a collection of its own that writes the same files."""
        return self.draw.choice([other for other in self.stages if len(other.words) == len(stage.words)])

    def _operation(self, stage: Stage) -> int:
        """Return the number of an operation; each kind is as frequent as the others."""
        kinds = self.operations[stage.name]
        return self.draw.choice(kinds[self.draw.choice(sorted(kinds))])

    def _kill_at_operation(self, stage: Stage, done: dict[str, int]) -> bool:
        """SIGKILL just before a random operation on files; return whether the program got there."""
        running = self.chain.run(stage, kill_at=self._operation(stage))
        self.faults.look(KILLS, running)
        self.faults.compare_work(KILLS, stage, done, running.output())
        if running.returncode == 0:
            return False
        found = OPERATION.findall(running.output())
        self.faults.counts[f"{KILLS}: {doing(found)}"] += 1
        return True

    def _encoded(self, log: str) -> int:
        """Return how many texts a run encoded, from its log."""
        found = re.findall(r"copying [\d,]+ vectors of unchanged texts, encoding ([\d,]+)", log)
        return sum(int(number.replace(",", "")) for number in found)

    def _unknown(self, stage: Stage, done: dict[str, int]) -> int:
        """Return the number of texts in unfinished blocks whose vectors are not in a complete old block."""
        out, known = self.chain.out / "para_emb", set()
        manifests = {checksum_json(found) for found in map(readable, out.rglob("manifest.json"))}
        manifests -= {checksum_json(json.loads(stage.results["para_emb/manifest.json"]))}
        vectors = {checksum(np.load(path)) for path in out.rglob("block-*.npy")}
        hashes = [np.fromfile(path, np.uint8).reshape(-1, 16) for path in out.rglob("block-*.hashes")]
        by_checksum = {checksum(found): found for found in hashes}
        for path in out.rglob("block-*.json"):
            stamp = read_checked_json(path) or {}
            if stamp.get("manifest") in manifests and stamp["vectors"] in vectors:
                known |= {row.tobytes() for row in by_checksum.get(stamp["hashes"], ())}
        finished = {Path(path).with_suffix(".hashes").name for path in done}
        names = [
            name for name in stage.results if name.endswith(".hashes") and Path(name).name not in finished
        ]
        texts = np.frombuffer(b"".join(stage.results[name] for name in names), np.uint8).reshape(-1, 16)
        return sum(row.tobytes() not in known for row in texts)

    # ---- damaged files

    def damages(self, count: int, kind: str, damaged) -> None:
        """Damage one file of the old vectors, then encode a changed collection."""
        for _ in range(count):
            self.chain.restore(self.before)
            stage, folder = self.draw.choice(self.stages), self.chain.out / "para_emb"
            if self.draw.random() < 0.5:  # after they were moved
                self.chain.run(stage, kill_at=self._operation(stage))
                stage = self._another(stage)
            found = [*folder.glob("previous/**/*"), *folder.glob("block-*"), folder / "manifest.json"]
            victim = self.draw.choice(
                sorted(path for path in found if path.is_file() and path.stat().st_size)
            )
            if folder / "previous" in victim.parents:
                self.faults.counts[f"{kind} after the move"] += 1
            victim.write_bytes(damaged(victim.read_bytes(), kind, self.draw))
            self.faults.counts[f"{kind} of old vectors: {victim.suffix[1:]}"] += 1
            name = f"{kind} of {victim.relative_to(self.chain.out)}"
            self.faults.finish(name, stage)


def doing(operations: list[tuple[str, str, str]]) -> str:
    """Return what a program was doing at the last of its operations on files."""
    moved = any("block-" in path and "previous/" in path for _, _, path in operations)
    path = operations[-1][2]
    if any(each[1] == "shutil.rmtree" for each in operations):
        return "searches" if "/" in path else "deletes the old blocks"
    if "previous/hashes" in path or "previous/rows" in path:
        return "looks up the texts"
    if "previous/" in path:
        return "moves the old blocks"
    return "copies and writes blocks" if moved else "before the move"


def readable(path: Path) -> dict:
    try:
        return read_json(path)
    except UserError:
        return {}


def checksum(array: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).data)
