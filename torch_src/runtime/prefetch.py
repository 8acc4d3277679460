"""Prepare the next items, or finish the previous one, while the current one is used."""

import atexit
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from torch_src.runtime.errors import UserError, first_line

PARALLEL_TOKENIZERS = "TOKENIZERS_PARALLELISM"  # environment variable of the tokenizers library
STUCK_SECONDS = 600  # without the next item, after which the workers are given up
Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def one_ahead(prepare: Callable[[Item], Prepared], items: Iterable[Item]) -> Iterator[Prepared]:
    """Yield prepare(item) for each item; a thread prepares the next one meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        waiting: Future[Prepared] | None = None
        for item in items:
            ready, waiting = waiting, executor.submit(prepare, item)
            if ready is not None:
                yield ready.result()
        if waiting is not None:
            yield waiting.result()


def finish_in_thread(finish: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Call finish(item) for each item in a thread, while the next item is made."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        running: Future[object] | None = None
        for item in items:
            if running is not None:
                running.result()
            running = executor.submit(finish, item)
        if running is not None:
            running.result()


def prepared_by_workers(
    prepare: Callable[[Item], Prepared], items: Iterable[Item], workers: int, ahead: int = 2
) -> Iterator[Prepared]:
    """Yield prepare(item) for each item, in order; each of `workers` processes is up to `ahead` items ahead.

    prepare is copied to the processes. Its UserError and OSError end the iteration as a UserError here.
    """
    # A DataLoader preserves the order and ends its workers with this process.
    loader: Any = DataLoader(
        _Prepared(prepare),
        sampler=items,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_stop_signals,
        timeout=STUCK_SECONDS,
    )
    with _sequential_tokenizers():
        prepared = iter(loader)  # starts the processes
    end = partial(_end_workers, prepared)
    # multiprocessing waits for them at exit, when the traceback of an error may still keep this generator
    atexit.register(end)
    try:
        for item in prepared:
            if isinstance(item, UserError):
                raise UserError(str(item))
            yield item
    except RuntimeError as error:  # a worker was killed, or does not answer
        if not first_line(error).startswith("DataLoader"):
            raise
        raise UserError(
            f"a process that prepares the next texts was killed or gave nothing for {STUCK_SECONDS} s "
            f"({first_line(error)}); free main memory and repeat the command, which resumes"
        ) from error
    finally:
        atexit.unregister(end)
        end()


def _end_workers(prepared: Any) -> None:
    """End the processes of a DataLoader's iterator, also those that are stuck."""
    prepared._shutdown_workers()
    for process in prepared._workers:
        process.kill()


class _Prepared(Dataset):
    def __init__(self, prepare: Callable[[Any], Any]):
        self.prepare = prepare

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.prepare(item)
        except UserError as error:
            return UserError(str(error))  # not raised: a DataLoader would add its traceback
        except OSError as error:
            return UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _ignore_stop_signals(_worker: int) -> None:
    """Ignore SIGINT and the first SIGTERM.

    They reach every process, and the main process ends the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _unchanged(item: Any) -> Any:
    return item  # a named function: worker processes cannot receive a lambda


@contextmanager
def _sequential_tokenizers() -> Iterator[None]:
    """Set TOKENIZERS_PARALLELISM=false for processes started in this block; tokenizers would warn in each."""
    before = os.getenv(PARALLEL_TOKENIZERS)
    os.environ[PARALLEL_TOKENIZERS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLEL_TOKENIZERS]
        else:
            os.environ[PARALLEL_TOKENIZERS] = before
