"""File locks between processes. The kernel releases them when a process ends, even after a crash.

POSIX locks on bytes of a file also work across machines if the shared file system supports locks (NFS does).
Closing any handle of a file releases all locks of the process on it, so each file has one handle.
"""

import fcntl
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from torch_src.runtime.errors import UserError
from torch_src.runtime.log import warn

FOLDER_BYTE = 1 << 40  # beyond every block number
READERS_BYTE = FOLDER_BYTE + 1


def _lock(file: IO[bytes], kind: int, byte: int = 0) -> bool:
    """Lock or unlock one byte; False when another process holds it, True where locks are not supported."""
    try:
        fcntl.lockf(file, kind, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        _warn_unsupported(file.name, error.strerror)
    return True


@cache
def _warn_unsupported(path: str, reason: str) -> None:
    warn(f"{path}: file locks are not supported ({reason}); run one process at a time in this folder")


@contextmanager
def folder_lock(folder: str | Path, shared: bool = False, name: str = "lock") -> Iterator[None]:
    """Lock an output folder for one run; UserError when another run has locked it.

    Runs with a `shared` lock may run together. A program that starts another one in the same folder needs
    a lock file with a different `name`.
    """
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:  # a shared lock needs a readable file, an exclusive one a writable file
        if not _lock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB):
            raise UserError(f"{folder}: locked by another run; wait for it, or use another folder")
        yield


@contextmanager
def waiting_lock(path: str | Path) -> Iterator[None]:
    """Lock a file; wait while another process has locked it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _lock(file, fcntl.LOCK_EX)
        yield


class BlockLocks:
    """This process's locks on the blocks of one folder; released when the object is garbage-collected."""

    _open: WeakValueDictionary[Path, "BlockLocks"] = WeakValueDictionary()

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file: IO[bytes] = open(folder / "blocks.lock", "a+b")
        self.acquired: set[int] = set()

    @classmethod
    def of(cls, folder: str | Path) -> "BlockLocks":
        """Return the process's locks on the folder."""
        path = Path(folder).resolve()
        locks = cls._open.get(path) or cls(path)
        cls._open[path] = locks
        return locks

    def acquire(self, block: int) -> bool:
        """Lock a block; False when another process, or this one, has locked it."""
        if block in self.acquired or not _lock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, block):
            return False
        self.acquired.add(block)
        return True

    def release(self, *blocks: int) -> None:
        for block in blocks:
            self.acquired.discard(block)
            _lock(self.file, fcntl.LOCK_UN, block)

    def acquire_missing(self, blocks: Iterable[int], is_missing: Callable[[int], bool]) -> Iterator[int]:
        """Lock and yield each block that no other process has locked or finished."""
        for block in blocks:
            if self.acquire(block):
                if is_missing(block):  # else another process finished it just before
                    yield block
                else:
                    self.release(block)

    def release_all(self) -> None:
        self.release(*self.acquired)

    @contextmanager
    def folder(self) -> Iterator[None]:
        """Lock the whole folder, waiting until no other process has locked it."""
        _lock(self.file, fcntl.LOCK_EX, FOLDER_BYTE)
        try:
            yield
        finally:
            _lock(self.file, fcntl.LOCK_UN, FOLDER_BYTE)

    def read(self) -> None:
        """Take a shared lock that keeps other processes from deleting the blocks."""
        _lock(self.file, fcntl.LOCK_SH, READERS_BYTE)

    def only_reader(self) -> bool:
        """Return whether no other process has the read() lock; if so, none gets it before this one."""
        return _lock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, READERS_BYTE)
