"""Prepare the next item in a thread while the current one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
