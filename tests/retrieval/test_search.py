"""Exact search compared with a full sort in fp64, on adversarial vectors, and the bounds of its scores."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_src.retrieval import chunks, score_bounds
from torch_src.retrieval import search as module
from torch_src.retrieval.chunks import DeviceCache
from torch_src.retrieval.score_bounds import (
    KINDS,
    Float32,
    Passages,
    Queries,
    Scratch,
    fastest_kind,
    fp32_error,
    int8_is_exact,
    int8_levels,
    round_down,
    select_pairs,
)
from torch_src.retrieval.search import TopK, choose_kind, chunk_rows, search
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.errors import UserError

CPU = torch.device("cpu")


def make_store(folder, vectors, block_rows):
    with mock.patch("os.fsync"):  # slow
        store = VectorStore.create_or_continue(folder, {}, *vectors.shape, block_rows, print)
        for block in range(store.block_count):
            first, last = store.block_range(block)
            store.write_block(block, vectors[first:last])
    return store


def tree_sum(values):
    """Return the sums (n,) of rows (n, H): the last half is added to the first until one column is left."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        last = values[:, -half:]
        values = np.concatenate([values[:, :half] + last, values[:, half:-half]], axis=1)
    return values[:, 0]


def full_sort(vectors, queries, topk):
    """Return (rows, scores): every fp64 inner product, higher first, then the lower row."""
    all_rows, all_scores = [], []
    for query in queries.astype(np.float64):
        scores = tree_sum(query * vectors.astype(np.float64)).tolist()
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:topk]
        all_rows.append(order)
        all_scores.append([scores[row] for row in order])
    return np.array(all_rows), np.array(all_scores)


def kinds_on(device):
    """Return the kinds of product that a device has."""
    return [kind for kind in KINDS if kind != "int8" or device.type == "cpu"]


def check(folder, vectors, queries, topk, block_rows, kinds=KINDS, devices=(CPU,), bs=1000, cached=False):
    """Assert that search gives the rows and scores of the full sort by every kind of product; return rows.

    cached: search a second time, over the vectors that the first search left on the devices.
    """
    vectors, queries = vectors.astype(np.float16), np.ascontiguousarray(queries, dtype=np.float32)
    store, devices = make_store(folder, vectors, block_rows), list(devices)
    expected, expected_scores = full_sort(vectors, queries, topk)
    for kind in kinds:
        cache = DeviceCache(devices) if cached else None
        for _ in range(2 if cached else 1):
            rows, scores, _ = search(store, queries, topk, devices, kind, cache=cache, bs=bs)
            assert rows.dtype == np.int64 and scores.dtype == np.float64
            assert np.array_equal(rows, expected), kind
            assert np.array_equal(scores, expected_scores), kind
    return rows


def check_world(folder, monkeypatch, world, seed, device):
    """Search an adversarial world in chunks of several sizes: streamed, in batches of queries, cached."""
    draw = np.random.default_rng(seed)
    vectors, queries = world(draw, 403, 24), queries_for(world, draw, 24)
    kinds, devices = kinds_on(device), [device]
    monkeypatch.setitem(module.CHUNK_ROWS, device.type, 64)
    check(folder / "0", vectors, queries, 5, 403, kinds, devices)
    monkeypatch.setitem(module.CHUNK_ROWS, device.type, 33)
    check(folder / "1", vectors, queries, 10, 100, kinds, devices, bs=4, cached=True)
    monkeypatch.setitem(module.CHUNK_ROWS, device.type, 10**6)
    monkeypatch.setitem(module.PRODUCT_PAIRS, device.type, 600)  # 64 passages
    monkeypatch.setitem(module.FP32_PAIRS, device.type, 0)
    check(folder / "2", vectors, queries, 50, 37, kinds, devices)


def check_small_chunks(folder, monkeypatch, device, repeats):
    """Search chunks of 64 rows again and again, pairs scored a few at a time: the same result every time."""
    monkeypatch.setitem(module.CHUNK_ROWS, device.type, 64)
    monkeypatch.setitem(module.SCORED_PAIRS, device.type, 50)
    monkeypatch.setitem(module.FP64_PAIRS, device.type, 20)
    draw = np.random.default_rng(2)
    vectors = draw.normal(size=(1000, 32)).astype(np.float16)
    queries = draw.normal(size=(13, 32)).astype(np.float32)
    store = make_store(folder, vectors, 700)
    expected, expected_scores = full_sort(vectors, queries, 9)
    for _ in range(repeats):
        rows, scores, _ = search(store, queries, 9, [device], bs=10)
        assert np.array_equal(rows, expected) and np.array_equal(scores, expected_scores)


def check_norms(folder, device, size):
    """Search vectors whose scores are above the range of fp16, or below its normal numbers."""
    draw = np.random.default_rng(4)
    vectors = draw.normal(size=(500, 16)) * size
    queries = draw.normal(size=(7, 16)) * 10.0 ** draw.integers(-20, 20, size=(7, 1))
    check(folder, np.clip(vectors, -65504, 65504), queries, 20, 100, kinds_on(device), [device])


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
    # the other dimensions decide the order, but fp32 rounds them away next to the outlier
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


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("world", WORLDS)
def test_equals_the_full_sort(tmp_path, monkeypatch, world, seed):
    check_world(tmp_path, monkeypatch, world, seed, CPU)


def test_pairs_scored_a_few_at_a_time(tmp_path, monkeypatch):
    check_small_chunks(tmp_path, monkeypatch, CPU, 1)


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_tiny_and_huge_norms(tmp_path, size):
    check_norms(tmp_path, CPU, size)


def test_all_batches_of_queries_share_one_pass(tmp_path, monkeypatch):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 64)
    draw = np.random.default_rng(5)
    store = make_store(tmp_path, draw.normal(size=(300, 8)).astype(np.float16), 100)
    queries, read, searched = draw.normal(size=(11, 8)).astype(np.float32), [], []
    read_into = VectorStore.read_into
    monkeypatch.setattr(
        VectorStore, "read_into", lambda *given: (read.append(len(given[2])), read_into(*given))
    )
    found = [search(store, queries, 6, [CPU], bs=bs, searched=searched.append) for bs in (1, 4, 11, 1000)]
    assert read == searched == [64, 64, 64, 64, 44] * 4
    for rows, scores, _ in found:
        assert np.array_equal(rows, found[0][0]) and np.array_equal(scores, found[0][1])


@pytest.mark.parametrize("copies", [1, 5, 64, 96])
def test_more_duplicates_of_the_kth_than_are_kept(tmp_path, monkeypatch, copies):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 50)
    draw = np.random.default_rng(copies)
    vectors = draw.normal(size=(300, 16)) * 0.1
    query = draw.normal(size=(1, 16))
    order = draw.permutation(300)
    vectors[order[:3]] = query * 2  # the first three results
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


def test_ties_of_one_query_do_not_change_the_others(tmp_path):
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(200, 8))
    vectors[:, 0] = 0
    tied = np.zeros((1, 8))
    tied[0, 0] = 1
    queries = np.concatenate([draw.normal(size=(1, 8)), tied, draw.normal(size=(1, 8))])
    assert check(tmp_path, vectors, queries, 3, 64)[1].tolist() == [0, 1, 2]


def test_scores_are_exact_to_fp64(tmp_path):
    draw = np.random.default_rng(1)
    vectors = draw.normal(size=(50, 768)).astype(np.float16)
    queries = draw.normal(size=(4, 768)).astype(np.float32)
    rows, scores, _ = search(make_store(tmp_path, vectors, 17), queries, 9, [CPU])
    for query, found, values in zip(queries, rows.tolist(), scores.tolist(), strict=True):
        for row, score in zip(found, values, strict=True):
            products = [float(a) * float(b) for a, b in zip(query, vectors[row], strict=True)]
            assert abs(score - math.fsum(products)) <= 1e-13 * sum(map(abs, products))


@pytest.mark.parametrize("hidden", [1, 16, 257, 768])
def test_errors_are_within_the_bound(hidden):
    # sums forwards and backwards in fp32, one rounding a step, against the correctly rounded true sum
    draw = np.random.default_rng(hidden)
    for scale in (np.ones(hidden), 10.0 ** draw.integers(-4, 4, size=hidden)):
        q = (draw.normal(size=(20, hidden)) * scale).astype(np.float32)
        p = (draw.normal(size=(20, hidden)) * np.minimum(1 / scale, 6e4)).astype(np.float16)
        largest_norm = float(np.linalg.norm(p.astype(np.float64), axis=1).max())
        bounds = fp32_error(hidden) * np.linalg.norm(q.astype(np.float64), axis=1) * largest_norm
        products = q * p.astype(np.float32)
        for at in range(20):
            true = math.fsum(float(a) * float(b) for a, b in zip(q[at], p[at], strict=True))
            sums = [np.cumsum(order, dtype=np.float32)[-1] for order in (products[at], products[at, ::-1])]
            sums += [q[at] @ p[at].astype(np.float32)]
            assert all(abs(float(total) - true) <= bounds[at] for total in sums)
            assert bounds[at] <= 2 * (hidden + 2) * 2.0**-23 * float(np.linalg.norm(q[at])) * largest_norm


def test_the_error_bound_holds_when_all_roundings_have_one_sign():
    # 1 + 2^-24 rounds back to 1 each time: the fp32 sum loses everything but the first term
    q = np.array([[1.0] + [2.0**-12] * 767], dtype=np.float32)
    p = np.array([[1.0] + [2.0**-12] * 767], dtype=np.float16)
    lost = 767 * 2.0**-24
    assert np.cumsum(q[0] * p[0].astype(np.float32), dtype=np.float32)[-1] == 1.0
    assert lost <= fp32_error(768) * float(np.linalg.norm(q[0]) * np.linalg.norm(p[0].astype(np.float64)))


def scaled(world, seed, hidden=48):
    """Vectors and queries of a world at very different scales."""
    draw = np.random.default_rng(seed)
    vectors = world(draw, 300, hidden).astype(np.float16)
    size = 10.0 ** draw.integers(-30, 30, size=(6, 1))
    return vectors, (queries_for(world, draw, hidden) * size).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
def test_no_pair_that_reaches_its_floor_is_missed(world, kind):
    """The floors are exactly true scores, where a slightly too small bound shows."""
    for seed in range(4):
        vectors, queries = scaled(world, seed)
        products = KINDS[kind](Queries(queries, CPU))
        true = queries.astype(np.float64) @ vectors.astype(np.float64).T
        for rank in (0, 20, 299):
            floor = -np.sort(-true, axis=1)[:, rank] * (1 + 1e-13 * np.sign(-true.max(axis=1)))
            scaled_floor = torch.from_numpy(floor) * products.queries.scale
            found = products.pairs_above(Passages(torch.from_numpy(vectors), Scratch()), scaled_floor, 10**9)
            pairs = set(zip(*(index.tolist() for index in found), strict=True))
            wanted = set(zip(*(index.tolist() for index in np.nonzero(true >= floor[:, None])), strict=True))
            assert wanted <= pairs, (kind, world.__name__, seed, rank)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_few_pairs_are_rescored(tmp_path, kind):
    """A bound that selects all pairs is exact as well, but useless."""
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(60_000, 64)).astype(np.float16)
    queries = draw.normal(size=(20, 64)).astype(np.float32)
    store = make_store(tmp_path, vectors, 60_000)
    _, _, stats = search(store, queries, 10, [CPU], kind, memory_gb=0.02)
    assert stats.selected_pairs < 0.02 * vectors.shape[0] * len(queries)
    assert stats.chunks >= 9 and stats.fp32_chunks <= stats.chunks / 3


def test_a_constant_offset_of_all_vectors_does_not_slow_int8():
    draw = np.random.default_rng(0)
    queries, vectors = draw.normal(size=(20, 64)), draw.normal(size=(4096, 64))
    counts = []
    for constant in (0, 20):
        moved = torch.from_numpy((vectors + constant).astype(np.float16))
        products = KINDS["int8"](Queries(queries.astype(np.float32), CPU))
        scores = torch.from_numpy(queries) @ moved.double().T
        floor = scores.topk(10).values[:, -1] * products.queries.scale
        counts.append(len(products.pairs_above(Passages(moved, Scratch()), floor, 10**9)[0]))
    assert counts[1] < 2 * counts[0]


def test_a_product_that_selects_too_many_pairs_is_skipped_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 64)
    vectors = np.zeros((64 * 60, 8), dtype=np.float16)
    store = make_store(tmp_path, vectors, 1000)
    tried = []
    monkeypatch.setattr(KINDS["int8"], "pairs_above", lambda self, *given: tried.append(1))
    _, _, stats = search(store, np.ones((2, 8), dtype=np.float32), 3, [CPU], "int8")
    assert stats.fp32_chunks == stats.chunks == 60 and 3 <= len(tried) <= 8


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_select_pairs_equals_a_plain_comparison(count):
    draw = torch.Generator().manual_seed(count)
    scores = torch.randint(-3, 4, (count, 5), generator=draw).float()
    threshold = torch.tensor([2.0, 3.0, -3.0, float("-inf"), 4.0], dtype=torch.float64)
    found = select_pairs(scores, threshold, 10**9)
    pairs = sorted(zip(*(index.tolist() for index in found), strict=True))
    assert pairs == [tuple(pair) for pair in torch.nonzero(scores.T >= threshold[:, None]).tolist()]
    for query in range(5):
        passages = found[1][found[0] == query].tolist()
        assert passages == sorted(passages)  # TopK needs it
    assert select_pairs(scores, threshold, 1) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounding_down_is_never_above_the_value_nor_far_below(dtype):
    limits = torch.finfo(dtype)
    sizes = torch.linspace(np.log2(limits.smallest_normal) - 12, np.log2(limits.max) + 2, 999).double()
    values = torch.cat([2**sizes, -(2**sizes), torch.tensor([0.0, 1 + 2.0**-25, limits.max, -np.inf])])
    lower = round_down(values, dtype)
    assert lower.dtype == dtype and (lower.double() <= values).all()
    near = values.abs() < limits.max / 2
    slack = 2.5 * limits.eps * values.abs() + 1.5 * limits.smallest_normal
    assert (values - lower.double() <= slack)[near].all()
    flushed = torch.where(values.abs() < limits.smallest_normal, 0.0, values.to(dtype))
    assert (flushed >= lower).all()  # a product rounded to `dtype`, subnormal results replaced by 0


@pytest.mark.slow
@pytest.mark.parametrize("devices", [3])
def test_several_devices_share_the_chunks_and_agree(tmp_path, monkeypatch, devices):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 64)
    draw = np.random.default_rng(devices)
    for at, world in enumerate(WORLDS):
        vectors, queries = world(draw, 777, 16), queries_for(world, draw, 16)
        check(tmp_path / str(at), vectors, queries, 7, 100, devices=[CPU] * devices)


def test_an_error_on_one_device_ends_the_search(tmp_path, monkeypatch):
    def fail(self, first, chunk):
        raise RuntimeError("this card is broken")

    monkeypatch.setattr(module.DeviceSearch, "add_chunk", fail)
    store = make_store(tmp_path, np.zeros((500, 8), np.float16), 100)
    with pytest.raises(RuntimeError, match="this card is broken"):
        search(store, np.zeros((1, 8), np.float32), 3, [CPU, CPU])


class OnlyMeta(TorchDispatchMode):
    """Asserts that operations use only tensors of the device `meta`, which have no contents."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), function
        return function(*args, **(kwargs or {}))


@pytest.mark.slow  # the first use of `meta` takes a second
@pytest.mark.parametrize("kind", kinds_on(torch.device("cuda")))
def test_a_search_stays_on_its_device(monkeypatch, kind):
    """As on a GPU: nothing is copied to the host but the sizes of results, a few times per chunk."""
    waits = []

    def nonzero(mask, as_tuple=False):
        waits.append("nonzero")
        indices = torch.zeros((7, mask.dim()), dtype=torch.int64, device=mask.device)
        return indices.unbind(1) if as_tuple else indices

    monkeypatch.setattr(torch, "nonzero", nonzero)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: waits.append("int") or 3)
    for name in ("CHUNK_ROWS", "PRODUCT_PAIRS", "SCORED_PAIRS", "FP32_PAIRS", "FP64_PAIRS"):
        monkeypatch.setitem(getattr(module, name), "meta", getattr(module, name)["cuda"])
    queries = np.random.default_rng(0).normal(size=(23, 16)).astype(np.float32)
    device_search = module.DeviceSearch(queries, 10, 5, kind, torch.device("meta"))
    with OnlyMeta():
        for number in range(5):
            waits.clear()
            chunk = torch.empty(320, 16, dtype=torch.float16, device="meta")
            device_search.add_chunk(320 * number, chunk)
    assert waits.count("nonzero") == 3 * len(device_search.batches) and waits.count("int") <= 3


def test_top_k_equals_a_sort():
    draw = np.random.default_rng(0)
    best, everything = TopK(5, 4, CPU), []
    for number in range(20):
        count = int(draw.integers(0, 30))
        rows = 100 * number + np.sort(draw.permutation(100)[:count])  # increasing
        pairs = (draw.integers(5, size=count), rows, draw.integers(3, size=count) * 1.0)
        best.add(*map(torch.from_numpy, pairs))
        everything += zip(*(part.tolist() for part in pairs), strict=True)
        assert best.pending_pairs < best.max_pending  # bounded
    best.flush()
    for query in range(5):
        order = sorted((-score, row) for q, row, score in everything if q == query)[:4]
        assert best.rows[query].tolist() == [row for _, row in order]
        assert best.scores[query].tolist() == [-score for score, _ in order]


def test_chunk_size_follows_the_memory_limit():
    sizes = [chunk_rows(1000, 768, gigabytes, [CPU]) for gigabytes in (0.12, 0.2, 2, 200)]
    assert sizes == sorted(sizes) and sizes[0] >= 64 and sizes[-1] == module.CHUNK_ROWS["cpu"]
    assert all(size % 64 == 0 for size in sizes)
    with pytest.raises(UserError, match="lower --bs"):
        chunk_rows(100_000, 768, 0.5, [CPU])


def test_chunk_size_on_a_gpu_follows_its_free_memory(monkeypatch):
    def rows(free_gb, queries=1000, memory_gb=2.0, cards=1):
        monkeypatch.setattr(module, "available_gpu_memory", lambda device: int(free_gb * 1e9))
        return chunk_rows(queries, 768, memory_gb, [torch.device("cuda", card) for card in range(cards)])

    sizes = [rows(free) for free in (2.5, 3, 4, 80)]
    assert sizes == sorted(sizes) and sizes[0] >= 64 and sizes[-1] == module.CHUNK_ROWS["cuda"]
    assert all(size % 64 == 0 for size in sizes)
    fixed, per_row = module._gpu_bytes(1000, 768)
    assert fixed + sizes[1] * per_row <= module.GPU_FRACTION * 3e9
    # host memory is limited as well: two chunks for each card
    assert 2 * 2 * 768 * rows(80, memory_gb=0.01) <= 0.01e9
    assert rows(80, memory_gb=0.01, cards=2) <= rows(80, memory_gb=0.01) / 2
    assert rows(24, queries=1) == module.CHUNK_ROWS["cuda"]
    with pytest.raises(UserError, match="1.5 GB of free GPU memory.*lower --bs"):
        rows(1.5)


def test_auto_uses_the_fastest_and_logs_it():
    lines = []
    name = choose_kind("auto", 64, CPU, lines.append)
    measured, seconds = fastest_kind(64, CPU)
    assert name in KINDS and f"{name} products" in lines[0]
    assert measured == min(seconds, key=seconds.get)
    assert ("int8" in seconds) == int8_is_exact(64)


def test_int8_that_is_not_exact_is_refused(monkeypatch):
    monkeypatch.setattr(module, "int8_is_exact", lambda hidden: False)
    with pytest.raises(UserError, match="no exact int8"):
        choose_kind("int8", 64, CPU, print)
    assert choose_kind("fp32", 64, CPU, print) == "fp32"


def test_wrong_int8_products_are_detected(monkeypatch):
    def saturating(*given):
        product = right(*given)
        return lambda passages: product(passages).clamp(max=2**15 - 1)

    right = score_bounds.int8_product
    monkeypatch.setattr(score_bounds, "int8_product", saturating)
    assert int8_levels.__wrapped__(256) == 0


class Failing:
    """Replaces torch.ops.onednn: some operators are missing or raise."""

    def __init__(self, missing, failing):
        self.missing, self.failing = missing, failing

    def __getattr__(self, name):
        if name in self.missing:
            raise AttributeError(name)
        if name in self.failing:
            return self.fail
        return getattr(ONEDNN, name)

    def fail(self, *given):
        raise RuntimeError("could not create a primitive descriptor")


ONEDNN = torch.ops.onednn


@pytest.mark.parametrize(
    ("missing", "failing"),
    [(["qlinear_prepack"], []), ([], ["qlinear_prepack"]), ([], ["qlinear_pointwise"])],
)
def test_without_the_int8_operators_search_falls_back(tmp_path, monkeypatch, missing, failing):
    monkeypatch.setattr(torch.ops, "onednn", Failing(missing, failing))
    assert int8_levels.__wrapped__(24) == 0
    monkeypatch.setattr(module, "int8_is_exact", lambda hidden: int8_levels.__wrapped__(hidden) > 0)
    monkeypatch.setattr(score_bounds, "int8_is_exact", lambda hidden: int8_levels.__wrapped__(hidden) > 0)
    assert choose_kind("auto", 24, CPU, print) in ("fp32", "bf16")
    # the operators may also fail only later, during the search
    monkeypatch.setattr(module, "choose_kind", lambda *given: "int8")
    monkeypatch.setattr(score_bounds, "int8_levels", lambda hidden: 63)
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 64)
    draw = np.random.default_rng(0)
    check(tmp_path, draw.normal(size=(400, 24)), draw.normal(size=(3, 24)), 5, 100, kinds=["int8"])


def test_products_have_full_precision_during_a_search(tmp_path, monkeypatch):
    def reduced():
        flags = torch.backends.cuda.matmul
        return {name: getattr(flags, name) for name in score_bounds.REDUCED_PRECISION}

    before, seen, pairs_above = reduced(), [], Float32.pairs_above

    def recorded(*given):
        seen.append(reduced())
        return pairs_above(*given)

    monkeypatch.setattr(Float32, "pairs_above", recorded)
    store = make_store(tmp_path, np.ones((9, 8), np.float16), 9)
    search(store, np.ones((2, 8), np.float32), 3, [CPU], "fp32")
    assert before["allow_fp16_reduced_precision_reduction"] and reduced() == before
    assert seen and not any(flag for flags in seen for flag in flags.values())


def test_fp32_scores_are_within_their_bound():
    draw = np.random.default_rng(0)
    passages = Passages(torch.from_numpy(draw.normal(size=(200, 768)).astype(np.float16)), Scratch())
    queries = Queries(draw.normal(size=(20, 768)).astype(np.float32), CPU)
    found = queries.scaled @ passages.float32.T
    error = found.double() - queries.scaled.double() @ passages.float16.double().T
    assert (error.abs() <= Float32(queries).bound(passages)[:, None]).all()


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(("rows", "topk"), [(200, 500), (200, 200), (130, 129), (65, 1)])
def test_topk_above_the_rows_of_a_short_last_chunk(tmp_path, monkeypatch, rows, topk, devices):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 64)
    draw = np.random.default_rng(rows)
    vectors, queries = (
        draw.normal(size=(rows, 8)).astype(np.float16),
        draw.normal(size=(5, 8)).astype(np.float32),
    )
    store = make_store(tmp_path / "v", vectors, 50)
    found, scores, _ = search(store, queries, topk, [CPU] * devices)
    expected, values = full_sort(vectors, queries, topk)
    assert np.array_equal(found, expected) and np.array_equal(scores, values)


@pytest.mark.parametrize("devices", [1, 3])
def test_vectors_that_stay_on_the_devices_are_read_once(tmp_path, monkeypatch, devices):
    """The second batch of queries on GPUs (here CPUs): the same result without the files."""
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 64)
    draw = np.random.default_rng(3)
    vectors = draw.normal(size=(500, 8)).astype(np.float16)
    rounds = [draw.normal(size=(count, 8)).astype(np.float32) for count in (9, 9, 4)]
    store, cpus = make_store(tmp_path / "v", vectors, 90), [CPU] * devices
    cache = DeviceCache(cpus)
    for number, queries in enumerate(rounds):
        found, scores, _ = search(store, queries, 10, cpus, cache=cache)
        expected, values = full_sort(vectors, queries, 10)
        assert np.array_equal(found, expected) and np.array_equal(scores, values)
        if not number:
            for path in (tmp_path / "v").glob("*.npy"):
                path.unlink()
    assert sum(len(chunk) for kept in cache.chunks for _, chunk in kept) == 500
    assert DeviceCache.if_it_fits(store, cpus) is None  # no GPU
    size_gb = 500 * 8 * 2 / devices / 1e9
    assert DeviceCache.if_it_fits(store, cpus, 1.01 * size_gb)  # requested
    assert DeviceCache.if_it_fits(store, cpus, 0.99 * size_gb) is None
    monkeypatch.setattr(chunks, "free_memory", lambda: 1.05 * 1e9 * size_gb)  # but there is not enough
    assert DeviceCache.if_it_fits(store, cpus, 1.01 * size_gb) is None


def test_many_pending_pairs_of_one_query_keep_its_best():
    draw = np.random.default_rng(0)
    best = TopK(1000, 4, CPU)
    rows, scores = np.arange(7000), draw.integers(50, size=7000) * 1.0
    best.add(torch.full((7000,), 3), torch.from_numpy(rows), torch.from_numpy(scores))
    best.add(torch.tensor([5, 3]), torch.tensor([9, 8000]), torch.tensor([1.0, 50.0], dtype=torch.float64))
    best.flush()
    order = sorted(zip((-scores).tolist(), rows.tolist(), strict=True))[:3]
    assert best.rows[3].tolist() == [8000, *(row for _, row in order)]
    assert best.rows[5, 0] == 9 and best.scores[5, 1] == -np.inf
