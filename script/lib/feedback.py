"""Clicks on the search page as training and dev queries: what feedback.jsonl says about each query."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from script.lib.foreign_datasets import text_id
from script.lib.foreign_files import Counts
from script.lib.official_layout import Passage, Query
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import FeedbackHit, FeedbackRow, read_feedback
from torch_src.data.passage_ids import pids_of, rows_of
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import checksum_text

RANDOM_PASSAGES = 64  # of which queries without negatives draw theirs
GONE = "passages of the feedback are no longer in the collection: omitted"


@dataclass
class Clicks:
    """What the feedback says about one query."""

    line: int  # the first
    answers: dict[FeedbackHit, bool] = field(default_factory=dict)  # marked passage -> the last word
    above: dict[FeedbackHit, list[FeedbackHit]] = field(default_factory=dict)  # shown above a marked one

    def add(self, row: FeedbackRow) -> None:
        self.answers[row.hit] = row.relevant
        self.above[row.hit] = row.above

    @property
    def positives(self) -> list[FeedbackHit]:
        return [hit for hit, relevant in self.answers.items() if relevant]

    @property
    def negatives(self) -> list[FeedbackHit]:
        """Passages shown above an answer that are no answers themselves."""
        answers = {hit.row for hit in self.positives}
        shown = (hit for answer in self.positives for hit in self.above[answer])
        return [hit for hit in dict.fromkeys(shown) if hit.row not in answers]


def read_clicks(path: Path) -> dict[str, Clicks]:
    """Return {query: its clicks}; a later line about the same passage replaces an earlier one."""
    found: dict[str, Clicks] = {}
    for line, row in enumerate(read_feedback(path), start=1):
        found.setdefault(row.query.strip(), Clicks(line)).add(row)
    if not found:
        raise UserError(f"{path}: contains no feedback; mark answers on the search page first")
    return found


def locate(hits: Iterable[FeedbackHit], folder: Path) -> dict[FeedbackHit, tuple[int, str]]:
    """Return {hit: (row, pid)} of the hits that the collection in `folder` has, by row or else by pid.

    A passage counts as found where the text is the same.
    """
    wanted = list(dict.fromkeys(hits))
    collection, map_path = PassageCollection(folder), folder / "passage2id.map.json"
    by_pid = rows_of(map_path, np.array([hit.pid.encode() for hit in wanted]))
    rows = {}
    for hit, moved in zip(wanted, by_pid.tolist(), strict=True):
        for row in (hit.row, moved):
            if 0 <= row < len(collection) and collection[row] == hit.passage:
                rows[hit] = row
                break
    distinct = np.unique(np.array([*rows.values()], dtype=np.int64))
    pids = dict(zip(distinct.tolist(), pids_of(map_path, distinct), strict=True))
    return {hit: (row, pid) for hit, row in rows.items() if (pid := pids[row]) is not None}


def feedback_queries(
    path: Path, folder: Path, dev_share: float, seed: int, counts: Counts
) -> tuple[list[Passage], list[Query]]:
    """Return the passages and the queries of the feedback, with random passages for those without negatives.

    A query is for dev or for training by a hash of its text: later feedback does not move it.
    """
    clicks = read_clicks(path)
    shown = [hit for found in clicks.values() for hit in (*found.positives, *found.negatives)]
    located = locate(shown, folder)
    queries = []
    for text, found in clicks.items():
        split = "dev" if int(checksum_text(text), 16) < dev_share * 16**16 else "train"
        query = Query(text_id("", text), text, split, path, found.line)
        for hits, grade in ((found.positives, 1), (found.negatives, 0 if split == "train" else None)):
            for hit in hits:
                counts.add(GONE, path, found.line, hit not in located)
                if hit in located and grade is not None:
                    query.judge(located[hit][1], grade, 1)
        queries.append(query)
    passages = {pid: Passage(pid, "", hit.passage, path) for hit, (_, pid) in located.items()}
    for passage in random_passages(folder, seed):
        passages.setdefault(passage.pid, passage)
    return [*passages.values()], queries


def random_passages(folder: Path, seed: int) -> list[Passage]:
    """Return passages of the collection, drawn without replacement."""
    collection = PassageCollection(folder)
    count = min(RANDOM_PASSAGES, len(collection))
    rows = np.sort(np.random.default_rng(seed).choice(len(collection), count, replace=False))
    pids = pids_of(folder / "passage2id.map.json", rows)
    pairs = zip(rows.tolist(), pids, strict=True)
    return [Passage(pid, "", collection[row], folder) for row, pid in pairs if pid is not None]
