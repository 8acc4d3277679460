"""Optional libraries: imported where they are needed, with an error that says why one cannot be."""

from importlib import import_module
from typing import Any

from torch_src.runtime.errors import UserError, first_line


def import_library(name: str, requirements: str, package: str = "") -> Any:
    """Return the module `name`; UserError when its `package` is not installed, or when its import fails.

    Any exception counts: a broken package, a missing system library or an unusable proxy setting raises what
    it likes.
    """
    fix = f"python -m pip install -r {requirements}"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name in (name, name.partition(".")[0]):
            raise UserError(f"{package or name} is not installed; run {fix}") from None
        raise UserError(f"{package or name} cannot be imported ({first_line(error)}); run {fix}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"[:300]
        raise UserError(f"{package or name} is installed but cannot be imported ({reason})") from error
