"""The passage collection: rows in numeric part order, offset cache, bad lines."""

import gzip
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_src.data import collection
from torch_src.data.collection import PassageCollection, collection_files
from torch_src.data.lines import FormatError
from torch_src.runtime.errors import UserError

STEADY = settings(derandomize=True, deadline=None)  # the same examples each time, on a slow machine too
ODD = ' "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r""b '


def lines(*texts):
    return "".join(f"-\t\t{text}\t0\n" for text in texts)


@pytest.fixture
def make(tmp_path):
    """Return a function that writes files to a new collection folder and returns the folder."""

    def write(**files):
        folder = tmp_path / "passages"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (folder / name.replace("part_", "part-")).write_bytes(data)
        return folder

    return write


def scans(monkeypatch):
    """Return the list of files that are scanned after this call."""
    seen, scan = [], collection._scan
    monkeypatch.setattr(collection, "_scan", lambda path: seen.append(path.name) or scan(path))
    return seen


def test_parts_are_in_numeric_order(make):
    folder = make(**{f"part_{number}": lines(f"p{number}") for number in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)})
    assert list(PassageCollection(folder)) == [f"p{number}" for number in range(11)]


def test_other_files_in_the_folder_are_ignored(make):
    folder = make(part_00=lines("a"), **{"passage2id.map.json": "{}", "part_01.tmp": "x", "xpart_02": "x"})
    assert [path.name for path in collection_files(folder)] == ["part-00"]


def test_all_doc_alone_is_the_collection(make):
    assert list(PassageCollection(make(all_doc=lines("a", "b")))) == ["a", "b"]


def test_all_doc_beside_parts_must_have_as_many_rows(make):
    folder = make(part_00=lines("a"), part_01=lines("b"), all_doc=lines("c", "d"))
    assert list(PassageCollection(folder)) == ["a", "b"]
    (folder / "all_doc").write_text(lines("c"))
    with pytest.raises(UserError, match="1 rows, but the parts beside it have 2") as caught:
        PassageCollection(folder)
    assert str(caught.value).startswith(str(folder / "all_doc"))


def test_missing_part_is_named(make):
    with pytest.raises(UserError, match="part-01 is missing"):
        collection_files(make(part_00=lines("a"), part_03=lines("b")))
    with pytest.raises(UserError, match="part-00 is missing"):
        collection_files(make(part_01=lines("a")))


def test_two_files_of_the_same_part_number_are_refused(make):
    with pytest.raises(UserError):
        PassageCollection(make(part_0=lines("a"), part_00=lines("b")))


def test_a_missing_or_empty_folder_is_a_user_error(make, tmp_path):
    for folder, words in ((tmp_path / "none", "no such folder"), (make(), "no passages")):
        with pytest.raises(UserError, match=f"^{folder}: {words}"):
            PassageCollection(folder)
    with pytest.raises(UserError, match="collection is empty"):
        PassageCollection(make(part_00=""))


def test_last_line_without_newline_is_a_row(make):
    folder = make(part_00=lines("a", "b")[:-1], part_01=lines("c")[:-1])
    assert list(PassageCollection(folder)) == ["a", "b", "c"]


def test_unusual_line_separators_do_not_end_a_line(make):
    passages = PassageCollection(make(part_00=lines(ODD, "", "\u2028"), part_01=lines(ODD)))
    assert len(passages) == 4
    assert passages[0:4] == [ODD, "", "\u2028", ODD]


@STEADY
@given(
    st.lists(st.lists(st.sampled_from(["", "a", ODD, "甲" * 9]), max_size=4), min_size=1, max_size=4),
    st.integers(1, 60),
    st.data(),
)
def test_slices_across_parts_equal_list_slices(tmp_path_factory, parts, read_size, data):
    texts = [text for part in parts for text in part]
    if not texts:
        return
    folder = tmp_path_factory.mktemp("parts")
    for number, part in enumerate(parts):
        (folder / f"part-{number:02d}").write_bytes(lines(*part).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection, "READ_SIZE", read_size)
        passages = PassageCollection(folder)
    start = data.draw(st.integers(-len(texts) - 1, len(texts) + 1))
    stop = data.draw(st.integers(-len(texts) - 1, len(texts) + 1))
    assert passages[start:stop] == texts[start:stop]
    assert [passages[row] for row in range(len(passages))] == texts


def test_row_outside_the_collection_is_an_index_error(make):
    passages = PassageCollection(make(part_00=lines("a"), part_01=lines("b")))
    assert passages[np.int64(1)] == "b"
    for row in (2, -1, 10**9):
        with pytest.raises(IndexError, match=f"row {row} is outside the collection of 2"):
            passages[row]


@pytest.mark.parametrize(
    "bad, word",
    [
        (b"-\t\tp\n", "expected 4"),
        (b"-\t\tp\tq\t0\n", "expected 4"),
        (b"\n", "expected 4"),
        (b"-\t\t\xff\t0\n", "not UTF-8"),
    ],
)
def test_bad_line_is_named_when_its_row_is_read(make, bad, word):
    folder = make(part_00=lines("a", "b"), part_01=lines("c").encode() + bad + lines("e").encode())
    passages = PassageCollection(folder)
    assert len(passages) == 5 and passages[0:3] == ["a", "b", "c"] and passages[4] == "e"
    for read in (lambda: passages[3], lambda: passages[0:5]):
        with pytest.raises(FormatError, match=word) as caught:
            read()
        assert str(caught.value).startswith(f"{folder / 'part-01'}:2: ")


def test_byte_order_mark_is_named_in_the_first_line_of_any_part(make):
    folder = make(part_00=lines("a"), part_01=b"\xef\xbb\xbf" + lines("b").encode())
    with pytest.raises(FormatError, match="part-01:1: .*byte order mark"):
        PassageCollection(folder)[1]


def test_a_file_truncated_while_open_is_a_user_error(make):
    folder = make(part_00=lines("a", "b"))
    passages = PassageCollection(folder)
    (folder / "part-00").write_text(lines("a"))
    with pytest.raises(UserError, match="part-00: shorter than when it was opened"):
        passages[0:2]


def test_offset_cache_is_reused_for_parts_and_all_doc(make, tmp_path, monkeypatch):
    folder, cache = make(part_00=lines("a"), part_01=lines("b"), all_doc=lines("a", "b")), tmp_path / "cache"
    first = PassageCollection(folder, cache)
    seen = scans(monkeypatch)
    again = PassageCollection(folder, cache)
    assert seen == []
    assert (list(again), again.checksum) == (list(first), first.checksum)


def test_offset_cache_is_rebuilt_for_the_changed_file_only(make, tmp_path, monkeypatch):
    folder, cache = make(part_00=lines("a"), part_01=lines("b")), tmp_path / "cache"
    before = PassageCollection(folder, cache).checksum
    (folder / "part-01").write_text(lines("b", "c"))
    seen = scans(monkeypatch)
    changed = PassageCollection(folder, cache)
    assert seen == ["part-01"] and list(changed) == ["a", "b", "c"] and changed.checksum != before


def test_new_modification_time_alone_keeps_the_checksum(make, tmp_path, monkeypatch):
    folder, cache = make(part_00=lines("a")), tmp_path / "cache"
    before = PassageCollection(folder, cache).checksum
    os.utime(folder / "part-00", ns=(1, 1))
    seen = scans(monkeypatch)
    assert PassageCollection(folder, cache).checksum == before
    assert seen == ["part-00"]


@pytest.mark.parametrize(
    "suffix, damage",
    [
        ("npy", lambda data: b""),
        ("npy", lambda data: data[:-3]),
        ("npy", lambda data: b"garbage" * 20),
        ("npy", lambda data: data[:-8] + bytes(8)),
        ("json", lambda data: data[:20]),
        ("json", lambda data: b"[]"),
        ("json", lambda data: data.replace(b'"array"', b'"other"')),
        ("json", lambda data: data.replace(b'"checksum": "', b'"checksum": 1, "x": "')),
    ],
)
def test_damaged_offset_cache_is_rebuilt(make, tmp_path, monkeypatch, suffix, damage):
    folder, cache = make(part_00=lines("a", "b")), tmp_path / "cache"
    fresh = PassageCollection(folder, cache)
    (path,) = cache.glob(f"*.{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    again = PassageCollection(folder, cache)
    assert (list(again), again.checksum) == (["a", "b"], fresh.checksum)
    seen = scans(monkeypatch)
    assert list(PassageCollection(folder, cache)) == ["a", "b"] and seen == []


def test_checksum_depends_on_content_not_path(make, tmp_path):
    folder = make(part_00=lines("a", "b"))
    first = PassageCollection(folder).checksum
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert PassageCollection(copy, tmp_path / "cache").checksum == first
    (copy / "part-00").write_text(lines("a", "c"))
    assert PassageCollection(copy, tmp_path / "cache").checksum != first


@pytest.mark.parametrize("name", ["part-00", "part-00.gz"])
def test_a_gzipped_part_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress("-\t\t甲\t0\n".encode()))
    with pytest.raises(UserError, match="part-00.*gzipped"):
        PassageCollection(tmp_path)
