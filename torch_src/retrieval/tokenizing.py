"""Token ids of blocks of texts or pairs, tokenized ahead of the model by a thread or by processes."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

from torch_src.models.tokenization import TokenTable
from torch_src.runtime.prefetch import one_ahead, prepared_by_workers

TOKENIZE_AHEAD = 4096  # texts tokenized at once: about 17 KB per passage as Python lists
TEXTS_PER_TASK = 1024  # that a worker process tokenizes at once, in about a second

Span = tuple[int, int]  # (first row, last row + 1)
Key = TypeVar("Key")


def tokenized_spans(
    tokenize: Callable[[int, int], TokenTable], spans: Iterable[Span], max_rows: int, workers: int = 0
) -> Iterator[tuple[Span, TokenTable]]:
    """Yield each span of rows with its token ids, tokenize(first row, last row + 1), in order.

    A thread tokenizes the next rows while a span is used. With `workers` > 0 that many processes tokenize
    the next span; `tokenize` must be picklable. `max_rows`: of a span.
    """
    return tokenized_groups(tokenize, ((span, [span]) for span in spans), max_rows, workers)


def tokenized_groups(
    tokenize: Callable[[int, int], TokenTable],
    groups: Iterable[tuple[Key, list[Span]]],
    max_rows: int,
    workers: int = 0,
) -> Iterator[tuple[Key, TokenTable]]:
    """Yield each key with the token ids of all its spans, like tokenized_spans; `max_rows`: of a group."""
    size = TEXTS_PER_TASK if workers else TOKENIZE_AHEAD

    def tasks() -> Iterator[tuple[Key, list[Span], bool]]:
        for key, spans in groups:
            chunks = list(_chunks(spans, size)) or [[]]
            for number, chunk in enumerate(chunks, start=1):
                yield key, chunk, number == len(chunks)

    prepare = partial(_tokenize, tokenize)
    if workers:
        ahead = max(2, 1 + math.ceil(max_rows / (size * workers)))  # a whole group
        ready = prepared_by_workers(prepare, tasks(), workers, ahead)
    else:
        ready = one_ahead(prepare, tasks())
    tables: list[TokenTable] = []
    for key, table, is_last in ready:
        tables.append(table)
        if is_last:
            yield key, TokenTable.concatenate(tables)
            tables = []


def _chunks(spans: Iterable[Span], size: int) -> Iterator[list[Span]]:
    """Yield the spans, divided where needed, in lists of `size` rows; the last one may have fewer."""
    chunk: list[Span] = []
    free = size
    for first, last in spans:
        while first < last:
            end = min(last, first + free)
            chunk.append((first, end))
            first, free = end, free - (end - first)
            if not free:
                yield chunk
                chunk, free = [], size
    if chunk:
        yield chunk


def _tokenize(
    tokenize: Callable[[int, int], TokenTable], task: tuple[Key, list[Span], bool]
) -> tuple[Key, TokenTable, bool]:
    """Return (key, token ids of these spans, whether they are the last ones of the key)."""
    key, spans, is_last = task
    return key, TokenTable.concatenate([tokenize(*span) for span in spans]), is_last
