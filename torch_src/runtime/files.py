"""Atomic files and JSON."""

import glob
import json
import os
import socket
from contextlib import contextmanager
from pathlib import Path

from torch_src.runtime.errors import UserError


@contextmanager
def atomic_write(path, mode: str = "w", keep_old=None):
    """Yield a file that becomes `path` only when the block ends well: tmp + fsync + rename, the folder too.

    A reader sees the old file or the whole new one, never a half; after a failure the old one is untouched.
    With `keep_old` the old file is kept under that name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One process at a time writes a given file, but two may meet on a shared folder: keep their tmp files
    # apart.
    here = f"{path.name}.{socket.gethostname()}"
    tmp = path.with_name(f"{here}.{os.getpid()}.tmp")
    for left in path.parent.glob(f"{glob.escape(here)}.*.tmp"):
        if not _is_running(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)  # of a killed process
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(tmp, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_old is not None and path.exists():
            os.replace(path, keep_old)
        os.replace(tmp, path)
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path}: could not be written ({error}); is the disk full?") from error  # numpy's
    finally:
        tmp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _is_running(pid: str) -> bool:
    """Return whether a process of this machine has the number; True where that cannot be known."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


def write_json(path, value) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


def read_json(path) -> dict:
    """Return the JSON object in `path`. UserError names the file when it is missing, torn or not an
    object.
    """
    return _read_json(path, dict, "object")


def read_json_list(path) -> list[dict]:
    """Return the JSON array of objects in `path`; UserError as read_json."""
    value = _read_json(path, list, "array")
    if not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{path}: expected a JSON array of objects")
    return value


def _read_json(path, kind: type, name: str):
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected a JSON {name}, got {type(value).__name__}")
    return value


def require(path, what: str, mend: str = "") -> str:
    """Return `path` when it exists, else UserError naming what it is and the mend."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder ({what})" + (f"; {mend}" if mend else ""))
    return str(path)
