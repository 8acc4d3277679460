"""One run at a time in an output folder: a lock that the system drops with the process, however that ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch_src.runtime.errors import UserError
from torch_src.runtime.log import warn

ALONE, TOGETHER = fcntl.LOCK_EX, fcntl.LOCK_SH


@contextmanager
def output_lock(folder, kind: int = ALONE, first: bool = True, name: str = "lock") -> Iterator[None]:
    """Hold the folder within the block; UserError when another run has it.

    `TOGETHER`: runs that share their work (encoding) hold it at the same time, and no other beside them.
    Processes but the `first` of several rely on the first one's lock. `name`: of the file; a program that
    runs another one in its folder has a name of its own (a process that closes a file drops its locks on it).
    """
    path = Path(folder) / name
    if not first:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:  # POSIX asks for reading and writing to lock either way
        try:
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            mend = "wait for its end, or give this one another folder"
            raise UserError(f"{folder}: another run is writing there; {mend}") from None
        except OSError as error:
            warn(f"{path}: no file locks here ({error.strerror}); run one program at a time in this folder")
        yield
