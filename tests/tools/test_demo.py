"""The search page: same results as the programs, mismatched inputs refused, no other host contacted."""

import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from retrieval.test_faiss_gpu import fake_gpus
from toy_world import ROOT, lines, make_world, options, train_options, write

from script import demo
from torch_src import cross_infer, cross_train, dual_infer, dual_train
from torch_src.retrieval.vectors import DamagedBlock
from torch_src.runtime.errors import UserError
from torch_src.tools import search_service
from torch_src.tools.demo_hparams import DemoHparams
from torch_src.tools.search_service import LONGEST_QUESTION, Hit, SearchService

NASTY = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">鱼 & 酱汁 <b>粗</b>'
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
)


def train(world: Path, output: Path) -> None:
    """Both stages by the four programs."""
    assert dual_train.main(train_options(world, output)) == 0
    assert dual_infer.main(options(world, output), topk=50, bs=4) == 0
    short = ["--epoch", "1", "--batch_size", "16", "--lr", "1e-4", "--max_seq_len", "96"]
    model = ["--pretrained_model_path", str(world / "model")]
    assert cross_train.main([*options(world, output), *model, *short]) == 0
    assert cross_infer.main(options(world, output)) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A world in which both stages have run; tests copy what they change."""
    world = make_world(tmp_path_factory.mktemp("world"))
    config = json.loads((world / "model/config.json").read_text(encoding="utf-8"))
    write(world / "model/config.json", [json.dumps(config | {"initializer_range": 0.1})])
    part = world / "data/passage-collection/part-00"
    write(part, [f"-\t\t{NASTY}\t0", *lines(part)[1:]])
    train(world, world / "output")
    return world


@pytest.fixture
def world(trained, tmp_path) -> Path:
    """A copy of that world that a test may break."""
    shutil.copytree(trained, tmp_path / "world")
    return tmp_path / "world"


def settings(world: Path, **more) -> DemoHparams:
    plain = DemoHparams(data_dir=str(world / "data"), output_dir=str(world / "output"), threads=1)
    return replace(plain, **more)


@pytest.fixture(scope="module")
def service(trained) -> SearchService:
    return SearchService(settings(trained))


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
    """Assert that the service raises a UserError of one line with all `words`, and writes nothing."""
    before = untouched(world / "output")
    with pytest.raises(UserError) as error:
        SearchService(settings(world, **more)).answer("鱼")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert untouched(world / "output") == before


# ---- the engine


@pytest.mark.slow
def test_both_rankings_are_those_of_the_programs(trained, service):
    before = untouched(trained / "output")
    for query in queries(trained):
        answer = service.answer(query)
        same_ranking(answer.recall, trained / "output/res.top50", query)
        same_ranking(answer.reranked, trained / "output/res.rerank50", query)
        assert answer.warning is None  # the scores differ clearly
        was = {hit.row: hit.rank for hit in answer.recall}
        assert all(hit.recall_rank == was[hit.row] for hit in answer.reranked)
    assert list(answer.seconds) == ["encode", "search", "read", "re-rank"]
    assert untouched(trained / "output") == before


def test_a_hit_carries_its_text_and_pid(trained, service):
    pids = json.loads((trained / "data/passage-collection/passage2id.map.json").read_text(encoding="utf-8"))
    parts = [trained / f"data/passage-collection/part-0{part}" for part in (0, 1)]
    texts = [line.split("\t")[2] for part in parts for line in lines(part)]
    hits = service.answer("鱼", topk=7).recall
    assert len(hits) == 7
    assert all(hit.text == texts[hit.row] and hit.pid == pids[str(hit.row)] for hit in hits)
    without = SearchService(settings(trained, passage_ids="none", cross_params="none"))
    assert {hit.pid for hit in without.answer("鱼").recall} == {""}


@pytest.mark.slow
def test_without_a_reranker_only_recall_is_shown(world):
    (world / "output/cross_params.bin").unlink()
    service = SearchService(settings(world))
    answer = service.answer("鱼")
    assert service.scorer is None and answer.reranked is None and "re-rank" not in answer.seconds
    refused(world, "cross_params.bin: no such file", cross_params=str(world / "output/cross_params.bin"))


@pytest.mark.slow
def test_vectors_in_memory_and_on_disk_give_the_same(trained, service):
    on_disk = SearchService(settings(trained, search_memory_gb=0.0))
    assert "read from disk" in on_disk.how and "kept in memory" in service.how
    assert on_disk.answer("怎么做鱼").recall == service.answer("怎么做鱼").recall


@pytest.mark.slow
def test_an_existing_index_is_used(world, monkeypatch):
    refused(world, "para.index: no finished index", "do_dual_infer.py --index 'Flat'", index="Flat")
    assert dual_infer.main([*options(world, world / "output"), "--index", "Flat", "--force"], topk=50) == 0
    before = untouched(world / "output")
    exact, index = SearchService(settings(world)), SearchService(settings(world, index="Flat"))
    monkeypatch.setattr(search_service, "index_gpus", lambda devices: fake_gpus())
    on_gpus = SearchService(settings(world, index="Flat"))
    for query in queries(world):
        assert index.answer(query).recall == exact.answer(query).recall == on_gpus.answer(query).recall
    assert untouched(world / "output") == before
    refused(world, "factory: Flat -> HNSW32", index="HNSW32")


@pytest.mark.slow
@pytest.mark.parametrize("way", [{"search_memory_gb": 0.0}, {"index": "Flat"}, {}])
def test_vectors_rebuilt_while_the_page_is_open(world, way):
    again = [*options(world, world / "output"), "--index", "Flat", "--force"]
    assert dual_infer.main(again, topk=50) == 0
    service = SearchService(settings(world, **way))
    found = service.answer("鱼").recall
    assert dual_infer.main(again, topk=50) == 0  # of the same weights: the same vectors
    assert service.answer("鱼").recall == found
    other = ["--dual_params", "none", "--pretrained_model_path", str(world / "model")]
    assert dual_infer.main([*options(world, world / "output"), *other], topk=50) == 0
    with pytest.raises(UserError, match="para_emb.*restart it"):
        service.answer("鱼")
    assert "restart it" in list(demo.respond(service, "鱼"))[-1]


def test_vectors_rebuilt_during_a_search(world, monkeypatch):
    service = SearchService(settings(world))

    def find(queries, topk):
        service.store.manifest_path.unlink()
        raise DamagedBlock(service.store.block_path(0), 0, "gone")

    monkeypatch.setattr(service, "find", find)
    with pytest.raises(UserError, match="vectors were replaced.*restart it"):
        service.answer("鱼")


@pytest.mark.slow
def test_a_zero_shot_run(world):
    model = ["--dual_params", "none", "--pretrained_model_path", str(world / "model")]
    way = ["--pooling", "mean", "--normalize", "--query_prefix", "问：", "--vector_dims", "16"]
    assert dual_infer.main([*options(world, world / "zero"), *model, *way], topk=50) == 0
    same = {
        "dual_params": "none", "pretrained_model_path": str(world / "model"), "pooling": "mean",
        "normalize": True, "query_prefix": "问：", "output_dir": str(world / "zero"),
    }  # fmt: skip
    service = SearchService(settings(world, **same))
    assert service.scorer is None
    for query in queries(world):
        same_ranking(service.answer(query).recall, world / "zero/res.top50", query)
    refused(world, "pooling: mean -> cls", **{**same, "pooling": "cls"})


@pytest.mark.slow
def test_vectors_of_another_precision_are_accepted(world):
    assert (
        dual_infer.main([*options(world, world / "output"), "--precision", "bf16", "--force"], topk=50) == 0
    )
    same = SearchService(settings(world))
    assert same.retriever.precision == "bf16"
    same_ranking(same.answer(queries(world)[0]).recall, world / "output/res.top50", queries(world)[0])
    assert SearchService(settings(world, precision="fp32")).answer("鱼").recall


@pytest.mark.slow
def test_concurrent_questions(service, trained):
    asked = queries(trained) * 3
    alone = [service.answer(query) for query in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(service.answer, asked))
    assert [a.recall for a in together] == [a.recall for a in alone]
    assert [a.reranked for a in together] == [a.reranked for a in alone]


@pytest.mark.slow
def test_odd_questions(service):
    for empty in ("", " \t\n　"):
        with pytest.raises(UserError, match="the question is empty"):
            service.answer(empty)
    with pytest.raises(UserError, match="10,001 characters .*10,000"):
        service.answer("长" * (LONGEST_QUESTION + 1))
    long = service.answer("鱼怎么蒸" * 2500)
    assert long.cut and len(long.recall) == len(long.reranked) == 50
    assert not service.answer(" 鱼\n怎么\0蒸 \ud800").cut


# ---- refusals


def test_missing_weights(world):
    (world / "output/dual_params.bin").unlink()
    refused(world, "dual_params.bin: no such file", "run do_dual_train.py first")


def test_missing_vectors_name_the_command(world):
    shutil.rmtree(world / "output/para_emb")
    options = [f"--data_dir {world}/data", f"--output_dir {world}/output", "--threads 1"]
    refused(world, "para_emb/manifest.json: ", "run python do_dual_infer.py --", *options)


@pytest.mark.slow
def test_unfinished_and_damaged_vectors(world):
    block = world / "output/para_emb/block-00000.npy"
    whole = block.read_bytes()
    block.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(world, "checksum mismatch")
    block.unlink()
    refused(world, "1 of 1 blocks are missing or incomplete; run python do_dual_infer.py")
    write(world / "output/para_emb/manifest.json", ["{}"])
    refused(world, "vectors of other weights, settings or passages", "rows: missing -> 60")


@pytest.mark.slow
def test_vectors_of_other_weights_or_passages(world):
    assert dual_train.main([*train_options(world, world / "other"), "--seed", "7"]) == 0
    other = str(world / "other/dual_params.bin")
    refused(world, "vectors of other weights", "weights: ", f"--dual_params {other}", dual_params=other)
    refused(world, "--pooling 'mean'", "was trained with 'cls'", pooling="mean")
    part = world / "data/passage-collection/part-00"
    write(part, [lines(part)[0].replace("\t0", "改\t0"), *lines(part)[1:]])
    refused(world, "vectors of other weights, settings or passages (collection: ")


def test_a_map_of_another_length(world):
    path = world / "data/passage-collection/passage2id.map.json"
    ids = json.loads(path.read_text(encoding="utf-8"))
    write(path, [json.dumps({row: pid for row, pid in ids.items() if row != "59"})])
    refused(world, "59 ids, but the collection has 60 passages")


def program_refused(capsys, status: int, *words: str) -> None:
    error = capsys.readouterr().err
    assert status == 2 and " ERROR " in error and error.count("\n") == 1
    for word in words:
        assert word in error


def test_missing_inputs_of_the_program(world, capsys, monkeypatch):
    given = ["--data_dir", str(world / "data"), "--output_dir", str(world / "output"), "--port"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(demo, "load_gradio", lambda: None)
        program_refused(capsys, demo.main([*given, port]), f"--port {port}", "pass another --port")
    (world / "output/dual_params.bin").unlink()
    program_refused(capsys, demo.main([*given, "0"]), "run do_dual_train.py first")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gradio", None)
    program_refused(capsys, demo.main([*given, "0"]), "gradio is not installed", "requirements-demo.txt")


# ---- what is shown


@pytest.mark.parametrize(("text", "question", "expected"), [
    ("先泼热油，再放酱汁", "热油和酱汁", "先泼<mark>热油</mark>，再放<mark>酱汁</mark>"),
    ("蒸鱼去腥", "清蒸鱼去", "<mark>蒸鱼去</mark>腥"),
    ("USB 3.0 的usb线，usbc", "Usb", "<mark>USB</mark> 3.0 的<mark>usb</mark>线，usbc"),
    ("鱼与熊掌", "鱼", "<mark>鱼</mark>与熊掌"), ("İstanbul鱼片", "鱼片", "İstanbul<mark>鱼片</mark>"),
    ("a<b & 热油>", "热油", "a&lt;b &amp; <mark>热油</mark>&gt;"), ("", "鱼", ""), ("无关", "热油", "无关"),
])  # fmt: skip
def test_marked(text, question, expected):
    assert demo.marked(text, set(demo.terms(question))) == expected


@pytest.mark.slow
def test_passages_are_escaped_and_cut(service):
    page = demo.answer_html(service.answer("鱼 <b>", topk=60))
    assert "&lt;script&gt;window.hacked" in page and "</mark> &amp; " in page
    assert not re.search(r"<(script|img|b>粗)", page)
    long = demo.passage(Hit(1, 5, '"<pid>', 0.5, "长" * 5000, 1), set(), False)
    assert "(3,000 more characters)" in long and "&quot;&lt;pid&gt;" in long and "<pid>" not in long


@pytest.mark.slow
def test_recall_is_shown_before_the_reranker_is_done(service):
    first, last = demo.respond(service, "鱼")
    assert first.count("<li>") == 50 and "scoring" in first
    assert last.count("<li>") == 100 and "scoring" not in last and "was " in last
    assert list(demo.respond(service, " ")) == ['<div class="search-error">the question is empty</div>']


@pytest.mark.slow
def test_a_reranker_with_constant_scores_is_reported(trained, monkeypatch):
    service = SearchService(settings(trained))
    monkeypatch.setattr(service.scorer, "score_all", lambda candidates: np.ones(len(candidates), np.float32))
    answer = service.answer("鱼")
    assert [hit.row for hit in answer.reranked] == [hit.row for hit in answer.recall]
    assert answer.warning and html.escape(answer.warning) in demo.answer_html(answer)


# ---- the page in a browser


def test_allowed_hosts():
    assert demo.allowed_hosts("127.0.0.1") == ["127.0.0.1", "localhost", "[::1]"]
    assert demo.allowed_hosts("10.0.0.5") == ["10.0.0.5", "127.0.0.1", "localhost", "[::1]"]
    assert demo.allowed_hosts("0.0.0.0") == demo.allowed_hosts("::") == ["*"]


@pytest.mark.browser
def test_only_the_names_of_this_machine_are_served():
    import gradio
    from starlette.testclient import TestClient

    with gradio.Blocks(analytics_enabled=False) as page:
        gradio.Markdown("here")
    client = TestClient(demo.build_app(page, "127.0.0.1"), base_url="http://127.0.0.1:7860")
    foreign = {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"}
    for path in ("/", "/config", "/gradio_api/info"):
        refused = client.get(path, headers=foreign)
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    for name in ("127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST"):
        assert client.get("/config", headers={"Host": name}).status_code == 200


# Python imports this module at its start: it logs every host that the program contacts or looks up.
WATCH = """
import sys
open({log!r}, "w").close()
def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        where = args[0] if event == "socket.getaddrinfo" else args[1]
        open({log!r}, "a").write(f"{{event}} {{where!r}}\\n")
sys.addaudithook(watch)
"""


@pytest.fixture
def page_at(trained, tmp_path):
    """Start the program on a free port; yield (process, address, file of the hosts it contacted)."""
    hosts = tmp_path / "hosts.txt"
    write(tmp_path / "sitecustomize.py", [WATCH.format(log=str(hosts))])
    given = ["--data_dir", str(trained / "data"), "--output_dir", str(trained / "output"), "--topk", "60"]
    # No proxy listens here: the program must not use the proxy that many machines set in the environment.
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environment = {**os.environ, **proxy, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "script/demo.py", *given, "--port", "0", "--threads", "1"]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 300
        while (found := re.search(r"open (http://\S+)", (tmp_path / "log.txt").read_text())) is None:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log.txt").read_text()
            time.sleep(0.3)
        yield process, found[1], hosts
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.browser
@pytest.mark.slow
def test_in_a_browser(chromium, page_at, trained, tmp_path):
    from playwright.sync_api import sync_playwright

    process, address, hosts = page_at
    messages, asked, query = [], [], queries(trained)[0]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS.split())
        page = browser.new_page()
        page.on("console", lambda message: messages.append((message.type, message.text)))
        page.on("pageerror", lambda error: messages.append(("error", str(error))))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        box = page.locator("#question input, #question textarea")
        box.fill(query)
        box.press("Enter")
        page.locator("#answer section").nth(1).locator("li").nth(59).wait_for(timeout=120_000)
        recall, reranked = page.locator("#answer section").all()
        shown = [text.strip() for text in recall.locator("code").all_inner_texts()]
        assert "window.hacked" in recall.inner_text() and "was " in reranked.inner_text()
        assert page.locator("mark").count() and page.locator(".search-times b").count() == 4
        assert page.evaluate("window.hacked") is None
        box.fill("")
        box.press("Enter")
        page.get_by_text("the question is empty").wait_for(timeout=60_000)
        browser.close()
    pids = json.loads((trained / "data/passage-collection/passage2id.map.json").read_text(encoding="utf-8"))
    run = [line.split("\t") for line in lines(trained / "output/res.top50")]
    assert shown[:10] == [pids[row] for text, row, *_ in run if text == query][:10]
    assert [text for kind, text in messages if kind in ("error", "warning")] == []
    assert {url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))} == set()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0
    assert re.search(r"\(Ctrl-C to stop\)\n\S+ stopped\n$", (tmp_path / "log.txt").read_text())
    assert [
        line for line in hosts.read_text().splitlines() if "127.0.0.1" not in line and "localhost" not in line
    ] == []
