"""Which process works on which block of a folder: claims that a dead process cannot hold.

A claim is a POSIX lock on one byte of the file `claims`, at the block's number. The system drops it with the
process, however that ends, and it works between machines where the shared file system has locks (NFS does).
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from torch_src.runtime.log import warn

WHOLE_FOLDER = 1 << 40  # the byte that stands for the folder itself: beyond every block's number


class Claims:
    """Claims of this process on the blocks of one folder."""

    def __init__(self, folder):
        path = Path(folder) / "claims"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab")  # kept open: closing any handle on it would drop every claim
        self.mine: set[int] = set()
        self.works = True

    def take(self, block: int) -> bool:
        """Claim a block; False when another process has it, or this one already."""
        if block in self.mine:
            return False
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, block)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            self._without_locks(error)
        self.mine.add(block)
        return True

    def give_back(self, block: int) -> None:
        """Let the others have a block."""
        self.mine.discard(block)
        if self.works:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, block)

    @contextmanager
    def whole_folder(self) -> Iterator[None]:
        """Hold the folder for a moment: one process at a time looks at it, and perhaps empties it."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, WHOLE_FOLDER)
        except OSError as error:
            self._without_locks(error)
        try:
            yield
        finally:
            if self.works:
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, WHOLE_FOLDER)

    def _without_locks(self, error: OSError) -> None:
        if self.works:
            why = f"no file locks here ({error.strerror})"
            warn(f"{self.file.name}: {why}; run one process at a time in this folder")
        self.works = False

    def takeable(self, store) -> Iterator[int]:
        """Claim and yield one missing block of a VectorStore after the other; those of other processes are
        left.
        """
        for block in store.missing_blocks():
            if self.take(block):
                if store.is_missing(block):  # it may have been finished between the two looks
                    yield block
                else:
                    self.give_back(block)

    def close(self) -> None:
        """Drop all claims."""
        self.file.close()
        self.mine.clear()


class Hold:
    """This process's hold on what is in a folder, for as long as something refers to it.

    Whoever reads there holds it together with the others; who wants to throw it away must hold it alone.
    """

    known: WeakValueDictionary = WeakValueDictionary()  # one handle a folder: closing any drops the locks

    def __init__(self, path: Path):
        self.file = open(path, "a+b")  # POSIX asks for reading and writing to lock either way

    @classmethod
    def of(cls, folder) -> "Hold":
        """Return the process's hold of the folder."""
        path = Path(folder).resolve() / "in_use"
        hold = cls.known.get(path) or cls(path)
        cls.known[path] = hold
        return hold

    def alone(self) -> bool:
        """Take it from all others; False when one of them has it."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            pass  # no locks here: Claims has said so
        return True

    def together(self) -> None:
        """Hold it, or go on holding it, with the others."""
        with suppress(OSError):  # no locks here
            fcntl.lockf(self.file, fcntl.LOCK_SH)
