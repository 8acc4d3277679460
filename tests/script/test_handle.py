"""script/handle.py: numeric order, whole rows, and never an unfinished all_doc."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "script" / "handle.py"


@pytest.fixture
def handle():
    spec = importlib.util.spec_from_file_location("handle", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_parts(folder: Path, parts: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    return folder


def row(text: str) -> bytes:
    return f"-\t\t{text}\t0\n".encode()


def test_parts_are_merged_in_numeric_order(handle, tmp_path, capsys):
    names = [f"part-{number}" for number in range(12)]  # as text, part-10 sorts before part-2
    folder = write_parts(tmp_path, {name: row(name) for name in reversed(names)})
    assert handle.main([str(folder)]) == 0
    assert (folder / "all_doc").read_bytes() == b"".join(row(name) for name in names)
    out = capsys.readouterr().out
    assert "part-11  1 rows" in out and "12 rows from 12 parts" in out
    assert not (folder / "all_doc.tmp").exists()


def test_a_missing_final_newline_does_not_join_rows(handle, tmp_path):
    odd = "a\x0b\x0c\x1c\x85\u2028b\r"  # only \n ends a row
    folder = write_parts(tmp_path, {"part-00": row(odd)[:-1], "part-01": row("c")[:-1]})
    assert handle.main([str(folder)]) == 0
    assert (folder / "all_doc").read_bytes() == row(odd) + row("c")


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_the_chunk_size_changes_nothing(handle, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(handle, "CHUNK", chunk)
    parts = {"part-00": row("一") + row("二"), "part-01": row("三")[:-1]}
    folder = write_parts(tmp_path, parts)
    assert handle.merge(handle.checked_parts(folder), folder / "all_doc") == [2, 1]
    assert (folder / "all_doc").read_bytes() == row("一") + row("二") + row("三")
    assert handle.rows_if_merged(handle.checked_parts(folder), folder / "all_doc") == [2, 1]


@pytest.mark.parametrize(
    "parts, complaint",
    [
        ({}, "no part-00"),
        ({"part-00": row("a"), "part-02": row("c")}, "part-01 is missing"),
        ({"part-01": row("b")}, "part-00 is missing"),
        ({"part-00": row("a"), "part-01": b""}, "part-01: empty"),
        ({"part-00": row("a"), "part-01": row("b"), "part-1": row("b")}, "duplicate"),
    ],
)
def test_bad_parts_are_an_error_of_one_line(handle, tmp_path, capsys, parts, complaint):
    folder = write_parts(tmp_path, {"part-00.tmp": b"x", "notes": b"x", **parts})
    assert handle.main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert complaint in captured.err
    assert not (folder / "all_doc").exists()


def test_a_missing_folder(handle, tmp_path, capsys):
    assert handle.main([str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err


def test_a_second_run_keeps_all_doc_and_force_rewrites_it(handle, tmp_path, capsys):
    folder = write_parts(tmp_path, {"part-00": row("a"), "part-01": row("b")[:-1]})
    merged = folder / "all_doc"
    assert handle.main([str(folder)]) == 0
    os.utime(merged, (1, 1))
    assert handle.main([str(folder)]) == 0
    assert merged.stat().st_mtime == 1
    assert "up to date" in capsys.readouterr().out
    assert handle.main([str(folder), "--force"]) == 0
    assert merged.stat().st_mtime != 1


@pytest.mark.parametrize(
    "stale",
    [
        row("b") + row("a"),  # right rows and size, in directory order
        row("a"),  # truncated
        row("a") + row("b") + row("c"),  # a part too many
    ],
)
def test_a_stale_all_doc_is_merged_again(handle, tmp_path, capsys, stale):
    folder = write_parts(tmp_path, {"part-00": row("a"), "part-01": row("b"), "all_doc": stale})
    assert handle.main([str(folder)]) == 0
    assert (folder / "all_doc").read_bytes() == row("a") + row("b")
    assert "merging again" in capsys.readouterr().out


def test_not_enough_disk_leaves_the_old_file(handle, tmp_path, monkeypatch, capsys):
    folder = write_parts(tmp_path, {"part-00": row("a"), "all_doc": b"old\n"})
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(handle.shutil, "disk_usage", lambda path: usage._replace(free=3))
    assert handle.main([str(folder)]) == 2
    assert "GB needed" in capsys.readouterr().err
    assert (folder / "all_doc").read_bytes() == b"old\n"


def test_a_write_that_fails_leaves_nothing(handle, tmp_path, monkeypatch, capsys):
    def full_disk(handle):
        raise OSError(28, "No space left on device")

    folder = write_parts(tmp_path, {"part-00": row("a")})
    monkeypatch.setattr(handle.os, "fsync", full_disk)
    assert handle.main([str(folder)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["part-00"]


@pytest.mark.parametrize("named, warned", [(2, False), (3, True)])
def test_a_missing_last_part_is_found_by_the_id_map(handle, tmp_path, capsys, named, warned):
    ids = {str(number): f"pid{number}" for number in range(named)}
    folder = write_parts(
        tmp_path, {"part-00": row("a") + row("b"), "passage2id.map.json": json.dumps(ids).encode()}
    )
    assert handle.main([str(folder)]) == 0
    assert ("is a part missing" in capsys.readouterr().err) == warned


def test_a_copy_in_the_collection_works_from_any_folder(tmp_path):
    folder = write_parts(tmp_path / "passage-collection", {"part-00": row("a")})
    shutil.copy(SCRIPT, folder / "handle.py")
    subprocess.run([sys.executable, folder / "handle.py"], cwd=tmp_path, check=True, capture_output=True)
    assert (folder / "all_doc").read_bytes() == row("a")


def test_in_the_repository_it_merges_the_current_folder(tmp_path):
    folder = write_parts(tmp_path, {"part-00": row("a")})
    subprocess.run([sys.executable, SCRIPT], cwd=folder, check=True, capture_output=True)
    assert (folder / "all_doc").read_bytes() == row("a")
