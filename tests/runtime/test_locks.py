"""Locks on blocks and folders: one process at a time, and none that outlives its process."""

import subprocess
import sys

import pytest
from toy_world import ROOT, make_world, options

from script import bm25, mine_negatives
from torch_src import cross_infer, cross_train, dual_infer, dual_train
from torch_src.runtime import locks as module
from torch_src.runtime.errors import UserError
from torch_src.runtime.locks import BlockLocks, folder_lock

BLOCKS = """
import sys
from torch_src.runtime.locks import BlockLocks
locks = BlockLocks.of(sys.argv[1])
print(*[locks.acquire(int(block)) for block in sys.argv[2:]], flush=True)
sys.stdin.read()
"""
FOLDER = """
import sys
from torch_src.runtime.locks import folder_lock
with folder_lock(sys.argv[1], bool(int(sys.argv[2])), name=sys.argv[3]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def start(code: str, *words) -> tuple[subprocess.Popen, str]:
    """Start a process that locks something until its input ends; return it and its first line."""
    command = [sys.executable, "-c", code, *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen, kill: bool = True) -> None:
    if kill:
        process.kill()
    process.communicate()


@pytest.mark.parametrize("kill", [True, False])
def test_blocks_are_free_when_their_process_has_ended(tmp_path, kill):
    process, answers = start(BLOCKS, tmp_path, 3, 5)
    assert answers == "True True"
    locks = BlockLocks.of(tmp_path)
    assert [locks.acquire(block) for block in (3, 4, 5)] == [False, True, False]
    end(process, kill)
    assert locks.acquire(3) and locks.acquire(5)


def test_a_locked_block_is_not_locked_again_until_it_is_released(tmp_path):
    locks = BlockLocks.of(tmp_path)
    assert BlockLocks.of(tmp_path) is locks  # closing a second handle would drop the locks
    assert locks.acquire(0) and not locks.acquire(0)
    process, answers = start(BLOCKS, tmp_path, 0, 1)
    assert answers == "False True"
    end(process)
    locks.release_all()
    process, answers = start(BLOCKS, tmp_path, 0)
    assert answers == "True"
    end(process)


def test_missing_blocks_are_those_neither_locked_nor_finished(tmp_path):
    process, _ = start(BLOCKS, tmp_path, 3)
    locks = BlockLocks.of(tmp_path)
    assert list(locks.acquire_missing([0, 2, 3, 4], lambda block: block != 2)) == [0, 4]
    assert locks.acquired == {0, 4}
    end(process)


def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    locks = BlockLocks.of(tmp_path)
    assert locks.acquire(0) and locks.acquire(1) and locks.only_reader()
    with locks.folder():
        locks.read()
    locks.release_all()
    assert capsys.readouterr().err.count("locks are not supported") == 1
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("theirs", "ours", "free"), [(0, 0, False), (0, 1, False), (1, 0, False), (1, 1, True)]
)
def test_only_shared_folder_locks_are_held_at_the_same_time(tmp_path, theirs, ours, free):
    process, _ = start(FOLDER, tmp_path, theirs, "lock")
    if free:
        with folder_lock(tmp_path, bool(ours)):
            pass
    else:
        with pytest.raises(UserError, match="another run"), folder_lock(tmp_path, bool(ours)):
            pass
    end(process)
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("program", [dual_train, dual_infer, cross_train, cross_infer])
def test_the_programs_refuse_a_folder_in_use(tmp_path, capsys, program):
    world = make_world(tmp_path)
    process, _ = start(FOLDER, world / "out", 0, "lock")
    words = [*options(world, world / "out"), "--pretrained_model_path", str(world / "model")]
    more = {"topk": 50, "bs": 10} if program is dual_infer else {}
    assert program.main(words, **more) == 2
    assert f"{world / 'out'}: locked by another run" in capsys.readouterr().err
    end(process)
    assert {path.name for path in (world / "out").iterdir()} == {"lock"}


@pytest.mark.parametrize(
    ("program", "words", "option", "name"),
    [
        (mine_negatives, ["--dual_params", "none"], "--mined_dir", "mining.lock"),
        (bm25, ["index"], "--index", "lock"),
    ],
)
def test_mining_and_bm25_refuse_a_folder_in_use(tmp_path, capsys, program, words, option, name):
    world = make_world(tmp_path)
    process, _ = start(FOLDER, tmp_path / "own", 0, name)
    assert program.main([*words, "--data_dir", str(world / "data"), option, str(tmp_path / "own")]) == 2
    assert "locked by another run" in capsys.readouterr().err
    end(process)
    assert {path.name for path in (tmp_path / "own").iterdir()} == {name}
