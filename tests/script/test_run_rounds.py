"""Rounds of mining and training over the toy world, through the command line."""

import re
import subprocess
import sys

import pytest
from toy_world import ROOT, lines, make_world, options

from script import run_rounds


def rounds(world, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "script/run_rounds.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_two_rounds_the_second_on_the_files_mined_by_the_first(tmp_path):
    world = make_world(tmp_path)
    shared = [*options(world, world / "rounds"), "--pretrained_model_path", str(world / "model")]
    cross = ["--cross_train.epoch", "1", "--cross_train.batch_size", "8", "--mine.max_score", "0.9"]
    short = ["--dual_train.epoch", "1", "--batch_size", "8", "--mine.topk", "20"]
    done = rounds(world, 2, "--denoise", *shared, *short, *cross)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.rsplit("round", 1)[1]
    assert len(re.findall(r"^ +[12] +\S+ +0\.\d{4} ", table, re.MULTILINE)) == 2
    mined = world / "rounds/round1/denoised/dual.train.tsv"
    assert lines(mined) and not (world / "rounds/round2/mined").exists()
    assert f"train_set = '{mined}'" in done.stdout
    again = rounds(world, 2, "--denoise", *shared, *short, *cross)
    assert again.returncode == 0 and again.stdout.count("up to date") > 7 and "epoch 1/1" not in again.stdout


@pytest.mark.parametrize("words", [[], ["--debug"], ["0"], ["2", "--no_such_knob", "1"]])
def test_malformed_commands_are_named(capsys, words):
    assert run_rounds.main(words) == 2
    error = capsys.readouterr().err
    assert " ERROR " in error and "Traceback" not in error
