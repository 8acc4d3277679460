"""Rounds of mining and training over the toy world."""

import re

import pytest
from toy_world import lines, make_world, options

from script import run_rounds


@pytest.mark.slow
def test_two_rounds_the_second_on_the_files_mined_by_the_first(tmp_path, quick_calls, capsys):
    world = make_world(tmp_path)
    shared = [*options(world, world / "rounds"), "--pretrained_model_path", str(world / "model")]
    cross = ["--cross_train.epoch", "1", "--cross_train.batch_size", "8", "--mine.max_score", "0.9"]
    short = ["--dual_train.epoch", "1", "--batch_size", "8", "--mine.topk", "20"]
    words = ["2", "--denoise", *shared, *short, *cross]
    assert run_rounds.main(words) == 0
    table = capsys.readouterr().out.rsplit("round", 1)[1]
    assert len(re.findall(r"^ +[12] +\S+ +0\.\d{4} ", table, re.MULTILINE)) == 2
    mined = world / "rounds/round1/denoised/dual.train.tsv"
    assert lines(mined) and not (world / "rounds/round2/mined").exists()
    assert f"train_set {mined} (" in "".join(quick_calls)
    quick_calls.clear()
    assert run_rounds.main(words) == 0
    again = "".join(quick_calls)
    assert again.count("up to date") > 7 and "epoch 1/1" not in again


@pytest.mark.parametrize(
    "words",
    [[], ["--debug"], ["0"], ["2", "--no_such_knob", "1"], ["2", "--dual_params", "none"], ["2", "--plan"]],
)
def test_malformed_commands_are_named(capsys, words):
    assert run_rounds.main(words) == 2
    error = capsys.readouterr().err
    assert " ERROR " in error and "Traceback" not in error
    assert all(word in error for word in words[1:2])
