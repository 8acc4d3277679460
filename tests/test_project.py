"""The project's own files: one version, the same bounds everywhere, existing commands."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_commands import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(name: str) -> set[str]:
    """Return the lines of a requirements file in the notation of extras."""
    lines = (line for line in text_of(name).splitlines() if line and not line.startswith("#"))
    # the dependencies are part of every extra
    others = (line.replace('"', "'") for line in lines if line != "-r requirements-base.txt")
    return {re.sub(r"-r requirements-([\w-]+)\.txt", rf"{PROJECT['name']}[\1]", line) for line in others}


def test_every_requirements_file_is_an_extra_with_the_same_bounds():
    files = {path.name for path in ROOT.glob("requirements*.txt")} - {"requirements-base.txt"}
    assert files == {f"requirements-{name}.txt" for name in EXTRAS} - {"requirements-gpu.txt"} | {
        "requirements.txt"
    }
    assert set(PROJECT["dependencies"]) == requirements("requirements-base.txt")
    for name, bounds in EXTRAS.items():
        assert set(bounds) == requirements(
            "requirements.txt" if name == "gpu" else f"requirements-{name}.txt"
        ), name


def test_one_version():
    version = PROJECT["version"]
    assert str(yaml.safe_load(text_of("CITATION.cff"))["version"]) == version
    assert re.search(r"(?m)^## (\d\S*)", text_of("CHANGELOG.md"))[1] == version


def test_pre_commit_has_the_ruff_of_the_tests():
    hooks = {
        repo["repo"]: repo["rev"] for repo in yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    }
    assert f"ruff=={hooks['https://github.com/astral-sh/ruff-pre-commit'][1:]}" in EXTRAS["test"]


def scripts(command: str) -> list[str]:
    """Return the shell scripts that a command names."""
    return re.findall(r"script/\w+\.sh", command)


def test_each_make_target_calls_one_script():
    targets = re.findall(r"(?m)^([\w-]+):.*\n((?:\t.*\n)+)", text_of("Makefile"))
    assert [name for name, _ in targets] == re.search(r"\.PHONY: (.*)", text_of("Makefile"))[1].split()
    for name, recipe in targets:
        (script,) = scripts(recipe)
        assert (ROOT / script).is_file(), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_a_developer_runs(path: Path):
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"} and "concurrency" in workflow
    for job in workflow["jobs"].values():
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        assert "script/test.sh" in scripts(commands) and all(
            (ROOT / name).is_file() for name in scripts(commands)
        )
        assert all(re.fullmatch(r"[\w/-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_the_workflow_has_every_python_of_the_project():
    workflow = yaml.safe_load(text_of(".github/workflows/test.yml"))
    prefix = "Programming Language :: Python :: "
    pythons = [name.removeprefix(prefix) for name in PROJECT["classifiers"] if name.startswith(prefix)]
    assert workflow["jobs"]["core"]["strategy"]["matrix"]["python"] == pythons
    assert PROJECT["requires-python"] == f">={pythons[0]}"
