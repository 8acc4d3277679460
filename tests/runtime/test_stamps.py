"""Stamps and checksums: a result is up to date when both agree; else each change is logged."""

import json
import os

import pytest

from torch_src.runtime import stamps
from torch_src.runtime.stamps import (
    checksum_files,
    checksum_text,
    is_intact,
    read_checked_json,
    stamp_path,
    up_to_date,
    write_checked_json,
    write_stamp,
)

STAMP = {"model": "a", "lengths": (32, 384), "prefix": "问", "dropout": None}


@pytest.fixture
def artifact(tmp_path):
    """A finished artifact with its stamp."""
    path = tmp_path / "vectors.npy"
    path.write_bytes(b"x")
    write_stamp(path, STAMP)
    return path


def answer(artifact, stamp):
    """Return up_to_date's answer and the lines it logs."""
    logged = []
    return up_to_date(artifact, stamp, logged.append), logged


def test_the_same_stamp_is_up_to_date_and_logs_nothing(artifact):
    assert answer(artifact, dict(STAMP)) == (True, [])
    assert answer(artifact, dict(reversed(STAMP.items()))) == (True, [])


def test_the_stamp_is_readable_json_beside_its_artifact(artifact):
    assert stamp_path(artifact) == artifact.with_name("vectors.npy.stamp.json")
    text = stamp_path(artifact).read_text(encoding="utf-8")
    assert "问" in text
    more = {"code": stamps.CODE_VERSION, "checksum": checksum_files([artifact])}
    assert json.loads(text) == {**STAMP, "lengths": [32, 384], **more}


def test_only_changed_fields_are_logged(artifact):
    fresh, logged = answer(artifact, {**STAMP, "model": "b", "lengths": (32, 128)})
    assert not fresh
    (line,) = logged
    assert line.startswith(f"{artifact}: out of date")
    assert "model: a -> b" in line and "lengths: [32, 384] -> [32, 128]" in line
    assert "prefix" not in line and "dropout" not in line and "code" not in line


@pytest.mark.parametrize(
    "old, new, named",
    [
        ({"a": 1}, {"a": 1, "b": 2}, ["b: missing -> 2"]),
        ({"a": 1, "b": 2}, {"a": 1}, ["b: 2 -> missing"]),
        ({"a": None}, {"a": 0}, ["a: None -> 0"]),
        ({"a": "1"}, {"a": 1}, ["a: 1 -> 1"]),
        ({"a": 1, "b": 1}, {"a": 2, "b": 0}, ["a: 1 -> 2", "b: 1 -> 0"]),
        ({"a": [1, 2]}, {"a": (1, 2)}, []),
    ],
)
def test_changes_of_fields(old, new, named):
    assert stamps.changes({**old, "code": stamps.CODE_VERSION}, new) == named


def test_new_code_version_makes_it_out_of_date(artifact, monkeypatch):
    monkeypatch.setattr(stamps, "CODE_VERSION", stamps.CODE_VERSION + 1)
    fresh, (line,) = answer(artifact, STAMP)
    assert not fresh and f"code: {stamps.CODE_VERSION - 1} -> {stamps.CODE_VERSION}" in line


def test_missing_artifact_is_not_up_to_date_even_with_a_stamp(artifact, tmp_path):
    artifact.unlink()
    assert stamps.read_stamp(artifact) is None
    assert answer(artifact, STAMP) == (False, [])
    assert answer(tmp_path / "never made", STAMP) == (False, [])


def test_an_artifact_without_a_stamp_is_rebuilt(artifact):
    stamps.clear_stamp(artifact)
    fresh, (line,) = answer(artifact, STAMP)
    assert not fresh and line.startswith(f"{artifact}: ") and "stamp" in line
    stamps.clear_stamp(artifact)
    assert artifact.exists()


@pytest.mark.parametrize("damaged", [b"", b'{"model": "a"', b"[]", b"null", b'{"\xff": 1}'])
def test_a_damaged_stamp_counts_as_missing(artifact, damaged):
    stamp_path(artifact).write_bytes(damaged)
    assert stamps.read_stamp(artifact) is None
    fresh, (line,) = answer(artifact, STAMP)
    assert not fresh and "rebuilding" in line


def test_files_have_the_checksum_of_their_content_not_of_name_or_time(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"same")
    second.write_bytes(b"same")
    os.utime(second, ns=(1, 1))
    assert checksum_files([first]) == checksum_files([second])
    second.write_bytes(b"sane")
    assert checksum_files([first]) != checksum_files([second])


def test_the_checksum_depends_on_order_and_boundaries_of_the_files(tmp_path):
    paths = {}
    for content in ("", "a", "b", "ab"):
        paths[content] = tmp_path / f"file {content}"
        paths[content].write_text(content)
    groups = [["a", "b"], ["b", "a"], ["ab"], ["ab", ""], ["", "ab"], ["a"], [""], []]
    found = {checksum_files([paths[content] for content in group]) for group in groups}
    assert len(found) == len(groups)
    assert all(len(digits) == 16 and int(digits, 16) >= 0 for digits in found)


def test_checksum_does_not_depend_on_the_size_of_a_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 3)
    whole = checksum_files([path])
    monkeypatch.setattr(stamps, "READ_SIZE", 7)
    assert checksum_files([path]) == whole


def test_text_checksum_follows_the_text():
    assert checksum_text("水") == checksum_text("水") != checksum_text("水 ")
    assert len(checksum_text("")) == 16


def test_an_artifact_with_another_checksum_is_rebuilt(artifact):
    assert is_intact(artifact) and answer(artifact, STAMP) == (True, [])
    artifact.write_bytes(b"y")
    fresh, (line,) = answer(artifact, STAMP)
    assert not fresh and not is_intact(artifact) and "checksum" in line


def test_json_with_a_checksum_over_all_entries(tmp_path):
    path, entries = tmp_path / "entries.json", {"a": 1, "b": [1.5, "问"], "c": {"d": None}}
    assert read_checked_json(path) is None
    write_checked_json(path, entries)
    read = read_checked_json(path)
    assert read == {**entries, "checksum": read["checksum"]}
    path.write_text(path.read_text(encoding="utf-8").replace("1.5", "2.5"), encoding="utf-8")
    assert read_checked_json(path) is None
