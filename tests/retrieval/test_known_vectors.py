"""A collection that changes: vectors of unchanged texts are copied, with the bytes of a new store."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_world import ROOT

from torch_src.data.collection import PassageCollection
from torch_src.models.tokenization import TextRules
from torch_src.retrieval import encoding, known_vectors
from torch_src.retrieval.encoding import Encoder, encode_collection, text_hashes
from torch_src.retrieval.known_vectors import KnownVectors
from torch_src.retrieval.vectors import TEXT_HASH, VectorStore
from torch_src.runtime.errors import UserError

CHARACTERS = "银杏从小苗到挂果得等多少年又称公孙树"
STAMP = {"weights": "abc", **TEXT_HASH}
READ = """
import sys
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.files import read_json
store = VectorStore(sys.argv[1], read_json(sys.argv[1] + "/manifest.json"))
store.locks.read()
print("reading", flush=True)
sys.stdin.readline()
"""


class Killed(BaseException):
    """Ends a run like a signal."""


def make_texts(count, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(CHARACTERS, k=draw.choice([3, 9, 22, 40]))) for _ in range(count)]


OLD = make_texts(40)
NEW = make_texts(9, seed=1)
CHANGES = {
    "added at the end": OLD + NEW,
    "added in the middle": OLD[:13] + NEW + OLD[13:],
    "removed": OLD[:7] + OLD[23:],
    "reordered": random.Random(3).sample(OLD, 40),
    "edited": [*OLD[:5], NEW[0], *OLD[6:]],
    "duplicates": OLD + OLD[:4] + NEW[:1] * 3,
    "other texts": NEW,
    "one left": OLD[17:18],
}


@pytest.fixture
def encode(tiny_bert, tokenizer, tmp_path, monkeypatch):
    """Return encode(texts, folder): the store, with encode.texts, the number of texts that were encoded."""
    tower = tiny_bert(0)
    real = Encoder.encode_on_device

    def count(self, table, *rest):
        run.texts += len(table)
        return real(self, table, *rest)

    monkeypatch.setattr(Encoder, "encode_on_device", count)

    def run(texts, folder="emb", block_rows=14, stamp=STAMP, **more):
        rules, device = TextRules(24), torch.device("cpu")
        encoder = Encoder(tower, tokenizer, rules, "cls", False, device, "fp32", 1, 4096)
        passages = tmp_path / "passages"
        passages.mkdir(exist_ok=True)
        lines = "".join(f"-\t\t{text}\t0\n" for text in texts)
        (passages / "part-00").write_text(lines, encoding="utf-8", newline="")
        collection, run.texts = PassageCollection(passages), 0
        stamp = {**stamp, "collection": collection.checksum}
        shape = len(collection), 32, block_rows
        store = VectorStore.create_or_continue(tmp_path / folder, stamp, *shape, print, **more)
        encode_collection(encoder, encoder.texts_of(collection), store, 1e9)
        return store

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file."""
    files = {path.name: path for path in folder.iterdir()}
    return {name: path.read_bytes() for name, path in files.items() if path.is_file()}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_collection_ends_in_the_bytes_of_a_new_store(encode, tmp_path, capsys, name):
    texts = CHANGES[name]
    encode(OLD)
    capsys.readouterr()
    store = encode(texts)
    new = [text for text in texts if text not in OLD]
    assert encode.texts == len(new)
    out = capsys.readouterr().out
    assert f"copying {len(texts) - len(new)} vectors of unchanged texts, encoding {len(new)}\n" in out
    assert "the collection changed (collection: " in out
    encode(texts, "fresh")
    assert contents(store.folder) == contents(tmp_path / "fresh")
    assert not store.previous.exists()


def test_equal_texts_have_equal_vectors(encode):
    store = encode(CHANGES["duplicates"])
    vectors = np.concatenate([block for _, block in store.blocks()])
    assert np.array_equal(vectors[:4], vectors[40:44]) and (vectors[44:] == vectors[44]).all()


@pytest.mark.parametrize("block_rows", [3, 100])
def test_another_block_size_needs_no_encoding(encode, tmp_path, block_rows):
    encode(OLD)
    store = encode(OLD, block_rows=block_rows)
    assert encode.texts == 0
    encode(OLD, "fresh", block_rows)
    assert contents(store.folder) == contents(tmp_path / "fresh")


def test_hashes_are_those_of_the_texts(encode):
    store = encode(OLD)
    assert np.array_equal(np.concatenate([store.read_hashes(b) for b in range(3)]), text_hashes(OLD))


@pytest.mark.parametrize("change", [{"stamp": {**STAMP, "weights": "xyz"}}, {"force": True}])
def test_other_settings_and_force_encode_everything(encode, change):
    encode(OLD)
    store = encode(OLD + NEW, **change)
    assert encode.texts == 49 and not store.previous.exists()


def test_vectors_without_hashes_are_deleted(encode, capsys):
    encode(OLD, stamp={"weights": "abc"})
    assert encode(OLD + NEW).missing_blocks() == [] and encode.texts == 49
    assert "text_hash: missing -> xxh3_128" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda data: data[:-3] + b"xyz", lambda data: data[:-3], None])
@pytest.mark.parametrize("name", ["block-00001.npy", "block-00001.hashes", "block-00001.json"])
def test_a_damaged_old_block_is_encoded(encode, tmp_path, name, damage):
    path = encode(OLD).folder / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    store = encode(OLD + NEW)
    assert encode.texts == 9 + 14
    encode(OLD + NEW, "fresh")
    assert contents(store.folder) == contents(tmp_path / "fresh")


def test_a_manifest_damaged_in_its_block_size_is_of_no_vectors(encode, tmp_path):
    manifest = encode(OLD).manifest_path
    damaged = manifest.read_text(encoding="utf-8").replace('"block_rows": 14', '"block_rows": 0')
    manifest.write_text(damaged, encoding="utf-8")
    assert encode(OLD + NEW).missing_blocks() == [] and encode.texts == 49
    assert not (tmp_path / "emb/previous").exists()


def test_damaged_hashes_are_a_missing_block(encode):
    store = encode(OLD)
    path = store.hashes_path(2)
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    assert store.missing_blocks() == [2]
    assert encode(OLD).missing_blocks() == [] and encode.texts == 12


def kill_after(monkeypatch, calls, target, name):
    """Make the call number `calls` of target.name raise, after its work when that is odd."""
    real, count = getattr(target, name), [0]

    def call(*given, **more):
        count[0] += 1
        if count[0] == calls and calls % 2:
            raise Killed
        result = real(*given, **more)
        if count[0] == calls:
            raise Killed
        return result

    monkeypatch.setattr(target, name, call)


@pytest.mark.parametrize("calls", [1, 2, 8, 11])
def test_a_run_killed_at_any_file_ends_in_the_same_bytes(encode, tmp_path, monkeypatch, calls):
    """Killed three times, with the second and third collection; then the third is finished."""
    texts = OLD[:20] + NEW + OLD[20:31]
    encode(OLD)
    for changed in (OLD[::-1] + NEW[:2], texts, texts):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, calls, os, "replace")
            encode(changed)
            raise Killed  # fewer files are written
    store = encode(texts)
    assert encode.texts <= 9
    encode(texts, "fresh")
    assert contents(store.folder) == contents(tmp_path / "fresh") and not store.previous.exists()


def test_a_run_killed_while_it_deletes_the_old_vectors(encode, tmp_path, monkeypatch):
    encode(OLD)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 1, shutil, "rmtree")
        encode(OLD + NEW)
    previous = tmp_path / "emb/previous"
    next(previous.glob("*/manifest.json")).unlink()
    assert encode(NEW + OLD).missing_blocks() == [] and encode.texts == 0
    assert not previous.exists()


def test_going_back_to_the_old_collection_copies_what_was_not_replaced(encode, tmp_path, monkeypatch):
    encode(OLD)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2, encoding, "_write_block")
        encode(NEW + OLD[3:])
    store = encode(OLD)
    assert encode.texts == 0
    encode(OLD, "fresh")
    assert contents(store.folder) == contents(tmp_path / "fresh")


def test_a_wrong_table_of_rows_is_noticed(encode, tmp_path, monkeypatch):
    """Copied are only vectors whose hash is that of the text."""
    encode(OLD)
    real = KnownVectors.of

    def wrong(store, hashes):
        known = real(store, hashes)
        known.rows = np.roll(known.rows, 1)
        known.rows[5] = 10**6
        return known

    with monkeypatch.context() as patch:
        patch.setattr(KnownVectors, "of", wrong)
        store = encode(OLD[1:])
    assert encode.texts == 39
    encode(OLD[1:], "fresh")
    assert contents(store.folder) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_the_lookup_in_passes_finds_every_row(encode, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(known_vectors, "SORTED_AT_ONCE", at_once)
    store = encode(OLD)
    table = known_vectors._sorted_hashes([store, store], tmp_path / "hashes.npy")
    assert table.shape == (3, 80) and (np.diff(table[0].astype(object)) >= 0).all()
    found = known_vectors._find(table, text_hashes(OLD + NEW))
    assert (found[40:] == -1).all() and (found[:40] % 40 == np.arange(40)).all()


def test_vectors_that_are_shared_or_in_use_are_not_replaced(encode, tmp_path):
    encode(OLD)
    with pytest.raises(UserError, match="belong to another run"):
        encode(OLD + NEW, shared=True)
    reader = subprocess.Popen(
        [sys.executable, "-c", READ, str(tmp_path / "emb")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert reader.stdout.readline() == b"reading\n"
    with pytest.raises(UserError, match="another run reads the vectors"):
        encode(OLD + NEW)
    reader.communicate(b"\n")
    assert encode(OLD).missing_blocks() == [] and encode.texts == 0
