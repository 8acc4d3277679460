"""Libraries that are missing or cannot be imported: one line that says how to install them."""

import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from types import ModuleType, TracebackType
from typing import Any

from torch_src.runtime import log
from torch_src.runtime.commands import pip_install
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import ROOT, from_root

OWN = {"torch_src", "metric", "script"}
GPU_REQUIREMENTS, CPU_REQUIREMENTS = "requirements.txt", "requirements-cpu.txt"
VENV = ".venv/bin/python"  # made by script/quickstart.sh


def import_library(name: str, requirements: str, package: str = "") -> Any:
    """Return the module `name`; UserError when its `package` is not installed, or when its import fails.

    Any exception counts: a broken package, a missing system library or an unusable proxy setting raises what
    it likes.
    """
    fix = pip_install("-r", from_root(requirements))
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name in (name, name.partition(".")[0]):
            raise UserError(f"{package or name} is not installed; run {fix}") from None
        raise UserError(f"{package or name} cannot be imported ({first_line(error)}); run {fix}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"[:300]
        raise UserError(f"{package or name} is installed but cannot be imported ({reason})") from error


def report_missing_package(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Log a missing or broken package as one line and end with status 2 (a sys.excepthook)."""
    line = describe_missing(error) if isinstance(error, ImportError) else ""
    if line := line or describe_broken(error, trace):
        log.escape_unprintable()
        log.error(line)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


def describe_missing(error: ImportError) -> str:
    """Return which package is missing, or does not fit, and how to install it; empty for our own bug."""
    package = (error.name or "").partition(".")[0]
    if not package or package in OWN or package in sys.stdlib_module_names:
        return ""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"{package} is not installed in {sys.executable}; {how_to_install(package)}"
    reason = f"is installed in a version that does not fit ({first_line(error)})"
    return f"{package} {reason}; {how_to_install(package)}"


def describe_broken(error: BaseException, trace: TracebackType | None) -> str:
    """Return which package failed while it was imported, such as a half installed one; else nothing."""
    module = getattr(error, "obj", None)
    names: list[str] = []
    if isinstance(module, ModuleType) and getattr(module, "__file__", None) is None:
        names = [module.__name__]  # a folder without its files
    elif isinstance(error, Exception):
        frames = [frame for frame, _ in walk_tb(trace) if frame.f_code.co_name == "<module>"]
        names = [str(frame.f_globals.get("__name__")) for frame in frames]
    own = {*OWN, "__main__", *sys.stdlib_module_names}
    package = next((top for top in (name.partition(".")[0] for name in names) if top not in own), "")
    if not package:
        return ""
    reason = f"{type(error).__name__}: {first_line(error)}"[:200]
    return f"{package} in {sys.executable} cannot be imported ({reason}); {how_to_install(package)}"


def how_to_install(package: str) -> str:
    """Return the commands that install a package: the environment of the quick start, or pip."""
    file = requirements_of(package)
    pip = pip_install("-r", from_root(file))
    if (ROOT / VENV).exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        return f"run it with {from_root(VENV)}, or {pip}"
    is_main = file in (GPU_REQUIREMENTS, CPU_REQUIREMENTS)
    return f"run sh {from_root('script/quickstart.sh')}, or {pip}" if is_main else f"run {pip}"


def requirements_of(package: str) -> str:
    """Return the requirements file that names a package; of the two main ones the one for this machine."""
    name = re.compile(rf"(?mi)^{package.replace('_', '[-_]')}\b")
    for path in [*sorted(ROOT.glob("requirements-*.txt")), ROOT / "script/bench/requirements.txt"]:
        is_main = path.name in ("requirements-base.txt", CPU_REQUIREMENTS)
        if not is_main and name.search(path.read_text(encoding="utf-8")):
            return str(path.relative_to(ROOT))
    return GPU_REQUIREMENTS if shutil.which("nvidia-smi") else CPU_REQUIREMENTS
