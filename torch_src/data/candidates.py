"""Pairs to score: a run with the collection, auxiliary/*.res.tsv with its id map, or training rows."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.data.formats import candidates_by_query, run_by_query
from torch_src.data.lines import FilePath, FormatError
from torch_src.data.results import check_collection
from torch_src.runtime.errors import UserError

OFFICIAL, OFFICIAL_IDS = ".res.tsv", ".res.id_map.tsv"


def official_ids_path(path: str) -> str:
    """Return the path of the id map beside official candidates."""
    return path.removesuffix(OFFICIAL) + OFFICIAL_IDS


@dataclass(frozen=True)
class TrainingTexts:
    """The passages of training rows: 2 * row is the row's positive, 2 * row + 1 its negative."""

    data: DualTrainingSet

    def __getitem__(self, place: int) -> str:
        _, *passages = self.data.file.read([place // 2])[0]
        return passages[place % 2]


@dataclass
class Candidates:
    """N (query, passage) pairs in file order; the pairs of a query are adjacent.

    Texts stay on disk: memory is about 50 bytes per pair, plus the longest pid for the official files.
    """

    queries: list[str]  # distinct, in file order
    query_of: np.ndarray  # (N,) int32: index into queries
    rows: np.ndarray  # (N,) int64: global rows; -1 in the official files; places in the training file
    scores: np.ndarray  # (N,) float32: the retriever's; -rank in the official files, which have no scores
    pids: np.ndarray | None  # (N,) bytes; None for a run (its rows identify the passages)
    qids: list[str] | None  # of queries; None for a run
    texts: PassageCollection | TrainingTexts | list[str]  # by row; by pair for official files and for a list

    def __len__(self) -> int:
        return len(self.query_of)

    def passages(self, first: int, last: int) -> list[str]:
        """Return the texts of pairs first..last-1."""
        by_row = self.pids is None and not isinstance(self.texts, list)
        if by_row or isinstance(self.texts, TrainingTexts):
            return [self.texts[row] for row in self.rows[first:last].tolist()]
        return self.texts[first:last]

    def texts_of(self, pairs: list[int]) -> tuple[list[str], list[str]]:
        """Return (queries, passages) of these pairs."""
        queries = [self.queries[self.query_of[pair]] for pair in pairs]
        return queries, [self.passages(pair, pair + 1)[0] for pair in pairs]

    def spans(self) -> Iterator[tuple[str, slice]]:
        """Yield (query, slice of its pairs)."""
        starts = np.flatnonzero(np.diff(self.query_of, prepend=-1)).tolist() + [len(self)]
        for query, (start, stop) in zip(self.queries, pairwise(starts), strict=True):
            yield query, slice(start, stop)

    def head(self, queries: int, depth: int) -> "Candidates":
        """Return the first `depth` candidates of the first `queries` queries.

        The texts of a run's candidates stay on disk, those of the official files are kept in memory.
        """
        spans = [span for _, span in self.spans()][:queries]
        pairs = [pair for span in spans for pair in range(span.start, min(span.stop, span.start + depth))]
        by_row = self.pids is None and isinstance(self.texts, PassageCollection)
        return Candidates(
            queries=self.queries[: len(spans)],
            query_of=self.query_of[pairs],
            rows=self.rows[pairs],
            scores=self.scores[pairs],
            pids=None if self.pids is None else self.pids[pairs],
            qids=None if self.qids is None else self.qids[: len(spans)],
            texts=self.texts if by_row else [self.passages(pair, pair + 1)[0] for pair in pairs],
        )


def open_candidates(
    path: FilePath, collection: PassageCollection | None, cache_dir: FilePath | None
) -> Candidates:
    """Return the candidates of a run (over `collection`) or of an official file, which has its own texts.

    FormatError for a malformed line, a row outside the collection, scattered lines of a query, a duplicate
    passage of a query, or an id map of another length. UserError for a run of another collection.
    """
    if str(path).endswith(OFFICIAL):
        return _open_official(str(path), cache_dir)
    if collection is None:
        raise UserError(f"{path}: a run has row numbers only; pass the collection with --passage_dir")
    check_collection(path, collection.checksum, collection.files[0].parent)
    pairs = _Pairs()
    for query, ranking in run_by_query(path):
        for row in ranking:
            if row.row >= len(collection):
                message = f"row {row.row} is outside the collection of {len(collection):,} passages"
                raise FormatError(path, len(pairs.rows) + 1, message)
            pairs.add(row.row, row.score)
        pairs.queries.append(query)
    pairs.check_not_empty(path)
    return pairs.candidates(None, None, collection)


def training_pairs(data: DualTrainingSet) -> tuple[Candidates, np.ndarray]:
    """Return the distinct (query, passage) pairs of the rows, and the pairs (rows, 2) int64 of each row."""
    pair_of = np.empty((data.rows, 2), dtype=np.int64)
    query_of, places, count = [], [], 0
    for query, group in enumerate(data.groups):
        hashes = np.stack([data.positive_hash[group], data.negative_hash[group]], axis=1)
        _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        pair_of[group] = count + which.reshape(hashes.shape)
        places.append(2 * group[first // 2] + first % 2)
        query_of.append(np.full(len(first), query, dtype=np.int32))
        count += len(first)
    queries = [data.file.read([int(group[0])])[0].query for group in data.groups]
    scores, texts = np.zeros(count, dtype=np.float32), TrainingTexts(data)
    pairs = Candidates(queries, np.concatenate(query_of), np.concatenate(places), scores, None, None, texts)
    return pairs, pair_of


def _open_official(path: str, cache_dir: FilePath | None) -> Candidates:
    pairs, pids, qids = _Pairs(), [], []
    for query, ranking in candidates_by_query(path, official_ids_path(path)):
        for rank, row in enumerate(ranking, start=1):
            pairs.add(-1, -rank)
            pids.append(row.pid.encode())
        pairs.queries.append(query)
        qids.append(ranking[0].qid)
    pairs.check_not_empty(path)
    return pairs.candidates(np.array(pids), qids, PassageCollection.of_file(path, cache_dir))


class _Pairs:
    """Growing columns of Candidates, 16 bytes per pair."""

    def __init__(self) -> None:
        self.queries: list[str] = []
        self.query_of, self.rows, self.scores = array("i"), array("q"), array("f")

    def add(self, row: int, score: float) -> None:
        """Add a pair of the current query, which joins `queries` after its last pair."""
        self.query_of.append(len(self.queries))
        self.rows.append(row)
        self.scores.append(score)

    def check_not_empty(self, path: FilePath) -> None:
        if not self.queries:
            raise UserError(f"{path}: contains no candidates")

    def candidates(
        self, pids: np.ndarray | None, qids: list[str] | None, texts: PassageCollection
    ) -> Candidates:
        return Candidates(
            self.queries,
            np.frombuffer(self.query_of, dtype=np.int32),
            np.frombuffer(self.rows, dtype=np.int64),
            np.frombuffer(self.scores, dtype=np.float32),
            pids,
            qids,
            texts,
        )
