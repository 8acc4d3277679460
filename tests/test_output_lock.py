"""One run at a time in an output folder; a dead one holds nothing."""

import subprocess
import sys

import pytest
from toy_world import ROOT, make_world, options, train_options

from torch_src.errors import UserError
from torch_src.output_lock import ALONE, TOGETHER, output_lock

HOLDER = """
import sys
from torch_src.output_lock import output_lock
with output_lock(sys.argv[1], int(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder, kind) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder), str(kind)]
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


def test_the_programs_refuse_a_folder_in_use(tmp_path):
    world = make_world(tmp_path)
    process = holder(world / "out", ALONE)
    for name, words in (
        ("do_dual_train.py", train_options(world, world / "out")),
        (
            "do_cross_train.py",
            [*options(world, world / "out"), "--pretrained_model_path", str(world / "model")],
        ),
        ("do_dual_infer.py", options(world, world / "out")),
        ("do_cross_infer.py", options(world, world / "out")),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / name), *words], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 2 and "another run is writing there" in done.stderr, name
    process.kill()
    process.communicate()
    assert {path.name for path in (world / "out").iterdir()} <= {"lock"}
