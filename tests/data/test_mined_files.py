"""Teachers' scores line by line with a training file: their mean, and files that do not belong to it."""

import numpy as np
import pytest
from toy_world import write

from torch_src.data.lines import FormatError
from torch_src.data.mined_files import COLUMNS, LOGITS, SIDECAR, TRAIN_ROWS, read_teacher, read_teachers
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import checksum_files, write_stamp

HEADER = "\t".join(LOGITS)


@pytest.fixture
def train(tmp_path):
    """Three rows of one query."""
    write(tmp_path / "dual.train.tsv", [f"q\t\tp\t\t{negative}\t0" for negative in "nmo"])
    return tmp_path / "dual.train.tsv"


def teacher(folder, name, *rows):
    write(folder / name, [HEADER, *rows])
    return folder / name


def same(found, expected):
    return np.array_equal(found, np.array(expected, dtype=np.float32), equal_nan=True)


def test_several_teachers_are_averaged(train, tmp_path):
    one = teacher(tmp_path, "a.tsv", "1.5\t-2", "1.5\t", "1.5\t4")
    other = teacher(tmp_path, "b.tsv", "-0.5\t1", "-0.5\t7", "-0.5\t-1e1")
    assert same(read_teachers(train, [one], 3), [[1.5, -2], [1.5, np.nan], [1.5, 4]])
    # a passage that one of them does not know is unknown: the constants of a query would not cancel
    assert same(read_teachers(train, [one, other], 3), [[0.5, -0.5], [0.5, np.nan], [0.5, -3]])
    assert same(read_teachers(train, [other, one], 3), read_teachers(train, [one, other], 3))


def test_columns_are_found_by_name(train, tmp_path):
    """The sidecar of mining is the default, and any file with the two columns will do."""
    row = "\t".join(["", "", "", "", "1.5", "", "", "", "", "-2"])
    write(tmp_path / SIDECAR, ["\t".join(COLUMNS), row, row, row])
    rows = ["note\tnegative_logit\tpositive_logit", "x\t-2\t1.5", "\t-2\t1.5", "\t-2\t1.5"]
    write(tmp_path / "b.tsv", rows)
    found = read_teachers(train, [], 3)
    assert same(found, 3 * [[1.5, -2]]) and same(read_teachers(train, [tmp_path / "b.tsv"], 3), found)


@pytest.mark.parametrize(
    "rows, named",
    [
        (["1\t2"] * 2, "a.tsv: 2 rows .*expected 3.*dual.train.tsv.*score this"),
        (["1\t2"] * 4, "a.tsv: 4 rows .*expected 3"),
        (["1\t2", "1\tx", "1\t2"], "a.tsv:3: negative_logit 'x' .*expected a number"),
        (["nan\t2", "1\t1", "1\t2"], "a.tsv:2: positive_logit 'nan' .*expected a number"),
        (["1\t2", "1", "1\t2"], "a.tsv:3: 1 TAB-separated columns .*expected 2"),
        (["1\t", "1\t", "\t2"], "a.tsv: no row with a teacher's scores"),
    ],
)
def test_a_wrong_file_is_named(train, tmp_path, rows, named):
    path = teacher(tmp_path, "a.tsv", *rows)
    with pytest.raises(UserError, match=named) as caught:
        read_teachers(train, [path], 3)
    assert "\n" not in str(caught.value)


def test_a_wrong_header_is_named(train, tmp_path):
    for header in ("1\t2", "positive_logit\tlogit", ""):
        write(tmp_path / "a.tsv", [header, "1\t2"])
        with pytest.raises(FormatError, match="a.tsv:1: .*expected a header with positive_logit"):
            read_teacher(train, tmp_path / "a.tsv")


def test_a_missing_file_and_teachers_without_a_common_row(train, tmp_path):
    with pytest.raises(UserError, match="dual.train.ids.tsv: no such file.*--teacher"):
        read_teachers(train, [], 3)
    one = teacher(tmp_path, "a.tsv", "1\t", "1\t2", "1\t")
    other = teacher(tmp_path, "b.tsv", "1\t2", "1\t", "1\t2")
    with pytest.raises(UserError, match="a.tsv, .*b.tsv: no row that all"):
        read_teachers(train, [one, other], 3)


def test_scores_of_another_training_file_are_refused(train, tmp_path):
    path = teacher(tmp_path, "a.tsv", *["1\t2"] * 3)
    write_stamp(path, {"stage": "score_training_set", TRAIN_ROWS: checksum_files([train])})
    assert len(read_teachers(train, [path], 3)) == 3
    write(tmp_path / "other.tsv", [f"q\t\tp\t\t{negative}\t0" for negative in "mno"])  # as many rows
    with pytest.raises(UserError, match="a.tsv: the scores of another training file than .*other.tsv"):
        read_teachers(tmp_path / "other.tsv", [path], 3)
    teacher(tmp_path, "a.tsv", *["1\t3"] * 3)
    with pytest.raises(UserError, match="a.tsv: changed since"):
        read_teachers(train, [path], 3)


def test_a_sidecar_of_another_mining_is_refused(train, tmp_path):
    path = teacher(tmp_path, SIDECAR, *["1\t2"] * 3)
    for file in (train, path):
        write_stamp(file, {"stage": "mine_negatives", "topk": 5})
    assert len(read_teacher(train, path)) == 3
    write_stamp(path, {"stage": "mine_negatives", "topk": 9})
    with pytest.raises(UserError, match=f"{SIDECAR}: from another mining run than .*{train.name}"):
        read_teacher(train, path)
    other = teacher(tmp_path, "a.tsv", *["1\t2"] * 3)  # without a stamp
    with pytest.raises(UserError, match="a.tsv: .*score the rows with script/score_training_set.py"):
        read_teacher(train, other)
    write_stamp(path, {"stage": "mine_negatives", "topk": 5})
    write(train, [f"q\t\tp\t\t{negative}\t0" for negative in "mno"])  # the same rows in another order
    with pytest.raises(UserError, match="changed since it was mined.*mine again, or.*delete"):
        read_teacher(train, path)
