"""Candidates to re-rank: from a run or the official files; each malformed line is named."""

from pathlib import Path

import numpy as np
import pytest
from toy_world import write

from torch_src.data.candidates import Candidates, open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.data.lines import FormatError
from torch_src.runtime.errors import UserError

TEXTS = [f"文{at}" for at in range(8)]
RUN = ["甲\t5\t1\t0.9", "甲\t2\t2\t0.5", "甲\t7\t3\t0.25", "乙\t2\t1\t7", "丙\t0\t1\t3", "丙\t5\t2\t3"]
PAIRS = [("q1", "p5", "甲"), ("q1", "p2", "甲"), ("q1", "p7", "甲"), ("q2", "p2", "乙")]
PAIRS += [("q3", "p0", "丙"), ("q3", "p5", "丙")]


@pytest.fixture
def collection(tmp_path) -> PassageCollection:
    write(tmp_path / "collection/part-00", [f"-\t\t{text}\t0" for text in TEXTS[:3]])
    write(tmp_path / "collection/part-01", [f"-\t\t{text}\t0" for text in TEXTS[3:]])
    return PassageCollection(tmp_path / "collection")


def run_file(tmp_path, rows: list[str]) -> Path:
    write(tmp_path / "res.top50", rows)
    return tmp_path / "res.top50"


def official_file(tmp_path, pairs: list[tuple[str, str, str]], ids: list[str] | None = None) -> Path:
    write(tmp_path / "dev.res.tsv", [f"{query}\t\t文{pid[1:]}\t0" for _, pid, query in pairs])
    write(tmp_path / "dev.res.id_map.tsv", ids or [f"{qid}\t{pid}" for qid, pid, _ in pairs])
    return tmp_path / "dev.res.tsv"


def both(tmp_path, collection) -> list[Candidates]:
    run = open_candidates(str(run_file(tmp_path, RUN)), collection, None)
    return [run, open_candidates(str(official_file(tmp_path, PAIRS)), None, None)]


def test_a_run(tmp_path, collection):
    found = open_candidates(str(run_file(tmp_path, RUN)), collection, None)
    assert len(found) == 6 and found.queries == ["甲", "乙", "丙"]
    assert found.query_of.tolist() == [0, 0, 0, 1, 2, 2] and found.rows.tolist() == [5, 2, 7, 2, 0, 5]
    assert np.allclose(found.scores, [0.9, 0.5, 0.25, 7, 3, 3]) and found.scores.dtype == np.float32
    assert found.pids is None and found.qids is None


def test_official_files(tmp_path):
    found = open_candidates(str(official_file(tmp_path, PAIRS)), None, None)
    assert len(found) == 6 and found.queries == ["甲", "乙", "丙"] and found.qids == ["q1", "q2", "q3"]
    assert found.query_of.tolist() == [0, 0, 0, 1, 2, 2] and found.rows.tolist() == [-1] * 6
    assert found.pids.tolist() == [b"p5", b"p2", b"p7", b"p2", b"p0", b"p5"]
    assert found.scores.tolist() == [-1, -2, -3, -1, -1, -2]


def test_texts_and_spans_of_both_are_the_same(tmp_path, collection):
    for found in both(tmp_path, collection):
        assert found.passages(0, 6) == ["文5", "文2", "文7", "文2", "文0", "文5"]
        assert found.passages(2, 4) == ["文7", "文2"]
        assert list(found.spans()) == [("甲", slice(0, 3)), ("乙", slice(3, 4)), ("丙", slice(4, 6))]


@pytest.mark.parametrize(
    "queries, depth, kept",
    [(1, 2, [0, 1]), (2, 50, [0, 1, 2, 3]), (3, 1, [0, 3, 4]), (99, 99, [0, 1, 2, 3, 4, 5])],
)
def test_head(tmp_path, collection, queries, depth, kept):
    for found in both(tmp_path, collection):
        head = found.head(queries, depth)
        count = min(queries, 3)
        assert head.queries == found.queries[:count] and len(head) == len(kept)
        for name in ("query_of", "rows", "scores"):
            assert getattr(head, name).tolist() == getattr(found, name)[kept].tolist()
        texts = found.passages(0, 6)
        assert head.passages(0, len(kept)) == [texts[at] for at in kept]
        assert head.passages(1, 2) == [texts[kept[1]]]
        assert [query for query, _ in head.spans()] == head.queries
        assert sum(span.stop - span.start for _, span in head.spans()) == len(kept)
        if found.pids is not None:
            assert head.pids.tolist() == found.pids[kept].tolist()


def test_head_keeps_the_qids_of_its_own_queries(tmp_path):
    head = open_candidates(str(official_file(tmp_path, PAIRS)), None, None).head(2, 1)
    assert head.qids == ["q1", "q2"]


def test_a_run_needs_a_collection(tmp_path):
    with pytest.raises(UserError, match="res.top50: .*--passage_dir"):
        open_candidates(str(run_file(tmp_path, RUN)), None, None)


@pytest.mark.parametrize(
    "rows, line, message",
    [
        ([*RUN, "丁\t8\t1\t1"], 7, "row 8 is outside the collection of 8 passages"),
        ([*RUN, "甲\t1\t1\t0.1"], 7, "'甲' appeared before"),
        ([*RUN, "甲\t1\t4\t0.1"], 7, ""),  # the same, with increasing rank
        ([*RUN[:2], "甲\t5\t3\t0.1", *RUN[3:]], 3, "duplicate passage 5"),
        ([RUN[0], *RUN[2:]], 2, "rank 3"),
        (["甲\t5\t0\t0.9"], 1, "rank '0'"),
        (["甲\t5\t2\t0.9"], 1, "rank 2"),
        ([RUN[0], RUN[2], RUN[1]], 2, "rank 3"),
        ([*RUN[:3], "乙\t2\t4\t7"], 4, "rank 4"),
        ([*RUN, "丁\t-1\t1\t1"], 7, "row '-1'"),
        ([*RUN, "丁\t1\t1\tnan"], 7, "score 'nan'"),
        ([*RUN, "丁\t1\t1"], 7, "3 TAB-separated columns"),
        ([*RUN, "丁\tx\t1\t1"], 7, "row 'x'"),
    ],
)
def test_a_malformed_line_of_a_run_is_named(tmp_path, collection, rows, line, message):
    with pytest.raises(FormatError) as found:
        open_candidates(str(run_file(tmp_path, rows)), collection, None)
    assert str(found.value).startswith(f"{tmp_path / 'res.top50'}:{line}: ") and message in str(found.value)


def test_a_malformed_line_of_the_official_files_is_named(tmp_path):
    def refused(pairs, line, message, ids=None, name="dev.res.tsv"):
        with pytest.raises(FormatError) as found:
            open_candidates(str(official_file(tmp_path, pairs, ids)), None, None)
        assert str(found.value).startswith(f"{tmp_path / name}:{line}: ") and message in str(found.value)

    ids = [f"{qid}\t{pid}" for qid, pid, _ in PAIRS]
    refused([*PAIRS, ("q1", "p1", "甲")], 7, "'甲' appeared before")
    refused([*PAIRS, ("q3", "p0", "丙")], 7, "duplicate passage p0")
    refused(PAIRS, 6, "the file ends here", ids[:-1], "dev.res.id_map.tsv")
    refused(PAIRS, 3, "1 TAB-separated columns", [*ids[:2], "q1 p7", *ids[3:]], "dev.res.id_map.tsv")


def test_an_id_map_that_is_too_long(tmp_path):
    ids = [f"{qid}\t{pid}" for qid, pid, _ in PAIRS] + ["q3\tp6"]
    with pytest.raises(UserError, match="dev.res.tsv:7: .*dev.res.id_map.tsv has more lines"):
        open_candidates(str(official_file(tmp_path, PAIRS, ids)), None, None)


def test_missing_files(tmp_path, collection):
    with pytest.raises(UserError, match="res.top50: no such file"):
        open_candidates(str(tmp_path / "res.top50"), collection, None)
    official = official_file(tmp_path, PAIRS)
    (tmp_path / "dev.res.id_map.tsv").unlink()
    with pytest.raises(UserError, match="dev.res.id_map.tsv: no such file"):
        open_candidates(str(official), None, None)


def test_an_empty_run(tmp_path, collection):
    with pytest.raises(UserError, match="res.top50: contains no candidates"):
        open_candidates(str(run_file(tmp_path, [])), collection, None)


def test_an_empty_official_file(tmp_path):
    write(tmp_path / "dev.res.tsv", [])
    write(tmp_path / "dev.res.id_map.tsv", [])
    with pytest.raises(UserError, match="dev.res.tsv: contains no candidates"):
        open_candidates(str(tmp_path / "dev.res.tsv"), None, None)
