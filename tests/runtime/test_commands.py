"""Commands in messages name the interpreter that runs and paths as seen from the current directory."""

import os
import sys

import pytest

from torch_src.runtime import commands
from torch_src.runtime.files import ROOT


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Return the folder of a virtual environment inside a repository, whose python is a link."""
    folder = tmp_path / "root" / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    monkeypatch.setattr(commands, "to_root", lambda path: os.path.relpath(path, tmp_path / "root"))
    monkeypatch.setattr(commands, "from_root", lambda path: os.path.relpath(tmp_path / "root" / path))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def test_the_interpreter_as_the_user_types_it(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")  # not activated: another python
    monkeypatch.chdir(tmp_path / "root")
    assert commands.python() == ".venv/bin/python"
    assert (
        commands.command("do_dual_infer.py", "--index", "a b")
        == ".venv/bin/python do_dual_infer.py --index 'a b'"
    )
    monkeypatch.chdir(tmp_path)
    assert commands.python() == "root/.venv/bin/python"
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")  # activated
    assert commands.python() == "python"


def test_only_the_data_set_of_download_sh_is_got_by_it(tmp_path):
    assert commands.how_to_get(tmp_path) == "" == commands.how_to_get(ROOT / "script/sample_data")
    assert "download.sh" in commands.how_to_get(ROOT / commands.DATASET / "train/dual.train.tsv")
