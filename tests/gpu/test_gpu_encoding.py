"""Encoding on CUDA: the CPU's vectors, whatever the precision, pooling, batch size and free memory."""

import numpy as np
import pytest
import torch
from gpu.memory import limited_memory
from retrieval.test_encoding import all_vectors, make_collection, make_store, make_texts
from retrieval.test_gpu_inference import CONFIGS, TEXTS, build_encoder, dtypes, masked_row_states
from toy_world import make_model, make_world, options, write

from torch_src import dual_infer
from torch_src.models.tokenization import TextRules
from torch_src.retrieval import gpu_inference
from torch_src.retrieval.encoding import Encoder, encode_collection
from torch_src.retrieval.engines.openvino import smallest_cosine
from torch_src.retrieval.gpu_inference import encoder_on_gpu

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
POOLINGS = ("cls", "mean", "max", "lasttoken", "weightedmean")
__all__ = ["make_collection"]  # a fixture


@pytest.fixture
def make_encoder(tiny_bert, tokenizer):
    def build(device, precision="fp32", pooling="cls", batch_size=64, tokens=4096):
        tower = tiny_bert(0).to(device)
        return Encoder(tower, tokenizer, TextRules(24), pooling, False, device, precision, batch_size, tokens)

    return build


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.999), ("fp16", 0.999)])
def test_vectors_are_those_of_the_cpu(make_encoder, precision, least, pooling):
    texts = make_texts(300)  # some of them empty
    expected = make_encoder(CPU, pooling=pooling).encode(texts)
    vectors = make_encoder(CUDA, precision, pooling).encode(texts)
    assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert smallest_cosine(vectors, expected) >= least


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_in_bf16_give_the_vectors_of_the_cpu(tokenizer, family):
    expected = build_encoder(tokenizer, family, "fp32").encode(TEXTS)
    encoder = encoder_on_gpu(build_encoder(tokenizer, family, device=CUDA))
    assert encoder.bf16_weights and dtypes(encoder.tower) == {torch.bfloat16}
    assert encoder.tokens_per_batch >= 32768
    assert smallest_cosine(encoder.encode(TEXTS), expected) >= 0.999


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_masked_row_does_not_disturb_the_others(tokenizer, family, precision):
    assert masked_row_states(build_encoder(tokenizer, family, precision, device=CUDA)).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_texts_of_no_and_of_one_token(make_encoder, precision):
    vectors = make_encoder(CUDA, precision, "mean").encode(["", "水", "水" * 40, ""])
    assert np.isfinite(vectors).all() and np.linalg.norm(vectors, axis=1).min() > 0


def test_transfers_do_not_race(make_encoder):
    encoder = make_encoder(CUDA, batch_size=16)
    table = encoder.tokenize(make_texts(400))
    first = encoder.encode_tokens(table)
    for _ in range(50):
        assert encoder.encode_tokens(table).tobytes() == first.tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_blocks_on_disk_are_the_vectors(make_encoder, make_collection, tmp_path, workers):
    encoder, texts = make_encoder(CUDA), make_texts(500)
    store = make_store(tmp_path / "emb", 500, block_rows=100)
    encode_collection(encoder, encoder.texts_of(make_collection(texts)), store, 1e9, workers)
    expected = np.concatenate([encoder.encode(texts[at : at + 100]) for at in range(0, 500, 100)])
    assert np.array_equal(all_vectors(store), expected.astype(np.float16))


def test_out_of_memory_halves_the_batch(make_encoder):
    texts = make_texts(10_000, seed=3)  # 6 tensors of 24 x 32 fp32 each at once: 184 MB
    expected = make_encoder(CUDA).encode(texts)
    encoder = make_encoder(CUDA, batch_size=10**6, tokens=10**7)
    with limited_memory(100e6):
        vectors = encoder.encode(texts)
    assert encoder.tokens_per_batch < 10**7
    assert smallest_cosine(vectors, expected) >= 0.9999


@pytest.fixture(scope="module")
def large_world(tmp_path_factory):
    """A model of width 256 and 1,000 passages of 200 characters: a forward pass may take gigabytes."""
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world / "model", hidden=256)
    write(
        world / "data/passage-collection/part-01", [f"-\t\t{'水银杏果' * 50}{row}\t0" for row in range(1000)]
    )
    return world


def plan_words(world, output):
    """Return the options of a plan on CUDA of a program that infers with the untrained model."""
    model = ["--pretrained_model_path", str(world / "model"), "--passage_ids", "none"]
    return [*options(world, output), "--device", str(CUDA), *model, "--plan"]


@pytest.fixture
def one_pass_too_large(monkeypatch):
    """Forward passes of 131,072 tokens of the large world, in memory for half of it.

    In attention 6 tensors of width 256 in fp32 exist at once, 6 KB a token: 0.81 GB, and 0.40 GB (with the
    mask of unequal texts 0.48 GB) after halving. 0.7 GB are free, and half of it is enough for the search.
    """
    monkeypatch.setattr(gpu_inference, "MIN_TOKENS", 1 << 17)
    monkeypatch.setattr(gpu_inference, "MAX_TOKENS", 1 << 17)
    with limited_memory(0.7e9):
        yield


def test_a_plan_halves_the_batch_when_out_of_memory(large_world, one_pass_too_large, tmp_path, capsys):
    words = [*plan_words(large_world, tmp_path), "--p_max_seq_len", "384", "--dual_params", "none"]
    assert dual_infer.main(words) == 0
    printed = capsys.readouterr()
    assert "halved to" in printed.err and "plan of do_dual_infer.py" in printed.out
