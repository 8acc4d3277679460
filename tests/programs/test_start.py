"""How programs start: options are parsed before slow imports, a missing package is one line."""

import os
import shutil
import subprocess
import sys

import pytest
from doc_commands import ROOT

FOLDERS = (ROOT, ROOT / "metric", ROOT / "script")
PROGRAMS = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in folder.glob("*.py"))
SLOW = {"torch", "transformers", "faiss", "tensorboard", "sentence_transformers", "fastapi", "matplotlib"}


def test_help_and_wrong_values_need_no_slow_import():
    """One process for all programs: importing numpy takes time."""
    code = f"""
import contextlib, io, runpy, sys
for program, *words in [*([name, "--help"] for name in {PROGRAMS!r}), ["do_dual_train.py", "--lr", "0"]]:
    sys.argv = [program, *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as ended:
            assert (ended.code or 0) == (0 if words == ["--help"] else 2), (program, ended.code)
    assert len(out.getvalue().splitlines()) > 3 or words != ["--help"], program
    assert not {SLOW!r} & set(sys.modules), program
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    ["do_cross_infer.py", "metric/evaluation.py a b", "script/compare_runs.py", "script/run_all.py --debug"],
)
def test_a_missing_package_is_one_line(words):
    """-S: without the installed packages."""
    done = subprocess.run([sys.executable, "-S", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert "is not installed" in done.stderr and "requirements" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["quickstart", "test", "run_all", "run_rounds", "download"])
def test_help_of_a_shell_script_explains_it(name):
    done = subprocess.run(["sh", f"script/{name}.sh", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert len(done.stdout.splitlines()) > 3 and f"{name}.sh" in done.stdout


def test_an_unknown_option_of_the_quick_start_is_refused():
    done = subprocess.run(
        ["sh", "script/quickstart.sh", "--nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--nothing" in done.stderr and not done.stdout


@pytest.mark.parametrize(("lacks", "words"), [("version_info", "3.10"), ("ensurepip", "python3-venv")])
def test_the_quick_start_without_a_usable_python(tmp_path, lacks, words):
    (tmp_path / "script").mkdir()
    for name in ("quickstart.sh", "make_venv.sh"):
        shutil.copy(ROOT / "script" / name, tmp_path / "script")
    commands = tmp_path / "commands"
    commands.mkdir()
    os.symlink(shutil.which("dirname"), commands / "dirname")
    (commands / "python3").write_text(f'#!/bin/sh\ncase "$2" in *{lacks}*) exit 1 ;; esac\n')
    (commands / "python3").chmod(0o755)
    command = [shutil.which("sh"), tmp_path / "script/quickstart.sh"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(commands)})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("ERROR ") and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()
