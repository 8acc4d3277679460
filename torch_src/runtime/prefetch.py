"""Prepare the next item in a thread while this one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


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
