"""Candidates to re-rank: a run with the collection, or auxiliary/*.res.tsv with its *.id_map.tsv."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.data.formats import FormatError, read_candidates, read_run
from torch_src.runtime.errors import UserError

OFFICIAL, OFFICIAL_IDS = ".res.tsv", ".res.id_map.tsv"


@dataclass
class Candidates:
    """N (query, passage) pairs in file order; the pairs of a query stand together.

    Texts stay on disk: memory is about 50 bytes a pair, and the longest pid more for the official files.
    """

    queries: list[str]  # distinct, in file order
    query_of: np.ndarray  # (N,) int32: index into queries
    rows: np.ndarray  # (N,) int64: global rows; -1 in the official files
    scores: np.ndarray  # (N,) float32: the retriever's; minus the rank in the official files, which have none
    pids: np.ndarray | None  # (N,) bytes; None for a run (its rows name the passages)
    qids: list[str] | None  # of queries; None for a run
    texts: PassageCollection  # text of a row, or of a pair's own line in the official files

    def __len__(self) -> int:
        return len(self.query_of)

    def passages(self, first: int, last: int) -> list[str]:
        """Return the texts of pairs first..last-1."""
        if self.pids is not None:
            return self.texts[first:last]
        return [self.texts[row] for row in self.rows[first:last].tolist()]

    def spans(self) -> Iterator[tuple[str, slice]]:
        """Yield (query, slice of its pairs)."""
        starts = np.flatnonzero(np.diff(self.query_of, prepend=-1)).tolist() + [len(self)]
        for at, query in enumerate(self.queries):
            yield query, slice(starts[at], starts[at + 1])

    def head(self, queries: int, depth: int) -> "Candidates":
        """Return the first `depth` candidates of the first `queries` queries."""
        spans = list(self.spans())[:queries]
        keep = np.concatenate(
            [np.arange(span.start, min(span.stop, span.start + depth)) for _, span in spans]
        )
        texts = [self.passages(pair, pair + 1)[0] for pair in keep.tolist()]
        return ListedCandidates(
            self.queries[: len(spans)], self.query_of[keep], self.rows[keep], self.scores[keep],
            None if self.pids is None else self.pids[keep],
            None if self.qids is None else self.qids[: len(spans)], texts,
        )  # fmt: skip


class ListedCandidates(Candidates):
    """A few candidates with their texts in a list, one a pair."""

    def passages(self, first: int, last: int) -> list[str]:
        return self.texts[first:last]


def open_candidates(path: str, collection: PassageCollection | None, cache_dir: str | None) -> Candidates:
    """Return the candidates of a run (over `collection`) or of an official file, which carries its own texts.

    FormatError for a malformed line, a row outside the collection, a query whose lines are scattered, a
    passage that a query has twice; UserError when the id map has another length.
    """
    if str(path).endswith(OFFICIAL):
        ids_path = str(path)[: -len(OFFICIAL)] + OFFICIAL_IDS
        gatherer = _Gatherer(path)
        for line, (qid, pid, query, _) in enumerate(read_candidates(path, ids_path), start=1):
            gatherer.add(line, query, pid, -1, -gatherer.rank(query), qid)
        gatherer.require_some()
        return gatherer.candidates(PassageCollection.of_file(path, cache_dir))
    if collection is None:
        raise UserError(f"{path}: a run names passages by row; give the collection (--passage_dir)")
    gatherer = _Gatherer(path)
    for line, row in enumerate(read_run(path), start=1):
        if row.row >= len(collection):
            raise FormatError(
                path, line, f"row {row.row} is outside the collection of {len(collection):,} passages"
            )
        if row.rank != gatherer.rank(row.query):
            raise FormatError(path, line, f"rank {row.rank}, expected {gatherer.rank(row.query)}")
        gatherer.add(line, row.query, row.row, row.row, row.score, None)
    gatherer.require_some()
    return gatherer.candidates(collection)


class _Gatherer:
    """Collects pairs line by line and checks that each query's lines stand together."""

    def __init__(self, path):
        self.path, self.index = path, {}
        self.query_of, self.rows, self.scores = array("i"), array("q"), array("f")  # 16 bytes a pair
        self.pids: list[str] = []  # of the official files
        self.qids: list[str | None] = []
        self.last, self.seen = "", set()

    def rank(self, query: str) -> int:
        """Return the rank from 1 of the next pair of `query`."""
        return len(self.seen) + 1 if self.index and self.last == query else 1

    def add(self, line: int, query: str, key, row: int, score: float, qid: str | None) -> None:
        if query not in self.index:
            self.index[query] = len(self.index)
            self.last = query
            self.qids.append(qid)
            self.seen = set()
        elif self.index[query] != len(self.index) - 1:
            raise FormatError(
                self.path, line, f"the query {query[:40]!r} appeared before; its lines must be together"
            )
        if key in self.seen:
            raise FormatError(self.path, line, f"the query {query[:40]!r} has the passage {key} twice")
        self.seen.add(key)
        self.query_of.append(self.index[query])
        self.rows.append(row)
        self.scores.append(score)
        if row < 0:
            self.pids.append(key)

    def require_some(self) -> None:
        if not self.rows:
            raise UserError(f"{self.path}: no candidates in it")

    def candidates(self, texts: PassageCollection) -> Candidates:
        official = self.rows[0] < 0
        return Candidates(
            list(self.index), np.frombuffer(self.query_of, dtype=np.int32),
            np.frombuffer(self.rows, dtype=np.int64), np.frombuffer(self.scores, dtype=np.float32),
            np.array([pid.encode() for pid in self.pids]) if official else None,
            self.qids if official else None, texts,
        )  # fmt: skip
