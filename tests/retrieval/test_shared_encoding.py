"""Encoding killed at any moment, and shared by several processes: the same bytes in every block."""

import json
import random
import shutil
import signal
import time

import pytest
from toy_world import make_world, options

from torch_src import dual_infer

PASSAGES = 440


@pytest.fixture(scope="module")
def world(tmp_path_factory, programs):
    """A collection of 440 passages in 22 blocks, and the blocks of a run without kills."""
    folder = make_world(tmp_path_factory.mktemp("world"), passages=PASSAGES)
    assert programs.run("do_dual_infer.py", words(folder, "whole"), folder / "log").returncode == 0
    return folder, blocks(folder / "whole")


def words(world, name: str) -> list[str]:
    more = ["--dual_params", "none", "--pretrained_model_path", str(world / "model"), "--block_rows", "20"]
    return [*options(world, world / name), *more]


def blocks(folder) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted((folder / "para_emb").glob("block-*.npy"))}
    return {**found, "run": (folder / "res.top50").read_bytes()}


def killed_runs(programs, world, name: str, kills: int, seed: int) -> int:
    """Start the program `kills` times and kill it after its next block; return the number of blocks."""
    draw = random.Random(seed)
    for _ in range(kills):
        before = count_blocks(world / name)
        process = programs.start("do_dual_infer.py", words(world, name), world / "log")
        while process.poll() is None and count_blocks(world / name) <= before:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return count_blocks(world / name)


def count_blocks(folder) -> int:
    return len(list((folder / "para_emb").glob("block-*.npy")))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2])
def test_a_run_that_is_killed_several_times_ends_in_the_same_bytes(programs, world, kills):
    folder, expected = world
    name = f"killed{kills}"
    assert 0 < killed_runs(programs, folder, name, kills, seed=kills)
    assert programs.run("do_dual_infer.py", words(folder, name), folder / "log").returncode == 0
    assert blocks(folder / name) == expected
    assert not list((folder / name / "para_emb").glob("*.tmp"))


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(programs, world):
    """With the environment that torchrun gives them."""
    folder, expected = world
    started = [
        programs.start(
            "do_dual_infer.py", words(folder, "together"), folder / f"log{rank}",
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    assert [process.wait() for process in started] == [0, 0], started[0].output() + started[1].output()
    assert "[rank 1] " in started[1].output()
    assert blocks(folder / "together") == expected


@pytest.mark.slow
def test_a_process_encodes_the_blocks_of_a_killed_one(programs, world):
    """Two share the blocks, one is killed: the other finishes all of them."""
    folder, expected = world
    first, second = (
        programs.start("do_dual_infer.py", words(folder, "one_dies"), folder / f"log{rank}", RANK=rank)
        for rank in ("0", "1")
    )
    while second.poll() is None and count_blocks(folder / "one_dies") < 3:
        time.sleep(0.002)
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert first.wait() == 0, first.output()
    assert blocks(folder / "one_dies") == expected


def test_force_is_refused_with_several_processes(tmp_path, monkeypatch, capsys):
    """One process would delete the vectors that the others encode."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dual_infer.main(["--debug", "--force", "--output_dir", str(tmp_path / "out")]) == 2
    assert "--force with several processes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_changed_collection_that_is_killed_and_shared_ends_in_the_same_bytes(programs, world, tmp_path):
    """Killed while the old vectors are moved or copied, then finished by two processes."""
    folder, _ = world
    grown, draw = tmp_path / "grown", random.Random(5)
    shutil.copytree(folder / "data", grown / "data")
    shutil.copytree(folder / "model", grown / "model")
    passages = grown / "data/passage-collection"
    rows = (passages / "part-00").read_text(encoding="utf-8").splitlines()
    new = [f"{row[:-2]}新\t0" for row in draw.sample(rows, 40)]
    changed = draw.sample([*rows[30:], *new], len(rows) + 10)
    (passages / "part-00").write_text("".join(f"{row}\n" for row in changed), encoding="utf-8")
    path = passages / "passage2id.map.json"
    old_ids = json.loads(path.read_text(encoding="utf-8"))
    ids = {**old_ids, **{str(len(old_ids) + row): f"new{row}" for row in range(10)}}
    path.write_text(json.dumps(ids), encoding="utf-8")
    one = ["--batch_size", "1"]  # on any processor a vector then depends on its text alone
    for world, name in ((folder, "old"), (grown, "whole")):
        assert programs.run("do_dual_infer.py", [*words(world, name), *one], grown / "log").returncode == 0
    shutil.copytree(folder / "old", grown / "out")
    for _ in range(3):
        process = programs.start("do_dual_infer.py", [*words(grown, "out"), *one], grown / "log")
        while process.poll() is None and not (grown / "out/para_emb/previous").is_dir():
            time.sleep(0.001)
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    both = [
        programs.start("do_dual_infer.py", [*words(grown, "out"), *one], grown / f"log{rank}", RANK=rank)
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in both] == [0, 0], both[0].output() + both[1].output()
    assert blocks(grown / "out") == blocks(grown / "whole")
    assert not (grown / "out/para_emb/previous").exists()
