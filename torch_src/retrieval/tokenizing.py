"""Token ids of blocks of texts or pairs, tokenized ahead of the model by a thread or by processes."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch_src.models.tokenization import TokenTable
from torch_src.runtime.prefetch import one_ahead, prepared_by_workers

TOKENIZE_AHEAD = 4096  # texts tokenized at once: about 17 KB per passage as Python lists
TEXTS_PER_TASK = 1024  # that a worker process tokenizes at once, in about a second

Span = tuple[int, int]  # (first row, last row + 1)


def tokenized_spans(
    tokenize: Callable[[int, int], TokenTable], spans: Iterable[Span], max_rows: int, workers: int = 0
) -> Iterator[tuple[Span, TokenTable]]:
    """Yield each span of rows with its token ids, tokenize(first row, last row + 1), in order.

    A thread tokenizes the next rows while a span is used. With `workers` > 0 that many processes tokenize
    the next span; `tokenize` must be picklable. `max_rows`: of a span.
    """

    size = TEXTS_PER_TASK if workers else TOKENIZE_AHEAD

    def chunks() -> Iterator[tuple[Span, Span]]:
        for first, last in spans:
            for start in range(first, last, size):
                yield (first, last), (start, min(last, start + size))

    prepare = partial(_tokenize, tokenize)
    if workers:
        ahead = max(2, 1 + math.ceil(max_rows / (size * workers)))  # a whole span
        ready = prepared_by_workers(prepare, chunks(), workers, ahead)
    else:
        ready = one_ahead(prepare, chunks())
    tables: list[TokenTable] = []
    for span, last, table in ready:
        tables.append(table)
        if last == span[1]:
            yield span, TokenTable.concatenate(tables)
            tables = []


def _tokenize(
    tokenize: Callable[[int, int], TokenTable], spans: tuple[Span, Span]
) -> tuple[Span, int, TokenTable]:
    """Return (span, last row + 1 of this chunk, its token ids)."""
    span, chunk = spans
    return span, chunk[1], tokenize(*chunk)
