"""Exact search on CUDA gives the rows and fp64 scores of a full sort, bit for bit, as on the CPU."""

import numpy as np
import pytest
import torch
from retrieval.test_search import (
    WORLDS,
    check,
    check_norms,
    check_small_chunks,
    check_world,
    kinds_on,
    make_store,
)

from torch_src.retrieval.chunks import ChunkReader
from torch_src.retrieval.search import search

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("world", WORLDS)
def test_adversarial_vectors_streamed_in_batches_and_cached(tmp_path, monkeypatch, world):
    check_world(tmp_path, monkeypatch, world, 0, CUDA)


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_tiny_and_huge_norms(tmp_path, size):
    check_norms(tmp_path, CUDA, size)


@pytest.mark.parametrize(("rows", "topk"), [(1, 5), (40, 50), (130, 129)])
def test_fewer_passages_than_k(tmp_path, rows, topk):
    draw = np.random.default_rng(rows)
    vectors, queries = draw.normal(size=(rows, 8)), draw.normal(size=(3, 8))
    check(tmp_path, vectors, queries, topk, 100, kinds_on(CUDA), [CUDA])


def test_transfers_do_not_race(tmp_path, monkeypatch):
    """Chunks of 64 rows are copied while others are searched: the same result every time."""
    check_small_chunks(tmp_path, monkeypatch, CUDA, 50)


def test_chunks_arrive_whole(tmp_path):
    """Every chunk equals its vectors, though its buffer is refilled while the GPU is busy."""
    vectors = np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32).astype(np.float16)
    store, expected = make_store(tmp_path, vectors, 5_000), torch.from_numpy(vectors).to(CUDA)
    busy, wrong = torch.randn(2048, 2048, device=CUDA), torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(10):
        for first, chunk in ChunkReader(store, 700).chunks(CUDA):
            busy = busy @ busy / busy.norm()
            wrong += (chunk != expected[first : first + len(chunk)]).sum()
    assert wrong.item() == 0


@pytest.fixture(scope="module")
def many_passages(tmp_path_factory):
    """Return (store, queries, what the CPU finds)."""
    draw = np.random.default_rng(1)
    vectors = draw.standard_normal((200_000, 256), dtype=np.float32).astype(np.float16)
    queries = draw.standard_normal((300, 256), dtype=np.float32)
    store = make_store(tmp_path_factory.mktemp("many") / "vectors", vectors, 65_536)
    return store, queries, search(store, queries, 50, [CPU])


@pytest.mark.parametrize("kind", kinds_on(CUDA))
def test_cuda_equals_cpu_on_many_passages(many_passages, kind):
    store, queries, (expected, expected_scores, _) = many_passages
    rows, scores, stats = search(store, queries, 50, [CUDA], kind, bs=128)
    assert np.array_equal(rows, expected) and np.array_equal(scores, expected_scores)
    if kind == "fp16":
        assert stats.fp32_chunks < stats.chunks and stats.selected_pairs < 1.5 * stats.fp64_pairs
