"""The search page: what its server answers and refuses, and the page in a browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient
from toy_world import ROOT, lines, options, write

from script import demo
from script.lib import server
from script.lib.demo import app
from torch_src import dual_infer
from torch_src.data.formats import read_feedback
from torch_src.tools.feedback import Feedback
from torch_src.tools.search_service import LONGEST_QUESTION, SearchService

NASTY = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">鱼 & 酱汁 <b>粗</b>'
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
)
ADDRESS = "http://127.0.0.1:7860"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def world(trained_copy) -> Path:
    """A trained world with a hostile passage; the index does not know it yet."""
    part = trained_copy / "data/passage-collection/part-00"
    write(part, [f"-\t\t{NASTY}\t0", *lines(part)[1:]])
    return trained_copy


@pytest.fixture
def client(world) -> TestClient:
    """The server's application, with BM25 only."""
    service = SearchService({"output_dir": str(world / "output"), "data_dir": str(world / "data")})
    service.bm25.refresh()
    return TestClient(app.build_app(service, Feedback(service), "127.0.0.1"), base_url=ADDRESS)


def test_allowed_hosts():
    assert server.allowed_hosts("127.0.0.1") == ["127.0.0.1", "localhost", "[::1]"]
    assert server.allowed_hosts("MyBox")[0] == "mybox"  # browsers send lower case
    assert server.allowed_hosts("10.0.0.5") == ["10.0.0.5", "127.0.0.1", "localhost", "[::1]"]
    assert server.allowed_hosts("0.0.0.0") == server.allowed_hosts("::") == ["*"]


def test_only_the_names_of_this_machine_are_served(client):
    foreign = {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"}
    for path in ("/", "/status", "/search?q=鱼&column=bm25"):
        refused = client.get(path, headers=foreign)
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    for name in ("127.0.0.1:7860", "localhost:7860", "[::1]:7860", "localhost"):
        assert client.get("/status", headers={"Host": name}).status_code == 200


def test_the_page_allows_only_its_own_script(client):
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'sha256-" in policy
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\son\w+=|style=|https?:", reply.text
    )


def test_both_languages_have_the_same_texts():
    script = app.PAGE.read_text(encoding="utf-8")
    english, chinese = re.findall(r"^  (?:en|zh): \{\n(.*?)^  \},", script, re.DOTALL | re.MULTILINE)
    keys = r"([\w-]+|\"[\w-]+\"): [\"{]"
    assert re.findall(keys, english) == re.findall(keys, chinese)
    values = r"\{\w+\}"
    assert sorted(re.findall(values, english)) == sorted(re.findall(values, chinese))


def test_status_and_search(client, world):
    status = client.get("/status").json()
    assert status["passages"] == 60 and status["columns"]["bm25"]["state"] == "ready"
    assert status["examples"] and status["feedback"] == str(world / "output/feedback.jsonl")
    found = client.get("/search", params={"q": " 酱汁 粗 ", "column": "bm25", "topk": 3}).json()
    (hit,) = [hit for hit in found["hits"] if hit["row"] == 0]
    assert found["question"] == "酱汁 粗" and hit["text"] == NASTY and hit["more"] == 0
    assert [NASTY[begin:end] for begin, end in hit["marks"]] == ["酱汁"]
    long = app.answer_json(
        SimpleNamespace(marked_terms=lambda question: set()),
        SimpleNamespace(question="长", hits=[SimpleNamespace(text="长" * 5000)]),
    )["hits"][0]
    assert len(long["text"]) == 2000 and long["more"] == 3000


def test_bad_requests(client):
    for query, column in (("", "bm25"), ("鱼", "dense"), ("a" * (LONGEST_QUESTION + 1), "bm25")):
        reply = client.get("/search", params={"q": query, "column": column})
        assert reply.status_code == 400 and reply.json()["error"] and reply.json()["zh"]
    assert client.get("/search", params={"q": "鱼", "column": "answer"}).status_code == 422
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_an_error_of_the_system_is_shown(client, world):
    (world / "output/feedback.jsonl").mkdir()
    given = {"query": "鱼", "row": 3, "relevant": True, "column": "bm25", "rank": 1, "above": []}
    reply = client.post("/feedback", json=given)
    assert reply.status_code == 500 and "feedback.jsonl: Is a directory" in reply.json()["error"]


def test_marking_an_answer(client, world):
    given = {"query": "鱼", "row": 3, "relevant": True, "column": "bm25", "rank": 2, "above": [1]}
    assert client.post("/feedback", json=given).json() == {"marked": [3]}
    assert client.get("/search", params={"q": "鱼", "column": "bm25"}).json()["marked"] == [3]
    assert client.post("/feedback", json={**given, "relevant": False}).json() == {"marked": []}
    written = (world / "output/feedback.jsonl").read_bytes()
    assert written.count(b"\n") == 2
    foreign = [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
        {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Length": str(1 << 21)}, {"Origin": "http://["},
    ]  # fmt: skip
    for headers in foreign:
        reply = client.post("/feedback", content=json.dumps(given), headers={**JSON, **headers})
        assert reply.status_code == 403, headers
    own = {**JSON, "Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}
    for bad in ({**given, "row": 10**6}, {**given, "rank": 0}):
        assert client.post("/feedback", content=json.dumps(bad), headers=own).status_code == 400
    assert client.post("/feedback", json={**given, "above": [0] * 1001}).status_code == 422
    assert (world / "output/feedback.jsonl").read_bytes() == written
    assert client.post("/feedback", content=json.dumps(given), headers=own).status_code == 200


def program_refused(capsys, status: int, *words: str) -> None:
    error = capsys.readouterr().err
    assert status == 2 and " ERROR " in error and error.count("\n") == 1
    for word in words:
        assert word in error


def test_missing_inputs_of_the_program(world, capsys, monkeypatch, tmp_path):
    given = ["--output_dir", str(world / "output"), "--port"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        program_refused(capsys, demo.main([*given, port]), f"--port {port}", "pass another --port")
    absent = ["--output_dir", str(tmp_path / "new"), "--data_dir", str(tmp_path / "absent"), "--port", "0"]
    program_refused(capsys, demo.main(absent), "absent: no such folder")
    write(world / "output/feedback.jsonl", ["mine"])
    program_refused(capsys, demo.main([*given, "0", "--data_dir", str(world / "data")]), "feedback.jsonl:1: ")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    program_refused(capsys, demo.main([*given, "0"]), "fastapi is not installed", "requirements-demo.txt")


# ---- the page in a browser

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
def page_at(world, tmp_path):
    """Start the program without vectors; yield (process, address, file of contacted hosts)."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    assert dual_infer.main(options(world, world / "output")) == 0  # with the hostile passage
    (world / "output/para_emb").rename(world / "aside")
    config = AutoConfig.from_pretrained(world / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(world / "model")
    hosts = tmp_path / "hosts.txt"
    write(tmp_path / "sitecustomize.py", [WATCH.format(log=str(hosts))])
    # No proxy listens here: the program must not use the proxy that many machines set in the environment.
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environment = {**os.environ, **proxy, "PYTHONPATH": str(tmp_path)}
    given = ["--output_dir", str(world / "output"), "--reranker", str(world / "model"), "--port", "0"]
    command = [sys.executable, "script/demo.py", *given, "--threads", "1"]
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
def test_in_a_browser(chromium, page_at, world, tmp_path):
    from playwright.sync_api import sync_playwright

    process, address, hosts = page_at
    messages, requests, feedback = [], [], world / "output/feedback.jsonl"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS.split())
        page = browser.new_page(locale="en-US", viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.on("console", lambda message: messages.append((message.type, message.text)))
        page.on("pageerror", lambda error: messages.append(("error", str(error))))
        page.on("request", lambda request: requests.append(request.url))

        page.goto(f"{address}/?q=粗酱汁")  # BM25 answers without vectors
        page.locator("#column-bm25 .hit").first.wait_for()
        assert "window.hacked" in page.locator("#column-bm25").inner_text()
        assert page.locator("#column-bm25 mark").count() and page.evaluate("window.hacked") is None
        assert "no vectors" in page.locator("#notes").inner_text()

        (world / "aside").rename(world / "output/para_emb")  # and the other columns appear
        page.locator("#column-hybrid .hit").nth(9).wait_for()
        page.locator("#column-reranked .hit").nth(9).wait_for()
        assert page.locator("#tabs button").all_inner_texts() == ["BM25", "Dense", "Hybrid", "Re-ranked"]
        assert "logit" in page.locator("#column-reranked .head").first.inner_text()
        page.locator("#tab-reranked").click()
        page.locator("#column-hybrid .more").click()
        assert page.locator(".column").count() == 1 and page.locator(".hit").count() == 20

        page.locator(".answer").nth(2).click()
        page.locator(".hit.marked").wait_for()
        page.locator(".hit.marked .answer").click()
        page.locator(".hit.marked").wait_for(state="detached")
        marks = list(read_feedback(feedback))
        assert [mark.relevant for mark in marks] == [True, False]
        assert (marks[0].column, marks[0].rank, len(marks[0].above)) == ("hybrid", 3, 2)

        late = []  # an answer from before the same question was asked again
        hold_first = lambda route: route.continue_() if late else late.append(route)  # noqa: E731
        page.route("**/search?*column=hybrid", hold_first)
        page.evaluate("ask(question)")
        page.wait_for_timeout(300)
        page.evaluate("ask(question)")
        page.locator("#column-hybrid .hit").first.wait_for()
        late[0].fulfill(status=200, json={"hits": [], "seconds": {}})
        page.wait_for_timeout(300)
        assert page.locator("#column-hybrid .hit").count() == 10

        page.evaluate("localStorage.setItem('language', 'of another program at this address')")
        page.reload()
        assert page.locator("h1").inner_text() == "Passage search"
        page.locator("#language").click()
        page.reload()
        page.locator("#column-hybrid .hit").first.wait_for()
        assert (
            page.locator("h1").inner_text() == "段落检索"
            and page.locator("html").get_attribute("lang") == "zh-CN"
        )
        page.locator("h1").click()
        page.keyboard.press("/")
        page.keyboard.type("怎么蒸鱼")
        page.keyboard.press("Enter")
        page.wait_for_url("**/?q=*%E6%80%8E*")
        page.go_back()
        assert page.locator("#question").input_value() == "粗酱汁"
        page.set_viewport_size({"width": 390, "height": 844})
        page.locator("#tab-bm25").click()
        page.locator("#column-bm25 .hit").first.wait_for()
        assert page.locator(".column").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        browser.close()
    assert [text for kind, text in messages if kind in ("error", "warning")] == []
    assert {url for url in requests if not url.startswith((f"{address}/", "data:"))} == set()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0
    assert re.search(r"stopped\n$", (tmp_path / "log.txt").read_text())
    assert [
        line for line in hosts.read_text().splitlines() if "127.0.0.1" not in line and "localhost" not in line
    ] == []
