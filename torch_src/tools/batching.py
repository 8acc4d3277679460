"""Requests of many callers computed together: a queue and one thread for each kind of work."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

WAIT_SECONDS = 0.003  # for more callers, when the last batch had several

Item = TypeVar("Item")
Result = TypeVar("Result")


class Late(Exception):
    """The result is not there in time."""


class Left(Exception):
    """The caller has left: nobody reads the result."""


class Call:
    """One request: how long its results are of use. Another thread may call leave()."""

    def __init__(self, seconds: float | None = None):
        """seconds: until Late is raised; None: no limit."""
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.has_left = False
        self.futures: list[Future] = []

    def results(self, futures: Iterable["Future[Result]"]) -> list[Result]:
        """Return the results, in order; Late or Left, after which the rest is not computed."""
        self.futures = found = list(futures)
        if self.has_left:
            self.leave()
        try:
            return [future.result(self._remaining()) for future in found]
        except FutureTimeout:
            raise Late from None
        except CancelledError:
            raise Left from None
        finally:
            for future in found:
                future.cancel()

    def _remaining(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def leave(self) -> None:
        """Drop what is not yet computed; results() raises Left."""
        self.has_left = True
        for future in self.futures:
            future.cancel()


class Batcher(Generic[Item, Result]):
    """Computes the items that callers submit in batches, in one thread, in order."""

    def __init__(
        self,
        compute: Callable[[list[Item]], list[Result]],
        most: int,
        size: Callable[[Item], int] | None = None,
    ):
        """compute: items to their results. A batch has at most `most` of size() in all, or one item."""
        self.compute, self.most, self.size = compute, most, size or (lambda item: 1)
        self.waiting: deque[tuple[Item, Future[Result]]] = deque()
        self.last = 0  # items of the latest batch
        self.worker = ThreadPoolExecutor(1, "batches")  # its thread ends when the batcher is deleted

    def submit(self, item: Item) -> "Future[Result]":
        future: Future[Result] = Future()
        self.waiting.append((item, future))
        self.worker.submit(self._run)
        return future

    def _run(self) -> None:
        """Compute one batch of what is waiting."""
        if not self.waiting:
            return  # an earlier batch had it
        if 1 < self.last > len(self.waiting):
            time.sleep(WAIT_SECONDS)
        batch: list[tuple[Item, Future[Result]]] = []
        total = 0
        while self.waiting:
            item, future = self.waiting[0]
            if batch and total + self.size(item) > self.most:
                break
            self.waiting.popleft()
            if future.set_running_or_notify_cancel():  # False: its caller has left
                batch.append((item, future))
                total += self.size(item)
        self.last = len(batch)
        if batch:
            self._finish(batch)

    def _finish(self, batch: list[tuple[Item, "Future[Result]"]]) -> None:
        try:
            results = self.compute([item for item, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                return batch[0][1].set_exception(error)
            for each in batch:  # the others need not fail with the one that did
                self._finish([each])
        else:
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
