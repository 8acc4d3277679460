"""Texts to vectors: order, batches, counts, float16, and blocks that are kept when a run is resumed."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from xxhash import xxh3_128_digest

from torch_src.data.collection import PassageCollection
from torch_src.models import tokenization
from torch_src.models.tokenization import TextRules
from torch_src.retrieval import encoding, tokenizing
from torch_src.retrieval.encoding import Encoder, encode_collection, text_hashes, to_float16
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.errors import UserError
from torch_src.runtime.progress import Progress

CHARACTERS = "银杏从小苗到挂果得等多少年又称公孙树"
MAX_LEN = 24  # 22 characters and two special tokens


def make_texts(count, seed=0):
    """Return texts of 0 to 40 characters, the lengths mixed; some are cut at 22."""
    draw = random.Random(seed)
    return ["".join(draw.choices(CHARACTERS, k=draw.choice([0, 1, 3, 9, 22, 23, 40]))) for _ in range(count)]


@pytest.fixture
def make_encoder(tiny_bert, tokenizer):
    def build(batch_size=8, tokens_per_batch=4096, pooling="cls", tower=None):
        tower = tower or tiny_bert(0)
        rules = TextRules(MAX_LEN)
        device = torch.device("cpu")
        return Encoder(tower, tokenizer, rules, pooling, False, device, "fp32", batch_size, tokens_per_batch)

    return build


@pytest.fixture
def make_collection(tmp_path):
    def build(texts):
        folder = tmp_path / "passages"
        folder.mkdir()
        cut = len(texts) // 3
        for part, piece in enumerate((texts[:cut], texts[cut:])):
            lines = "".join(f"-\t\t{text}\t0\n" for text in piece)
            (folder / f"part-{part:02d}").write_text(lines, encoding="utf-8", newline="")
        return PassageCollection(folder)

    return build


def make_store(folder, rows, block_rows=10):
    return VectorStore.create_or_continue(folder, {}, rows, 32, block_rows, print)


def encode(encoder, collection, store, *more):
    encode_collection(encoder, encoder.texts_of(collection), store, *more)


def all_vectors(store):
    return np.concatenate([block for _, block in store.blocks()])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_order_and_batch_composition_do_not_matter(make_encoder, pooling):
    texts = make_texts(40)
    alone = make_encoder(pooling=pooling)
    expected = np.concatenate([alone.encode([text]) for text in texts])
    distances = np.abs(expected[:, None] - expected[None]).max(axis=2)
    differs = np.array([[a[:22] != b[:22] for b in texts] for a in texts])
    assert distances[differs].min() > 1e-2  # swapped rows would be detected
    for batch_size, tokens_per_batch in ((8, 4096), (1000, 10**6), (7, 100), (3, 1), (1, 4096)):
        encoder = make_encoder(batch_size, tokens_per_batch, pooling)
        vectors = encoder.encode(texts)
        assert vectors.dtype == np.float32 and vectors.shape == (40, 32)
        assert np.abs(vectors - expected).max() < 1e-5
    backwards = make_encoder(pooling=pooling).encode(texts[::-1])[::-1]
    assert np.abs(backwards - expected).max() < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_vector_depends_on_its_text_alone(make_encoder, precision):
    """To the last bit, whatever the other texts of its batch: known vectors can be copied.

    Other processors than those with AVX2 were not at hand.
    """
    exact = torch.backends.cpu.get_cpu_capability() == "AVX2"
    texts = make_texts(40)
    expected = replace(make_encoder(32), precision=precision).encode(texts)
    for size in (1, 7):
        alone = replace(make_encoder(size), precision=precision).encode(texts[::-1])[::-1]
        assert np.array_equal(alone, expected) if exact else np.allclose(alone, expected, atol=1e-3)


def test_same_texts_same_bytes_and_dropout_is_restored(make_encoder, tiny_bert):
    tower = tiny_bert(0).train()
    encoder = make_encoder(tower=tower)
    first, second = encoder.encode(make_texts(20)), encoder.encode(make_texts(20))
    assert first.tobytes() == second.tobytes() and tower.training
    tower.eval()
    assert encoder.encode(make_texts(20)).tobytes() == first.tobytes() and not tower.training


def test_vectors_are_copied_once(make_encoder, host_copies):
    batches = []
    encoder = make_encoder(batch_size=8)
    table = encoder.tokenize(make_texts(40))
    encoder.encode_on_device(table, torch.float32, lambda *batch: batches.append(batch)).cpu().numpy()
    assert host_copies == ["cpu", "numpy"] and sum(texts for texts, _ in batches) == 40


def test_batches_respect_both_limits(make_encoder, monkeypatch):
    shapes, real = [], encoding.embed

    def spy(tower, input_ids, mask, *rest):
        shapes.append(tuple(input_ids.shape))
        return real(tower, input_ids, mask, *rest)

    monkeypatch.setattr(encoding, "embed", spy)
    encoder = make_encoder(8, 100)
    encoder.encode(make_texts(50))
    assert sum(rows for rows, _ in shapes) == 50
    assert all(rows <= 8 and rows * length <= 100 for rows, length in shapes)
    assert not any(length % encoder.pad_multiple for _, length in shapes)
    assert all((min(8, 100 // length), length) in shapes for _, length in shapes)  # as full as allowed


@pytest.mark.parametrize("ahead", [4096, 4, 10, 1])
def test_collection_in_blocks_equals_all_at_once(make_encoder, make_collection, tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(tokenizing, "TOKENIZE_AHEAD", ahead)
    texts = make_texts(31)
    store = make_store(tmp_path / "emb", 31)
    encode(make_encoder(), make_collection(texts), store, 1e9)
    assert [len(block) for _, block in store.blocks()] == [10, 10, 10, 1]
    expected = make_encoder().encode(texts)
    stored = all_vectors(store)
    assert stored.dtype == np.float16
    assert np.allclose(stored, expected, rtol=2.0**-10, atol=2e-5)


def test_the_texts_of_a_collection_are_its_passages(make_encoder, make_collection):
    passages, encoder = make_texts(20), make_encoder()
    texts = encoder.texts_of(make_collection(passages))
    table, expected = texts.tokenize(3, 9), encoder.tokenize(passages[3:9])
    assert len(texts) == 20 and np.array_equal(table.ids, expected.ids)
    hashes = texts.hashes(3, 9)
    assert hashes.dtype == np.uint8 and hashes.shape == (6, 16)
    assert [row.tobytes() for row in hashes] == [xxh3_128_digest(text.encode()) for text in passages[3:9]]
    assert text_hashes([]).shape == (0, 16)


def test_one_row(make_encoder, make_collection, tmp_path):
    store = make_store(tmp_path / "emb", 1)
    encode(make_encoder(), make_collection(["银杏"]), store, 1e9)
    assert np.array_equal(all_vectors(store), make_encoder().encode(["银杏"]).astype(np.float16))


def test_no_text_gives_no_vector(make_encoder):
    assert make_encoder().encode([]).shape == (0, 32)


def test_finished_blocks_are_kept_and_the_others_are_the_same_bytes(
    make_encoder, make_collection, tmp_path, capsys
):
    collection, folder = make_collection(make_texts(35)), tmp_path / "emb"
    encode(make_encoder(), collection, make_store(folder, 35), 1e9)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("block-00001.npy", "block-00003.json"):
        (folder / name).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    store = make_store(folder, 35)
    assert store.missing_blocks() == [1, 3]
    encode(make_encoder(), collection, store, 1e9)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    kept = times.keys() - {"block-00001.json", "block-00003.npy", "blocks.lock"}
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == {name: times[name] for name in kept}
    out = capsys.readouterr().out
    assert "2 of 4 blocks" in out and "encoded 15 passages in " in out


def test_a_failure_keeps_the_blocks_before_it(make_encoder, make_collection, tmp_path, monkeypatch):
    collection = make_collection(make_texts(30))
    encoder, store = make_encoder(), make_store(tmp_path / "emb", 30)
    real, calls = encoder.encode_on_device, []

    def fail_on_third(table, *rest):
        calls.append(len(table))
        if len(calls) == 3:
            raise RuntimeError("broken")
        return real(table, *rest)

    monkeypatch.setattr(encoder, "encode_on_device", fail_on_third)
    with pytest.raises(RuntimeError, match="broken"):
        encode(encoder, collection, store, 1e9)
    assert calls == [10, 10, 10] and store.missing_blocks() == [2]
    assert not list((tmp_path / "emb").glob("*.tmp"))


def test_a_malformed_passage_is_named_from_the_thread_that_tokenizes(make_encoder, make_collection, tmp_path):
    collection = make_collection(make_texts(14) + ["a\tb"] + make_texts(5))
    with pytest.raises(UserError, match=r"part-01:9: 5 TAB-separated columns"):
        encode(make_encoder(), collection, make_store(tmp_path / "emb", 20), 1e9)


def test_progress_counts_texts_tokens_and_cuts(make_encoder, make_collection, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizing, "TOKENIZE_AHEAD", 4)
    texts, counts = make_texts(31), []
    real = Progress.add

    def add(progress, *numbers):
        counts.append(numbers)
        real(progress, *numbers)

    monkeypatch.setattr(Progress, "add", add)
    encode(make_encoder(4), make_collection(texts), make_store(tmp_path / "emb", 31), 1e9)
    assert sum(texts for texts, _ in counts) == 31 and max(texts for texts, _ in counts) == 4
    assert sum(tokens for _, tokens in counts) == sum(min(len(text), 22) + 2 for text in texts)
    cut = sum(len(text) > 22 for text in texts)
    assert f"{100 * cut / 31:.1f}% truncated" in capsys.readouterr().out


def test_progress_lines(capsys):
    now = [100.0]
    progress = Progress(400, 10, clock=lambda: now[0])
    for seconds, lines in ((5.0, 0), (4.75, 0), (0.25, 1), (9.75, 0), (0.25, 1)):
        now[0] += seconds
        progress.add(50, 500)
        progress.add_truncated(5)
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == lines
    assert [line[9:] for line in printed] == [
        "encoded 250/400 passages (62.5%)  12 passages/s  125 tokens/s  eta 12.0s"
    ]
    now[0] += 5
    progress.close()
    closing = "encoded 250 passages in 25.0s  10 passages/s  10.0% truncated\n"
    assert capsys.readouterr().out[9:] == closing


def test_progress_without_tokens(capsys):
    now = [0.0]
    progress = Progress(400, 10, "searched", clock=lambda: now[0])
    now[0] += 10
    progress.add(100)
    progress.close()
    line, closing = capsys.readouterr().out.splitlines()
    assert "100/400 passages (25.0%)" in line and "eta 30.0s" in line
    assert "100 passages" in closing and "10 passages/s" in closing
    assert "token" not in line + closing and "truncated" not in line + closing


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30, np.inf, np.nan])
def test_values_beyond_float16_name_the_row(value):
    vectors = np.zeros((4, 3), dtype=np.float32)
    vectors[0], vectors[2, 1], vectors[3, 0] = 65504.0, value, value
    with pytest.raises(UserError, match="vector of row 1002 .*65,504"):
        to_float16(vectors, 1000)
    assert to_float16(vectors[:2], 0).max() == 65504.0


def test_float16_overflow_of_a_model_is_refused(make_encoder, make_collection, tiny_bert, tmp_path):
    tower = tiny_bert(0)
    with torch.no_grad():
        tower.encoder.layer[-1].output.LayerNorm.weight.mul_(1e6)
    store = make_store(tmp_path / "emb", 12)
    with pytest.raises(UserError, match="vector of row 0 .*beyond float16"):
        encode(make_encoder(tower=tower), make_collection(make_texts(12)), store, 1e9)
    assert store.missing_blocks() == [0, 1]


def test_the_row_of_an_overflow_is_counted_over_the_collection(
    make_encoder, make_collection, tmp_path, monkeypatch
):
    real = encoding.embed

    def overflow_at_the_rare_character(tower, input_ids, *rest):
        vectors = real(tower, input_ids, *rest)
        vectors[(input_ids == rare).any(dim=1)] = 1e5
        return vectors

    encoder = make_encoder()
    rare = encoder.tokenizer.convert_tokens_to_ids("水")
    monkeypatch.setattr(encoding, "embed", overflow_at_the_rare_character)
    texts = make_texts(20)
    texts[17] = "水"
    with pytest.raises(UserError, match="vector of row 17 "):
        encode(encoder, make_collection(texts), make_store(tmp_path / "emb", 20), 1e9)


def test_vectors_that_are_not_finite_are_refused(make_encoder, tiny_bert):
    tower = tiny_bert(0)
    with torch.no_grad():
        tower.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        make_encoder(tower=tower).encode(["银杏"])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_tokens(make_encoder, make_collection, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(tokenizing, "TEXTS_PER_TASK", 4)
    collection = make_collection(make_texts(37))
    for folder, count in (("a", 0), ("b", workers)):
        encode(make_encoder(), collection, make_store(tmp_path / folder, 37), 1e9, count)
    blocks = [sorted((tmp_path / folder).glob("block-*.npy")) for folder in "ab"]
    assert len(blocks[0]) == 4
    assert [path.read_bytes() for path in blocks[0]] == [path.read_bytes() for path in blocks[1]]


def test_a_malformed_passage_is_named_by_a_worker_process(make_encoder, make_collection, tmp_path):
    collection = make_collection(make_texts(14) + ["a\tb"] + make_texts(5))
    with pytest.raises(UserError, match=r"part-01:9: 5 TAB-separated columns"):
        encode(make_encoder(), collection, make_store(tmp_path / "emb", 20), 1e9, 1)


def test_out_of_memory_halves_the_budget(make_encoder, monkeypatch, capsys):
    real = encoding.embed

    def too_little_memory(tower, input_ids, *rest):
        if input_ids.numel() > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tower, input_ids, *rest)

    texts = make_texts(50)
    expected = make_encoder().encode(texts)
    monkeypatch.setattr(encoding, "embed", too_little_memory)
    monkeypatch.setattr(tokenization, "MIN_TOKENS_PER_BATCH", 10)
    encoder = make_encoder(1000, 1000)
    assert np.abs(encoder.encode(texts) - expected).max() < 1e-5
    assert encoder.tokens_per_batch == 125
    assert capsys.readouterr().err.count("halved to") == 3
    monkeypatch.setattr(tokenization, "MIN_TOKENS_PER_BATCH", 200)
    with pytest.raises(UserError, match="out of memory at 250 tokens"):
        make_encoder(1000, 1000).encode(texts)


def test_the_stamp_of_a_block_has_its_token_budget(make_encoder, make_collection, tmp_path):
    store = make_store(tmp_path / "emb", 12)
    encode(make_encoder(7, 99), make_collection(make_texts(12)), store, 1e9)
    note = json.loads((tmp_path / "emb/block-00001.json").read_text())
    assert (note["batch_size"], note["tokens_per_batch"]) == (7, 99)
    assert note["threads"] == torch.get_num_threads()
