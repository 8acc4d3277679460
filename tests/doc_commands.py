"""The commands in the documents, checked against the options of the programs."""

import argparse
import contextlib
import dataclasses
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from script import run_all, run_rounds
from script.lib.report.hparams import ReportHparams
from torch_src import hparams
from torch_src.cross_hparams import CrossHparams
from torch_src.dual_hparams import DualHparams
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.tools.demo_hparams import DemoHparams
from torch_src.tools.mining_hparams import MiningHparams
from torch_src.tools.serve_hparams import ServeHparams

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
DOCUMENTS = [
    *READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "dev/LOG.md", ROOT / "script/README.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]  # fmt: skip
SETTINGS: dict[str, type[hparams.Hparams]] = {
    "do_dual_train.py": DualHparams,
    "do_dual_infer.py": InferenceDeHparams,
    "do_cross_train.py": CrossHparams,
    "do_cross_infer.py": InferenceCrossHparams,
    "script/mine_negatives.py": MiningHparams,
    "script/demo.py": DemoHparams,
    "script/serve.py": ServeHparams,
    "script/report.py": ReportHparams,
}
PYTHONS = ("python", "python3", ".venv/bin/python", "milvus/bin/python")
PLAIN = (
    ".",
    "git", "cd", "cp", "mv", "rm", "cut", "head", "grep", "tail", "kill", "printf", "curl", ".venv/bin/pip",
    ".venv/bin/pre-commit",
)  # fmt: skip
SHELLS = {  # shell script -> the program that receives its options
    "script/download.sh": "script/lib/download.py",
    "script/run_all.sh": "script/run_all.py",
    "script/run_rounds.sh": "script/run_rounds.py",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PARSE_ARGS, PARSE = argparse.ArgumentParser.parse_args, hparams.parse


class Stopped(BaseException):
    """Raised once a program has parsed its options."""


def without_fences(text: str) -> str:
    """Return a document without its code blocks."""
    return FENCE.sub("", text)


def shell_blocks(text: str) -> list[str]:
    """Return the code blocks marked sh and the unmarked ones that begin with a command."""
    begins = (*PYTHONS, "sh ", "torchrun ", "CUDA_VISIBLE_DEVICES")
    return [
        body for name, body in FENCE.findall(text) if name == "sh" or not name and body.startswith(begins)
    ]


def commands(text: str) -> list[list[str]]:
    """Return the commands in a document's shell blocks, with variables resolved and lines joined."""
    found: list[list[str]] = []
    variables: dict[str, str] = {}
    for line in "".join(shell_blocks(text)).replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and re.match(r"[A-Z_0-9]+=", words[0]):
            name, value = words[0].split("=", 1)
            variables[name] = value
        elif words:
            found.append(words)
    return found


def program_of(words: list[str]) -> list[str]:
    """Return a command without environment variables, nohup and redirections."""
    while words and (re.match(r"[A-Z_0-9]+=", words[0]) or words[0] == "nohup"):
        words = words[1:]
    ends = [at for at, word in enumerate(words) if word in (">", ">>", "|", "&", "&&", "2>&1")]
    return words[: min(ends, default=len(words))]


def check(words: list[str]) -> None:
    """AssertionError unless the command is a plain tool, or one of our programs with valid options."""
    program, *rest = program_of(words)
    if program in PYTHONS and rest[0] != "-m":
        check_options(rest[0], rest[1:])
    elif program == "torchrun":
        at = next(at for at, word in enumerate(rest) if word.endswith(".py"))
        check_options(rest[at], rest[at + 1 :])
    elif program == "sh":
        assert subprocess.run(["sh", "-n", ROOT / rest[0]]).returncode == 0, words
        if rest[0] in SHELLS:
            check_options(SHELLS[rest[0]], rest[1:])
    elif program == "make":
        assert rest == re.findall(rf"(?m)^({'|'.join(rest)}):", (ROOT / "Makefile").read_text()), words
    else:
        assert program in PYTHONS or program in PLAIN, words


def check_options(script: str, options: list[str]) -> None:
    """AssertionError unless the program exists and accepts these options and values."""
    script = "script/handle.py" if script == "handle.py" else script  # copied beside the collection
    assert (ROOT / script).is_file(), f"{script}: no such program"
    if script == "script/bench/plan.py":
        return check_options(options[0], options[1:])
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            parse(script, options)
    except (SystemExit, ValueError) as refused:
        if not isinstance(refused, SystemExit) or refused.code:
            raise AssertionError(f"{script} {' '.join(options)}: {output.getvalue()}{refused}") from None


def parse(script: str, options: list[str]) -> None:
    """Let a program parse its options, and nothing else."""
    if script == "script/run_rounds.py":
        words = [word for word in options[1:] if word != "--denoise"]
        run_rounds.Rounds(int(options[0]), "--denoise" in options, words)
    elif script == "script/run_all.py":
        options = [*options]
        if "--from" in options:
            at = options.index("--from")
            assert options.pop(at + 1) in run_all.STAGES and options.pop(at)
        for name, words in run_all.split_options(options).items():
            hparams.parse(run_all.PROGRAMS[name], words)
    else:
        until_parsed(
            script,
            lambda parser: PARSE_ARGS(parser, options),
            lambda settings: PARSE(settings, options),
        )


def option_names(script: str) -> set[str]:
    """Return the options of a program, with their dashes."""
    found: set[str] = set()

    def knobs(settings: type[hparams.Hparams]) -> None:
        names = [field.name for field in dataclasses.fields(settings)]
        found.update(f"--{prefix}{name}" for name in names for prefix in ("", "no_"))

    until_parsed(script, lambda parser: found.update(parser._option_string_actions), knobs)
    return found


def until_parsed(script: str, look: Callable[..., object], look_at_settings: Callable[..., object]) -> None:
    """Run a program until it parses its options; then call look(parser) or look_at_settings(settings)."""
    if not re.search(r"parse_args\(|hparams|torch_src import", (ROOT / script).read_text(encoding="utf-8")):
        return

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        look(parser)
        raise Stopped

    def stop_settings(settings: type[hparams.Hparams], *_: object) -> NoReturn:
        look_at_settings(settings)
        raise Stopped

    folder, modules = (ROOT / script).parent, set(sys.modules)
    with (
        patch.object(sys, "argv", [script]),
        patch.object(sys, "path", [str(folder), *sys.path]),
        patch.object(argparse.ArgumentParser, "parse_args", stop),
        patch.object(hparams, "parse", stop_settings),
        contextlib.suppress(Stopped),
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    for name in set(sys.modules) - modules:  # two folders have a `common`
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
            del sys.modules[name]
