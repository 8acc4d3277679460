"""Exact search on CUDA gives the rows and fp64 scores of a full sort, as on the CPU."""

import numpy as np
import pytest
import torch
from retrieval.test_search import WORLDS, full_sort, make_store, queries_for

from torch_src.retrieval import search as module
from torch_src.retrieval.chunks import DeviceCache
from torch_src.retrieval.search import search

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("world", WORLDS)
def test_adversarial_vectors_streamed_and_cached(tmp_path, monkeypatch, world, kind):
    monkeypatch.setitem(module.CHUNK_ROWS, "cuda", 64)
    draw = np.random.default_rng(0)
    vectors = world(draw, 403, 24).astype(np.float16)
    queries = np.ascontiguousarray(queries_for(world, draw, 24), dtype=np.float32)
    store = make_store(tmp_path / "vectors", vectors, 100)
    expected, expected_scores = full_sort(vectors, queries, 10)
    cache = DeviceCache([CUDA])
    for vectors_on_device in (None, cache, cache):
        rows, scores, _ = search(store, queries, 10, [CUDA], kind, cache=vectors_on_device)
        assert np.array_equal(rows, expected) and np.array_equal(scores, expected_scores)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "auto"])
def test_cuda_equals_cpu_on_many_passages(tmp_path, kind):
    draw = np.random.default_rng(1)
    vectors = draw.standard_normal((200_000, 256), dtype=np.float32).astype(np.float16)
    queries = draw.standard_normal((300, 256), dtype=np.float32)
    store = make_store(tmp_path / "vectors", vectors, 65_536)
    rows, scores, _ = search(store, queries, 50, [CUDA], kind)
    expected, expected_scores, _ = search(store, queries, 50, [CPU])
    assert np.array_equal(rows, expected) and np.array_equal(scores, expected_scores)


def test_transfers_do_not_race(tmp_path):
    """Chunks are copied while others are computed: the same result every time."""
    draw = np.random.default_rng(2)
    vectors = draw.standard_normal((40_000, 64), dtype=np.float32).astype(np.float16)
    queries = draw.standard_normal((50, 64), dtype=np.float32)
    store = make_store(tmp_path / "vectors", vectors, 5_000)
    first = search(store, queries, 20, [CUDA], memory_gb=0.05)
    for _ in range(50):
        again = search(store, queries, 20, [CUDA], memory_gb=0.05)
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
