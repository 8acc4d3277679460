"""Every numeric option of every program, out of range: one line and status 2, never a traceback."""

import argparse
import dataclasses
import importlib
import math
import typing
from pathlib import Path

import pytest
from doc_commands import SETTINGS
from toy_world import ROOT, options, train_options

from torch_src import cross_infer, cross_train, dual_infer, dual_train
from torch_src.hparams import inherited
from torch_src.runtime.errors import UserError
from torch_src.runtime.options import OptionParser, integer, number

VALUES = ("-1", "0", "1e9", "1000000000", "1" + 40 * "0", "nan", "inf", "-inf", "0x1", "1_0", "１", "")
PARSED = [
    f"{folder.replace('/', '.')}.{path.stem}"
    for folder in ("script", "metric", "script/lib")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "OptionParser(" in path.read_text(encoding="utf-8")
    and path.stem != "quickstart"  # has no file to name: an accepted seed would run it
]


def numeric_fields(settings) -> list[tuple[str, type]]:
    """Return (name, int or float) of the numeric knobs."""
    kinds = {f.name: typing.get_args(f.type) or (f.type,) for f in dataclasses.fields(settings)}
    return [(name, kind[0]) for name, kind in kinds.items() if kind[0] in (int, float)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=lambda settings: settings.__name__)
def test_settings_accept_exactly_their_range(settings):
    for name, kind in numeric_fields(settings):
        low, high = (*inherited(settings, "RANGES")[name], math.inf)[:2]
        values = (-1, 0, 10**9, 10**40) if kind is int else (-1.0, 0.0, 1e9, math.nan, math.inf, -math.inf)
        for value in (*values, low - 1, high + 1):
            own = {"early_stop": 0, "hard_negatives": 1, "rank_to": 0} | {name: value}
            hp = dataclasses.replace(settings(), **{key: own[key] for key in own if hasattr(settings, key)})
            if low <= value <= high and value != math.inf:
                continue  # whether it fits other options, or the data, is checked elsewhere
            with pytest.raises(UserError, match=rf"^--{name} "):
                hp.check()


def test_all_argparse_programs_share_one_parser():
    files = [path for folder in ("script", "metric", "script/lib") for path in (ROOT / folder).glob("*.py")]
    plain = [path.name for path in files if "ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert plain == ["handle.py"]  # which runs without the repository
    assert {"script.bm25", "script.milvus_load", "metric.convert_recall_res_to_json"} <= set(PARSED)


@pytest.mark.parametrize("module", PARSED)
def test_numbers_of_argparse_programs(module, tmp_path, monkeypatch, capsys):
    """All other arguments name files that do not exist, so that an accepted number ends with 2, too."""
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(module).main
    actions: list[argparse.Action] = []

    def stop(self, *_):
        actions.extend(self._actions)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(OptionParser, "parse_known_args", stop)
        with pytest.raises(ZeroDivisionError):
            main([])
    for tested in (action for action in actions if action.type not in (None, Path)):
        for value in VALUES:
            words = []
            for action in actions:
                given = value if action is tested else (action.choices or ["missing"])[0]
                if not action.option_strings:
                    words.append(str(given) if action is tested or action.type is None else "1")
                elif action is tested or action.required:
                    words.append(f"{action.option_strings[0]}={given}")
            try:
                status = main(words)
            except SystemExit as done:
                status = done.code
            assert status == 2, words
            assert len(capsys.readouterr().err.splitlines()) == 1, words


def test_numbers_are_ascii_digits_within_their_range():
    assert [integer(1, 10)(text) for text in ("1", "+5", "10")] == [1, 5, 10]
    assert [number(0, 1)(text) for text in ("0", "1", "5e-1")] == [0.0, 1.0, 0.5]
    for parse, texts in ((integer(1, 10), VALUES), (number(0.5, 1), VALUES)):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError):
                parse(text)


def limits(settings, at: int) -> list[str]:
    """Return options with the lowest (0) or highest (-1) value of each number (none: 10^9)."""
    words = []
    for name, _ in numeric_fields(settings):
        low, high = (*inherited(settings, "RANGES")[name], 10**9)[:2]
        if name not in ("threads", "workers", "epoch", "max_steps", "port"):
            words += [f"--{name}", str((low, high)[at])]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, -1])
def test_programs_run_or_refuse_at_the_limits_of_all_ranges(trained_copy, at, monkeypatch):
    world, output = trained_copy, trained_copy / "output"
    run = str(output / "res.top10")
    again = ["--output_dir", str(world / "new")]
    train = [*train_options(world, world / "new")[:10], "--max_steps", "1"]
    pair = [
        "--retrieval_result",
        run,
        "--cross_params",
        "none",
        "--pretrained_model_path",
        str(world / "model"),
    ]
    mine = importlib.import_module("script.mine_negatives").main
    programs = {
        "do_dual_infer.py": (
            dual_infer.main,
            [*options(world, output), *again, "--dual_params", str(output / "dual_params.bin")],
        ),
        "do_cross_infer.py": (cross_infer.main, [*options(world, output), *again, *pair]),
        "script/mine_negatives.py": (mine, options(world, output)),
        "do_dual_train.py": (dual_train.main, train),
        "do_cross_train.py": (cross_train.main, [*train, "--dev_candidates", run]),
    }
    for name, (main, words) in programs.items():
        settings = SETTINGS[name]
        own = limits(settings, at)
        assert main([*words, *own]) in (0, 2), name
        for option, value in zip(own[::2], own[1::2], strict=True):
            if "len" in option or "topk" in option:
                assert main([*words, option, value]) in (0, 2), (name, option)
