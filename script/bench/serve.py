"""Requests per second of script/serve.py: 32 clients at once against one request at a time.

    sh script/quickstart.sh                       # the models and vectors that are served
    python script/bench/serve.py --runs 3

Prints medians of --runs and the service's resident memory before and after.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import signal
import subprocess
from importlib import import_module
from importlib.util import find_spec

from script.bench.common import ROOT, make_parser

# older versions of huggingface_hub need httpx instead
httpx = import_module("httpx2" if find_spec("httpx2") else "httpx")

CLIENTS, SINGLE, MANY = 32, 60, 640  # clients, and requests of a run


@contextmanager
def service() -> Iterator[tuple[str, int]]:
    """Start the service of the sample; yield (its address, its process id)."""
    words = [sys.executable, str(ROOT / "script/serve.py"), "--debug", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    url = next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
    try:
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def rate(url: str, path: str, bodies: list[dict], clients: int) -> float:
    """Return the requests per second of this many clients."""

    def ask(client: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            for body in bodies[client::clients]:
                http.post(path, json=body).raise_for_status()

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    return len(bodies) / (time.perf_counter() - started)


def main() -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args()
    lines = (ROOT / "script/sample_data/dev/dev.q.format").read_text(encoding="utf-8").splitlines()
    questions = [line.split("\t")[0] for line in lines]
    asked = [f"{questions[at % len(questions)]} {at}" for at in range((SINGLE + MANY) * args.runs)]
    kinds = {
        "/search": lambda text: {"query": text, "rerank": False},
        "/v1/embeddings": lambda text: {"model": "retriever-query", "input": text},
        "/v1/rerank": lambda text: {"query": text, "documents": questions[:4]},
    }
    with service() as (url, pid):
        for path, body in kinds.items():  # what is allocated once
            rate(url, path, [body(text) for text in questions], CLIENTS)
        before = resident_mb(pid)
        for path, body in kinds.items():
            rest = iter(asked)
            rates: dict[int, list[float]] = {1: [], CLIENTS: []}
            for _ in range(args.runs):
                for clients, count in ((1, SINGLE), (CLIENTS, MANY)):
                    bodies = [body(next(rest)) for _ in range(count)]
                    rates[clients].append(rate(url, path, bodies, clients))
            one, many = (statistics.median(rates[clients]) for clients in rates)
            print(f"{path:16} one at a time {one:6.1f}/s   {CLIENTS} clients {many:6.1f}/s", flush=True)
        print(f"memory {before:,.0f} MB before, {resident_mb(pid):,.0f} MB after")


if __name__ == "__main__":
    main()
