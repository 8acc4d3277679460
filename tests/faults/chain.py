"""The four programs on a tiny data set, as stages whose results are known byte for byte.

Each stage starts from the output of the stages before it, in one output folder. Passages are encoded one by
one, so that their vectors do not depend on the others on any processor.
"""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from preloaded import Preloaded, Running
from toy_world import make_world, options, train_options

from torch_src.models.trained_settings import MODEL_FIELDS
from torch_src.runtime.stamps import checksum_json, read_checked_json
from torch_src.training.checkpoints import load_checkpoint

NOT_COMPARED = {"tensorboard", "cache"}  # they contain times
EVERY_UPDATE = "--save_every_minutes 1e-9 --log_every 1 --dropout 0.1".split()
LISTWISE = "--epoch 1 --loss listwise --groups_per_step 4 --group_size 3 --eval_every 3 --lr 1e-3".split()


@dataclass
class Stage:
    """One program with its options, its results without faults, and how long it took."""

    name: str
    program: str
    words: list[str]
    results: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    first_write: float = 0.0  # seconds until its first write
    pace: float = 1.0  # fraction of `seconds` after which a kill still finds it running


class Chain:
    """The stages in `folder`; `prepare` runs them once without faults and keeps the results of each."""

    def __init__(self, folder: Path, programs: Preloaded):
        self.folder, self.programs = folder, programs
        self.world = make_world(folder / "world")
        self.out, self.log = folder / "out", folder / "log"
        both, model = options(self.world, self.out), ["--pretrained_model_path", str(self.world / "model")]
        run = str(self.out / "res.top20")
        encode = [*both, "--block_rows", "8", "--batch_size", "1"]
        self.stages = [
            Stage("dual_train", "do_dual_train.py", [*train_options(self.world, self.out), *EVERY_UPDATE]),
            Stage("dual_infer", "do_dual_infer.py", [*encode, "--topk", "20"]),
            Stage(
                "index", "do_dual_infer.py",
                [*encode, "--topk", "10", "--index", "IVF2,Flat", "--recall_queries", "2"],
            ),
            Stage(
                "cross_train", "do_cross_train.py",
                [*both, *model, *LISTWISE, *EVERY_UPDATE, "--max_seq_len", "96", "--dev_candidates", run],
            ),
            Stage(
                "cross_infer", "do_cross_infer.py",
                [*both, "--retrieval_result", run, "--block_pairs", "16", "--topk", "10"],
            ),
        ]  # fmt: skip

    def prepare(self) -> None:
        self.out.mkdir()
        for stage in self.stages:
            shutil.copytree(self.out, self.before(stage))
            self.measure(stage)
        shutil.copytree(self.out, self.folder / "after")

    def measure(self, stage: Stage) -> None:
        """Run the stage without faults; keep its results and how long it took."""
        begun, seen = time.monotonic(), files(self.out)
        running = self.start(stage)
        while running.poll() is None:
            if not stage.first_write and files(self.out) != seen:
                stage.first_write = time.monotonic() - begun
            time.sleep(0.002)
        assert running.returncode == 0, running.output()
        stage.seconds = time.monotonic() - begun
        stage.results = self.contents()

    def remove_vectors(self) -> None:
        """Delete the vectors, so that all passages are encoded."""
        shutil.rmtree(self.out / "para_emb")

    def before(self, stage: Stage) -> Path:
        return self.folder / f"before-{stage.name}"

    def restore(self, kept: Path) -> None:
        """Restore the output folder, including the times of files, which the caches compare."""
        shutil.rmtree(self.out)
        shutil.copytree(kept, self.out)

    def start(self, stage: Stage, **more) -> Running:
        return self.programs.start(stage.program, stage.words, self.log, **more)

    def run(self, stage: Stage, **more) -> Running:
        running = self.start(stage, **more)
        running.wait()
        return running

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of every result, except checkpoints (their layout is up to torch), caches, curves.

        Reduced to what is protected: an intact stamp of a block without its checksum, and of
        NAME_hparams.json the fields that belong to the weights, since the other ones may be edited.
        """
        found = {path.relative_to(self.out): path for path in self.out.rglob("*") if path.is_file()}
        kept = {name: path for name, path in found.items() if not NOT_COMPARED & set(name.parts)}
        kept = {n: p for n, p in kept.items() if "checkpoint" not in n.name and not n.name.endswith("lock")}
        contents = {str(name): path.read_bytes() for name, path in sorted(kept.items())}
        return {name: protected(self.out / name, data) for name, data in contents.items()}

    def done_work(self, stage: Stage) -> dict[str, int]:
        """Return the work that a resumed run keeps: {finished block: its time}, {"step": updates saved}.

        Not blocks of an earlier collection, which are moved.
        """
        stamps = []
        for name in ("para_emb", "cross_scores"):
            if manifest := stage.results.get(f"{name}/manifest.json"):
                current, found = checksum_json(json.loads(manifest)), (self.out / name).glob("block-*.json")
                stamps += [
                    path for path in found if (read_checked_json(path) or {}).get("manifest") == current
                ]
        blocks = [path.with_suffix(".npy") for path in stamps if path.with_suffix(".npy").exists()]
        done = {str(block): block.stat().st_mtime_ns for block in blocks}
        checkpoint = self.out / f"{stage.name.removesuffix('_train')}_checkpoint.pt"
        if stage.name.endswith("_train") and checkpoint.exists():
            done["step"] = load_checkpoint(checkpoint)["progress"]["step"]
        return done


def protected(path: Path, data: bytes) -> bytes:
    """Return the part of a result that damage must not change."""
    if path.match("block-*.json") and (stamp := read_checked_json(path)):
        del stamp["checksum"]
        return json.dumps(stamp).encode()
    if path.name in ("dual_hparams.json", "cross_hparams.json"):
        try:
            settings = json.loads(data)
            return json.dumps([settings[field] for field in (*MODEL_FIELDS, "checksum")]).encode()
        except (ValueError, LookupError, TypeError):
            return data
    return data


def files(folder: Path) -> set[tuple[str, int]]:
    """Return (path, time) of all files except locks."""
    found = set()
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.name.endswith("lock"):
                found.add((str(path), path.stat().st_mtime_ns))
        except OSError:
            continue  # deleted meanwhile
    return found


def steps(log: str) -> list[int]:
    """Return the numbers of the updates in a training's log."""
    return [int(step) for step in re.findall(r"epoch .* step (\d+)/", log, re.MULTILINE)]


class SmallDisk:
    """The output folder as its own file system, full or read-only; needs permission to mount."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "SmallDisk":
        self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
        return self

    def __exit__(self, *_) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)

    def leave_free(self, size: int) -> None:
        """Shrink the disk until about `size` bytes are free."""
        state = os.statvfs(self.folder)
        used = (state.f_blocks - state.f_bfree) * state.f_frsize
        self._mount("-o", f"remount,size={used + size}")

    def read_only(self, on: bool) -> None:
        self._mount("-o", f"remount,{'ro' if on else 'rw'}")

    def grow(self) -> None:
        self._mount("-o", "remount,size=64m")

    def _mount(self, *words: str) -> None:
        subprocess.run(["mount", *words, str(self.folder)], check=True, capture_output=True)

    @staticmethod
    def can_mount(folder: Path) -> bool:
        try:
            with SmallDisk(folder):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False
