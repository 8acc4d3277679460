"""Exact search, ours against faiss, over generated fp16 vectors on disk.

    python script/bench/search.py --rows 1000000 --queries 1000                # against blockwise faiss.knn
    python script/bench/search.py --rows 1000000 --queries 1000 --peer flat    # against IndexFlatIP
    python script/bench/search.py --rows 8096668 --queries 1000 --folder F     # 12.4 GB, kept in F

Vectors and queries are independent normal numbers: nothing in them helps a search to skip anything. Each run
is a process of its own, ours and the peer's in turn; medians. Blockwise faiss reads ahead in a thread as we
do. IndexFlatIP's time is that of its search alone; building it (reading, adding) is printed beside it.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import numpy as np
import torch
from common import compare, parser

from torch_src.retrieval.faiss_index import load_faiss
from torch_src.retrieval.search import choose_kind, read_chunks, search
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import set_threads

BLOCK_ROWS = 65536
PEER_CHUNK = 32768  # rows a block of blockwise faiss


def make_store(folder: Path, rows: int, hidden: int) -> VectorStore:
    """Return the generated vectors; blocks that are there are kept."""
    stamp = {"generated": "normal", "seed": 0}
    store = VectorStore.create_or_continue(folder, stamp, rows, hidden, BLOCK_ROWS, print)
    for block in store.missing_blocks():
        first, last = store.block_range(block)
        draw = torch.Generator().manual_seed(block + 1)
        store.write_block(block, torch.randn(last - first, hidden, generator=draw).half().numpy())
    return store


def prepared(given) -> tuple[VectorStore, np.ndarray]:
    """Return (vectors, queries) of a side's process."""
    set_threads(0)
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(given.queries, given.hidden, generator=draw).numpy()
    return make_store(given.folder, given.rows, given.hidden), queries


def ours(given) -> dict:
    store, queries = prepared(given)
    device = torch.device("cpu")
    kind = choose_kind(given.product, store.hidden, device, print)
    begun = time.perf_counter()
    rows, _, effort = search(store, queries, given.topk, [device], kind, given.memory_gb)
    took = time.perf_counter() - begun
    np.save(given.result, rows)
    return {"seconds": took, "note": f"{kind} {effort}"}


def blocks(given) -> dict:
    """faiss.knn on each chunk in fp32, results merged by faiss's own heap."""
    store, queries = prepared(given)
    faiss = load_faiss()
    begun = time.perf_counter()
    heap = faiss.ResultHeap(len(queries), given.topk, keep_max=True)
    for first, chunk in read_chunks(store, PEER_CHUNK, 3):
        vectors = torch.from_numpy(chunk).float().numpy()
        scores, rows = faiss.knn(queries, vectors, given.topk, metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, rows + first)
    heap.finalize()
    took = time.perf_counter() - begun
    np.save(given.result, heap.I)
    return {"seconds": took}


def flat(given) -> dict:
    """IndexFlatIP over all vectors in fp32 in memory."""
    store, queries = prepared(given)
    begun = time.perf_counter()
    index = load_faiss().IndexFlatIP(store.hidden)
    for _, chunk in read_chunks(store, PEER_CHUNK, 3):
        index.add(torch.from_numpy(chunk).float().numpy())
    built = time.perf_counter()
    _, rows = index.search(queries, given.topk)
    took = time.perf_counter() - built
    np.save(given.result, rows)
    return {"seconds": took, "build_seconds": built - begun}


def main() -> None:
    options = parser(__doc__)
    for name, default in (("rows", 1_000_000), ("queries", 1000), ("hidden", 768), ("topk", 50)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--peer", choices=["blocks", "flat"], default="blocks")
    options.add_argument("--product", default="auto", help="fp32, bf16, int8 or auto")
    options.add_argument("--memory_gb", type=float, default=1.0, help="search_memory_gb of our side")
    options.add_argument(
        "--folder", type=Path, help="where the vectors are kept; default: a temporary folder"
    )
    given = options.parse_args()

    def recall(folder: Path) -> dict:
        found, expected = (np.load(folder / f"{name}.npy").tolist() for name in ("ours", given.peer))
        hits = sum(len(set(a) & set(b)) for a, b in zip(found, expected, strict=True))
        size = f"{given.rows:,} x {given.hidden} fp16, {given.queries:,} queries, top {given.topk}"
        return {
            "recall": hits / (given.queries * given.topk),
            "size": size,
            "threads": torch.get_num_threads(),
        }

    with tempfile.TemporaryDirectory() as temporary:
        if given.folder is None:
            given.folder = Path(temporary) / "vectors"
            sys.argv += ["--folder", str(given.folder)]
        if not given.side:
            make_store(given.folder, given.rows, given.hidden)
        compare(given, {"ours": ours, "blocks": blocks, "flat": flat}, ["ours", given.peer], recall)


if __name__ == "__main__":
    main()
