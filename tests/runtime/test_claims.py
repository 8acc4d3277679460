"""Claims on blocks: one process at a time has a block, and a dead one has none."""

import subprocess
import sys

import pytest
from toy_world import ROOT

from torch_src.runtime import claims as module
from torch_src.runtime.claims import Claims

HOLDER = """
import sys
from torch_src.runtime.claims import Claims
claims = Claims(sys.argv[1])
print(*[claims.take(int(block)) for block in sys.argv[2:]], flush=True)
sys.stdin.read()
"""


def holder(folder, *blocks) -> subprocess.Popen:
    """Start a process that takes these blocks and keeps them until it is told to end, or killed."""
    command = [sys.executable, "-c", HOLDER, str(folder), *map(str, blocks)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def end(process: subprocess.Popen, kill: bool) -> None:
    if kill:
        process.kill()
    process.communicate()


@pytest.mark.parametrize("kill", [True, False])
def test_a_block_is_free_again_when_its_process_is_gone(tmp_path, kill):
    process = holder(tmp_path, 3, 5)
    assert process.stdout.readline() == "True True\n"
    claims = Claims(tmp_path)
    assert [claims.take(block) for block in (3, 4, 5)] == [False, True, False]
    end(process, kill)
    assert claims.take(3) and claims.take(5)


def test_what_this_process_has_another_does_not_get(tmp_path):
    claims = Claims(tmp_path)
    assert claims.take(0) and not claims.take(0)
    process = holder(tmp_path, 0, 1)
    assert process.stdout.readline() == "False True\n"
    end(process, kill=True)
    claims.give_back(0)
    process = holder(tmp_path, 0)
    assert process.stdout.readline() == "True\n"
    end(process, kill=True)


class Store:
    """Blocks 0..4, of which 1 and, after the first look, 2 are finished."""

    def missing_blocks(self):
        return [0, 2, 3, 4]

    def is_missing(self, block):
        return block != 2


def test_takeable_leaves_out_what_is_finished_or_held(tmp_path):
    process = holder(tmp_path, 3)
    process.stdout.readline()
    claims = Claims(tmp_path)
    assert list(claims.takeable(Store())) == [0, 4]
    assert claims.mine == {0, 4}
    end(process, kill=True)


def test_without_file_locks_it_says_so_once_and_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    claims = Claims(tmp_path)
    assert claims.take(0) and claims.take(1)
    with claims.whole_folder():
        pass
    claims.give_back(0)
    assert capsys.readouterr().err.count("no file locks here") == 1
