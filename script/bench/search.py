"""Exact search, ours against faiss, over generated fp16 vectors on disk.

    python script/bench/search.py --rows 1000000 --queries 1000                 # against blockwise faiss.knn
    python script/bench/search.py --rows 1000000 --queries 1000 --peer flat     # against IndexFlatIP in
    memory python script/bench/search.py --rows 8096668 --queries 1000 --folder F      # 12.4 GB; kept in F
    when given

Vectors and queries are independent normal numbers: nothing in them helps a search to skip anything. Each run
is a process of its own, ours and the peer's in turn; medians. Blockwise faiss reads ahead in a thread as we
do. IndexFlatIP's time is split into building (reading and adding) and searching. Prints a table, last a JSON
line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import numpy as np
import torch

from torch_src.devices import set_threads
from torch_src.faiss_loading import load_faiss
from torch_src.search import choose_kind, read_chunks, search
from torch_src.vectors import VectorStore

BLOCK_ROWS = 65536
PEER_CHUNK = 32768  # rows a block of blockwise faiss: its fastest of 8,192 to 131,072 in the runs we made


def make_store(folder: Path, rows: int, hidden: int) -> VectorStore:
    """Return the generated vectors; blocks that are there are kept."""
    stamp = {"generated": "normal", "seed": 0}
    store = VectorStore.create_or_continue(folder, stamp, rows, hidden, BLOCK_ROWS, print)
    for block in store.missing_blocks():
        first, last = store.block_range(block)
        draw = torch.Generator().manual_seed(block + 1)
        store.write_block(block, torch.randn(last - first, hidden, generator=draw).half().numpy())
    return store


def make_queries(count: int, hidden: int) -> np.ndarray:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(0)).numpy()


def ours(store: VectorStore, queries: np.ndarray, topk: int, given) -> dict:
    device = torch.device("cpu")
    kind = choose_kind(given.product, store.hidden, device, print)
    begun = time.perf_counter()
    rows, _, effort = search(store, queries, topk, [device], kind, given.memory_gb)
    return {"seconds": time.perf_counter() - begun, "rows": rows, "note": f"{kind} {effort.line()}"}


def blockwise(store: VectorStore, queries: np.ndarray, topk: int, given) -> dict:
    """faiss.knn on each chunk in fp32, results merged by faiss's own heap."""
    faiss = load_faiss()
    begun = time.perf_counter()
    heap = faiss.ResultHeap(len(queries), topk, keep_max=True)
    for first, chunk in read_chunks(store, PEER_CHUNK, 3):
        scores, rows = faiss.knn(
            queries, torch.from_numpy(chunk).float().numpy(), topk, metric=faiss.METRIC_INNER_PRODUCT
        )
        heap.add_result(scores, rows + first)
    heap.finalize()
    return {"seconds": time.perf_counter() - begun, "rows": heap.I}


def flat(store: VectorStore, queries: np.ndarray, topk: int, given) -> dict:
    """IndexFlatIP over all vectors in fp32 in memory."""
    faiss = load_faiss()
    begun = time.perf_counter()
    index = faiss.IndexFlatIP(store.hidden)
    for _, chunk in read_chunks(store, PEER_CHUNK, 3):
        index.add(torch.from_numpy(chunk).float().numpy())
    built = time.perf_counter()
    _, rows = index.search(queries, topk)
    done = time.perf_counter()
    return {"seconds": done - built, "build_seconds": built - begun, "rows": rows}


SIDES = {"ours": ours, "blocks": blockwise, "flat": flat}


class PeakMemory(threading.Thread):
    """The most unshared memory (RssAnon) seen, in 10^9 bytes; looked at every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            with open("/proc/self/status", encoding="ascii") as file:
                line = next(line for line in file if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) * 1024)


def one_run(given) -> None:
    """Run one side in this process; the rows found go to --result, the figures to standard output."""
    set_threads(0)
    store, queries = (
        make_store(given.folder, given.rows, given.hidden),
        make_queries(given.queries, given.hidden),
    )
    memory = PeakMemory()
    memory.start()
    found = SIDES[given.side](store, queries, given.topk, given)
    memory.done.set()
    np.save(given.result, found.pop("rows"))
    print(json.dumps({**found, "unshared_gb": memory.peak / 1e9}))


def measure(given, side: str, folder: Path) -> tuple[dict, np.ndarray]:
    """Run one side in a process of its own."""
    result = folder / f"{side}.npy"
    command = [sys.executable, __file__, "--side", side, "--result", result, "--folder", given.folder]
    for name in ("rows", "queries", "hidden", "topk", "product", "memory_gb"):
        command += [f"--{name}", getattr(given, name)]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), np.load(result)


def compare(given, folder: Path) -> None:
    make_store(given.folder, given.rows, given.hidden)
    found: dict[str, list[dict]] = {"ours": [], given.peer: []}
    for at in range(given.runs):
        both = {}
        for side in found:
            figures, both[side] = measure(given, side, folder)
            found[side].append(figures)
            print(f"run {at + 1}  {side:7} {json.dumps(figures)}", flush=True)
    pairs = zip(both["ours"], both[given.peer], strict=True)
    recall = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in pairs) / both["ours"].size
    medians = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
    memory = {side: max(run["unshared_gb"] for run in runs) for side, runs in found.items()}
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["ours"], found[given.peer], strict=True)]
    what = f"{given.rows:,} x {given.hidden} fp16, {given.queries:,} queries, top {given.topk}"
    print(f"\n{what}, {given.runs} runs")
    print(f"{'':8} {'median s':>9} {'unshared GB':>12}")
    for side in found:
        print(f"{side:8} {medians[side]:9.2f} {memory[side]:12.2f}")
    print(json.dumps({
        "bench": "search", "rows": given.rows, "hidden": given.hidden, "queries": given.queries,
        "peer": given.peer, "ratio": round(statistics.median(ratios), 3), "recall": recall,
        "seconds": medians, "unshared_gb": memory, "threads": torch.get_num_threads(),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rows", 1_000_000), ("queries", 1000), ("hidden", 768), ("topk", 50), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer", choices=["blocks", "flat"], default="blocks")
    parser.add_argument("--product", default="auto", help="fp32, bf16, int8 or auto")
    parser.add_argument("--memory_gb", type=float, default=1.0, help="search_memory_gb of our side")
    parser.add_argument("--folder", type=Path, help="where the vectors are kept; default: a temporary folder")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        return one_run(given)
    with tempfile.TemporaryDirectory() as temporary:
        given.folder = given.folder or Path(temporary) / "vectors"
        compare(given, Path(temporary))


if __name__ == "__main__":
    main()
