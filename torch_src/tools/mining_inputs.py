"""Inputs of mining: training queries, their candidates in a run, their positives in the collection.

Two texts are the same passage or query if they differ in white space only.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.data.formats import RunRow, format_query, format_run_row, run_by_query
from torch_src.data.row_file import text_hash
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write

READ_ROWS = 4096  # passages in memory at a time
Located = dict[int, list[int]]  # hash of a positive's text -> rows of the collection with that text


def without_spaces(text: str) -> str:
    """Return the text without white space."""
    return "".join(text.split())


def open_training_set(path: str) -> DualTrainingSet:
    """Return dual.train.tsv grouped by query."""
    return DualTrainingSet(path, without_spaces)


def query_text(data: DualTrainingSet, group: np.ndarray) -> str:
    """Return the query of a group of training rows."""
    return data.file.read([int(group[0])])[0].query


def write_train_queries(data: DualTrainingSet, path: Path) -> None:
    """Write each distinct query once, in the format of dev.q.format, in the order of first rows."""
    with atomic_write(path) as file:
        file.writelines(format_query(query_text(data, group)) for group in data.groups)


def locate_positives(data: DualTrainingSet, collection: PassageCollection) -> Located:
    """Return the rows of each positive, from one pass over the collection."""
    wanted = set(data.positive_hash.tolist())
    found: Located = {}
    for start in range(0, len(collection), READ_ROWS):
        for row, text in enumerate(collection[start : start + READ_ROWS], start=start):
            if (key := text_hash(without_spaces(text))) in wanted:
                found.setdefault(key, []).append(row)
    return found


def positive_rows(data: DualTrainingSet, group: np.ndarray, located: Located) -> list[int]:
    """Return the rows of the collection that hold a positive of a query, in ascending order."""
    texts = set(data.positive_hash[group].tolist())
    return sorted(row for text in texts for row in located.get(text, ()))


def write_with_positives(data: DualTrainingSet, located: Located, run: Path, target: Path) -> None:
    """Write the run, with the positives that a query's candidates lack added after its last rank.

    Distillation needs the teacher's score of the positive, so the re-ranker scores these rows, too. Their
    retriever score is that of the last candidate.
    """
    with atomic_write(target) as file:
        for group, (query, rows) in candidates_by_group(data, run):
            present = {row.row for row in rows}
            missing = [row for row in positive_rows(data, group, located) if row not in present]
            score = rows[-1].score if rows else 0.0
            added = [RunRow(query, row, len(rows) + at, score) for at, row in enumerate(missing, 1)]
            file.writelines(map(format_run_row, [*rows, *added]))


def candidates_by_group(
    data: DualTrainingSet, run: Path
) -> Iterator[tuple[np.ndarray, tuple[str, list[RunRow]]]]:
    """Yield (training rows of a query, (query, its candidates)); UserError if the run is of other queries.

    A query that is not in the run (BM25 may find nothing) has no candidates. Of two queries in the run that
    differ in white space only, the first counts.
    """
    found, seen = run_by_query(run), set()
    query, rows = next(found, ("", []))
    if not rows:
        raise UserError(f"{run}: no results in this file")
    for group in data.groups:
        key = int(data.query_hash[group[0]])
        if text_hash(without_spaces(query)) != key:
            yield group, (query_text(data, group), [])
            continue
        yield group, (query, rows)
        seen.add(key)
        while rows and text_hash(without_spaces(query)) in seen:
            query, rows = next(found, ("", []))
    if rows:
        raise UserError(f"{run}: expected the queries of {data.path} in the same order; delete the run")
