"""--passage_windows of both inference programs: the results of a slow maximum over the windows."""

import json

import numpy as np
import pytest
from toy_world import lines, options

from torch_src import Reranker, Retriever, cross_infer, dual_infer
from torch_src.data.formats import run_by_query
from torch_src.models.windows import tokenize_pair_windows, tokenize_windows
from torch_src.runtime.errors import UserError

WINDOWS = ["--passage_windows", "3", "--window_stride", "8"]
DUAL = ["--dual_params", "none", "--p_max_seq_len", "40"]
CROSS = ["--cross_params", "none", "--max_seq_len", "64"]


def dual(world, output, *more, topk=10):
    model = ["--pretrained_model_path", str(world / "model")]
    return dual_infer.main([*options(world, output), *model, *DUAL, *more], topk=topk, bs=4)


def cross(world, output, *more):
    model = ["--pretrained_model_path", str(world / "model"), "--topk", "10"]
    run = ["--retrieval_result", str(output / "res.top10")]
    return cross_infer.main([*options(world, output), *model, *run, *CROSS, *more])


def rows_of(path):
    return {query: [(row.row, row.score) for row in rows] for query, rows in run_by_query(path)}


def slow_best(world, output, topk):
    """Passages of each query by the best of their windows, each window encoded alone."""
    retriever = Retriever.load(
        output, data_dir=str(world / "data"), precision="fp32", threads=1, passage_windows=3, window_stride=8
    )
    encoder, found = retriever.own_encoder("passage"), {}
    texts = retriever.collection[0 : len(retriever.collection)]
    best = []
    for text in texts:
        table = tokenize_windows(encoder.tokenizer, [text], encoder.rules)
        windows = [encoder.encode_tokens(table.slice(at, at + 1))[0] for at in range(len(table))]
        best.append(np.stack(windows).astype(np.float16).astype(np.float64))
    queries = [line.split("\t")[0] for line in lines(world / "data/dev/dev.q.format")]
    for query, vector in zip(queries, retriever.encode_queries(queries).astype(np.float64), strict=True):
        scores = [(each @ vector).max() for each in best]
        found[query] = sorted(range(len(texts)), key=lambda row: (-scores[row], row))[:topk], scores
    return found


@pytest.mark.slow
def test_the_run_is_that_of_the_best_windows(trained, tmp_path, capsys):
    output = tmp_path / "output"
    assert dual(trained, output, *WINDOWS) == 0
    run = (output / "res.top10").read_bytes()
    for query, (passages, scores) in slow_best(trained, output, 10).items():
        found = rows_of(output / "res.top10")[query]
        assert np.allclose([score for _, score in found], [scores[row] for row in passages], atol=2e-3)
        assert len({row for row, _ in found}) == 10
    manifest = json.loads((output / "para_emb/manifest.json").read_text())
    first = np.load(output / "cache/first_window.npy")
    assert (manifest["passage_windows"], manifest["window_stride"]) == (3, 8)
    assert manifest["rows"] == first[-1] > 60 and len(first) == 61
    capsys.readouterr()
    assert dual(trained, output, *WINDOWS) == 0 and "up to date" in capsys.readouterr().out
    # an exact index, and no search at all, on the same vectors
    assert dual(trained, output, *WINDOWS, "--index", "Flat") == 0
    printed = capsys.readouterr().out
    assert "recall@10 1.0000" in printed and "vectors up to date" in printed
    assert [r for r, _ in rows_of(output / "res.top10")[query]] == [row for row, _ in found]
    assert dual(trained, output, *WINDOWS, "--dev_q", "none") == 0
    assert "windows; no search" in capsys.readouterr().out
    assert dual(trained, output, *WINDOWS, "--plan") == 0
    assert "encode 0 of 60 passages in 0 windows" in capsys.readouterr().out
    assert dual(trained, tmp_path / "other", *WINDOWS, "--plan") == 0
    assert f"60 passages in {first[-1]} windows" in capsys.readouterr().out
    # more passages than there are
    assert dual(trained, output, *WINDOWS, topk=70) == 0
    assert {len(rows) for rows in rows_of(output / "res.top70").values()} == {60}
    # the Python API finds them, too
    retriever = Retriever.load(output, precision="fp32", threads=1)
    assert [hit.row for hit in retriever.search(query)] == [row for row, _ in found]
    retriever.index(retriever.collection[0:60])
    assert [hit.row for hit in retriever.search(query)] == [row for row, _ in found]
    # other windows: other vectors
    capsys.readouterr()
    assert dual(trained, output, "--passage_windows", "2") == 0
    assert "passage_windows: 3 -> 2" in capsys.readouterr().out
    assert dual(trained, output) == 0
    assert json.loads((output / "para_emb/manifest.json").read_text())["rows"] == 60
    assert run != (output / "res.top10").read_bytes()


@pytest.mark.slow
def test_the_logit_of_a_pair_is_that_of_its_best_window(trained, tmp_path, capsys):
    output = tmp_path / "output"
    assert dual(trained, output, *WINDOWS) == 0 and cross(trained, output) == 0
    plain = (output / "res.rerank10").read_bytes()
    capsys.readouterr()
    assert cross(trained, output, *WINDOWS) == 0
    assert "passage_windows: missing -> 3" in capsys.readouterr().out
    assert (output / "res.rerank10").read_bytes() != plain
    reranker = Reranker.load(output, precision="fp32", threads=1)
    scorer = reranker.own_scorer
    assert scorer.rules.windows == 3
    collection = Retriever.load(output, precision="fp32", threads=1).collection
    for query, rows in rows_of(output / "res.rerank10").items():
        for row, score in rows:
            table = tokenize_pair_windows(scorer.tokenizer, [query], [collection[row]], scorer.rules)
            alone = [scorer.score(table.slice(at, at + 1))[0] for at in range(len(table))]
            assert score == pytest.approx(max(alone), abs=1e-4)
    assert cross(trained, output, *WINDOWS) == 0 and "up to date" in capsys.readouterr().out
    assert cross(trained, output, *WINDOWS, "--plan") == 0
    assert "60 pairs in" in capsys.readouterr().out


@pytest.mark.parametrize("run", [dual, cross])
def test_a_stride_needs_windows_and_leaves_tokens(trained, tmp_path, run, capsys):
    assert run(trained, tmp_path, "--window_stride", "8") == 2
    assert "--passage_windows" in capsys.readouterr().err


def test_a_stride_as_long_as_the_window_is_refused(trained, tmp_path, capsys):
    assert dual(trained, tmp_path, "--passage_windows", "2", "--window_stride", "38") == 2
    assert "--window_stride 38: must be below 38" in capsys.readouterr().err
    with pytest.raises(UserError, match="below"):
        Reranker.load(trained / "model", passage_windows=2, window_stride=500, max_seq_len=64)
