"""Atomic files and JSON."""

import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch_src.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # the repository


def from_root(path: str) -> str:
    """Return a path of the repository as seen from the current directory, in its shortest form."""
    if os.path.isabs(path):
        return path
    absolute = str(ROOT / path)
    return min(os.path.relpath(absolute), absolute, key=len)


def to_root(path: str) -> str:
    """Return a path as seen from the repository: relative inside it, else absolute."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


@contextmanager
def atomic_write(path: str | Path, mode: str = "w", keep_old: str | Path | None = None) -> Iterator[IO[Any]]:
    """Yield a temporary file that replaces `path` when the block ends without an error.

    A reader sees the old file or the complete new one. The old file is renamed to `keep_old`, if given.
    """
    path = Path(path)
    require_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = _temporary(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        with open(tmp, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_old is not None and path.exists():
            os.replace(path, keep_old)
        os.replace(tmp, path)
    except OSError as error:
        if error.errno is not None:  # numpy raises one without a number
            raise
        raise UserError(f"{path}: could not be written ({error}); is the disk full?") from error
    finally:
        tmp.unlink(missing_ok=True)
    _sync(path.parent)  # the rename


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an error.

    The caller checks that an existing folder may be replaced (runtime.outputs).
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = _temporary(path)
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        for found in [*tmp.rglob("*"), tmp]:
            _sync(found)
        if path.exists():
            shutil.rmtree(path)
        os.rename(tmp, path)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    _sync(path.parent)


def require_replaceable(path: Path) -> None:
    """UserError when `path` is a folder, a device or a pipe, which a written file must not replace."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder (expected a file to write)")
    device = re.match(r"/(dev(?!/shm/)|proc|sys)/", os.path.abspath(path))  # /dev/stdout may be a file
    if device or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: not a regular file (expected a file to write)")


def _temporary(path: Path) -> Path:
    """Return a temporary name beside `path`, and delete what killed processes left under such names."""
    # host and process id in the name: two machines may write the same file on a shared file system
    prefix = f"{path.name}.{socket.gethostname()}"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}.*.tmp"):
        if _is_running(leftover.name.split(".")[-2]):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return path.with_name(f"{prefix}.{os.getpid()}.tmp")


def _sync(path: Path) -> None:
    """Write a file, or the names in a folder, to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _is_running(pid: str) -> bool:
    """Return whether a process with this id runs on this machine; True when that is unknown."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in `path`; UserError when it is missing, damaged or not an object."""
    value = _read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON {type(value).__name__} (expected an object)")
    return value


def read_json_list(path: str | Path) -> list[dict[str, Any]]:
    """Return the JSON array of objects in `path`; UserError like read_json."""
    value = _read_json(path)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{path}: expected a JSON array of objects")
    return value


def _read_json(path: str | Path) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def require(path: str | Path, what: str, fix: str = "") -> str:
    """Return `path`; UserError when it does not exist, describing the file (`what`) and the fix."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder ({what})" + (f"; {fix}" if fix else ""))
    return str(path)
