"""The repository's own rules: imports, nothing done at import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_commands import ROOT, SETTINGS

# `runtime <- data <- models <- retrieval <- training <- programs <- tools, script`: imports go left only.
ORDER = ["runtime", "data", "models", "retrieval", "training", "programs", "tools"]
MODULES = sorted((ROOT / "torch_src").rglob("[a-z]*.py"))


def package(module: str) -> str:
    """Return the package of `torch_src.x.y`; the files on top are the programs and their settings."""
    name = module.split(".")[1]
    return name if name in ORDER else "programs"


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Return the dotted names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_package_imports_only_from_packages_to_its_left(path):
    own = ORDER.index(package(dotted(path)))
    wrong = {
        name
        for name in imported(path)
        if name.startswith(("torch_src.", "script")) and ORDER.index(package(name)) > own
    }
    assert not wrong, f"{dotted(path)} imports {wrong}"


@pytest.mark.parametrize("path", [path for path in MODULES if package(dotted(path)) == "data"], ids=dotted)
def test_data_needs_no_torch(path):
    heavy = {"torch", "transformers", "faiss"}
    assert not {name.split(".")[0] for name in imported(path)} & heavy


def test_only_programs_tools_and_the_training_stage_see_settings_objects():
    sees_settings = {"stage"}
    for path in MODULES:
        if package(dotted(path)) not in ("programs", "tools") and path.stem not in sees_settings:
            assert not re.search(r"\bhp\.", path.read_text(encoding="utf-8")), path


def test_handle_uses_the_standard_library_alone():
    assert {name.split(".")[0] for name in imported(ROOT / "script/handle.py")} <= set(
        sys.stdlib_module_names
    )


@pytest.mark.slow
def test_nothing_happens_at_import(tmp_path):
    """With another program's arguments in an empty folder: no parsing, file, device or environment."""
    names = [dotted(path) for path in MODULES] + [name[:-3] for name in SETTINGS if "/" not in name]
    code = f"""
import os, sys, logging
sys.path.insert(0, {str(ROOT)!r}); sys.argv = ["other", "--not_ours", "x"]
import torch, transformers, torch.utils.tensorboard, numpy
own = lambda: {{k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}}  # torch's
before = own(), len(logging.getLogger().handlers), torch.get_num_threads(), torch.initial_seed()
for name in {names!r}: __import__(name)
assert before == (own(), len(logging.getLogger().handlers), torch.get_num_threads(), torch.initial_seed())
assert not torch.cuda.is_initialized()
print("quiet")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "quiet\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_cuda_visible_devices_is_never_written():
    for path in [*MODULES, *ROOT.glob("do_*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.name == "prefetch.py":
            text = text.replace("environ[PARALLEL_TOKENIZERS]", "")
        assert not re.search(r"\b(environ|putenv)\b", text), path


def test_no_pickle_and_no_remote_code():
    for path in [*MODULES, *ROOT.glob("do_*.py"), *ROOT.glob("script/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text and "allow_pickle=True" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_lines_of_shell_scripts_parse():
    for path in [*ROOT.glob("script/*.sh"), ROOT / ".ci/run"]:
        shell = "bash" if path.name == "run" else "sh"
        assert subprocess.run([shell, "-n", path]).returncode == 0, path
