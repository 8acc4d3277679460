"""One command for the whole chain: its table, stages that are up to date, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from toy_world import ROOT, make_world, options

from script import run_all

MEASURES = r"0\.\d{4} +0\.\d{4} +0\.\d{4}"


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def words(world, *more: str) -> list[str]:
    """Return options with which a stage takes a second or two."""
    model = str(world / "model")
    short = "--epoch 1 --dual_train.batch_size 8 --cross_train.batch_size 16 --dual_infer.topk 20".split()
    models = ["--dual_train.pretrained_model_path", model, "--cross_train.pretrained_model_path", model]
    lengths = ["--p_max_seq_len", "64", "--max_seq_len", "96"]
    return [*options(world, world / "out"), *short, *models, *lengths, *more]


@pytest.mark.slow
def test_the_whole_chain_twice(world, quick_calls, capsys):
    assert run_all.main(words(world)) == 0
    table = capsys.readouterr().out.rsplit("stage ", 1)[1]
    assert re.search(rf"^convert +\S+ +{MEASURES}$", table, re.MULTILINE)
    assert re.search(rf"^cross_infer +\S+ +{MEASURES}$", table, re.MULTILINE)
    names = "dual_params.bin res.top20 dual_res.json cross_params.bin res.rerank50 run_all.json".split()
    for name in names:
        assert (world / "out" / name).exists(), name
    quick_calls.clear()
    assert run_all.main(words(world)) == 0
    again = "".join(quick_calls)
    assert again.count(": up to date") >= 4 and "epoch 1/1" not in again


def test_a_stage_that_is_up_to_date_keeps_its_recorded_time(world):
    out, names = world / "out", iter(["dual_params.bin"])
    out.mkdir()
    recorded = {"check": 70.0, "dual_train": 71.0, "dual_infer": 72.0, "convert": 73.0, "cross_train": 74.0}
    (out / "run_all.json").write_text(json.dumps({"seconds": recorded}))
    run_all.run(words(world), lambda command: (out / next(names, "another")).write_text("new"))
    seconds = json.loads((out / "run_all.json").read_text())["seconds"]
    changed = {name for name, value in recorded.items() if seconds[name] != value}
    assert changed == {"check", "dual_train"} and seconds["cross_infer"] < 70


def test_a_missing_training_file_is_an_error_before_the_first_stage(world, capsys):
    (world / "data/train/cross.train.tsv").unlink()
    assert run_all.main(words(world)) == 2
    printed = capsys.readouterr()
    assert "cross.train.tsv" in printed.err and "== dual_train" not in printed.out


@pytest.mark.slow
def test_a_signal_stops_the_program_after_it_saves(world):
    long = ["--dual_train.epoch", "400", "--dual_train.log_every", "1", "--dual_train.eval_every", "-1"]
    command = [sys.executable, str(ROOT / "script/run_all.py"), *words(world, *long)]
    with open(world / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None and " step 3/" not in (world / "log").read_text():
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 2
    text = (world / "log").read_text()
    assert "stopped by SIGTERM" in text and "Traceback" not in text
    assert (world / "out/dual_checkpoint.pt").exists()
