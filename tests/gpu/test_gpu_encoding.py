"""Encoding on CUDA: the CPU's vectors, whatever the precision, batch size and free memory."""

import numpy as np
import pytest
import torch
from retrieval.test_encoding import make_texts

from torch_src.models.tokenization import TextRules
from torch_src.retrieval.encoding import Encoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def make_encoder(tiny_bert, tokenizer):
    def build(device, precision="fp32", pooling="cls", batch_size=64, tokens=4096):
        tower = tiny_bert(0).to(device)
        return Encoder(tower, tokenizer, TextRules(24), pooling, False, device, precision, batch_size, tokens)

    return build


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.999), ("fp16", 0.999)])
def test_vectors_are_those_of_the_cpu(make_encoder, precision, least, pooling):
    texts = make_texts(300)  # some of them empty
    expected = make_encoder(CPU, pooling=pooling).encode(texts)
    vectors = make_encoder(CUDA, precision, pooling).encode(texts)
    assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert cosine(vectors, expected).min() >= least


def test_transfers_do_not_race(make_encoder):
    encoder, texts = make_encoder(CUDA, batch_size=16), make_texts(400)
    first = encoder.encode(texts)
    for _ in range(50):
        assert encoder.encode(texts).tobytes() == first.tobytes()


def test_out_of_memory_halves_the_batch(make_encoder):
    texts = make_texts(30_000, seed=3)
    expected = make_encoder(CUDA).encode(texts)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    encoder = make_encoder(CUDA, batch_size=10**6, tokens=10**7)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 150e6) / total, 0)
    try:
        vectors = encoder.encode(texts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert encoder.tokens_per_batch < 10**7
    assert cosine(vectors, expected).min() >= 0.9999
