"""Exact search against a full sort in fp64, on vectors made to break it; the bound it is proved by; faiss."""

import math
import types
from importlib import metadata

import numpy as np
import pytest
import torch

from torch_src import search as module
from torch_src.errors import UserError
from torch_src.search import fp32_error_bound, load_faiss, score_rows, search
from torch_src.vectors import VectorStore

CPU = torch.device("cpu")


def make_store(folder, vectors, block_rows):
    store = VectorStore.create_or_continue(folder, {}, *vectors.shape, block_rows, print)
    for block in range(store.block_count):
        first, last = store.block_range(block)
        store.write_block(block, vectors[first:last])
    return store


def full_sort(vectors, queries, topk):
    """Return (rows, scores): every fp64 inner product, higher first, then the lower row."""
    all_rows, all_scores = [], []
    for query in queries.astype(np.float64):
        scores = (query * vectors.astype(np.float64)).sum(axis=1).tolist()
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:topk]
        all_rows.append(order)
        all_scores.append([scores[row] for row in order])
    return np.array(all_rows), np.array(all_scores)


def check(folder, vectors, queries, topk, block_rows):
    """Assert that search gives the rows and scores of the full sort; return the rows."""
    vectors, queries = vectors.astype(np.float16), np.ascontiguousarray(queries, dtype=np.float32)
    rows, scores = search(make_store(folder, vectors, block_rows), queries, topk, CPU)
    expected, expected_scores = full_sort(vectors, queries, topk)
    assert rows.dtype == np.int64 and scores.dtype == np.float64
    assert np.array_equal(rows, expected)
    assert np.array_equal(scores, expected_scores)
    return rows


def random_vectors(draw, rows, hidden):
    return draw.normal(size=(rows, hidden))


def near_ties(draw, rows, hidden):
    # all passages are one vector but for a last bit of fp16 in a few places: fp32 cannot order them
    vectors = np.tile(draw.normal(size=hidden).astype(np.float16), (rows, 1))
    bits = vectors.view(np.uint16)
    at = draw.integers(hidden, size=(rows, 2))
    for row in range(rows):
        bits[row, at[row]] ^= 1
    return vectors


def duplicates(draw, rows, hidden):
    return draw.normal(size=(7, hidden))[draw.integers(7, size=rows)]


def all_zero(draw, rows, hidden):
    return np.zeros((rows, hidden))


def zeros_among_others(draw, rows, hidden):
    return draw.normal(size=(rows, hidden)) * (draw.random((rows, 1)) < 0.1)


def huge_norms(draw, rows, hidden):
    vectors = draw.uniform(-65504, 65504, size=(rows, hidden))
    vectors[::3] *= 1e-6
    return vectors


def one_outlier_dimension(draw, rows, hidden):
    # the outlier swamps fp32: the other dimensions decide, and are lost in its rounding
    vectors = draw.normal(size=(rows, hidden)) * 0.01
    vectors[:, 0] = 30000
    return vectors


def cancelling_outliers(draw, rows, hidden):
    vectors = draw.normal(size=(rows, hidden)) * 0.01
    vectors[:, 0] = draw.choice([20000, 30000], size=rows)
    vectors[:, -1] = -vectors[:, 0]
    return vectors


def integers(draw, rows, hidden):
    return draw.integers(-2, 3, size=(rows, hidden))


WORLDS = [random_vectors, near_ties, duplicates, all_zero, zeros_among_others, huge_norms,
          one_outlier_dimension, cancelling_outliers, integers]  # fmt: skip


def queries_for(world, draw, hidden):
    if world is integers:
        return draw.integers(-2, 3, size=(6, hidden))
    queries = draw.normal(size=(6, hidden))
    if world in (one_outlier_dimension, cancelling_outliers):
        queries[:, [0, -1]] = 1.0
    if world is huge_norms:
        queries *= 1e6
    queries[5] = 0
    return queries


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("world", WORLDS)
def test_equals_the_full_sort(tmp_path, monkeypatch, world, seed):
    draw = np.random.default_rng(seed)
    vectors, queries = world(draw, 403, 24), queries_for(world, draw, 24)
    for at, (topk, block_rows, chunk_rows) in enumerate([(5, 403, 64), (10, 100, 33), (50, 37, 10**6)]):
        monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
        check(tmp_path / str(at), vectors, queries, topk, block_rows)


@pytest.mark.parametrize("seed", range(3))
def test_without_spare_candidates_the_second_pass_alone_makes_it_exact(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(module, "SPARE", 0)
    monkeypatch.setattr(module, "CHUNK_ROWS", 31)
    draw = np.random.default_rng(seed)
    for at, world in enumerate(WORLDS):
        check(tmp_path / str(at), world(draw, 203, 16), queries_for(world, draw, 16), 7, 50)


@pytest.mark.parametrize("copies", [1, module.SPARE, module.SPARE + 1, 3 * module.SPARE])
def test_more_duplicates_of_the_kth_than_spare_candidates(tmp_path, monkeypatch, copies):
    monkeypatch.setattr(module, "CHUNK_ROWS", 50)
    draw = np.random.default_rng(copies)
    vectors = draw.normal(size=(300, 16)) * 0.1
    query = draw.normal(size=(1, 16))
    order = draw.permutation(300)
    vectors[order[:3]] = query * 2  # three that are certain to stand first
    vectors[order[3 : 3 + copies]] = query
    rows = check(tmp_path, vectors, query, 4, 77)
    assert rows[0, :3].tolist() == sorted(order[:3]) and rows[0, 3] == min(order[3 : 3 + copies])


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("topk", [1, 5, 50])
@pytest.mark.parametrize("block_rows", [1, 3, 100])
def test_small_collections_and_topk_above_them(tmp_path, rows, topk, block_rows):
    draw = np.random.default_rng(rows)
    found = check(tmp_path, draw.integers(-1, 2, size=(rows, 4)), draw.normal(size=(3, 4)), topk, block_rows)
    assert found.shape == (3, min(topk, rows)) and found.min() >= 0


def test_every_query_has_its_own_second_pass(tmp_path):
    # one query of three meets ties, the other two must keep their results
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(200, 8))
    vectors[:, 0] = 0
    tied = np.zeros((1, 8))
    tied[0, 0] = 1
    queries = np.concatenate([draw.normal(size=(1, 8)), tied, draw.normal(size=(1, 8))])
    assert check(tmp_path, vectors, queries, 3, 64)[1].tolist() == [0, 1, 2]


def first_pass_by(monkeypatch, score):
    """Put `score(queries, vectors)` in place of the first pass's scores, of ties the last rows first."""

    def knn(queries, vectors, count, metric):
        scores = score(queries, vectors).astype(np.float32)
        where = scores.shape[1] - 1 - np.argsort(-scores[:, ::-1], axis=1, kind="stable")[:, :count]
        return np.take_along_axis(scores, where, 1), where

    monkeypatch.setattr(module, "load_faiss", lambda: types.SimpleNamespace(knn=knn, METRIC_INNER_PRODUCT=0))


def test_ties_inside_the_topk_that_fp32_rounding_would_order_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_second_pass", None)  # not needed here: the k-th stands far above the rest
    draw = np.random.default_rng(0)
    vectors = np.full((200, 8), -1.0)
    vectors[draw.permutation(200)[:90]] = draw.integers(1, 3, size=(90, 8))
    # within the rounding bound of 1.5e-5 and more
    first_pass_by(monkeypatch, lambda q, v: q @ v.T + draw.uniform(-8e-6, 8e-6, size=(len(q), len(v))))
    check(tmp_path, vectors, np.ones((2, 8)), 90, 64)


@pytest.mark.parametrize("world", [all_zero, zeros_among_others, duplicates, integers])
def test_the_order_in_which_the_first_pass_takes_ties_does_not_matter(tmp_path, monkeypatch, world):
    first_pass_by(monkeypatch, lambda q, v: q @ v.T)
    monkeypatch.setattr(module, "CHUNK_ROWS", 90)
    draw = np.random.default_rng(3)
    check(tmp_path, world(draw, 403, 24), queries_for(world, draw, 24), 5, 200)


def test_scores_are_exact_to_fp64(tmp_path):
    draw = np.random.default_rng(1)
    vectors = draw.normal(size=(50, 768)).astype(np.float16)
    queries = draw.normal(size=(4, 768)).astype(np.float32)
    store, rows = make_store(tmp_path, vectors, 17), draw.integers(50, size=(4, 9))
    for at, scores in enumerate(score_rows(store, queries, rows).tolist()):
        for row, score in zip(rows[at], scores, strict=True):
            products = [float(a) * float(b) for a, b in zip(queries[at], vectors[row], strict=True)]
            assert abs(score - math.fsum(products)) <= 1e-13 * sum(map(abs, products))


@pytest.mark.parametrize("hidden", [1, 16, 257, 768])
def test_the_error_bound_bounds(hidden):
    # sums forwards and backwards in fp32, one rounding a step, against the correctly rounded true sum
    draw = np.random.default_rng(hidden)
    for scale in (np.ones(hidden), 10.0 ** draw.integers(-4, 4, size=hidden)):
        q = (draw.normal(size=(20, hidden)) * scale).astype(np.float32)
        p = (draw.normal(size=(20, hidden)) * np.minimum(1 / scale, 6e4)).astype(np.float16)
        longest = float(np.linalg.norm(p.astype(np.float64), axis=1).max())
        bounds, products = fp32_error_bound(q, longest), q * p.astype(np.float32)
        for at in range(20):
            true = math.fsum(float(a) * float(b) for a, b in zip(q[at], p[at], strict=True))
            sums = [np.cumsum(order, dtype=np.float32)[-1] for order in (products[at], products[at, ::-1])]
            sums += [q[at] @ p[at].astype(np.float32)]
            assert all(abs(float(total) - true) <= bounds[at] for total in sums)
            assert bounds[at] <= 2 * (hidden + 1) * 2.0**-23 * float(np.linalg.norm(q[at])) * longest


def test_the_error_bound_holds_where_every_rounding_goes_one_way():
    # 1 + 2^-24 rounds back to 1 each time: the fp32 sum loses everything but the first term
    q = np.array([[1.0] + [2.0**-12] * 767], dtype=np.float32)
    p = np.array([[1.0] + [2.0**-12] * 767], dtype=np.float16)
    lost = 767 * 2.0**-24
    assert np.cumsum(q[0] * p[0].astype(np.float32), dtype=np.float32)[-1] == 1.0
    assert lost <= fp32_error_bound(q, float(np.linalg.norm(p[0].astype(np.float64))))[0]


def only(*installed):
    def distribution(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)

    return distribution


def test_a_hollow_faiss_is_named(monkeypatch):
    monkeypatch.setattr(module.metadata, "distribution", only("faiss-cpu"))
    monkeypatch.setattr(module, "import_module", lambda name: types.ModuleType(name))
    with pytest.raises(UserError, match="faiss is hollow.*pip uninstall -y faiss-cpu faiss-gpu"):
        load_faiss()


def test_both_wheels_are_refused(monkeypatch):
    monkeypatch.setattr(module.metadata, "distribution", only("faiss-cpu", "faiss-gpu"))
    with pytest.raises(UserError, match="both faiss-cpu and faiss-gpu are installed.*pip uninstall"):
        load_faiss()


def test_a_missing_faiss_is_named(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(module.metadata, "distribution", only())
    monkeypatch.setattr(module, "import_module", fail)
    with pytest.raises(UserError, match="faiss cannot be imported.*No module named 'faiss'"):
        load_faiss()


@pytest.mark.parametrize("wheel", [(), ("faiss-cpu",), ("faiss-gpu",)])
def test_a_whole_faiss_is_returned(monkeypatch, wheel):
    monkeypatch.setattr(module.metadata, "distribution", only(*wheel))
    assert callable(load_faiss().knn)
