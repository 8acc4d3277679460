"""The four programs on a tiny world, in stages whose results are known byte for byte; what a fault may do to
them.

A stage starts from what the stages before it left, in one output folder whose path never changes.
"""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from preloaded import Preloaded, Running
from toy_world import make_world, options, train_options

from torch_src.training.checkpoints import load_checkpoint

CURVES = {"tensorboard", "cache"}  # they carry times, or paths and times of files
EVERY_UPDATE = "--save_every_minutes 1e-9 --log_every 1 --dropout 0.1".split()
LISTWISE = "--epoch 1 --loss listwise --groups_per_step 4 --group_size 3 --eval_every 3 --lr 1e-3".split()


@dataclass
class Stage:
    """One program with its options, what it left when nothing disturbed it, and how long that took."""

    name: str
    program: str
    words: list[str]
    results: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    first_write: float = 0.0  # seconds until it first wrote
    pace: float = 1.0  # the part of its time in which a kill still meets it running


class Chain:
    """The stages in `folder`; `prepare` runs them once, undisturbed, and keeps what each leaves."""

    def __init__(self, folder: Path, programs: Preloaded):
        self.folder, self.programs = folder, programs
        self.world = make_world(folder / "world")
        self.out, self.log = folder / "out", folder / "log"
        both, model = options(self.world, self.out), ["--pretrained_model_path", str(self.world / "model")]
        run = str(self.out / "res.top20")
        self.stages = [
            Stage("dual_train", "do_dual_train.py", [*train_options(self.world, self.out), *EVERY_UPDATE]),
            Stage("dual_infer", "do_dual_infer.py", [*both, "--block_rows", "8", "--topk", "20"]),
            Stage(
                "index", "do_dual_infer.py",
                [*both, "--block_rows", "8", "--topk", "10", "--index", "IVF2,Flat", "--recall_queries", "2"],
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
            begun, seen = time.monotonic(), files(self.out)
            running = self.start(stage)
            while running.poll() is None:
                if not stage.first_write and files(self.out) != seen:
                    stage.first_write = time.monotonic() - begun
                time.sleep(0.002)
            assert running.returncode == 0, running.output()
            stage.seconds = time.monotonic() - begun
            stage.results = self.contents()
        shutil.copytree(self.out, self.folder / "after")

    def before(self, stage: Stage) -> Path:
        return self.folder / f"before-{stage.name}"

    def restore(self, kept: Path) -> None:
        """Make the output folder what it was; times of files too, as the caches go by them."""
        shutil.rmtree(self.out)
        shutil.copytree(kept, self.out)

    def start(self, stage: Stage, **more) -> Running:
        return self.programs.start(stage.program, stage.words, self.log, **more)

    def run(self, stage: Stage, **more) -> Running:
        running = self.start(stage, **more)
        running.wait()
        return running

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of every result; checkpoints (an archive's layout is torch's affair), caches and
        curves are left out. A block's note that has lost its last line end alone says the same: it counts
        as whole, and is not written again.
        """
        found = {path.relative_to(self.out): path for path in self.out.rglob("*") if path.is_file()}
        kept = {name: path for name, path in found.items() if not CURVES & set(name.parts)}
        kept = {n: p for n, p in kept.items() if "checkpoint" not in n.name and not n.name.endswith("lock")}
        contents = {str(name): path.read_bytes() for name, path in sorted(kept.items())}
        notes = [name for name in contents if Path(name).match("block-*.json")]
        return {**contents, **{name: contents[name].rstrip(b"\n") for name in notes}}

    def done_work(self, stage: Stage) -> dict[str, int]:
        """Return what a next run must not do again: {finished block: its time}, {"step": updates saved}."""
        folders = (self.out / "para_emb", self.out / "cross_scores")
        notes = [note for folder in folders for note in folder.glob("block-*.json")]
        blocks = [note.with_suffix(".npy") for note in notes if note.with_suffix(".npy").exists()]
        done = {str(block): block.stat().st_mtime_ns for block in blocks}
        checkpoint = self.out / f"{stage.name.removesuffix('_train')}_checkpoint.pt"
        if stage.name.endswith("_train") and checkpoint.exists():
            done["step"] = load_checkpoint(checkpoint)["progress"]["step"]
        return done


def files(folder: Path) -> set[tuple[str, int]]:
    """Return (path, time) of all files but the lock."""
    found = set()
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.name.endswith("lock"):
                found.add((str(path), path.stat().st_mtime_ns))
        except OSError:
            continue  # it went away meanwhile
    return found


def steps(log: str) -> list[int]:
    """Return the numbers of the updates that a training's log tells of."""
    return [int(step) for step in re.findall(r"epoch .* step (\d+)/", log, re.MULTILINE)]


class SmallDisk:
    """The output folder as a file system of its own: a full or a read-only disk. Needs the right to mount."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "SmallDisk":
        self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
        return self

    def __exit__(self, *_) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)

    def leave_free(self, size: int) -> None:
        """Make the disk so small that about `size` bytes are free."""
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
