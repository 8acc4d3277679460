"""Vectors of windows: which passage they belong to, the best of each, the cache, tokens and hashes."""

import numpy as np
import pytest
import torch
import xxhash

from torch_src.data.collection import PassageCollection
from torch_src.models.tokenization import TextRules
from torch_src.models.windows import tokenize_windows
from torch_src.retrieval import passage_windows
from torch_src.retrieval.faiss_index import FaissSearch, IndexSettings
from torch_src.retrieval.passage_windows import (
    FIELDS,
    PassageWindows,
    WindowTexts,
    cached_windows,
    collection_windows,
)
from torch_src.retrieval.search import measured_recall, search
from torch_src.retrieval.vectors import VectorStore

CPU = torch.device("cpu")


def slow_best_windows(scores, counts, topk):
    """Return (passages, scores) of one query: the maximum over each passage's windows, ties to the lower."""
    best, row = [], 0
    for passage, count in enumerate(counts):
        best.append((-max(scores[row : row + count]), passage))
        row += count
    best = sorted(best)[:topk]
    return [passage for _, passage in best], [-score for score, _ in best]


@pytest.fixture
def world(tmp_path):
    """(store of windows, their map, counts, queries); integers, so that scores tie and are exact."""
    draw = np.random.default_rng(0)
    counts = np.array([1, 7, 1, 3, 2, 1, 1, 5, 1, 4] * 4)
    vectors = draw.integers(-2, 3, size=(counts.sum(), 8)).astype(np.float16)
    vectors[1:8] = vectors[1]  # all windows of a passage tie
    store = VectorStore.create_or_continue(tmp_path / "emb", {}, *vectors.shape, 30, print)
    for block in range(store.block_count):
        first, last = store.block_range(block)
        store.write_block(block, vectors[first:last])
    queries = draw.integers(-2, 3, size=(9, 8)).astype(np.float32)
    queries[0] = 2 * vectors[1]  # its first windows are those of one passage
    return store, PassageWindows.of_counts(counts), counts.tolist(), queries, vectors


def expected(world, topk):
    _, _, counts, queries, vectors = world
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return [slow_best_windows(row.tolist(), counts, topk) for row in scores]


@pytest.mark.parametrize("topk", [1, 2, 5, 39, 40, 50])
def test_exact_search_gives_the_best_passages(world, topk):
    store, windows, _, queries, _ = world
    rows, scores, _ = search(store, queries, topk, [CPU], windows=windows)
    for query, (passages, values) in enumerate(expected(world, topk)):
        assert rows[query].tolist() == passages and scores[query].tolist() == values
    assert rows.shape == (9, min(topk, 40))


def test_one_window_for_each_passage_is_the_search_without_windows(world):
    store, _, _, queries, _ = world
    windows = PassageWindows.of_counts(np.ones(store.rows, np.int64))
    assert windows.depth(5) == 5
    rows, scores, _ = search(store, queries, 5, [CPU], windows=windows)
    plain_rows, plain_scores, _ = search(store, queries, 5, [CPU])
    assert np.array_equal(rows, plain_rows) and np.array_equal(scores, plain_scores)


def test_depth_is_the_most_that_may_be_needed(world):
    _, windows, counts, _, _ = world
    for topk in (1, 2, 7, 40, 99):
        largest = sorted(counts, reverse=True)
        assert windows.depth(topk) == sum(largest[: min(topk, 40) - 1]) + 1
        assert min(topk, 40) <= windows.first_depth(topk) <= windows.depth(topk)


@pytest.mark.parametrize("topk", [1, 4, 40, 60])
def test_a_flat_index_finds_the_same_and_asks_again_for_passages_that_lack(world, tmp_path, topk):
    store, windows, _, queries, _ = world
    index = FaissSearch(store, IndexSettings("Flat", "", 1.0, 0), tmp_path / "index", {}, windows=windows)
    rows, scores = index.search(queries, topk)
    for query, (passages, values) in enumerate(expected(world, topk)):
        assert scores[query].tolist() == values
        # faiss breaks ties at the last place in its own way
        inside = [p for p, value in zip(passages, values, strict=True) if value > values[-1]]
        assert rows[query].tolist()[: len(inside)] == inside
    assert "recall@4 1.0" in measured_recall(
        lambda q: search(store, q, 4, [CPU], windows=windows)[:2], store, queries, 4, CPU, 9, 1.0, 0, windows
    )


@pytest.mark.parametrize("params", ["", "efSearch=4"])
def test_an_hnsw_index_searches_as_deep_as_the_windows_need(world, tmp_path, params):
    store, windows, _, queries, _ = world
    settings = IndexSettings("HNSW16", params, 1.0, 0)
    index = FaissSearch(store, settings, tmp_path / "index", {}, windows=windows)
    _, scores = index.search(queries, 39)
    for query, (_, values) in enumerate(expected(world, 39)):
        assert scores[query].tolist() == values


def test_a_search_is_repeated_until_there_are_enough_passages_or_no_more_windows():
    windows, calls = PassageWindows.of_counts(np.array([20, *[1] * 5])), []

    def find(queries, depth, most=25):
        """Rows 0, 1, 2, ...; for a query of ones row 20 first."""
        calls.append((len(queries), depth))
        rows = np.tile(np.arange(depth), (len(queries), 1))
        rows[rows >= most] = -1
        rows[queries[:, 0] == 1, 0] = 20
        return rows, np.where(rows < 0, -np.inf, 99.0 - np.arange(depth))

    queries = np.array([[1.0], [0.0]], np.float32)
    rows, scores = windows.search(find, queries, 2)
    assert rows.tolist() == [[1, 0], [0, 1]] and scores.tolist() == [[99, 98], [99, 79]]
    assert calls == [(2, 18), (1, 25)]
    rows, scores = windows.search(lambda q, depth: find(q, depth, most=3), queries, 3)
    assert rows.tolist() == [[1, 0, -1], [0, -1, -1]] and np.isneginf(scores[:, 2]).all()
    assert calls[2:] == [(2, 22)]  # -1: the index has no more


def test_missing_rows_come_last():
    windows = PassageWindows.of_counts(np.array([2, 1]))
    rows, scores = windows.collapse(np.array([[1, 0, 2, -1], [-1, -1, -1, -1]]), np.zeros((2, 4)), 3)
    assert rows.tolist() == [[0, 1, -1], [-1, -1, -1]]
    assert scores[0].tolist() == [0, 0, -np.inf]


@pytest.fixture
def collection(tmp_path):
    texts = ["水" * 50, "", "油", "水油" * 40, "a " * 9, "的" * 500]
    (tmp_path / "passages").mkdir()
    (tmp_path / "passages" / "part-00").write_text("".join(f"-\t-\t{text}\t0\n" for text in texts), "utf-8")
    return PassageCollection(tmp_path / "passages")


RULES = TextRules(20, windows=4, stride=5)
STAMP = dict.fromkeys(FIELDS, "same")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_windows_of_a_collection_are_counted_once(
    collection, tokenizer, tmp_path, monkeypatch, workers, capsys
):
    windows = collection_windows(tokenizer, RULES, collection, STAMP, tmp_path / "cache", 9.0, workers)
    table = tokenize_windows(tokenizer, collection[0 : len(collection)], RULES)
    assert np.diff(windows.first).tolist() == table.windows.tolist() == [4, 1, 1, 4, 1, 4]
    printed = capsys.readouterr().out
    assert "3 of them in several windows: 15 windows" in printed and "33.3%" in printed
    monkeypatch.setattr(passage_windows, "_counted", None)
    again = collection_windows(tokenizer, RULES, collection, STAMP, tmp_path / "cache", 9.0, workers)
    assert np.array_equal(again.first, windows.first)
    assert cached_windows(tmp_path / "cache", {**STAMP, "window_stride": 6}) is None
    file = tmp_path / "cache" / "first_window.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert cached_windows(tmp_path / "cache", STAMP) is None


def test_tokens_and_hashes_of_windows_do_not_depend_on_the_span(collection, tokenizer):
    whole = tokenize_windows(tokenizer, collection[0 : len(collection)], RULES)
    texts = WindowTexts(tokenizer, RULES, collection, PassageWindows.of_counts(whole.windows))
    hashes = []
    for passage, count in enumerate(whole.windows.tolist()):
        data = collection[passage].encode()
        hashes += [xxhash.xxh3_128_digest(data, seed=number) for number in range(count)]
    for first, last in [(0, len(texts)), (0, 1), (1, 3), (3, 6), (5, 11), (14, 15)]:
        table = texts.tokenize(first, last)
        assert table.lengths.tolist() == whole.lengths[first:last].tolist()
        assert table.ids.tolist() == whole.ids[whole.starts[first] : whole.starts[last]].tolist()
        assert texts.hashes(first, last).tobytes() == b"".join(hashes[first:last])
    assert len(texts) == 15
