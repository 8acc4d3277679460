"""The Python API: `from torch_src import Retriever, Reranker`."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from doc_commands import FENCE
from toy_world import ROOT, lines

from torch_src import Reranker, Retriever
from torch_src.runtime.errors import UserError

PAGE = ROOT / "docs/service_and_api.md"
TEXTS = ["银杏生长较慢，从栽种到结果要二十多年。", "火星有两颗卫星，都很小。", "蒸鱼要先用姜片去腥。"]


@pytest.fixture(scope="module")
def retriever(tiny_encoder) -> Retriever:
    retriever = Retriever.load(tiny_encoder, precision="fp32")
    retriever.index(TEXTS)
    return retriever


@pytest.fixture(scope="module")
def reranker(tiny_encoder) -> Reranker:
    return Reranker.load(tiny_encoder, precision="fp32")


@pytest.fixture(scope="module")
def from_output(trained) -> Retriever:
    return Retriever.load(trained / "output", precision="fp32")


def test_importing_changes_nothing():
    code = (
        "import sys, signal, threading; before = sys.excepthook, signal.getsignal(signal.SIGINT)\n"
        "import torch_src\n"
        "assert before == (sys.excepthook, signal.getsignal(signal.SIGINT)), 'handlers'\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(ImportError):
        from torch_src import Nothing  # noqa: F401


def test_the_example_of_the_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = [body for kind, body in FENCE.findall(PAGE.read_text(encoding="utf-8")) if kind == "python"]
    exec(code, {})
    printed = capsys.readouterr()
    assert re.match(r"1 0 -?[\d.]+ 银杏", printed.out) and printed.out.count("\n") == 2
    assert printed.err == ""


def test_passages_in_memory(retriever):
    assert [hit.row for hit in retriever.search("银杏多少年才结果")][0] == 0
    both = retriever.search(["银杏多少年才结果", "火星有几颗卫星"], topk=2)
    assert [hits[0].text for hits in both] == TEXTS[:2]
    assert [[hit.rank for hit in hits] for hits in both] == [[1, 2], [1, 2]]
    queries, passages = retriever.encode_queries(["火星"]), retriever.encode_passages(TEXTS)
    assert queries.dtype == passages.dtype == np.float32 and passages.shape == (3, queries.shape[1])
    expected = (passages.astype(np.float16).astype(np.float64) @ queries[0].astype(np.float64)).tolist()
    hits = retriever.search("火星")
    assert {hit.row: pytest.approx(hit.score, abs=1e-6) for hit in hits} == dict(enumerate(expected))
    assert retriever.encode_queries([]).shape == (0, queries.shape[1])


def test_an_output_folder_searches_as_the_program(trained, from_output):
    run = [line.split("\t") for line in lines(trained / "output/res.top10")]
    query = run[0][0]
    hits = from_output.search(query, topk=10)
    assert [hit.row for hit in hits] == [int(row) for name, row, *_ in run if name == query]
    assert hits[0].pid and hits[0].text == from_output.collection[hits[0].row]
    saved = np.load(trained / "output/query.emb.npy")
    assert np.allclose(from_output.encode_queries([query])[0], saved[0], atol=1e-6)
    first = np.load(trained / "output/para_emb/block-00000.npy")[:4]
    assert np.allclose(from_output.encode_passages(from_output.collection[0:4]), first, atol=1e-3)


def test_vectors_of_other_passages_are_refused(trained_copy):
    part = trained_copy / "data/passage-collection/part-00"
    part.write_text(part.read_text(encoding="utf-8").replace("\t0\n", "改\t0\n", 1), encoding="utf-8")
    with pytest.raises(UserError, match="other weights, settings or passages .*run do_dual_infer.py again"):
        Retriever.load(trained_copy / "output")
    shutil.rmtree(trained_copy / "output/para_emb")
    only_model = Retriever.load(trained_copy / "output")
    assert len(only_model.encode_queries(["鱼"])) == 1
    with pytest.raises(UserError, match="no vectors in .*para_emb; run do_dual_infer.py"):
        only_model.search("鱼")


def test_reranking(retriever, reranker):
    query = "火星有几颗卫星"
    logits = reranker.score(query, TEXTS)
    assert logits.dtype == np.float32 and logits.argmax() == 1
    hits = reranker.rerank(query, TEXTS)
    assert [hit.row for hit in hits] == np.argsort(-logits, kind="stable").tolist()
    assert [hit.rank for hit in hits] == [1, 2, 3] and hits[0].score == hits[0].logit
    found = retriever.search(query)
    scores = np.array([hit.score for hit in found])
    expected = (
        reranker.score(query, [hit.text for hit in found]) + 3 * (scores - scores.mean()) / scores.std()
    )
    mixed = reranker.rerank(query, found, topk=2, retriever_weight=3)
    assert [hit.score for hit in mixed] == pytest.approx(sorted(expected, reverse=True)[:2], abs=1e-5)
    assert reranker.rerank(query, []) == []


def test_several_threads(retriever, reranker):
    asked = [f"{text[:n]}吗" for text in TEXTS for n in (2, 4, 6)]
    alone = [reranker.rerank(query, retriever.search(query)) for query in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda query: reranker.rerank(query, retriever.search(query)), asked))
    assert together == alone


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, _: r.search("鱼", topk=0), "topk 0"),
        (lambda r, _: r.encode_queries("鱼"), "queries: expected a list of texts"),
        (lambda r, _: r.encode_passages(["鱼", None]), r"passages\[1\]: expected a text, not NoneType"),
        (lambda r, _: r.search("\ud800"), "not valid Unicode"),
        (lambda r, _: r.index([]), "no passages"),
        (lambda _, x: x.rerank("鱼", ["a"], topk=-1), "topk -1"),
        (lambda _, x: x.score("鱼", "a"), "passages: expected a list"),
        (lambda *_: Retriever.load("docs"), "docs: no model in this folder"),
        (lambda *_: Reranker.load(ROOT / "docs"), "no model in this folder"),
        (lambda *_: Retriever.load(ROOT / "script/sample_data/tiny_encoder", precision="x"), "--precision x"),
        (lambda *_: Retriever.load(ROOT / "script/sample_data/tiny_encoder", device="tpu"), "--device tpu"),
    ],
)
def test_mistakes_are_one_line(retriever, reranker, call, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message) as caught:
        call(retriever, reranker)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_model_without_passages(tiny_encoder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no passages; call index\(passages\)"):
        Retriever.load(tiny_encoder).search("鱼")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="output: no such folder"):
        Retriever.load()
