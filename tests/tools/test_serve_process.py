"""The HTTP service as a process: under load, killed and started again, and used by real clients."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from threading import Semaphore

import numpy as np
import pytest
from toy_world import ROOT, lines

from torch_src import Retriever

# older versions of huggingface_hub need httpx instead
httpx = import_module("httpx2" if find_spec("httpx2") else "httpx")

CLIENTS, REQUESTS = 32, 800  # 2,000 were sent once: the rest of a longer run finds nothing else
MORE_MB = 64  # resident memory may grow by this much under load


class Service:
    """A running script/serve.py on a free port."""

    def __init__(self, output: Path, log: Path, *more: str, **env: str):
        command = [sys.executable, "script/serve.py", "--output_dir", str(output), "--port", "0", *more]
        command += ["--threads", "1", "--precision", "fp32"]
        self.log, self.file = log, open(log, "w", encoding="utf-8")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.file, stderr=self.file
        )
        self.url = self._wait(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8")))[
            0
        ]
        self._wait(lambda: httpx.get(f"{self.url}/health", timeout=60).status_code == 200)

    def _wait(self, ready):
        while not (found := ready()):
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            time.sleep(0.1)
        return found

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        self.file.close()
        return self.process.wait(60)


@pytest.fixture
def start(trained, tmp_path):
    """Return a function that starts a service; ends what still runs after the test."""
    started: list[Service] = []

    def start(name: str, **env: str) -> Service:
        more = ["--reranker", str(trained / "model")]
        started.append(Service(trained / "output", tmp_path / name, *more, **env))
        return started[-1]

    yield start
    for service in started:
        service.process.kill()


@pytest.fixture
def output(trained) -> Path:
    return trained / "output"


def ask_all(url: str, bodies: list[tuple[str, dict]]) -> list[dict]:
    """Return the answers to all requests, sent by CLIENTS clients at a time."""

    def ask(numbers: range) -> list[tuple[int, dict]]:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            found = []
            for number in numbers:
                path, body = bodies[number]
                reply = client.post(path, json=body)
                assert reply.status_code == 200, reply.text
                found.append((number, reply.json()))
            return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        parts = pool.map(ask, (range(first, len(bodies), CLIENTS) for first in range(CLIENTS)))
        answers = dict(answer for part in parts for answer in part)
    assert len(answers) == len(bodies)
    return [answers[number] for number in range(len(bodies))]


def kill_while_clients_ask(service: Service, bodies: list[tuple[str, dict]]) -> None:
    """SIGKILL after some answers; every client then gets an error of its connection, not a wrong answer."""
    answered = Semaphore(0)

    def ask_until_it_fails(client_number: int) -> None:
        with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as client:
            for path, body in cycle(bodies[client_number:]):
                assert client.post(path, json=body).status_code == 200
                answered.release()

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask_until_it_fails, number) for number in range(CLIENTS)]
        for _ in range(2 * CLIENTS):
            assert answered.acquire(timeout=120)
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
        for client in clients:
            with pytest.raises(httpx.TransportError):
                client.result()


def requests(trained: Path) -> list[tuple[str, dict]]:
    """Return REQUESTS requests of all kinds with some sixty different questions."""
    texts = [line.split("\t")[2] for line in lines(trained / "data/passage-collection/part-00")]
    bodies: list[tuple[str, dict]] = []
    for number in range(REQUESTS):
        text = texts[number % len(texts)][: 20 + number % 4]
        kind = number % 10
        if kind < 4:
            bodies.append(("/search", {"query": text, "topk": 3, "rerank": False}))
        elif kind < 9:
            bodies.append(("/v1/embeddings", {"input": [text, text[:9]], "model": "retriever-query"}))
        else:
            documents = [texts[(number + more) % len(texts)][:40] for more in range(3)]
            bodies.append(("/v1/rerank", {"query": text, "documents": documents}))
    return bodies


@pytest.mark.slow
def test_many_clients_a_kill_and_another_start(start, output, trained, tmp_path):
    service = start("first")
    bodies = requests(trained)
    ask_all(service.url, bodies[:200])  # what is allocated once
    before = service.resident_mb()
    answers = ask_all(service.url, bodies)
    assert service.resident_mb() - before < MORE_MB
    retriever = Retriever.load(output, precision="fp32", threads=1)
    encode, search = cache(retriever.encode_queries), cache(retriever.search)
    for (path, body), answer in zip(bodies, answers, strict=True):
        if path == "/v1/embeddings":
            vectors = np.float32([each["embedding"] for each in answer["data"]])
            assert np.allclose(vectors, encode(tuple(body["input"])), atol=1e-5)
        elif path == "/search":
            (result,) = answer["results"]
            expected = search(body["query"], topk=3)
            assert result["query"] == body["query"]
            scores = [hit["score"] for hit in result["hits"]]
            assert scores == pytest.approx([hit.score for hit in expected], abs=1e-5)
        else:
            assert {each["index"] for each in answer["results"]} == {0, 1, 2}
    kill_while_clients_ask(service, bodies)
    again = start("second")
    for (path, _), found, expected in zip(
        bodies[:20], ask_all(again.url, bodies[:20]), answers, strict=False
    ):
        if path == "/v1/embeddings":
            both = [[each["embedding"] for each in answer["data"]] for answer in (found, expected)]
            assert np.allclose(*both, atol=1e-5)
        elif path == "/search":
            pids = [[hit["pid"] for hit in answer["results"][0]["hits"]] for answer in (found, expected)]
            assert pids[0] == pids[1]
    body = b'{"query": "fish", "documents": ["fish"]}'
    with socket.create_connection(("127.0.0.1", int(again.url.rpartition(":")[2]))) as connection:
        head = "POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert b"100 Continue" in connection.recv(1000)  # the request runs
        again.process.send_signal(signal.SIGTERM)
        connection.sendall(body)
        assert b"200 OK" in connection.recv(1000)
    assert again.process.wait(60) == 0
    printed = (tmp_path / "second").read_text(encoding="utf-8")
    assert printed.rstrip().endswith("stopped") and "Traceback" not in printed


@pytest.mark.tools
@pytest.mark.slow
def test_the_openai_client_and_the_schema(start, output, tmp_path):
    import openai
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    service = start("log", SERVE_API_KEY="secret")
    retriever = Retriever.load(output, precision="fp32", threads=1)
    texts = ["鱼怎么蒸", "银杏"]
    own = {"base_url": f"{service.url}/v1", "http_client": httpx.Client(trust_env=False)}
    client = openai.OpenAI(api_key="secret", **own)
    assert next(iter(client.models.list())).id == "retriever"
    expected = retriever.encode_queries(texts)
    for name, more in (("retriever-query", {}), ("retriever", {"extra_body": {"input_type": "query"}})):
        found = client.embeddings.create(model=name, input=texts, **more)  # sends and decodes base64
        numbers = client.embeddings.create(model=name, input=texts, encoding_format="float", **more)
        for each in (found, numbers):
            assert np.array_equal(np.float32([data.embedding for data in each.data]), expected)
        assert found.usage.total_tokens == retriever.own_encoder("query").tokenize(texts).lengths.sum()
    with pytest.raises(openai.AuthenticationError, match="KEY"):
        openai.OpenAI(api_key="wrong", **own).models.list()
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.embeddings.create(model="gpt", input="鱼")
    with pytest.raises(openai.UnprocessableEntityError, match="token ids"):
        client.embeddings.create(model="retriever", input=[3, 4])

    headers = {"Authorization": "Bearer secret"}
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json", headers=headers)
    few = settings(
        max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
    )
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 5

    def check(case) -> None:
        case.call_and_validate(headers=headers)

    for operation in operations:
        few(given(case=operation.as_strategy())(check))()
    assert service.end(signal.SIGINT) == 0
    printed = (tmp_path / "log").read_text(encoding="utf-8")
    assert "secret" not in printed and "Traceback" not in printed
