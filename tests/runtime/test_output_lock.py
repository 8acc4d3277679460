"""One run at a time in an output folder; a dead one holds nothing."""

import subprocess
import sys

import pytest
from toy_world import ROOT, make_world, options

from script import bm25, mine_negatives
from torch_src import cross_infer, cross_train, dual_infer, dual_train
from torch_src.runtime.errors import UserError
from torch_src.runtime.output_lock import ALONE, TOGETHER, output_lock

HOLDER = """
import sys
from torch_src.runtime.output_lock import output_lock
with output_lock(sys.argv[1], int(sys.argv[2]), name=sys.argv[3]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder, kind, name="lock") -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder), str(kind), name]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(("theirs", "ours", "free"), [
    (ALONE, ALONE, False), (ALONE, TOGETHER, False), (TOGETHER, ALONE, False), (TOGETHER, TOGETHER, True),
])  # fmt: skip
def test_who_may_run_beside_whom(tmp_path, theirs, ours, free):
    process = holder(tmp_path, theirs)
    if free:
        with output_lock(tmp_path, ours):
            pass
    else:
        with pytest.raises(UserError, match="another run is writing there"), output_lock(tmp_path, ours):
            pass
    process.kill()
    process.communicate()
    with output_lock(tmp_path, ALONE):  # the dead one holds nothing
        pass


@pytest.mark.parametrize("program", [dual_train, dual_infer, cross_train, cross_infer])
def test_the_programs_refuse_a_folder_in_use(tmp_path, capsys, program):
    world = make_world(tmp_path)
    process = holder(world / "out", ALONE)
    words = [*options(world, world / "out"), "--pretrained_model_path", str(world / "model")]
    more = {"topk": 50, "bs": 10} if program is dual_infer else {}
    assert program.main(words, **more) == 2
    assert "another run is writing there" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert {path.name for path in (world / "out").iterdir()} == {"lock"}


@pytest.mark.parametrize(("program", "words", "option", "name"), [
    (mine_negatives, [], "--mined_dir", "mining.lock"), (bm25, ["index"], "--index", "lock"),
])  # fmt: skip
def test_so_do_mining_and_bm25(tmp_path, capsys, program, words, option, name):
    world = make_world(tmp_path)
    process = holder(tmp_path / "own", ALONE, name)
    assert program.main([*words, "--data_dir", str(world / "data"), option, str(tmp_path / "own")]) == 2
    assert "another run is writing there" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert {path.name for path in (tmp_path / "own").iterdir()} == {name}
