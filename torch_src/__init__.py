"""Passage retrieval in two stages: dual encoder, exact search, cross-encoder. Which module imports which:
tests/test_layout.py.

`from torch_src import Retriever, Reranker` is the Python API (docs/service_and_api.md). Importing torch_src
imports no other package. In a program of this repository a missing package ends it with one line.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 10):  # noqa: UP036 (older versions read this file, too)
    sys.stderr.write("ERROR " + sys.executable + ": an older python (expected 3.10 or later)\n")
    sys.exit(2)

from torch_src.runtime.libraries import report_missing_package

if TYPE_CHECKING:
    from torch_src.inference import Retriever
    from torch_src.reranker import Reranker

__all__ = ["Reranker", "Retriever"]


def __getattr__(name: str) -> Any:
    """Import the classes of the Python API, and with them torch, when they are first used."""
    if name == "Retriever":
        from torch_src.inference import Retriever

        return Retriever
    if name == "Reranker":
        from torch_src.reranker import Reranker

        return Reranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_own_program() -> bool:
    """Return whether the process runs a file of this repository, not a notebook or another program."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    name = os.path.relpath(os.path.abspath(program), root) if program else ""
    return name.startswith(("do_", "script" + os.sep, "metric" + os.sep))


if sys.excepthook is sys.__excepthook__ and _is_own_program():
    sys.excepthook = report_missing_package
