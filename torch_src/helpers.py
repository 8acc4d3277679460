"""Small things every program needs: log lines, atomic files, exit statuses."""

import glob
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from torch_src.errors import Stopped, UserError, is_out_of_memory


def rank() -> int:
    """Return the number of this process among those that torchrun started; 0 for a single one."""
    return int(os.getenv("RANK", "0"))


def say(line: str) -> None:
    """Print one log line at once: under nohup a line kept in a buffer is a line lost when the run
    is killed. Processes but the first put their number before it.
    """
    print(f"[rank {rank()}] {line}" if rank() else line, flush=True)


def warn(line: str) -> None:
    """Print one warning; the word stands first so that `grep WARNING train.log` finds all of them."""
    say(f"WARNING: {line}")


def exit_status(program, *mistakes: type[Exception]) -> int:
    """Run `program()` and return the process's exit status: 0, 2 for a user's mistake (UserError, and what
    else `mistakes` names) or when memory does not suffice, 130 when interrupted.
    """
    try:
        program()
    except (UserError, *mistakes) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        mend = "lower --grad_cache_chunk (training) or --tokens_per_batch; --plan suggests a number"
        what = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        print(f"error: out of memory ({what}); {mend}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr, flush=True)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted: the same command carries on", file=sys.stderr, flush=True)
        return 130
    return 0


def leave(program: Callable[[], int]) -> NoReturn:
    """Run `program()` and end the process with the status that it returns.

    Ctrl-C while `program` is still importing, or is past its work, ends it without a traceback: between the
    two exit_status sees to it.
    """
    sys.unraisablehook = _raise_again
    try:
        status = program()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _raise_again(lost) -> None:
    """Python drops what a signal's handler raises while some object is being deleted: Ctrl-C comes again."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    elif not issubclass(lost.exc_type, Stopped):  # the run knows that it is to stop, and will
        sys.__unraisablehook__(lost)


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


def one_ahead(prepare: Callable, items: Iterable) -> Iterator:
    """Yield prepare(item) of each item, the next one being prepared in a thread while this one is used."""
    with ThreadPoolExecutor(max_workers=1) as ahead:
        waiting = None
        for item in items:
            ready, waiting = waiting, ahead.submit(prepare, item)
            if ready is not None:
                yield ready.result()
        if waiting is not None:
            yield waiting.result()


def duration(seconds: float) -> str:
    """`1h52m`, `3m07s` or `4.2s`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
