"""Windows of long passages in a collection: which vector belongs to which passage, and the best of each.

The score of a passage is that of its best window (MaxP, Dai and Callan 2019, arXiv 1905.09217).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from torch_src.data.collection import PassageCollection
from torch_src.models.tokenization import TextRules, TokenTable
from torch_src.models.windows import tokenize_windows, window_counts
from torch_src.retrieval.tokenizing import TEXTS_PER_TASK
from torch_src.retrieval.vectors import HASH_BYTES
from torch_src.runtime.files import atomic_write
from torch_src.runtime.locks import waiting_lock
from torch_src.runtime.log import log, warn
from torch_src.runtime.prefetch import one_ahead, prepared_by_workers
from torch_src.runtime.progress import Progress
from torch_src.runtime.stamps import JsonDict, checksum_files, read_checked_json, write_checked_json

FIRST_WINDOW = "first_window.npy"  # in the cache of an output folder
# Fields of the vectors' stamp that decide how many windows a passage has.
FIELDS = (
    "tokenizer", "passage_prefix", "remove_spaces", "p_max_seq_len", "passage_windows", "window_stride",
    "collection",
)  # fmt: skip
OVER_FETCH = 2  # times the average number of windows: vectors that an index returns for each passage wanted

# find(queries (B, H) float32, depth) -> (vector rows (B, depth) int64, scores (B, depth) float64), best first
FindRows = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class PassageWindows:
    """The vector rows of each passage: windows are in the order of their passages."""

    first: np.ndarray  # (P + 1,) int64: row of each passage's first window, and the number of windows

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "PassageWindows":
        """Return the map of passages with these numbers of windows (P,)."""
        return cls(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))

    @property
    def passages(self) -> int:
        return len(self.first) - 1

    @property
    def rows(self) -> int:
        """The number of windows."""
        return int(self.first[-1])

    def passages_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the passages of vector rows, int64; -1 of a row of -1."""
        return np.searchsorted(self.first, rows, side="right").astype(np.int64) - 1

    @cached_property
    def _passages_with(self) -> np.ndarray:
        """The number of passages with 0, 1, 2, ... windows."""
        return np.bincount(np.diff(self.first))

    def depth(self, topk: int) -> int:
        """Return the number of best windows that always belong to `topk` passages at least.

        That is one more than the windows of the topk - 1 passages that have the most.
        """
        left, depth = min(topk, self.passages) - 1, 1
        for count in range(len(self._passages_with) - 1, 0, -1):
            taken = min(left, int(self._passages_with[count]))
            depth, left = depth + taken * count, left - taken
        return depth

    def first_depth(self, topk: int) -> int:
        """Return the number of windows to request from an index first; the rest on demand."""
        keep = min(topk, self.passages)
        return min(self.depth(keep), OVER_FETCH * -(-keep * self.rows // self.passages))

    def collapse(self, rows: np.ndarray, scores: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (passages (B, keep) int64, scores (B, keep) float64) of windows (B, D), best first.

        Passages keep the place of their best window, and windows are in the order of their passages, so that
        ties go to the lower passage. Missing results are -1 with score -inf, and come last.
        """
        passages = self.passages_of(rows)
        by_passage = np.argsort(passages, axis=1, kind="stable")
        ordered = np.take_along_axis(passages, by_passage, 1)
        is_best = ordered >= 0
        is_best[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        best = np.zeros_like(is_best)
        np.put_along_axis(best, by_passage, is_best, 1)
        order = np.argsort(~best, axis=1, kind="stable")[:, :keep]
        kept = np.full((len(rows), keep), -1, np.int64), np.full((len(rows), keep), -np.inf)
        found = np.take_along_axis(best, order, 1)
        kept[0][:, : order.shape[1]] = np.where(found, np.take_along_axis(passages, order, 1), -1)
        kept[1][:, : order.shape[1]] = np.where(found, np.take_along_axis(scores, order, 1), -np.inf)
        return kept

    def search(
        self, find: FindRows, queries: np.ndarray, topk: int, most: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (passages (B, K) int64, scores (B, K) float64) from a search for windows.

        Queries whose windows belong to fewer than K passages are searched again for more windows, up to
        `most`, while `find` has more. K = min(topk, passages).
        """
        keep, most = min(topk, self.passages), min(self.rows, most or self.rows)
        rows, scores = np.full((len(queries), keep), -1, np.int64), np.full((len(queries), keep), -np.inf)
        left, depth = np.arange(len(queries)), min(most, self.first_depth(keep))
        while len(left):
            found, values = find(queries[left], depth)
            rows[left], scores[left] = self.collapse(found, values, keep)
            left = left[(rows[left, -1] < 0) & (found[:, -1] >= 0)]
            if depth == most:
                break
            depth = min(4 * depth, most)
        if len(left):
            warn(
                f"{len(left)} queries: the maximum of {most:,} windows belongs to fewer than {keep} passages"
            )
        return rows, scores


@dataclass
class WindowTexts:
    """A vector for each window of a collection's passages (VectorTexts)."""

    unit: ClassVar[str] = "windows"

    tokenizer: PreTrainedTokenizerBase
    rules: TextRules
    collection: PassageCollection
    windows: PassageWindows

    def __len__(self) -> int:
        return self.windows.rows

    def tokenize(self, first: int, last: int) -> TokenTable:
        """Return the token ids of the windows first..last-1."""
        begin, end = self._passages(first, last)
        table = tokenize_windows(self.tokenizer, self.collection[begin:end], self.rules)
        starts = self.windows.first[begin : end + 1]
        assert table.windows is not None and np.array_equal(table.windows, np.diff(starts))
        return table.slice(first - int(starts[0]), last - int(starts[0]))

    def hashes(self, first: int, last: int) -> np.ndarray:
        """Return the XXH3-128 hashes (last - first, 16) uint8 of the texts, the window number as seed."""
        begin, end = self._passages(first, last)
        starts, digests = self.windows.first, bytearray()
        for passage, text in enumerate(self.collection[begin:end], start=begin):
            data, start = text.encode("utf-8"), int(starts[passage])
            for row in range(max(first, start), min(last, int(starts[passage + 1]))):
                digests += xxhash.xxh3_128_digest(data, seed=row - start)
        return np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, HASH_BYTES)

    def _passages(self, first: int, last: int) -> tuple[int, int]:
        """Return the passages (first, last + 1) of windows first..last-1."""
        begin, end = self.windows.passages_of(np.array([first, last - 1])).tolist()
        return begin, end + 1


def collection_windows(
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules,
    collection: PassageCollection,
    stamp: JsonDict,
    cache: Path,
    log_every: float,
    workers: int = 0,
) -> PassageWindows:
    """Return the windows of a collection, from the cache or from one pass of the tokenizer over it.

    stamp: that of the vectors. `workers` processes tokenize (0: a thread). Processes that share the cache
    wait for the first of them.
    """
    fields = {name: stamp[name] for name in FIELDS}
    if (known := cached_windows(cache, fields)) is not None:
        return known
    with waiting_lock(cache / "first_window.lock"):
        if (known := cached_windows(cache, fields)) is not None:
            return known
        counts, cut = _counted(tokenizer, rules, collection, log_every, workers)
        windows = PassageWindows.of_counts(counts)
        _write(cache, windows, fields)
    long = int((counts > 1).sum())
    log(
        f"{windows.passages:,} passages, {long:,} of them in several windows: {windows.rows:,} windows "
        f"({100 * cut / windows.passages:.1f}% of the passages have more than {rules.windows})"
    )
    return windows


def cached_windows(cache: Path, stamp: JsonDict) -> PassageWindows | None:
    """Return the windows in the cache of an output folder; None unless they are those of this stamp."""
    path = cache / FIRST_WINDOW
    known = read_checked_json(path.with_suffix(".json")) or {}
    wanted = {name: stamp.get(name) for name in FIELDS}
    if not path.exists() or not wanted.items() <= known.items() or checksum_files([path]) != known["array"]:
        return None
    return PassageWindows(np.load(path, allow_pickle=False))


def _write(cache: Path, windows: PassageWindows, fields: JsonDict) -> None:
    path = cache / FIRST_WINDOW
    path.with_suffix(".json").unlink(missing_ok=True)  # first, so that it never describes another array
    with atomic_write(path, "wb") as file:
        np.save(file, windows.first, allow_pickle=False)
    write_checked_json(path.with_suffix(".json"), {**fields, "array": checksum_files([path])})


def _counted(
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules,
    collection: PassageCollection,
    log_every: float,
    workers: int,
) -> tuple[np.ndarray, int]:
    """Return (windows of each passage (P,) int64, number of passages that need more than allowed)."""
    spans = (
        (start, min(len(collection), start + TEXTS_PER_TASK))
        for start in range(0, len(collection), TEXTS_PER_TASK)
    )
    count = partial(_count, tokenizer, rules, collection)
    progress = Progress(len(collection), log_every, "counted the windows of")
    counts, cut = [], 0
    for found, were_cut in prepared_by_workers(count, spans, workers) if workers else one_ahead(count, spans):
        counts.append(found)
        cut += were_cut
        progress.add(len(found))
    progress.close()
    return np.concatenate(counts), cut


def _count(
    tokenizer: PreTrainedTokenizerBase, rules: TextRules, collection: PassageCollection, span: tuple[int, int]
) -> tuple[np.ndarray, int]:
    return window_counts(tokenizer, collection[span[0] : span[1]], rules)
