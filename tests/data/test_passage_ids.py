"""passage2id.map.json, streamed with any chunk size: the same pairs as json.loads, in row order."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_src.data import json_pairs, passage_ids
from torch_src.data.passage_ids import read_passage_ids
from torch_src.runtime.errors import UserError

STEADY = settings(derandomize=True, deadline=None)  # the same examples each time, on a slow machine too
ODD = 'a"b\\c/\x0b\u2028,}:{" 甲𠮷'
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LAYOUTS = [{}, {"indent": 2}, {"separators": (",", ":")}, {"separators": (" ,\n", "\t: ")}]
OBJECT = '{"0": "p0", "1": "p1"}'


def pairs_of(path, chunk):
    return [pair for part in json_pairs.read_json_pairs(path, chunk) for pair in part.pairs]


def read_in_chunks(monkeypatch, size):
    """Read JSON maps `size` bytes at a time."""
    monkeypatch.setattr(json_pairs.read_json_pairs, "__defaults__", (size,))


@pytest.fixture
def file(tmp_path):
    """A function that writes the map (text or bytes) and returns its path."""

    def write(content):
        path = tmp_path / "map.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@STEADY
@given(
    st.dictionaries(TEXT, TEXT, max_size=6),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(1, 40),
)
@example({ODD: ODD, "": "", "\\": '\\"'}, {}, True, 1)
@example({ODD: ODD, "\\\\": '"'}, {}, False, 1)
@example({}, {"indent": 2}, True, 1)
def test_pairs_equal_json_loads_for_any_chunk_size(tmp_path_factory, pairs, layout, ascii_only, chunk):
    path = tmp_path_factory.getbasetemp() / "pairs.json"
    path.write_bytes((json.dumps(pairs, ensure_ascii=ascii_only, **layout) + "\n").encode())
    assert pairs_of(path, chunk) == list(pairs.items())


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_whitespace_before_the_object_is_allowed(file, chunk):
    assert pairs_of(file(f"\r\n {OBJECT}"), chunk) == [("0", "p0"), ("1", "p1")]


def test_pair_longer_than_the_chunk_is_read_whole(file):
    long = "x" * 5000
    assert pairs_of(file(json.dumps({"0": long, "1": "b"})), 7) == [("0", long), ("1", "b")]


@pytest.mark.parametrize("length", range(len(OBJECT)))
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_file_cut_off_anywhere_is_a_user_error(file, length, chunk):
    path = file(OBJECT[:length])
    with pytest.raises(UserError) as caught:
        pairs_of(path, chunk)
    assert str(caught.value).startswith(f"{path}:")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '["0", "p"]',
        '{"0": 1}',
        '{"0": null}',
        '{"0": "p" "1": "q"}',
        '{"0" "p"}',
        '{0: "p"}',
        '{"0": {"1": "p"}}',
        "\ufeff" + OBJECT,
        b'{"0": "\xff"}',
    ],
)
def test_anything_but_one_flat_object_of_strings_is_a_user_error(file, content):
    path = file(content)
    with pytest.raises(UserError) as caught:
        read_passage_ids(path)
    assert str(caught.value).startswith(f"{path}:")


@pytest.mark.parametrize("content", ['{"0": "\\x"}', '{"0": "\\u12"}', '{"\\q": "p"}', '{"0": "\\ud800"}'])
def test_invalid_escape_is_a_user_error(file, content):
    path = file(content)
    with pytest.raises(UserError) as caught:
        read_passage_ids(path)
    assert str(caught.value).startswith(f"{path}:")


@pytest.mark.parametrize("rest", ["x", OBJECT, ', "2": "p2"}'])
def test_text_after_the_object_is_a_user_error(file, rest):
    with pytest.raises(UserError):
        read_passage_ids(file(OBJECT + rest))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_passage_ids(tmp_path / "none.json")


@STEADY
@given(st.permutations(range(9)), st.sampled_from([1, 2, 3, 9, 100]))
def test_entry_i_is_the_pid_of_row_i_in_any_key_order(tmp_path_factory, order, chunk):
    pids = ["", "a", "bb" * 20, "甲", "e\u0301", 'q"', "7", "pid-7", "z"]
    path = tmp_path_factory.getbasetemp() / "order.json"
    path.write_text(json.dumps({str(row): pids[row] for row in order}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        read_in_chunks(patch, chunk)
        found = read_passage_ids(path)
    assert found.dtype.kind == "S"
    assert [pid.decode() for pid in found] == pids


def test_empty_object_gives_no_ids(file):
    found = read_passage_ids(file("{}"))
    assert found.shape == (0,) and found.dtype.kind == "S"


@pytest.mark.parametrize("keys", [["1"], ["0", "2"], ["0", "0"], ["0", "1", "1"], ["1", "2"]])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_missing_or_repeated_row_is_a_user_error(file, monkeypatch, keys, chunk):
    read_in_chunks(monkeypatch, chunk)
    path = file("{" + ", ".join(f'"{key}": "p"' for key in keys) + "}")
    with pytest.raises(UserError, match=rf"the rows 0\.\.{len(keys) - 1}") as caught:
        read_passage_ids(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", ["", "a", "-1", "1.0", " 0", "²", "01", "00"])
def test_key_that_is_not_a_row_number_is_an_error(file, key):
    with pytest.raises(UserError, match="not a row number") as caught:
        read_passage_ids(file(json.dumps({"0": "p", key: "q"})))
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize("digits", [12, 20, 5000])
def test_huge_row_number_is_a_user_error(file, digits):
    with pytest.raises(UserError):
        read_passage_ids(file(json.dumps({"9" * digits: "p"})))


def test_ids_are_one_bytes_array_as_wide_as_the_longest(file):
    found = read_passage_ids(file(json.dumps({"1": "abc", "0": "甲乙"})))
    assert found.dtype == np.dtype("S6") and found.tolist() == ["甲乙".encode(), b"abc"]


def test_the_ids_are_cached(file, tmp_path, monkeypatch):
    path = file(OBJECT)
    assert read_passage_ids(path, tmp_path / "cache").tolist() == [b"p0", b"p1"]
    with monkeypatch.context() as patch:
        patch.setattr(passage_ids, "read_json_pairs", None)
        assert read_passage_ids(path, tmp_path / "cache").tolist() == [b"p0", b"p1"]
    file('{"0": "p0", "1": "p1", "2": "p2"}')
    assert len(read_passage_ids(path, tmp_path / "cache")) == 3
