"""Commands in messages, as the user can type them in the current directory."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from torch_src.runtime.files import from_root, to_root

DATASET = "dureader-retrieval-baseline-dataset"  # what script/download.sh writes, in the repository


def python() -> str:
    """Return the interpreter that runs: `python` or `python3` where that is the same one, else its path."""
    if not sys.executable:
        return "python3"
    for name in ("python", "python3"):
        found = shutil.which(name)
        # not by the file alone: that of a virtual environment is a link to the interpreter it was made by
        if found and os.path.dirname(found) == os.path.dirname(sys.executable):
            if os.path.samefile(found, sys.executable):
                return name
    return shlex.quote(from_root(to_root(sys.executable)))


def command(program: str, *words: object) -> str:
    """Return the command line of a program of the repository, such as do_dual_infer.py."""
    return f"{python()} {shlex.join([from_root(program), *map(str, words)])}"


def pip_install(*words: str) -> str:
    """Return the command that installs packages for the interpreter that runs."""
    return f"{python()} -m pip install {shlex.join(words)}"


def download(*words: str) -> str:
    """Return the command line of script/download.sh."""
    return shlex.join(["sh", from_root("script/download.sh"), *words])


def how_to_get(path: str | Path) -> str:
    """Return `; get it with ...` for a path of the data set that download.sh gets, else nothing."""
    is_ours = Path(to_root(str(path))).parts[:1] == (DATASET,)
    return f"; get it with `{download()}`" if is_ours else ""
