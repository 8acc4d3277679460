"""Training data of the cross-encoder: batches as a function of (seed, epoch, step), malformed files."""

from collections import Counter

import numpy as np
import pytest
from toy_world import write

from torch_src.data.cross_training_set import CrossTrainingSet, draw_negatives
from torch_src.data.lines import FormatError
from torch_src.runtime.errors import UserError


def row(query: str, passage: str, label: int) -> str:
    return f"{query}\t\t{passage}\t{label}"


def rows_of(queries: int, positives: int, negatives: int) -> list[str]:
    """Rows of `queries` queries; the passages name their query, their label and their number."""
    kinds = [(1, at) for at in range(positives)] + [(0, at) for at in range(negatives)]
    return [row(f"问{q}", f"{q} {'负正'[label]} {at}", label) for label, at in kinds for q in range(queries)]


def opened(path, rows: list[str], **options) -> CrossTrainingSet:
    write(path, rows)
    return CrossTrainingSet(path, **options)


def groups(batch, size: int) -> list[tuple[list[str], list[str], list[float]]]:
    """(queries, passages, labels) of each group of a batch."""
    starts = range(0, len(batch.rows), size)
    parts = (batch.queries, batch.passages, batch.labels.tolist())
    return [tuple(part[at : at + size] for part in parts) for at in starts]


def same(one, other) -> bool:
    parts = one.queries == other.queries and one.passages == other.passages and one.rows == other.rows
    return parts and one.labels.tolist() == other.labels.tolist()


def test_pairs_are_a_function_of_seed_epoch_and_step(tmp_path):
    data = opened(tmp_path / "t.tsv", rows_of(5, 1, 7))
    again = CrossTrainingSet(tmp_path / "t.tsv")
    steps = [(epoch, step) for epoch in range(2) for step in range(4)]
    forwards = {at: data.pair_batch(3, *at, batch_size=10) for at in steps}
    assert all(same(forwards[at], again.pair_batch(3, *at, batch_size=10)) for at in reversed(steps))
    assert not same(forwards[0, 0], data.pair_batch(4, 0, 0, 10))
    assert not same(forwards[0, 0], forwards[1, 0]) and not same(forwards[0, 0], forwards[0, 1])


def test_lists_are_a_function_of_seed_epoch_and_step(tmp_path):
    data = opened(tmp_path / "t.tsv", rows_of(6, 2, 9))
    again = CrossTrainingSet(tmp_path / "t.tsv")
    steps = [(epoch, step) for epoch in range(2) for step in range(3)]
    forwards = {at: data.group_batch(3, *at, count=4, group_size=5) for at in steps}
    assert all(same(forwards[at], again.group_batch(3, *at, count=4, group_size=5)) for at in reversed(steps))
    assert not same(forwards[0, 0], data.group_batch(4, 0, 0, 4, 5))
    assert not same(forwards[0, 0], forwards[1, 0]) and not same(forwards[0, 0], forwards[0, 1])


def test_one_epoch_uses_every_row_once(tmp_path):
    data = opened(tmp_path / "t.tsv", rows_of(4, 1, 5))
    steps = data.steps_per_epoch(6, listwise=False)
    seen = [number for step in range(steps) for number in data.pair_batch(1, 0, step, 6).rows]
    assert steps == 4 and sorted(seen) == list(range(1, 25))
    assert data.rows == 24 and data.queries == 4


def test_rows_of_a_batch_are_the_line_numbers_of_its_pairs(tmp_path):
    written = rows_of(3, 1, 3)
    batch = opened(tmp_path / "t.tsv", written).pair_batch(0, 0, 0, 12)
    found = zip(batch.queries, batch.passages, batch.labels, strict=True)
    assert [row(q, p, int(label)) for q, p, label in found] == [written[at - 1] for at in batch.rows]
    assert batch.labels.dtype == np.float32 and batch.rows != sorted(batch.rows)


def test_one_epoch_uses_every_positive_once(tmp_path):
    data = opened(tmp_path / "t.tsv", rows_of(4, 3, 5))
    steps = data.steps_per_epoch(4, listwise=True)
    found = [part for step in range(steps) for part in groups(data.group_batch(1, 0, step, 4, 3), 3)]
    assert steps == 3
    assert sorted(passages[0] for _, passages, _ in found) == sorted(
        f"{q} 正 {at}" for q in range(4) for at in range(3)
    )


def test_a_group_is_one_positive_first_and_distinct_negatives_of_its_query(tmp_path):
    data = opened(tmp_path / "t.tsv", rows_of(5, 2, 6))
    for epoch in range(5):
        for queries, passages, labels in groups(data.group_batch(8, epoch, 0, 10, 7), 7):
            assert len(set(queries)) == 1 and labels == [1, 0, 0, 0, 0, 0, 0]
            assert {passage.split()[0] for passage in passages} == {queries[0].removeprefix("问")}
            assert len(set(passages)) == 7  # with six negatives, none is repeated


def test_each_epoch_draws_other_negatives(tmp_path):
    data = opened(tmp_path / "t.tsv", rows_of(1, 1, 30))
    draws = [tuple(data.group_batch(0, epoch, 0, 1, 4).passages[1:]) for epoch in range(60)]
    assert len(set(draws)) > 55
    assert len({passage for draw in draws for passage in draw}) == 30  # each negative is drawn
    counts = Counter(passage for draw in draws for passage in draw)
    assert max(counts.values()) < 20  # expected: 6 of each


def test_two_positives_of_a_query_get_their_own_draws(tmp_path):
    data = opened(tmp_path / "t.tsv", rows_of(1, 2, 40))
    first, second = groups(data.group_batch(0, 0, 0, 2, 6), 6)
    assert first[1][1:] != second[1][1:]


def test_negatives_repeat_only_when_too_few(tmp_path):
    data = opened(tmp_path / "t.tsv", rows_of(2, 1, 3))
    for _, passages, _ in groups(data.group_batch(0, 0, 0, 2, 8), 8):
        assert sorted(Counter(passages[1:]).values()) == [2, 2, 3]  # all are used before any repeats
    assert data.short_groups(8) == 2 and data.short_groups(5) == 2 and data.short_groups(4) == 0


@pytest.mark.parametrize("there, count", [(5, 5), (5, 3), (5, 7), (1, 4), (3, 9)])
def test_draw_negatives_draws_all_equally_often(there, count):
    chosen = draw_negatives(np.arange(10, 10 + there), count, np.random.default_rng(0))
    times = Counter(chosen)
    assert len(chosen) == count and set(chosen) <= set(range(10, 10 + there))
    assert max(times.values()) - min(times.get(at, 0) for at in range(10, 10 + there)) <= 1


def test_a_known_positive_is_never_a_negative(tmp_path):
    """A text labeled 1 in one row and 0 in another, and an answer with different spaces."""
    rows = [row("问", "答一", 1), row("问", "答 一", 0), row("问", "答二", 0), row("问", "答二", 1)]
    rows += [row("问", "错一", 0), row("问", "错二", 0), row("别问", "答一", 0), row("别问", "别答", 1)]
    data = opened(tmp_path / "t.tsv", rows, clean=lambda text: text.replace(" ", ""))
    for epoch in range(20):
        for queries, passages, _ in groups(data.group_batch(0, epoch, 0, 3, 3), 3):
            expected = (
                {"错一", "错二"} if queries[0] == "问" else {"答一"}
            )  # it may be a negative of another query
            assert set(passages[1:]) == expected


def test_queries_that_differ_only_in_removed_spaces_are_one(tmp_path):
    rows = [row("问 题", "答", 1), row("问题", "错", 0)]
    assert opened(tmp_path / "t.tsv", rows, clean=lambda text: text.replace(" ", "")).queries == 1
    assert CrossTrainingSet(tmp_path / "t.tsv").queries == 2


def test_a_repeated_row_counts_once_in_a_group(tmp_path):
    rows = [row("问", "答", 1), row("问", "答", 1), *[row("问", "错", 0)] * 20, row("问", "误", 0)]
    data = opened(tmp_path / "t.tsv", rows)
    assert data.steps_per_epoch(1, listwise=True) == 1 and data.short_groups(3) == 0
    assert all(set(data.group_batch(0, epoch, 0, 1, 3).passages) == {"答", "错", "误"} for epoch in range(10))


def test_a_positive_without_negatives_forms_no_group(tmp_path):
    rows = [*rows_of(2, 1, 2), row("孤", "答", 1), row("无", "错", 0)]
    data = opened(tmp_path / "t.tsv", rows)
    assert data.queries == 4 and data.steps_per_epoch(2, listwise=True) == 1
    assert data.steps_per_epoch(8, listwise=False) == 1
    with pytest.raises(UserError, match="only 2 positives with negatives, .* of 3; lower --groups_per_step"):
        data.steps_per_epoch(3, listwise=True)
    with pytest.raises(UserError, match="only 8 rows, .* of 9; lower --batch_size"):
        data.steps_per_epoch(9, listwise=False)


@pytest.mark.parametrize("label", [0, 1])
def test_all_labels_equal(tmp_path, label):
    with pytest.raises(UserError, match=f"t.tsv: every label is {label} "):
        opened(tmp_path / "t.tsv", [row(f"问{at}", "文", label) for at in range(4)])


@pytest.mark.parametrize(
    "line, message",
    [
        ("问\t\t文\t2", "label '2'"),
        ("问\t\t文\t", "label ''"),
        ("问\t\t文\t1\r", r"label '1\\r'"),
        ("问\t\t文", "3 TAB-separated columns"),
        (" \t\t文\t1", "the query is empty"),
        ("问\t标题\t文\t1", r"column 2 \(title\)"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    rows = rows_of(2, 1, 1)
    with pytest.raises(FormatError, match=f"t.tsv:3: {message}"):
        opened(tmp_path / "t.tsv", [*rows[:2], line, *rows[2:]])


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="none.tsv: no such file"):
        CrossTrainingSet(tmp_path / "none.tsv")
    with pytest.raises(UserError, match="t.tsv: contains no training rows"):
        opened(tmp_path / "t.tsv", [])
