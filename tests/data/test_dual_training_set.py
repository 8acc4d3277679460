"""Batches of the dual encoder: grouping, drawing of positives and negatives, masks, malformed files."""

import random

import numpy as np
import pytest

from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.runtime.errors import UserError


def write(path, triples):
    """Write rows (query, positive, negative) in the official layout; return the path."""
    lines = [f"{query}\t\t{positive}\tnull\t{negative}\t0\n" for query, positive, negative in triples]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    return path


def make_world(seed=0, queries=23, texts=30):
    """Return shuffled rows; a text may be a negative of one query and a positive of another."""
    draw = random.Random(seed)
    rows = []
    for query in range(queries):
        positives = draw.sample(range(texts), draw.choice([1, 1, 2, 3]))
        for _ in range(draw.randint(len(positives), 7)):
            rows.append((f"问{query}", f"段 落{draw.choice(positives)}", f"段 落{draw.randrange(texts)}"))
    draw.shuffle(rows)
    return rows


def known(rows, clean=lambda text: text):
    """Return {query: the set of its positives, (query -> negatives)} by plain dictionaries."""
    positives, negatives = {}, {}
    for query, positive, negative in rows:
        positives.setdefault(clean(query), set()).add(clean(positive))
        negatives.setdefault(clean(query), set()).add(clean(negative))
    return positives, negatives


def same(a, b):
    return (
        (a.queries, a.passages, a.rows) == (b.queries, b.passages, b.rows)
        and np.array_equal(a.targets, b.targets)
        and np.array_equal(a.masked, b.masked)
    )


def test_scattered_rows_of_a_query_are_one_group(tmp_path):
    rows = make_world()
    data = DualTrainingSet(write(tmp_path / "t.tsv", rows))
    order = list(dict.fromkeys(query for query, _, _ in rows))
    assert data.rows == len(rows) and data.queries == len(order) == 23
    for query, group in zip(order, data.groups, strict=True):
        assert sorted(group.tolist()) == [at for at, row in enumerate(rows) if row[0] == query]


def test_an_epoch_has_each_query_at_most_once_and_rows_are_line_numbers(tmp_path):
    rows = make_world(1)
    data = DualTrainingSet(write(tmp_path / "t.tsv", rows))
    assert data.steps_per_epoch(5) == 4 and data.steps_per_epoch(23) == 1 and data.steps_per_epoch(1) == 23
    left_over = set()
    for epoch in range(12):
        seen = []
        for step in range(data.steps_per_epoch(5)):
            batch = data.batch(7, epoch, step, 5, 2)
            assert len(batch.queries) == len(set(batch.queries)) == 5
            for query, target, line in zip(batch.queries, batch.targets, batch.rows, strict=True):
                assert rows[line - 1][:2] == (query, batch.passages[target])
            seen += batch.queries
        assert len(seen) == len(set(seen)) == 20
        left_over |= {query for query, _, _ in rows} - set(seen)
    assert len(left_over) > 3  # the omitted queries differ between epochs


def test_a_batch_depends_on_seed_epoch_and_step_only(tmp_path):
    path = write(tmp_path / "t.tsv", make_world(2))
    first, second = DualTrainingSet(path), DualTrainingSet(path)
    second.batch(1, 1, 1, 5, 2)  # earlier batches have no effect
    for step in (3, 0, 2):
        assert same(first.batch(42, 4, step, 5, 2), second.batch(42, 4, step, 5, 2))
    base = first.batch(42, 4, 0, 5, 2)
    for other in ((42, 5, 0), (43, 4, 0), (42, 4, 1)):
        assert first.batch(*other, 5, 2).queries != base.queries


def test_a_query_with_several_positives_draws_each_of_them_and_each_negative(tmp_path):
    rows = [("甲", f"p{at % 4}", f"n{at}") for at in range(8)] + [("乙", "x", "y")]
    data = DualTrainingSet(write(tmp_path / "t.tsv", rows))
    positives, negatives = {}, set()
    for epoch in range(80):
        batch = data.batch(0, epoch, 0, 2, 2)
        at = batch.queries.index("甲")
        positive = batch.passages[batch.targets[at]]
        positives[positive] = positives.get(positive, 0) + 1
        negatives |= {text for text in batch.passages if text.startswith("n")}
    assert set(positives) == {"p0", "p1", "p2", "p3"} and min(positives.values()) >= 8
    assert negatives == {f"n{at}" for at in range(8)}


def test_queries_with_fewer_distinct_negatives_than_wanted(tmp_path):
    rows = [("甲", "p", "n0"), ("甲", "p", "n1"), ("甲", "p", "n1"), ("甲", "q", "p"), ("乙", "x", "y")]
    data = DualTrainingSet(write(tmp_path / "t.tsv", rows))
    assert [data.short_queries(wanted) for wanted in range(5)] == [0, 0, 1, 2, 2]


def test_distinct_positives_are_equally_likely_for_any_number_of_rows(tmp_path):
    rows = [("甲", "often", f"n{at}") for at in range(50)] + [("甲", "once", "n50")]
    data = DualTrainingSet(write(tmp_path / "t.tsv", rows))
    drawn = [data.batch(3, epoch, 0, 1, 0).passages[0] for epoch in range(200)]
    assert 70 < drawn.count("once") < 130


@pytest.mark.parametrize("hard_negatives", [0, 1, 3])
@pytest.mark.parametrize("remove_spaces", [False, True])
def test_masks_targets_and_columns_agree_with_the_whole_file(tmp_path, hard_negatives, remove_spaces):
    def clean(text):
        return text.replace(" ", "") if remove_spaces else text

    rows = make_world(4) + [("问1", "段 落3", "段落4"), ("问2", "段落5", "段 落6"), ("问 2", "段落 7", "8")]
    data = DualTrainingSet(write(tmp_path / "t.tsv", rows), clean)
    positives, negatives = known(rows, clean)
    assert data.queries == len(positives) == (23 if remove_spaces else 24)
    masks = shared = 0
    for epoch in range(6):
        for step in range(data.steps_per_epoch(8)):
            batch = data.batch(5, epoch, step, 8, hard_negatives)
            texts = [clean(text) for text in batch.passages]
            assert len(texts) == len(set(texts)), "a repeated text is encoded once"
            assert batch.masked.shape == (8, len(texts)) and batch.masked.dtype == bool
            assert batch.targets.shape == (8,) and batch.targets.dtype == np.int64
            own = []
            for at, query in enumerate(clean(query) for query in batch.queries):
                target = int(batch.targets[at])
                assert texts[target] in positives[query]
                for column, text in enumerate(texts):
                    expected = text in positives[query] and column != target
                    assert batch.masked[at, column] == expected
                own.append(texts[target])
                available = len(negatives[query] - positives[query])
                counted = {text for text in texts if text in negatives[query] - positives[query]}
                assert len(counted) >= min(hard_negatives, available)
            allowed = set(own).union(*(negatives[clean(q)] - positives[clean(q)] for q in batch.queries))
            assert set(texts) <= allowed and len(texts) <= 8 * (1 + hard_negatives)
            masks += int(batch.masked.sum())
            shared += len(own) - len(set(own))
    assert masks > 0 and shared > 0  # both cases occur


def test_a_query_with_few_negatives_and_positives_never_as_negatives(tmp_path):
    rows = [("甲", "a", "b"), ("甲", "b", "c"), ("甲", "a", "c"), ("乙", "d", "d")]
    data = DualTrainingSet(write(tmp_path / "t.tsv", rows))
    for epoch in range(20):
        batch = data.batch(0, epoch, 0, 2, 5)
        at = batch.queries.index("甲")
        positive = batch.passages[batch.targets[at]]
        assert sorted(batch.passages) == sorted([positive, "c", "d"]) and positive in "ab"
        assert not batch.masked.any()
        alone = next(b for b in (data.batch(0, epoch, s, 1, 5) for s in (0, 1)) if b.queries == ["乙"])
        assert alone.passages == ["d"] and alone.masked.tolist() == [[False]]


def test_one_positive_of_two_queries_is_one_column(tmp_path):
    data = DualTrainingSet(write(tmp_path / "t.tsv", [("甲", "same", "x"), ("乙", "same", "x")]))
    batch = data.batch(0, 0, 0, 2, 1)
    assert batch.passages == ["same", "x"] and batch.targets.tolist() == [0, 0] and not batch.masked.any()


def test_texts_are_returned_unchanged(tmp_path):
    odd = 'a\x0bb\x0c\x1c\x85\u2028 "quoted" \' '
    path = write(tmp_path / "t.tsv", [(f"问{odd}", odd, f" {odd}"), ("x", "y", "")])
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))  # a last line without its newline
    data = DualTrainingSet(path, lambda text: text.replace(" ", ""))
    batch = data.batch(0, 0, 0, 2, 1)
    assert data.rows == data.queries == 2 and set(batch.queries) == {f"问{odd}", "x"}
    # by cleaned text the negative of the first row is its own positive
    assert sorted(batch.passages) == sorted([odd, "y", ""])


def test_batch_size_above_the_number_of_queries(tmp_path):
    data = DualTrainingSet(write(tmp_path / "t.tsv", [("甲", "a", "b"), ("甲", "c", "d"), ("乙", "e", "f")]))
    with pytest.raises(UserError, match=r"--batch_size 3.*only 2 distinct queries"):
        data.steps_per_epoch(3)


def test_empty_or_missing_file(tmp_path):
    (tmp_path / "empty.tsv").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.tsv: contains no training rows"):
        DualTrainingSet(tmp_path / "empty.tsv")
    with pytest.raises(UserError, match=r"gone\.tsv: no such file"):
        DualTrainingSet(tmp_path / "gone.tsv")


@pytest.mark.parametrize(
    "bad", [b"q\t\tp\t\tn\n", b"\n", b"q\t\tp\t\tn\t0\t0\n", b"\t\tp\t\tn\t0\n", b"q\ttitle\tp\t\tn\t0\n",
            b"\xff\t\tp\t\tn\t0\n", b"  \t\tp\t\tn\t0\n", b"q\t\tp\ttitle\tn\t0"],
)  # fmt: skip
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, bad):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"q\t\tp\t\tn\t0\n" * 2 + bad)
    with pytest.raises(UserError, match=r"t\.tsv:3: "):
        DualTrainingSet(path)


def test_each_querys_own_passages_with_their_teacher(tmp_path):
    rows = make_world(4)
    teacher = np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2)
    teacher[::5, 1] = np.nan
    data = DualTrainingSet(write(tmp_path / "t.tsv", rows))
    data.teacher = teacher
    scores = {}
    for (query, positive, negative), (high, low) in zip(rows, teacher.tolist(), strict=True):
        scores.setdefault((query, positive, 0), high)
        scores.setdefault((query, negative, 1), low)
    for step in range(4):
        batch = data.batch(1, 0, step, 5, 2)
        assert batch.lists.shape == batch.teacher.shape and batch.lists.shape[0] == 5
        assert (batch.lists[:, 0] == batch.targets).all()
        for at, query in enumerate(batch.queries):
            for place, (column, logit) in enumerate(zip(batch.lists[at], batch.teacher[at], strict=True)):
                if column < 0:
                    assert np.isnan(logit) and place > 0
                    continue
                expected = scores[query, batch.passages[column], min(place, 1)]
                assert logit == expected or (np.isnan(logit) and np.isnan(expected))
    plain = DualTrainingSet(tmp_path / "t.tsv").batch(1, 0, 0, 5, 2)
    assert np.isnan(plain.teacher).all() and (plain.lists == data.batch(1, 0, 0, 5, 2).lists).all()
