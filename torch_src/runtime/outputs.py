"""The outputs of a command: checked before it starts, so that none replaces an input or a foreign file."""

import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import require_replaceable
from torch_src.runtime.stamps import stamp_path, stamp_stage

FilePath = str | Path
FileTest = Callable[[FilePath], bool]
HEAD = 4096  # bytes that tell the format of a file


def begins(pattern: bytes) -> FileTest:
    """Return a test of whether the content of a file begins like this pattern."""

    def test(path: FilePath) -> bool:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            head = file.read(HEAD)
        if head.startswith(b"\x1f\x8b"):
            try:
                head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD)
            except zlib.error:  # reported by the reader of the file
                return False
        return re.match(pattern, head) is not None

    return test


def never(_: Path) -> bool:
    """A file without a stamp is not the program's own: for files whose path is an option."""
    return False


def settings_of(result: FilePath) -> Callable[[Path], bool]:
    """Return a test of whether a JSON file holds settings, or is at least beside a result with a stamp."""
    return lambda path: SETTINGS(path) or stamp_path(result).exists()


RUN = begins(rb"[^\t\n]*\t[0-9]+\t[0-9]+\t[-+.0-9e]+\n")
RESULT = begins(rb'\{\s*("[^\n]*": *\[|\}\s*$)')
SETTINGS = begins(rb'\{\s*"output_dir": ')
TIMES = begins(rb'\{\s*"(rounds|seconds)": ')
NUMPY = begins(rb"\x93NUMPY")


@dataclass(frozen=True)
class Output:
    """A file that a command writes.

    An existing file is the program's own if its stamp is of one of the `stages`, or is incomplete. Without a
    stamp `is_own(path)` decides.
    """

    path: FilePath
    is_own: Callable[[Path], bool]
    stages: Sequence[str] = ()


def check_outputs(outputs: Iterable[Output], inputs: Iterable[FilePath] = ()) -> None:
    """UserError when an output is an input, inside an input folder, another output, or a foreign file.

    Links are followed. An input that is empty or does not exist is compared by its path.
    """
    sources = [Path(path) for path in inputs if str(path)]
    seen: set[str] = set()
    for output in outputs:
        path, real = Path(output.path), os.path.realpath(output.path)
        check_apart(path, sources)
        if real in seen:
            raise UserError(f"{path}: is named for two outputs; name another file for one of them")
        seen.add(real)
        require_replaceable(path)
        if path.suffix == ".gz":
            raise UserError(f"{path}: outputs are not compressed; name it {path.with_suffix('').name}")
        _check_own(path, output)


def check_apart(output: FilePath, inputs: Iterable[FilePath]) -> None:
    """UserError when an output file or folder is one of the inputs or inside an input folder.

    The folder `output` of the current directory is fine even if that directory is the input folder.
    """
    real = Path(os.path.realpath(output))
    for source in inputs:
        if not str(source):
            continue
        target = Path(os.path.realpath(source))
        if real == target or _same_file(real, target):
            raise UserError(f"{output}: the output is one of the inputs ({source}); name another output")
        here = Path.cwd()
        around = target == here or target in here.parents
        if target.is_dir() and (real.parent == target if around else target in real.parents):
            raise UserError(f"{output}: the output is inside the input folder {source}; name another output")


def _same_file(first: Path, second: Path) -> bool:
    """Return whether both are names (hard links) of one file."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _check_own(path: Path, output: Output) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    stage = stamp_stage(path)
    if stage is not None and (stage == "" or stage in output.stages):
        return
    if stage is None and output.is_own(path):
        return
    writer = f"was written by {stage}" if stage else "was not written by this program"
    raise UserError(f"{path}: exists and {writer}; move it, delete it, or name another output")


def check_new_folder(folder: FilePath, inputs: Iterable[FilePath] = ()) -> None:
    """UserError unless the output folder is missing or empty, and apart from the inputs."""
    path = Path(folder)
    check_apart(path, inputs)
    for source in filter(str, inputs):
        if Path(os.path.realpath(path)) in Path(os.path.realpath(source)).parents:
            raise UserError(f"{path}: contains the input {source}; name another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file (expected a new folder); name another folder")
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path}: not empty; name another folder, or delete this one")
