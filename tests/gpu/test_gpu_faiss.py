"""A faiss index on CUDA: the checks of tests/retrieval/test_faiss_gpu.py, and limits of real memory."""

import numpy as np
import pytest
import torch
from retrieval.test_faiss_gpu import (
    FALLBACKS,
    check_falls_back,
    check_flat,
    check_lists,
    clustered_world,
    is_on_gpus,
    open_index,
)
from retrieval.test_search import make_store

from torch_src.retrieval import faiss_gpu
from torch_src.retrieval.faiss_index import FaissSearch, IndexSettings, index_gpus, load_faiss, new_index
from torch_src.retrieval.search import search

CUDA = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA or not load_faiss().get_num_gpus(), reason="needs CUDA and faiss for it"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return clustered_world(tmp_path_factory.mktemp("ann"))


@pytest.fixture
def gpus():
    """Return all GPUs; vectors are added 256 at a time."""
    found = index_gpus(CUDA)
    found.chunk_rows = 256
    return found


@pytest.mark.parametrize("shard_rows", [10**6, 500])
def test_flat(world, tmp_path, monkeypatch, gpus, shard_rows):
    monkeypatch.setattr(faiss_gpu, "FLAT_SHARD_BYTES", shard_rows * 64)
    index = check_flat(world, gpus, tmp_path / "i")
    assert sum(shard.ntotal for shard in index.index.shards) == 3000


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQ8", "IVF8,SQfp16", "IVF8,PQ8", "PCA16,IVF8,SQ8"])
def test_inverted_lists(world, tmp_path, gpus, factory):
    # the lookup tables of PQ are fp16 on a GPU
    check_lists(world, factory, gpus, tmp_path, 0.1 if "PQ" in factory else 0.02)


def test_two_shards_of_inverted_lists_on_one_gpu(world, tmp_path, gpus):
    gpus.devices = [0, 0]  # as two GPUs are used
    assert len(check_lists(world, "IVF8,SQ8", gpus, tmp_path).index.shards) == 2


@pytest.mark.parametrize(("factory", "params", "topk", "reason"), FALLBACKS)
def test_fallback_to_the_cpu(world, tmp_path, capsys, gpus, factory, params, topk, reason):
    check_falls_back(world, factory, params, topk, gpus, tmp_path / "i")
    assert f"index {factory}: on the CPU (" in capsys.readouterr().out


def test_2048_results_and_probes_are_on_the_gpu(world, tmp_path, gpus):
    index = open_index(world, tmp_path / "i", "IVF8,Flat", gpus, "nprobe=2048", 2048)
    rows, _ = index.search(world[2], 2048)
    assert is_on_gpus(index) and (rows >= 0).all() and len(set(rows[0].tolist())) == 2048


def test_too_little_memory_is_seen_beforehand(world, tmp_path, capsys, gpus):
    gpus.spare_bytes = torch.cuda.mem_get_info(0)[1]
    assert not is_on_gpus(open_index(world, tmp_path / "i", "Flat", gpus))
    assert "WARNING index Flat: on the CPU (needs about" in capsys.readouterr().err


def test_out_of_memory_while_filling_falls_back_and_frees_the_memory(world, tmp_path, capsys, gpus):
    """Other tensors take the memory that was free when it was checked."""
    free = torch.cuda.mem_get_info(0)[0]
    taken = torch.empty(free - (400 << 20), dtype=torch.uint8, device="cuda:0")
    gpus.free_bytes = lambda gpu: 16 << 30  # temporary memory of 1 GiB does not fit
    index = open_index(world, tmp_path / "i", "IVF8,Flat", gpus)
    assert not is_on_gpus(index) and "out of" in capsys.readouterr().err
    del taken
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info(0)[0] > free - (300 << 20)


def test_memory_stays_within_the_estimate_and_is_freed(gpus):
    draw = np.random.default_rng(0)
    chunks = [(first, draw.standard_normal((16384, 256), dtype=np.float32).astype(np.float16))
              for first in range(0, 20 * 16384, 16384)]  # fmt: skip
    gpus.devices, gpus.chunk_rows, rows = [0], 16384, 20 * 16384
    for factory in ("Flat", "IVF64,SQfp16"):
        free, empty = torch.cuda.mem_get_info(0)[0], new_index(factory, 256)
        if not empty.is_trained:
            gpus.train(empty, chunks[0][1].astype(np.float32))
        needed = gpus.bytes_needed(empty, rows)
        index = gpus.fill(empty, rows, chunks)
        assert free - torch.cuda.mem_get_info(0)[0] < needed + (200 << 20)  # CUDA's own
        assert index.search(chunks[3][1][:5].astype(np.float32), 1)[1].shape == (5, 1)
        del index
        assert torch.cuda.mem_get_info(0)[0] > free - (300 << 20)


def test_flat_over_many_passages_finds_what_the_exact_search_finds(tmp_path, gpus):
    draw = np.random.default_rng(1)
    vectors = draw.standard_normal((200_000, 256), dtype=np.float32).astype(np.float16)
    queries = draw.standard_normal((300, 256), dtype=np.float32)
    store = make_store(tmp_path / "vectors", vectors, 65_536)
    gpus.chunk_rows = 16384
    index = FaissSearch(store, IndexSettings("Flat", "", 0.1, 1, 50), tmp_path / "i", {}, gpus=gpus)
    rows, scores = index.search(queries, 50)
    expected, expected_scores, _ = search(store, queries, 50, CUDA[:1])
    hits = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), expected.tolist(), strict=True)]
    assert is_on_gpus(index) and sum(hits) >= 0.99 * expected.size
    assert np.abs(scores - expected_scores).max() < 0.1
