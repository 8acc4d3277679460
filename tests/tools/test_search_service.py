"""The search service: results of the programs, parts that appear and change, mismatched inputs refused."""

import json
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from retrieval.test_faiss_gpu import fake_gpus
from toy_world import copy_world, lines, make_model, make_world, options, train_options, write

from torch_src import cross_infer, cross_train, dual_infer, dual_train, vector_search
from torch_src.data.formats import read_feedback
from torch_src.retrieval.bm25 import Bm25Index
from torch_src.retrieval.fusion import fuse_rankings, standardized
from torch_src.retrieval.hits import Hit
from torch_src.retrieval.vectors import DamagedBlock
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import ROOT
from torch_src.tools.demo_hparams import demo_settings
from torch_src.tools.feedback import Feedback
from torch_src.tools.search_service import LONGEST_QUESTION, SearchService, marks

ALL = {"bm25": "ready", "dense": "ready", "hybrid": "ready", "reranked": "missing"}


# ---- with a fake re-ranker


class Lengths:
    """A re-ranker whose logit is the length of the passage."""

    def __init__(self, hp):
        self.hp, self.name = hp, "lengths"

    def submit(self, question: str, passages: list[str]) -> "Future[np.ndarray]":
        return done(np.array([len(passage) / 100 for passage in passages], np.float32))


def done(result) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def service_of(world: Path, **more) -> SearchService:
    """Return a service with everything loaded that is there."""
    service = SearchService({"output_dir": str(world / "output"), "threads": 1, **more})
    service.refresh()
    return service


def states(service: SearchService) -> dict[str, str]:
    return {name: column["state"] for name, column in service.status()["columns"].items()}


@pytest.fixture(scope="module")
def searched(trained) -> SearchService:
    """A service of the trained world with a re-ranker."""
    service = service_of(trained)
    service.reranker._set(Lengths(service.hp), "ready")
    return service


def test_output_dir_is_enough(trained, searched):
    hp = searched.hp
    assert hp.data_dir == str(trained / "data") and hp.dual_params == ""
    assert states(searched) == {**ALL, "reranked": "ready"}
    query = queries(trained)[0]
    run = [line.split("\t") for line in lines(trained / "output/res.top10") if line.startswith(f"{query}\t")]
    hits = searched.answer(query, "dense", 10).hits
    assert [hit.row for hit in hits] == [int(row) for _, row, _, _ in run]
    assert [hit.score for hit in hits] == pytest.approx([float(score) for *_, score in run], abs=1e-5)


def test_a_hit_carries_its_text_and_pid(trained, searched):
    pids = json.loads((trained / "data/passage-collection/passage2id.map.json").read_text(encoding="utf-8"))
    parts = [trained / f"data/passage-collection/part-0{part}" for part in (0, 1)]
    texts = [line.split("\t")[2] for part in parts for line in lines(part)]
    hits = searched.answer("鱼", "dense", 7).hits
    assert len(hits) == 7
    assert all(hit.text == texts[hit.row] and hit.pid == pids[str(hit.row)] for hit in hits)


def test_hybrid_and_reranked_by_hand(trained, searched):
    query = queries(trained)[0]
    dense = [(hit.row, hit.score) for hit in searched.answer(query, "dense").hits]
    bm25 = Bm25Index(trained / "output/cache/bm25").search(query, 50)
    expected = fuse_rankings([dense, bm25], [1, 1])[:50]
    hits = searched.answer(query, "hybrid").hits
    assert [(hit.row, hit.score) for hit in hits] == expected
    place = {row: rank for rank, (row, _) in enumerate(bm25, start=1)}
    assert [hit.ranks.get("bm25") for hit in hits] == [place.get(hit.row) for hit in hits]
    scores = standardized(np.array([score for _, score in expected]))
    both = {
        row: 2 * score + len(searched.collection[row]) / 100
        for (row, _), score in zip(expected, scores, strict=True)
    }
    reranked = searched.answer(query, "reranked").hits
    assert [hit.row for hit in reranked] == sorted(both, key=lambda row: -both[row])
    assert [hit.score for hit in reranked] == pytest.approx([both[hit.row] for hit in reranked], abs=1e-6)
    was = {row: rank for rank, (row, _) in enumerate(expected, start=1)}
    assert all(hit.ranks == {"hybrid": was[hit.row]} for hit in reranked)
    assert all(hit.logit == pytest.approx(len(hit.text) / 100) for hit in reranked)


def test_columns_appear_when_their_files_do(trained_copy):
    output, aside = trained_copy / "output", trained_copy / "aside"
    output.rename(aside)
    service = SearchService({"output_dir": str(output), "data_dir": str(trained_copy / "data"), "threads": 1})
    service.refresh()
    assert states(service) == {**ALL, "dense": "missing", "hybrid": "missing"}
    assert "do_dual_infer.py" in service.dense.message and "do_dual_infer.py" in service.dense.zh
    assert service.answer(queries(trained_copy)[0], "bm25").hits
    with pytest.raises(UserError, match="dense is not ready"):
        service.answer("鱼", "dense")
    vectors = output / "para_emb"
    vectors.mkdir()
    shutil.copy(aside / "para_emb/manifest.json", vectors)  # do_dual_infer.py has started
    service.refresh()
    assert service.status()["columns"]["dense"] == {
        "state": "working",
        "message": "",
        "zh": "",
        "done": 0,
        "total": 1,
    }
    for path in aside.iterdir():
        if path.is_file():
            shutil.copy(path, output)
    shutil.copytree(aside / "para_emb", vectors, dirs_exist_ok=True)
    service.refresh()
    assert states(service) == ALL
    assert service.best_scores == sorted(service.best_scores) and len(service.best_scores) == 6
    version = service.status()["version"]
    service.refresh()
    assert service.status()["version"] == version  # nothing is loaded again


def test_vectors_that_are_complete_before_their_settings_are_saved(trained_copy):
    output = trained_copy / "output"
    (output / "dual_infer_hparams.json").rename(trained_copy / "saved.json")
    (output / "dual_params.bin").rename(trained_copy / "weights.bin")  # as with --dual_params none
    service = service_of(trained_copy)
    assert service.status()["columns"]["dense"] == {
        "state": "working",
        "message": "",
        "zh": "",
        "done": 1,
        "total": 1,
    }


def test_a_reranker_without_lists_to_rank(trained_copy):
    (trained_copy / "output/para_emb").rename(trained_copy / "aside")
    service = SearchService({"output_dir": str(trained_copy / "output"), "bm25": "none"})
    service.reranker._set(Lengths(service.hp), "ready")
    assert states(service)["reranked"] == "working"  # nobody has looked yet whether there are lists
    service.bm25.refresh()
    service.dense.refresh()
    assert states(service) == {"bm25": "off", "dense": "missing", "hybrid": "off", "reranked": "off"}


def test_an_error_of_a_part_leaves_the_others(trained_copy):
    output = trained_copy / "output"
    params = output / "dual_params.bin"
    params.write_bytes(params.read_bytes()[:-1])
    service = service_of(trained_copy)
    assert states(service) == {**ALL, "dense": "error", "hybrid": "error"}
    assert "\n" not in service.dense.message and str(output) in service.dense.message
    assert service.answer(queries(trained_copy)[0], "bm25").hits


def test_advice_never_replaces_good_vectors(trained_copy):
    saved = trained_copy / "output/dual_infer_hparams.json"
    service = service_of(trained_copy, passage_prefix="段落：")
    assert "--passage_prefix" in service.dense.message and "do_dual_infer.py" not in service.dense.message
    other = {"dual_params": "none", "pretrained_model_path": str(trained_copy / "model")}
    service = service_of(trained_copy, **other)
    assert service.dense.message.endswith("omit --dual_params --pretrained_model_path")
    part = trained_copy / "data/passage-collection/part-00"
    write(part, [lines(part)[0].replace("\t0", "改\t0"), *lines(part)[1:]])
    service = service_of(trained_copy)
    assert "(collection: " in service.dense.message  # the same command brings them up to date
    assert f" do_dual_infer.py --output_dir {trained_copy}/output" in service.dense.message
    saved.unlink()
    service = service_of(trained_copy, data_dir=str(trained_copy / "data"))
    assert "name the model and settings" in service.dense.message


def test_replaced_vectors_are_noticed(trained_copy):
    service = service_of(trained_copy)
    old = service.dense.loaded
    vectors = trained_copy / "output/para_emb"
    manifest = vectors / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(UserError, match="replaced"):
        service.answer("鱼", "dense")
    service.refresh()
    assert states(service)["dense"] == "missing" and states(service)["bm25"] == "ready"
    manifest.write_bytes(content)
    service.refresh()
    assert service.dense.loaded is not old and service.answer("鱼", "dense").hits


def test_vectors_of_other_passages_than_those_of_the_page(trained_copy):
    service = service_of(trained_copy)
    other = copy_world(trained_copy, trained_copy / "other")
    part = other / "data/passage-collection/part-00"
    write(part, [*lines(part)[1:], lines(part)[0]])
    assert dual_infer.main(options(other, trained_copy / "output")) == 0  # saves the other data folder
    service.refresh()
    assert states(service)["dense"] == "error" and "start the page again" in service.dense.message
    assert "重新启动" in service.status()["columns"]["dense"]["zh"]


def test_vectors_replaced_during_a_search(trained_copy, monkeypatch):
    service = service_of(trained_copy)

    vectors = service.dense.loaded.vectors

    def find(queries, topk):
        vectors.store.manifest_path.unlink()
        raise DamagedBlock(vectors.store.block_path(0), 0, "gone")

    monkeypatch.setattr(vectors, "_find", find)
    with pytest.raises(UserError, match="vectors were replaced"):
        service.answer("鱼", "dense")


def test_bm25_of_an_option_or_turned_off(trained, tmp_path):
    service = SearchService({"output_dir": str(trained / "output"), "bm25": "none", "cross_params": "none"})
    service.bm25.refresh()
    service.reranker.refresh()
    assert service.bm25.state == service.reranker.state == "off"
    service = SearchService({"output_dir": str(trained / "output"), "reranker": "none"})
    service.reranker.refresh()
    assert service.reranker.state == "off"
    service = SearchService({"output_dir": str(trained / "output"), "bm25": str(tmp_path / "absent")})
    service.bm25.refresh()
    assert "no BM25 index" in service.bm25.message and "bm25.py index" in service.bm25.message
    assert "bm25.py index" in service.bm25.zh


def test_without_the_engine(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "tantivy", None)
    service = SearchService({"output_dir": str(trained / "output")})
    service.bm25.refresh()
    assert service.bm25.state == "missing" and "pip install" in service.bm25.message
    assert "pip install" in service.bm25.zh


def test_saved_settings_and_options(tmp_path):
    def save(name: str, **values) -> None:
        write(tmp_path / f"{name}_hparams.json", [json.dumps(values)])

    save("dual", data_dir="trained_on")
    assert demo_settings({"output_dir": str(tmp_path)}).data_dir == "trained_on"
    save(
        "dual_infer", data_dir="d", dual_params="none", pretrained_model_path="m", normalize=True, topk=7,
        engine="milvus", search_params="ef=3", precision="bf16",
    )  # fmt: skip
    rerank = {"fuse_retriever_weight": 0.5, "data_dir": "other"}
    save("cross_infer", cross_params="none", pretrained_model_path="r", **rerank)
    hp = demo_settings({"output_dir": str(tmp_path), "pooling": "cls"})
    found = (hp.data_dir, hp.dual_params, hp.pretrained_model_path, hp.normalize, hp.pooling)
    assert found == ("d", "none", "m", True, "cls")
    assert (hp.topk, hp.search_params, hp.precision) == (50, "", "auto")
    assert (hp.reranker, hp.fuse_retriever_weight) == ("r", 0.5)
    assert demo_settings({"output_dir": str(tmp_path), "cross_params": "none"}).reranker == ""
    assert demo_settings({"output_dir": str(tmp_path), "data_dir": "e"}).data_dir == "e"


def test_saved_paths_are_those_of_the_repository(tmp_path, monkeypatch):
    for folder in ("script", "output/saved"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # a folder of the same name is another one
    saved = {"data_dir": "script/sample_data", "dual_params": "none", "pretrained_model_path": "script/x"}
    write(tmp_path / "output/saved/dual_infer_hparams.json", [json.dumps(saved)])
    (tmp_path / "script/sample_data").mkdir()
    hp = demo_settings({"output_dir": "output/saved"})
    assert Path(hp.data_dir).resolve() == ROOT / "script/sample_data"
    assert (hp.output_dir, hp.dual_params) == ("output/saved", "none")


def test_off_topic(trained, searched, monkeypatch):
    query = queries(trained)[0]
    best = searched.answer(query, "dense").hits[0].score
    monkeypatch.setattr(searched, "best_scores", [best + 0.1] * 10)
    assert searched.answer(query, "dense").off_topic and not searched.answer(query, "bm25").off_topic
    monkeypatch.setattr(searched, "best_scores", [best] * 10)
    assert not searched.answer(query, "dense").off_topic
    monkeypatch.setattr(searched, "best_scores", [])  # no dev queries
    assert not searched.answer(query, "dense").off_topic


def test_words_worth_marking(tmp_path):
    texts = ["鱼可以清蒸", "肉可以红烧", "菜可以清炒", "饭可以蒸", *[f"面可以煮{n}" for n in range(8)]]
    write(tmp_path / "data/passage-collection/part-00", [f"-\t\t{text}\t0" for text in texts])
    given = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "o"), "passage_ids": "none"}
    service = SearchService(given)
    assert service.marked_terms("鱼可以清蒸吗") == {"鱼可", "可以", "以清", "清蒸"}  # no index yet
    service.bm25.refresh()
    assert service.marked_terms("鱼可以清蒸吗") == {"鱼可", "以清", "清蒸"}
    assert service.marked_terms("鱼怎么样") == set() and service.marked_terms("鱼") == {"鱼"}


@pytest.mark.parametrize(("text", "wanted", "expected"), [
    ("先泼热油，再放酱汁", {"热油", "酱汁"}, [(2, 4), (7, 9)]), ("蒸鱼去腥", {"蒸鱼", "鱼去"}, [(0, 3)]),
    ("USB 3.0 的usb线，usbc", {"usb"}, [(0, 3), (9, 12)]),
    ("İstanbul鱼片", {"鱼片"}, [(8, 10)]), ("", {"鱼"}, []),
])  # fmt: skip
def test_marks(text, wanted, expected):
    assert marks(text, wanted) == expected


def test_odd_questions(searched):
    for empty in ("", " \t\n　"):
        with pytest.raises(UserError, match="the question is empty"):
            searched.answer(empty, "dense")
    with pytest.raises(UserError, match="10,001 characters .*10,000"):
        searched.answer("长" * (LONGEST_QUESTION + 1), "bm25")
    with pytest.raises(UserError, match="column 'x'"):
        searched.answer("鱼", "x")
    assert searched.answer("鱼怎么蒸" * 2500, "dense").cut
    assert searched.answer(" 鱼\n怎么\0蒸 \ud800", "hybrid").question == "鱼 怎么 蒸 ?"
    assert searched.answer("？！", "bm25").hits == []


def test_a_map_of_another_length(trained_copy):
    path = trained_copy / "data/passage-collection/passage2id.map.json"
    ids = json.loads(path.read_text(encoding="utf-8"))
    write(path, [json.dumps({row: pid for row, pid in ids.items() if row != "59"})])
    with pytest.raises(UserError, match="59 ids, but the collection has 60 passages"):
        SearchService({"output_dir": str(trained_copy / "output")})


def test_feedback(trained_copy):
    service = SearchService({"output_dir": str(trained_copy / "output")})
    feedback = Feedback(service)
    assert feedback.add("鱼怎么蒸", 5, True, "hybrid", 3, [7, 1]) == [5]
    assert feedback.add(" 鱼怎么蒸\n", 6, True, "bm25", 1, []) == [5, 6]
    assert feedback.add("鱼怎么蒸", 5, False, "hybrid", 3, []) == [6]
    assert Feedback(service).marked("鱼怎么蒸") == [6] and Feedback(service).marked("别的") == []
    rows = list(read_feedback(trained_copy / "output/feedback.jsonl"))
    assert [(row.query, row.hit.row, row.relevant, row.column, row.rank) for row in rows] == [
        ("鱼怎么蒸", 5, True, "hybrid", 3), ("鱼怎么蒸", 6, True, "bm25", 1),
        ("鱼怎么蒸", 5, False, "hybrid", 3),
    ]  # fmt: skip
    assert [hit.row for hit in rows[0].above] == [7, 1]
    assert rows[0].above[0].passage == service.collection[7] and rows[0].above[0].pid == service.pid(7)
    for bad in (("", 5, "bm25", 1), ("鱼", 60, "bm25", 1), ("鱼", -1, "bm25", 1), ("鱼", 5, "x", 1)):
        with pytest.raises(UserError):
            feedback.add(bad[0], bad[1], True, bad[2], bad[3], [])
    assert len(list(read_feedback(feedback.path))) == 3
    write(feedback.path, ["something else"])
    with pytest.raises(UserError, match="feedback.jsonl:1"):
        Feedback(service)


def test_marks_of_passages_that_changed_are_not_shown(trained_copy):
    given = {"output_dir": str(trained_copy / "output")}
    feedback = Feedback(SearchService(given))
    feedback.add("鱼", 0, True, "bm25", 1, [])
    feedback.add("鱼", 1, True, "bm25", 2, [])
    part = trained_copy / "data/passage-collection/part-00"
    write(part, ["-\t\t别的\t0", *lines(part)[1:]])
    assert Feedback(SearchService(given)).marked("鱼") == [1]


def test_a_mark_is_written_whole_or_not_at_all(trained_copy, monkeypatch):
    feedback = Feedback(SearchService({"output_dir": str(trained_copy / "output")}))
    feedback.add("鱼", 0, True, "bm25", 1, [])
    written = feedback.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        feedback.add("鱼", 1, True, "bm25", 2, [])
    monkeypatch.undo()
    monkeypatch.setattr("torch_src.tools.feedback.LONGEST_LINE", 100)  # a longer one could not be read again
    with pytest.raises(UserError, match="too long"):
        feedback.add("鱼", 1, True, "bm25", 2, [0])
    assert feedback.path.read_bytes() == written and feedback.marked("鱼") == [0]


# ---- with both stages trained


def train(world: Path, output: Path) -> None:
    """Both stages by the four programs."""
    assert dual_train.main(train_options(world, output)) == 0
    assert dual_infer.main(options(world, output), topk=50, bs=4) == 0
    short = ["--epoch", "1", "--batch_size", "16", "--lr", "1e-4", "--max_seq_len", "96"]
    model = ["--pretrained_model_path", str(world / "model")]
    assert cross_train.main([*options(world, output), *model, *short]) == 0
    assert cross_infer.main(options(world, output)) == 0


@pytest.fixture(scope="module")
def both_trained(tmp_path_factory) -> Path:
    """A world in which both stages have run; tests copy what they change."""
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world / "model", deviation=0.1)  # so that the scores of a query differ clearly
    train(world, world / "output")
    return world


@pytest.fixture
def world(both_trained, tmp_path) -> Path:
    """A copy of that world that a test may break."""
    return copy_world(both_trained, tmp_path / "world")


@pytest.fixture(scope="module")
def service(both_trained) -> SearchService:
    return service_of(both_trained, bm25="none", precision="fp32")  # as the programs; auto may be bf16


def queries(world: Path) -> list[str]:
    return [line.split("\t")[0] for line in lines(world / "data/dev/dev.q.format")]


def same_ranking(hits: list[Hit], run: Path, query: str) -> None:
    """Assert that the hits are the run's rows of the query; scores equal up to rounding may swap."""
    expected = [line.split("\t") for line in lines(run) if line.startswith(f"{query}\t")]
    rows, scores = [int(row) for _, row, _, _ in expected], np.array([float(s) for *_, s in expected])
    assert [hit.rank for hit in hits] == list(range(1, len(expected) + 1))
    assert np.allclose([hit.score for hit in hits], scores, atol=1e-5)
    place = {row: at for at, row in enumerate(rows)}
    assert {hit.row for hit in hits} == set(rows)
    moved = [scores[place[hit.row]] - scores[at] for at, hit in enumerate(hits)]
    assert np.abs(moved).max() < 1e-5


def untouched(folder: Path) -> dict[str, tuple]:
    """Bytes and times of every file but caches."""
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def refused(world: Path, *words: str, **more) -> None:
    """Assert that the retriever fails with one line that has all `words`, and that nothing is written."""
    before = untouched(world / "output")
    service = service_of(world, bm25="none", **more)
    assert states(service)["dense"] == "error" and "\n" not in service.dense.message
    for word in words:
        assert word in service.dense.message
    assert untouched(world / "output") == before


@pytest.mark.slow
def test_both_rankings_are_those_of_the_programs(both_trained, service):
    before = untouched(both_trained / "output")
    for query in queries(both_trained):
        dense, reranked = (service.answer(query, column) for column in ("dense", "reranked"))
        same_ranking(dense.hits, both_trained / "output/res.top50", query)
        same_ranking(reranked.hits, both_trained / "output/res.rerank50", query)
        assert not reranked.warning  # the scores differ clearly
        was = {hit.row: hit.rank for hit in dense.hits}
        assert all(hit.ranks == {"dense": was[hit.row]} for hit in reranked.hits)
    assert list(reranked.seconds) == ["encode", "search", "re-rank", "read"]
    assert untouched(both_trained / "output") == before


@pytest.mark.slow
def test_a_reranker_appears_and_disappears(world):
    params = world / "output/cross_params.bin"
    params.rename(world / "aside.bin")
    service = service_of(world)
    assert states(service) == ALL
    assert "--reranker" in service.reranker.message
    (world / "aside.bin").rename(params)
    service.refresh()
    assert states(service) == {**ALL, "reranked": "ready"} and service.answer("鱼", "reranked").hits


@pytest.mark.slow
def test_a_folder_as_reranker(world):
    """One folder serves both stages, without training."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(world / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(world / "model")
    model = ["--dual_params", "none", "--pretrained_model_path", str(world / "model")]
    assert dual_infer.main([*options(world, world / "zero"), *model], topk=50) == 0
    given = {"output_dir": str(world / "zero"), "threads": 1, "reranker": str(world / "model")}
    service = SearchService(given)
    service.refresh()
    assert states(service) == {**ALL, "reranked": "ready"} and service.reranker_weight == 2
    saved = [*options(world, world / "zero"), "--cross_params", "none", *model[2:], "--max_seq_len", "99"]
    assert cross_infer.main(saved) == 0
    more = {"threads": 1, "bm25": "none", "precision": "fp32"}
    service = SearchService({"output_dir": str(world / "zero"), **more})
    service.refresh()
    query = queries(world)[0]
    same_ranking(service.answer(query, "reranked").hits, world / "zero/res.rerank50", query)


@pytest.mark.slow
def test_vectors_in_memory_and_on_disk_give_the_same(both_trained, service):
    on_disk = service_of(both_trained, bm25="none", search_memory_gb=0.0)
    assert "read from disk" in on_disk.dense.loaded.vectors.how
    assert on_disk.answer("怎么做鱼", "dense").hits == service.answer("怎么做鱼", "dense").hits


@pytest.mark.slow
def test_an_existing_index_is_used(world, monkeypatch):
    refused(world, "para.index: no finished index", "do_dual_infer.py --index 'Flat'", index="Flat")
    assert dual_infer.main([*options(world, world / "output"), "--index", "Flat", "--force"], topk=50) == 0
    before = untouched(world / "output")
    exact, index = service_of(world, index=""), service_of(world)  # the saved index
    monkeypatch.setattr(vector_search, "index_gpus", lambda devices: fake_gpus())
    on_gpus = service_of(world, index="Flat")
    assert "Flat" in index.dense.loaded.vectors.how and "exact" in exact.dense.loaded.vectors.how
    for query in queries(world):
        hits = [each.answer(query, "dense").hits for each in (exact, index, on_gpus)]
        assert hits[0] == hits[1] == hits[2]
    assert untouched(world / "output") == before
    refused(world, "factory: Flat -> HNSW32", index="HNSW32")


@pytest.mark.slow
@pytest.mark.parametrize("way", [{"search_memory_gb": 0.0}, {"index": "Flat"}, {}])
def test_vectors_rebuilt_while_the_page_is_open(world, way):
    again = [*options(world, world / "output"), "--index", "Flat", "--force"]
    assert dual_infer.main(again, topk=50) == 0
    service = service_of(world, **{"index": "", **way})
    found = service.answer("鱼", "dense").hits
    assert dual_infer.main(again, topk=50) == 0  # of the same weights: the same vectors
    assert service.answer("鱼", "dense").hits == found
    other = ["--dual_params", "none", "--pretrained_model_path", str(world / "model")]
    assert dual_infer.main([*options(world, world / "output"), *other], topk=50) == 0
    with pytest.raises(UserError, match="para_emb.*replaced"):
        service.answer("鱼怎么蒸", "dense")
    if "index" not in way:
        service.refresh()
        query = queries(world)[0]
        same_ranking(service.answer(query, "dense").hits, world / "output/res.top50", query)


@pytest.mark.slow
def test_a_zero_shot_run(world):
    model = ["--dual_params", "none", "--pretrained_model_path", str(world / "model")]
    way = ["--pooling", "mean", "--normalize", "--query_prefix", "问：", "--vector_dims", "16"]
    assert dual_infer.main([*options(world, world / "zero"), *model, *way], topk=50) == 0
    service = SearchService({"output_dir": str(world / "zero"), "threads": 1})
    service.refresh()
    assert states(service) == ALL | {"reranked": "ready"}  # by the head in the same folder
    for query in queries(world):
        same_ranking(service.answer(query, "dense").hits, world / "zero/res.top50", query)


@pytest.mark.slow
def test_vectors_of_another_precision_are_accepted(world):
    other = [*options(world, world / "output"), "--precision", "bf16", "--force"]
    assert dual_infer.main(other, topk=50) == 0
    same = service_of(world)
    assert same.dense.loaded.retriever.precision == "bf16"
    query = queries(world)[0]
    same_ranking(same.answer(query, "dense").hits, world / "output/res.top50", query)
    assert service_of(world, precision="fp32").answer("鱼", "dense").hits


@pytest.mark.slow
def test_concurrent_questions(both_trained):
    service, again = service_of(both_trained), service_of(both_trained)
    asked = [(query, column) for query in queries(both_trained) for column in ("reranked", "hybrid", "dense")]
    alone = [service.answer(*each).hits for each in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda each: again.answer(*each).hits, asked * 2))
    for one, other in zip(together, alone * 2, strict=True):  # a batch rounds differently
        scores = [dict((hit.row, hit.score) for hit in hits) for hits in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.slow
def test_a_reranker_with_constant_scores_is_reported(both_trained, monkeypatch):
    service = service_of(both_trained, bm25="none")
    ones = lambda question, passages: done(np.ones(len(passages), np.float32))  # noqa: E731
    monkeypatch.setattr(service.reranker.loaded, "submit", ones)
    answer = service.answer("鱼", "reranked")
    assert [hit.row for hit in answer.hits] == [hit.row for hit in service.answer("鱼", "dense").hits]
    assert answer.warning


@pytest.mark.slow
def test_unfinished_and_damaged_vectors(world):
    block = world / "output/para_emb/block-00000.npy"
    whole = block.read_bytes()
    block.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(world, "checksum mismatch")
    block.unlink()
    service = service_of(world)
    assert (service.dense.state, service.dense.done, service.dense.total) == ("working", 0, 1)
    write(world / "output/para_emb/manifest.json", ["{}"])
    refused(world, "manifest.json: not a manifest of vectors")


@pytest.mark.slow
def test_vectors_of_other_weights(world):
    assert dual_train.main([*train_options(world, world / "other"), "--seed", "7"]) == 0
    other = str(world / "other/dual_params.bin")
    refused(world, "vectors of other weights", "weights: ", "omit --dual_params", dual_params=other)
    refused(world, "--pooling 'mean'", "was trained with 'cls'", pooling="mean")
