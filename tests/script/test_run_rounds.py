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
def test_three_rounds_each_on_the_files_mined_by_the_round_before(tmp_path):
    world = make_world(tmp_path)
    shared = [*options(world, world / "rounds"), "--pretrained_model_path", str(world / "model")]
    cross = ["--cross_train.epoch", "1", "--cross_train.batch_size", "8", "--mine.max_score", "0.9"]
    short = ["--dual_train.epoch", "1", "--batch_size", "8", "--mine.topk", "20"]
    done = rounds(world, 3, "--denoise", *shared, *short, *cross)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.rsplit("round", 1)[1]
    assert len(re.findall(r"^ +[123] +\S+ +0\.\d{4} ", table, re.MULTILINE)) == 3
    first, second = (lines(world / f"rounds/round{number}/denoised/dual.train.tsv") for number in (1, 2))
    assert first and second and not (world / "rounds/round3/mined").exists()
    assert f"train_set = '{world}/rounds/round2/denoised/dual.train.tsv'" in done.stdout
    again = rounds(world, 3, "--denoise", *shared, *short, *cross)
    assert again.returncode == 0 and again.stdout.count("up to date") > 12 and "epoch 1/1" not in again.stdout


@pytest.mark.parametrize("words", [[], ["--debug"], ["0"], ["2", "--no_such_knob", "1"]])
def test_malformed_commands_are_named(capsys, words):
    assert run_rounds.main(words) == 2
    error = capsys.readouterr().err
    assert " ERROR " in error and "Traceback" not in error
