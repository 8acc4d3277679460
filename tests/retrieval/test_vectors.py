"""Vectors on disk: blocks, manifest, damaged files."""

import json
import subprocess
import sys

import numpy as np
import pytest
from toy_world import ROOT

from torch_src.retrieval.vectors import DamagedBlock, VectorStore, save_vectors
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import CODE_VERSION

STAMP = {"weights": "abc", "max_len": 32, "prefix": "", "normalize": False}
USE = f"""
import sys
from torch_src.retrieval.vectors import VectorStore
store = VectorStore.create_or_continue(sys.argv[1], {STAMP}, 9, 3, 4, print)
print("reading", flush=True)
sys.stdin.readline()
"""


def make(folder, logged=None, rows=9, hidden=3, block_rows=4, stamp=STAMP, force=False):
    log = [].append if logged is None else logged.append
    return VectorStore.create_or_continue(folder, stamp, rows, hidden, block_rows, log, force)


def fill(store, seed=0, **more):
    """Write every block; return all vectors."""
    vectors = np.random.default_rng(seed).normal(size=(store.rows, store.hidden)).astype(np.float16)
    for block in range(store.block_count):
        first, last = store.block_range(block)
        store.write_block(block, vectors[first:last], **more)
    return vectors


@pytest.mark.parametrize(
    ("rows", "block_rows", "lengths"),
    [(9, 4, [4, 4, 1]), (8, 4, [4, 4]), (1, 4, [1]), (3, 1, [1, 1, 1]), (7, 7, [7]), (5, 100, [5])],
)
def test_blocks_cover_the_rows_in_order(tmp_path, rows, block_rows, lengths):
    store = make(tmp_path / "para_emb", rows=rows, block_rows=block_rows)
    assert store.block_count == len(lengths) and store.missing_blocks() == list(range(len(lengths)))
    vectors = fill(store)
    assert store.missing_blocks() == []
    pieces = list(store.blocks())
    assert [len(piece) for _, piece in pieces] == lengths
    assert [first for first, _ in pieces] == [sum(lengths[:at]) for at in range(len(lengths))]
    assert np.array_equal(np.concatenate([piece for _, piece in pieces]), vectors)
    assert all(piece.dtype == np.float16 and isinstance(piece, np.memmap) for _, piece in pieces)
    names = {path.name for path in (tmp_path / "para_emb").iterdir()}
    blocks = {f"block-{block:05d}.{kind}" for block in range(len(lengths)) for kind in ("npy", "json")}
    assert names == {"manifest.json", "blocks.lock"} | blocks


def test_a_block_of_the_wrong_shape_or_type_is_not_written(tmp_path):
    store = make(tmp_path)
    for block, vectors in (
        (0, np.zeros((3, 3), np.float16)),
        (2, np.zeros((4, 3), np.float16)),
        (0, np.zeros((4, 2), np.float16)),
        (0, np.zeros((4, 3), np.float32)),
    ):
        with pytest.raises(AssertionError):
            store.write_block(block, vectors)
    assert store.missing_blocks() == [0, 1, 2]


def test_finished_blocks_are_kept_when_the_manifest_agrees(tmp_path):
    fill(make(tmp_path))
    (tmp_path / "block-00001.npy").unlink()
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    logged = []
    again = make(tmp_path, logged)
    assert again.missing_blocks() == [1] and logged == []
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()} == before
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {**STAMP, "rows": 9, "hidden": 3, "block_rows": 4, "code": CODE_VERSION}


def test_a_tuple_in_the_stamp_is_no_change(tmp_path):
    stamp, logged = {**STAMP, "layers": (1, 2)}, []
    fill(make(tmp_path, stamp=stamp))
    assert make(tmp_path, logged, stamp=stamp).missing_blocks() == [] and logged == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stamp": {**STAMP, "weights": "xyz"}}, "weights: abc -> xyz"),
        ({"stamp": {**STAMP, "normalize": True}}, "normalize: False -> True"),
        ({"stamp": {**STAMP, "new": 5}}, "new: missing -> 5"),
        ({"stamp": {k: v for k, v in STAMP.items() if k != "max_len"}}, "max_len: 32 -> missing"),
        ({"rows": 10}, "rows: 9 -> 10"),
        ({"hidden": 2}, "hidden: 3 -> 2"),
        ({"block_rows": 5}, "block_rows: 4 -> 5"),
    ],
)
def test_a_manifest_that_differs_deletes_every_block_and_logs_the_field(tmp_path, change, words):
    fill(make(tmp_path))
    logged = []
    store = make(tmp_path, logged, **change)
    assert list(tmp_path.glob("block-*")) == [] and store.missing_blocks() == list(range(store.block_count))
    assert len(logged) == 1 and f"({words})" in logged[0]
    assert make(tmp_path, logged, **change).manifest == store.manifest and len(logged) == 1


def test_another_code_version_deletes_the_vectors(tmp_path, monkeypatch):
    fill(make(tmp_path))
    monkeypatch.setattr("torch_src.retrieval.vectors.CODE_VERSION", CODE_VERSION + 1)
    monkeypatch.setattr("torch_src.runtime.stamps.CODE_VERSION", CODE_VERSION + 1)
    logged = []
    assert make(tmp_path, logged).missing_blocks() == [0, 1, 2]
    assert f"code: {CODE_VERSION} -> {CODE_VERSION + 1}" in logged[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 9'])
def test_a_damaged_manifest_keeps_the_blocks_whose_stamp_agrees(tmp_path, text):
    fill(make(tmp_path))
    written = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "block-00002.json").write_text("{}")  # without its stamp a block is missing
    (tmp_path / "manifest.json").write_text(text)
    logged = []
    assert make(tmp_path, logged).missing_blocks() == [2] and "manifest.json: damaged" in logged[0]
    assert (tmp_path / "manifest.json").read_bytes() == written
    (tmp_path / "manifest.json").write_text(text)  # blocks of another run are deleted
    logged = []
    assert make(tmp_path, logged, stamp={**STAMP, "weights": "xyz"}).missing_blocks() == [0, 1, 2]
    assert "unreadable" in logged[0] and list(tmp_path.glob("block-*")) == []


def test_a_missing_manifest_is_rewritten_when_the_stamps_agree(tmp_path):
    fill(make(tmp_path))
    (tmp_path / "manifest.json").unlink()
    logged = []
    assert make(tmp_path, logged).missing_blocks() == [] and len(logged) == 1
    for path in [tmp_path / "manifest.json", *tmp_path.glob("block-*.json")]:
        path.unlink()
    logged = []
    assert make(tmp_path, logged).missing_blocks() == [0, 1, 2]
    assert len(logged) == 1 and "missing" in logged[0]


@pytest.mark.parametrize("change", [{"stamp": {**STAMP, "weights": "xyz"}}, {"force": True}])
def test_vectors_that_another_run_reads_are_not_deleted(tmp_path, change):
    fill(make(tmp_path))
    using = subprocess.Popen(
        [sys.executable, "-c", USE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert using.stdout.readline() == b"reading\n"
    assert make(tmp_path).missing_blocks() == []  # a run of the same vectors shares them
    with pytest.raises(UserError, match="another run reads the vectors"):
        make(tmp_path, **change)
    assert make(tmp_path).missing_blocks() == []
    using.communicate(b"\n")
    logged = []
    assert make(tmp_path, logged, **change).missing_blocks() == [0, 1, 2] and logged


@pytest.mark.parametrize("at", range(0, 128, 3))
def test_a_flipped_byte_of_a_header_is_damage(tmp_path, at):
    store = make(tmp_path)
    fill(store)
    path = tmp_path / "block-00001.npy"
    data = bytearray(path.read_bytes())
    for bit in range(8):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        try:
            store.read_into(0, read := np.empty((9, 3), np.float16))
        except DamagedBlock as damage:
            assert damage.block == 1
        else:
            assert read.tobytes() == b"".join(vectors.tobytes() for _, vectors in store.blocks())


def test_force_deletes_every_block(tmp_path):
    fill(make(tmp_path))
    logged = []
    assert make(tmp_path, logged, force=True).missing_blocks() == [0, 1, 2]
    assert len(logged) == 1 and "--force" in logged[0]
    logged.clear()
    make(tmp_path / "fresh", logged, force=True)
    assert logged == []  # there was nothing to delete


@pytest.mark.parametrize("keep", [0, 5, 60, 128, -1])
def test_a_truncated_block_is_named(tmp_path, keep):
    store = make(tmp_path)
    fill(store)
    path = tmp_path / "block-00001.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"block-00001\.npy: damaged.*delete it"):
        list(store.blocks())


def test_a_block_that_is_missing_or_has_another_shape_is_named(tmp_path):
    store = make(tmp_path)
    fill(store)
    np.save(tmp_path / "block-00002.npy", np.zeros((1, 3), np.float32))
    with pytest.raises(UserError, match=r"block-00002\.npy: damaged .*\(1, 3\) float16"):
        list(store.blocks())
    np.save(tmp_path / "block-00000.npy", np.zeros((3, 3), np.float16))
    with pytest.raises(UserError, match=r"block-00000\.npy: damaged .*\(4, 3\)"):
        next(store.blocks())
    (tmp_path / "block-00000.npy").unlink()
    with pytest.raises(UserError, match=r"block-00000\.npy: missing"):
        next(store.blocks())


def test_pickled_objects_are_not_loaded(tmp_path):
    store = make(tmp_path)
    fill(store)
    np.save(tmp_path / "block-00000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"block-00000\.npy: damaged"):
        next(store.blocks())


def test_a_write_that_fails_leaves_the_old_block(tmp_path, monkeypatch):
    store = make(tmp_path)
    vectors = fill(store)

    def fail(file, *_, **__):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("torch_src.retrieval.vectors.np.save", fail)
    with pytest.raises(UserError, match="is the disk full"):
        store.write_block(0, np.zeros((4, 3), np.float16))
    assert not list(tmp_path.glob("*.tmp"))
    assert np.array_equal(next(store.blocks())[1], vectors[:4])


def test_save_vectors_round_trip(tmp_path):
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_vectors(tmp_path / "query.emb.npy", vectors)
    loaded = np.load(tmp_path / "query.emb.npy")
    assert loaded.dtype == np.float32 and np.array_equal(loaded, vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["query.emb.npy"]


def test_a_block_without_its_stamp_is_missing(tmp_path):
    """The stamp is written last: a run that is killed before it encodes the block again."""
    store = make(tmp_path)
    fill(store)
    (tmp_path / "block-00001.json").unlink()
    assert store.missing_blocks() == [1] and store.is_missing(1) and not store.is_missing(0)
    assert make(tmp_path).missing_blocks() == [1]


def test_a_block_whose_stamp_was_edited_is_missing(tmp_path):
    """Also when the edited field does not affect the vectors."""
    store = make(tmp_path)
    fill(store, settings={"threads": 2})
    path = tmp_path / "block-00001.json"
    path.write_text(path.read_text().replace('"threads": 2', '"threads": 3'))
    assert store.missing_blocks() == [1]


@pytest.mark.parametrize("block_rows", [1, 4, 9, 100])
def test_rows_are_read_across_blocks(tmp_path, block_rows):
    store = make(tmp_path, block_rows=block_rows)
    vectors = fill(store)
    for first, last in ((0, 9), (3, 8), (4, 4), (8, 9), (0, 1)):
        into = np.empty((last - first, 3), dtype=np.float16)
        store.read_into(first, into)
        assert np.array_equal(into, vectors[first:last])


def test_a_truncated_block_is_named_when_it_is_read(tmp_path):
    store = make(tmp_path)
    fill(store)
    path = tmp_path / "block-00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="block-00001.npy.*delete it"):
        store.read_into(2, np.empty((5, 3), dtype=np.float16))


def test_two_runs_with_other_settings_never_mix_their_blocks(tmp_path):
    """The second run deletes the blocks; the first, still encoding, stops, and its block is not used."""
    first = make(tmp_path)
    first.write_block(0, np.ones((4, 3), np.float16))
    second = make(tmp_path, stamp={**STAMP, "weights": "xyz"})
    with pytest.raises(UserError, match="another run with other settings"):
        first.write_block(1, np.ones((4, 3), np.float16))
    vectors = fill(second)
    assert first.missing_blocks() == [0, 1, 2]  # they have another manifest
    with pytest.raises(DamagedBlock):
        first.read_into(0, np.empty((9, 3), np.float16))
    found = np.empty((9, 3), np.float16)
    second.read_into(0, found)
    assert np.array_equal(found, vectors)


def test_a_block_that_cannot_be_opened_is_not_damaged(tmp_path, monkeypatch):
    store = make(tmp_path)
    fill(store)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "block")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError):
        list(store.blocks())
    monkeypatch.undo()
    assert store.missing_blocks() == []


def test_a_block_that_another_process_rebuilt_is_not_deleted(tmp_path):
    store = make(tmp_path)
    vectors = fill(store)
    path = store.block_path(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(DamagedBlock) as caught:
        list(store.blocks())
    path.write_bytes(whole)  # another process has rebuilt it
    store.delete_damaged(caught.value, set())
    assert store.missing_blocks() == [] and np.array_equal(store.vectors_at(np.arange(9)), vectors)
    path.write_bytes(whole[:-1] + b"x")
    store.delete_damaged(caught.value, deleted := set())
    assert store.missing_blocks() == [1] and deleted == {1}
    with pytest.raises(DamagedBlock):  # damaged again
        store.delete_damaged(caught.value, deleted)


def test_shared_blocks_without_a_manifest_are_not_deleted(tmp_path):
    store = make(tmp_path)
    fill(store)
    store.manifest_path.unlink()
    with pytest.raises(UserError, match="belong to another run"):
        VectorStore.create_or_continue(tmp_path, {"weights": "xyz"}, 9, 3, 4, print, shared=True)
    assert store.block_path(0).exists()


def test_a_complete_read_only_folder_is_used(tmp_path, monkeypatch):
    vectors = fill(make(tmp_path))

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("torch_src.retrieval.vectors.BlockLocks.of", refuse)
    assert np.array_equal(make(tmp_path).vectors_at(np.arange(9)), vectors)
    with pytest.raises(PermissionError):
        make(tmp_path, stamp={**STAMP, "weights": "xyz"})


def test_a_folder_with_blocks_of_another_run_is_refused(tmp_path):
    fill(make(tmp_path / "mine"))
    theirs = make(tmp_path / "theirs", stamp={**STAMP, "weights": "xyz"})
    theirs.write_block(0, np.zeros((4, 3), np.float16))
    for name in ("block-00001.npy", "block-00001.json"):  # overwritten
        (tmp_path / "theirs" / name).write_bytes((tmp_path / "mine" / name).read_bytes())
    with pytest.raises(UserError, match="belong to another run"):
        VectorStore.create_or_continue(tmp_path / "theirs", STAMP, 9, 3, 4, print, shared=True)
    assert theirs.missing_blocks() == [1, 2]


def test_a_block_that_is_deleted_while_it_is_read_is_damaged(tmp_path):
    store = make(tmp_path)
    fill(store)
    store.read_into(0, np.empty((2, 3), np.float16))
    store.block_path(0).unlink()
    with pytest.raises(DamagedBlock, match="missing"):
        store.read_into(2, np.empty((2, 3), np.float16))


@pytest.mark.parametrize("force", [False, True])
def test_files_of_another_program_stay(tmp_path, force):
    (tmp_path / "block-notes.txt").write_text("mine")
    (tmp_path / "block-00000.txt").write_text("mine")
    fill(make(tmp_path, force=force))
    make(tmp_path, stamp={**STAMP, "weights": "xyz"}, force=force)
    assert (tmp_path / "block-notes.txt").exists() and (tmp_path / "block-00000.txt").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(UserError, match="not a manifest of vectors"):
        make(other, force=force)
    assert (other / "manifest.json").read_text() == '{"name": "a web page"}'
