"""The HTTP service: formats, pairing of answers, limits, and what it refuses."""

import asyncio
import base64
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from toy_world import lines

from script import serve
from script.lib.serve import app, guard
from torch_src.tools.batching import Call
from torch_src.tools.demo_hparams import search_settings
from torch_src.tools.search_service import SearchService
from torch_src.tools.serve_hparams import ServeHparams

ADDRESS = "http://127.0.0.1:8000"
JSON = {"Content-Type": "application/json"}
TEXTS = ["银杏生长较慢", "火星有两颗卫星", "蒸鱼要先去腥", "鱼"]


@pytest.fixture(scope="module")
def given(trained, tiny_encoder) -> dict:
    return {
        "output_dir": str(trained / "output"), "reranker": str(tiny_encoder), "threads": 1,
        "precision": "fp32", "max_texts": 8, "max_chars": 100, "topk": 12,
    }  # fmt: skip


@pytest.fixture(scope="module")
def service(given) -> SearchService:
    service = SearchService(given, ServeHparams)
    service.refresh()
    return service


def client_of(service: SearchService, given: dict, key: str = "", **more) -> TestClient:
    hp = search_settings(ServeHparams, {**given, **more})
    built = app.build_app(service, hp, key)
    return TestClient(built, base_url=ADDRESS, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(service, given):
    with client_of(service, given) as client:
        yield client


def queries(trained: Path) -> list[str]:
    return [line.split("\t")[0] for line in lines(trained / "data/dev/dev.q.format")]


def error_of(reply) -> str:
    """Return the reason of a refused request; it is one line in OpenAI's format."""
    content = reply.json()["error"]
    assert content["code"] == reply.status_code and "\n" not in content["message"]
    return content["message"]


def test_search(client, service, trained):
    asked = queries(trained)[:3]
    found = client.post("/search", json={"query": asked, "topk": 4, "rerank": False}).json()
    assert not found["reranked"] and [result["query"] for result in found["results"]] == asked
    for result, query in zip(found["results"], asked, strict=True):
        alone = service.answer(query, "dense", 4).hits
        assert [(hit["row"], hit["pid"], hit["text"]) for hit in result["hits"]] == [
            (hit.row, hit.pid, hit.text) for hit in alone
        ]
        assert [hit["rank"] for hit in result["hits"]] == [1, 2, 3, 4]
        assert result["hits"][0]["logit"] is None and {"encode", "search"} <= result["seconds"].keys()
    reranked = client.post("/search", json={"query": asked[0]}).json()
    assert reranked["reranked"] and len(reranked["results"][0]["hits"]) == 10
    hits = reranked["results"][0]["hits"]
    assert [hit["row"] for hit in hits] == [hit.row for hit in service.answer(asked[0], "reranked", 10).hits]
    assert all(isinstance(hit["logit"], float) and hit["ranks"]["dense"] >= 1 for hit in hits)


def test_embeddings(client, service):
    retriever = service.dense.loaded.retriever
    expected = {"query": retriever.encode_queries(TEXTS), "passage": retriever.encode_passages(TEXTS)}
    for side, more in (
        ("passage", {"model": "retriever"}), ("query", {"model": "retriever-query"}),
        ("query", {"model": "retriever", "input_type": "query"}), ("passage", {"model": "retriever-passage"}),
    ):  # fmt: skip
        given = {"input": TEXTS, "user": "someone", **more}
        numbers = client.post("/v1/embeddings", json=given).json()
        assert np.array_equal(np.float32([e["embedding"] for e in numbers["data"]]), expected[side])
        packed = client.post("/v1/embeddings", json={**given, "encoding_format": "base64"}).json()
        vectors = [np.frombuffer(base64.b64decode(e["embedding"]), "<f4") for e in packed["data"]]
        assert np.array_equal(vectors, expected[side])
        assert [e["index"] for e in numbers["data"]] == [0, 1, 2, 3] and numbers["model"] == more["model"]
        tokens = retriever.own_encoder(side).tokenize(TEXTS).lengths.sum()
        assert numbers["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    one = client.post("/v1/embeddings", json={"input": TEXTS[0], "model": "retriever", "dimensions": 32})
    assert len(one.json()["data"]) == 1


def test_rerank(client, service):
    given = {"query": "火星有几颗卫星", "documents": [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]}
    logits = service.reranker.loaded.reranker.score(given["query"], TEXTS)
    results = client.post("/v1/rerank", json=given).json()["results"]
    assert [each["index"] for each in results] == np.argsort(-logits).tolist() and results[0]["index"] == 1
    expected = [1 / (1 + np.exp(-float(logits[each["index"]]))) for each in results]
    assert [each["relevance_score"] for each in results] == pytest.approx(expected, abs=1e-6)
    assert all("document" not in each for each in results)
    best = client.post(
        "/v1/rerank", json={**given, "top_n": 1, "return_documents": True, "model": "reranker"}
    )
    assert best.json()["results"] == [{**results[0], "document": {"text": TEXTS[1]}}]


def test_models_and_health(client, given):
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["retriever", "retriever-query", "retriever-passage", "reranker"]
    health = client.get("/health")
    assert health.status_code == 200 and health.json()["status"] == "ready"
    assert client.get("/docs").status_code == 404 and "/search" in client.get("/openapi.json").json()["paths"]
    empty = client_of(SearchService(given, ServeHparams), given)  # nothing is loaded
    assert (empty.get("/health").status_code, empty.get("/health").json()["status"]) == (503, "loading")
    for path, body in (
        ("/search", {"query": "鱼"}), ("/v1/embeddings", {"input": "鱼", "model": "retriever"}),
        ("/v1/rerank", {"query": "鱼", "documents": ["鱼"]}),
    ):  # fmt: skip
        reply = empty.post(path, json=body)
        assert reply.status_code == 503 and reply.headers["retry-after"] and "not ready" in error_of(reply)


EMBED = {"model": "retriever"}
BAD = [
    ("/search", {}, 422, "query: Field required"),
    ("/search", {"query": ""}, 422, "query: "),
    ("/search", {"query": " \t\n\0　"}, 422, "query"),
    ("/search", {"query": []}, 422, "query: List should have at least 1"),
    ("/search", {"query": ["鱼", 5]}, 422, "query.1: Input should be a valid string"),
    ("/search", {"query": "鱼", "topk": 0}, 422, "topk: "),
    ("/search", {"query": "鱼", "topk": 51}, 422, "topk: "),
    ("/search", {"query": "鱼" * 101}, 422, "query: String should have at most 100"),
    ("/search", {"query": ["鱼"] * 9}, 422, "query: List should have at most 8"),
    ("/search", '{"query": "鱼", "topk": NaN}', 422, "topk: "),
    ("/search", '{"query": "鱼", "topk": Infinity}', 422, "topk: "),
    ("/search", '{"query": "\\ud800"}', 422, "query: "),
    ("/search", "{", 422, "JSON"),
    ("/search", "[]", 422, "valid dictionary"),
    ("/search", "[" * 100_000, 400, "parsing the body"),
    ("/search", b'{"query": "\xff"}', 400, "parsing the body"),
    ("/v1/embeddings", {"input": "鱼", "model": "gpt"}, 404, "no such model"),
    ("/v1/embeddings", {**EMBED, "input": [3, 4]}, 422, "not token ids"),
    ("/v1/embeddings", {**EMBED, "input": [[3, 4]]}, 422, "not token ids"),
    ("/v1/embeddings", {**EMBED, "input": "鱼", "dimensions": 7}, 422, "have 32"),
    ("/v1/embeddings", {**EMBED, "input": "鱼", "encoding_format": "int8"}, 422, "encoding_format: "),
    ("/v1/rerank", {"query": "鱼", "documents": []}, 422, "documents: "),
    ("/v1/rerank", {"query": "鱼", "documents": [{"title": "鱼"}]}, 422, "documents.0: Field required"),
    ("/v1/rerank", {"query": "鱼", "documents": ["鱼"], "model": "retriever"}, 404, "no such model"),
    ("/v1/nothing", {}, 404, "Not Found"),
    ("/health", {}, 405, "Not Allowed"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "reason"), BAD)
def test_bad_requests(client, path, body, status, reason):
    content = body if isinstance(body, (str, bytes)) else json.dumps(body, ensure_ascii=False)
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    reply = client.post(path, content=content, headers=JSON)
    assert reply.status_code == status, reply.text
    assert reason in error_of(reply)


def test_odd_texts_are_answered(client):
    odd = ["\0鱼", "a\0b", "<script>", "🐟" * 50, " 鱼\n怎么蒸 ", "\u202e鱼"]
    assert client.post("/search", json={"query": odd}).status_code == 200
    assert client.post("/v1/embeddings", json={**EMBED, "input": [*odd, " "]}).status_code == 200
    assert client.post("/v1/rerank", json={"query": "\0", "documents": odd}).status_code == 200


def test_huge_bodies(client):
    large = b'{"query": "' + b"a" * guard.LARGEST_BODY + b'"}'
    assert client.post("/search", content=large, headers=JSON).status_code == 413
    pieces = (large[at : at + 65536] for at in range(0, len(large), 65536))  # its length is not stated
    reply = client.post("/search", content=pieces, headers=JSON)
    assert reply.status_code == 413 and "MiB" in error_of(reply)


def test_other_sites_and_names_are_refused(client):
    body = json.dumps({"query": "鱼"})
    for headers in (
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
        {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"},
    ):  # fmt: skip
        assert client.post("/search", content=body, headers={**JSON, **headers}).status_code == 403
    for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        assert client.post("/search", content=body, headers={**JSON, "Host": name}).status_code == 400
        assert client.get("/health", headers={"Host": name}).status_code == 400
    own = {**JSON, "Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/search", content=body, headers=own).status_code == 200


def test_a_key_is_required(service, given, capsys, monkeypatch):
    client = client_of(service, given, key="secret", host="0.0.0.0")
    for wrong in ("", "Bearer x", "Basic abc", "Bearer", "Bearer secret x"):
        reply = client.post("/search", json={"query": "鱼"}, headers={"Authorization": wrong})
        assert reply.status_code == 401 and "KEY" in error_of(reply) and reply.headers["www-authenticate"]
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").status_code == client.get("/openapi.json").status_code == 401
    good = {"Authorization": "Bearer secret"}
    assert client.get("/v1/models", headers=good).status_code == 200
    monkeypatch.delenv(serve.KEY, raising=False)
    assert serve.main(["--output_dir", given["output_dir"], "--host", "0.0.0.0"]) == 2
    assert serve.KEY in capsys.readouterr().err


class Slow:
    """A re-ranker that answers after `open` is set."""

    def __init__(self, real):
        self.real, self.hp = real, real.hp
        self.open, self.begun = threading.Event(), threading.Semaphore(0)

    def submit(self, question, passages):
        self.begun.release()
        assert self.open.wait(30)
        return self.real.submit(question, passages)


def test_overload(service, given, monkeypatch):
    slow = Slow(service.reranker.loaded)
    monkeypatch.setattr(service.reranker, "loaded", slow)
    body = {"query": "鱼", "documents": ["鱼"]}
    with client_of(service, given, max_requests=2) as client, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(client.post, "/v1/rerank", json=body) for _ in range(2)]
        assert slow.begun.acquire(timeout=30) and slow.begun.acquire(timeout=30)
        reply = client.post("/v1/rerank", json=body)
        assert reply.status_code == 503 and "2 requests" in error_of(reply)
        assert reply.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
        slow.open.set()
        assert [future.result().status_code for future in running] == [200, 200]
        assert client.post("/v1/rerank", json=body).status_code == 200


def test_a_request_that_takes_too_long(service, given, monkeypatch):
    never: Future = Future()
    monkeypatch.setattr(service.reranker.loaded, "submit", lambda question, passages: never)
    with client_of(service, given, timeout_s=0.05) as client:
        reply = client.post("/v1/rerank", json={"query": "鱼", "documents": ["鱼"]})
    assert reply.status_code == 504 and "in time" in error_of(reply)


def test_the_work_of_a_client_who_disconnects_is_dropped():
    calls: list[Call] = []
    left = asyncio.Event()

    async def inner(scope, receive, send):
        calls.append(scope["call"])
        while not scope["call"].has_left:
            await asyncio.sleep(0.001)
        left.set()

    async def run() -> None:
        messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        scope = {"type": "http", "path": "/search", "method": "GET", "headers": []}
        await guard.Guard(inner, "", 1, 60)(scope, receive, None)

    asyncio.run(run())
    assert left.is_set() and calls[0].has_left


def test_many_clients_get_their_own_answers(client, service):
    """Requests of 8 clients mixed: each answer is the one that its request gets alone."""
    words = ["鱼怎么蒸", "银杏", "火星", "卫星有几颗", "汁", "先去腥"]
    asked = [f"{one}{other}" for one in words for other in words]
    alone = {text: service.dense.loaded.retriever.encode_queries([text])[0] for text in asked}

    def check(number: int) -> None:
        text = asked[number % len(asked)]
        given = {"input": text, "model": "retriever-query"}
        vector = client.post("/v1/embeddings", json=given).json()["data"][0]["embedding"]
        assert np.allclose(vector, alone[text], atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(100)))
