"""Stamps: a result is up to date when its stamp agrees; else the log names each change."""

import json
import os

import pytest

from torch_src.runtime import stamps
from torch_src.runtime.stamps import (
    fingerprint_files,
    fingerprint_text,
    is_sealed,
    record_seal,
    seal,
    stamp_path,
    up_to_date,
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


def told(artifact, stamp):
    """The answer of up_to_date and the lines it said."""
    said = []
    return up_to_date(artifact, stamp, said.append), said


def test_same_stamp_is_up_to_date_in_silence(artifact):
    assert told(artifact, dict(STAMP)) == (True, [])
    assert told(artifact, dict(reversed(STAMP.items()))) == (True, [])


def test_stamp_lies_beside_its_artifact_as_readable_json(artifact):
    assert stamp_path(artifact) == artifact.with_name("vectors.npy.stamp.json")
    text = stamp_path(artifact).read_text(encoding="utf-8")
    assert "问" in text
    assert json.loads(text) == {**STAMP, "lengths": [32, 384], "code": stamps.CODE_VERSION}


def test_each_change_is_named_from_to_and_nothing_else(artifact):
    fresh, said = told(artifact, {**STAMP, "model": "b", "lengths": (32, 128)})
    assert not fresh
    (line,) = said
    assert line.startswith(f"{artifact}: out of date")
    assert "model: a -> b" in line and "lengths: [32, 384] -> [32, 128]" in line
    assert "prefix" not in line and "dropout" not in line and "code" not in line


@pytest.mark.parametrize(
    "old, new, named",
    [
        ({"a": 1}, {"a": 1, "b": 2}, ["b: unknown -> 2"]),
        ({"a": 1, "b": 2}, {"a": 1}, ["b: 2 -> gone"]),
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
    fresh, (line,) = told(artifact, STAMP)
    assert not fresh and f"code: {stamps.CODE_VERSION - 1} -> {stamps.CODE_VERSION}" in line


def test_missing_artifact_is_not_up_to_date_even_with_a_stamp(artifact, tmp_path):
    artifact.unlink()
    assert stamps.read_stamp(artifact) is None
    assert told(artifact, STAMP) == (False, [])
    assert told(tmp_path / "never made", STAMP) == (False, [])


def test_artifact_without_stamp_is_made_again_and_said_so(artifact):
    stamps.clear_stamp(artifact)
    fresh, (line,) = told(artifact, STAMP)
    assert not fresh and line.startswith(f"{artifact}: ") and "without a stamp" in line
    stamps.clear_stamp(artifact)
    assert artifact.exists()


@pytest.mark.parametrize("torn", [b"", b'{"model": "a"', b"[]", b"null", b'{"\xff": 1}'])
def test_torn_stamp_counts_as_none(artifact, torn):
    stamp_path(artifact).write_bytes(torn)
    assert stamps.read_stamp(artifact) is None
    fresh, (line,) = told(artifact, STAMP)
    assert not fresh and "made again" in line


def test_files_have_the_fingerprint_of_their_content_not_of_name_or_time(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"same")
    second.write_bytes(b"same")
    os.utime(second, ns=(1, 1))
    assert fingerprint_files([first]) == fingerprint_files([second])
    second.write_bytes(b"sane")
    assert fingerprint_files([first]) != fingerprint_files([second])


def test_fingerprint_knows_order_and_borders_of_the_files(tmp_path):
    paths = {}
    for content in ("", "a", "b", "ab"):
        paths[content] = tmp_path / f"file {content}"
        paths[content].write_text(content)
    groups = [["a", "b"], ["b", "a"], ["ab"], ["ab", ""], ["", "ab"], ["a"], [""], []]
    found = {fingerprint_files([paths[content] for content in group]) for group in groups}
    assert len(found) == len(groups)
    assert all(len(digits) == 16 and int(digits, 16) >= 0 for digits in found)


def test_fingerprint_does_not_depend_on_the_size_of_a_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 3)
    whole = fingerprint_files([path])
    monkeypatch.setattr(stamps, "READ_SIZE", 7)
    assert fingerprint_files([path]) == whole


def test_text_fingerprint_follows_the_text():
    assert fingerprint_text("水") == fingerprint_text("水") != fingerprint_text("水 ")
    assert len(fingerprint_text("")) == 16


def test_a_sealed_artifact_that_changed_is_made_again(artifact):
    seal(artifact, STAMP)
    assert is_sealed(artifact) and told(artifact, STAMP) == (True, [])
    artifact.write_bytes(b"y")
    fresh, (line,) = told(artifact, STAMP)
    assert not fresh and not is_sealed(artifact) and "its bytes are not those that were written" in line


def test_the_seal_of_a_record_covers_all_but_itself():
    record = {"a": 1, "b": [1.5, "问"], "c": {"d": None}}
    sealed = {**record, "seal": record_seal(record)}
    assert record_seal(json.loads(json.dumps(sealed))) == sealed["seal"]
    assert record_seal({**sealed, "a": 2}) != sealed["seal"]
