"""Exact search against faiss, over random fp16 vectors on disk.

    python script/bench/search.py --rows 1000000 --queries 1000                # against blockwise faiss.knn
    python script/bench/search.py --rows 1000000 --queries 1000 --peer flat    # against IndexFlatIP
    python script/bench/search.py --rows 8096668 --queries 1000 --folder F     # 12.4 GB, kept in F

Vectors and queries are independent normal numbers, without structure that speeds up a search. Blockwise faiss
reads ahead in a thread as ours does. The time of IndexFlatIP is its search alone; the time to build it
(reading, adding) is printed beside it.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np
import torch

from script.bench.common import Figures, compare, make_parser, work_folder
from script.bench.synthetic import fill_random, open_store
from torch_src.retrieval.chunks import read_chunks
from torch_src.retrieval.faiss_index import load_faiss
from torch_src.retrieval.search import choose_kind, search
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import set_threads

BLOCK_ROWS = 65536
PEER_CHUNK = 32768  # rows per chunk of blockwise faiss


def make_store(args: argparse.Namespace) -> VectorStore:
    """Return the random vectors; complete blocks are kept."""
    stamp = {"generated": "normal", "seed": 0}
    store = open_store(args.folder, stamp, args.rows, args.hidden, BLOCK_ROWS)
    fill_random(store)
    return store


def prepared(args: argparse.Namespace) -> tuple[VectorStore, np.ndarray]:
    """Return (vectors, queries) in the process of a variant."""
    set_threads(0)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(args.queries, args.hidden, generator=generator).numpy()
    return make_store(args), queries


def ours(args: argparse.Namespace) -> Figures:
    store, queries = prepared(args)
    device = torch.device("cpu")
    kind = choose_kind(args.product, store.hidden, device, print)
    start = time.perf_counter()
    rows, _, effort = search(store, queries, args.topk, [device], kind, args.memory_gb)
    took = time.perf_counter() - start
    np.save(args.result, rows)
    return {"seconds": took, "note": f"{kind} {effort}"}


def blocks(args: argparse.Namespace) -> Figures:
    """faiss.knn on each chunk in fp32; faiss's heap merges the results."""
    store, queries = prepared(args)
    faiss = load_faiss()
    start = time.perf_counter()
    heap = faiss.ResultHeap(len(queries), args.topk, keep_max=True)
    for first, chunk in read_chunks(store, PEER_CHUNK, 3):
        vectors = torch.from_numpy(chunk).float().numpy()
        scores, rows = faiss.knn(queries, vectors, args.topk, metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, rows + first)
    heap.finalize()
    took = time.perf_counter() - start
    np.save(args.result, heap.I)
    return {"seconds": took}


def flat(args: argparse.Namespace) -> Figures:
    """IndexFlatIP over all vectors, in fp32 in memory."""
    store, queries = prepared(args)
    start = time.perf_counter()
    index = load_faiss().IndexFlatIP(store.hidden)
    for _, chunk in read_chunks(store, PEER_CHUNK, 3):
        index.add(torch.from_numpy(chunk).float().numpy())
    built = time.perf_counter()
    _, rows = index.search(queries, args.topk)
    took = time.perf_counter() - built
    np.save(args.result, rows)
    return {"seconds": took, "build_seconds": built - start}


def main() -> None:
    parser = make_parser(__doc__)
    for name, default in (("rows", 1_000_000), ("queries", 1000), ("hidden", 768), ("topk", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer", choices=["blocks", "flat"], default="blocks")
    parser.add_argument("--product", default="auto", help="our first pass: fp32, bf16, int8 or auto")
    parser.add_argument("--memory_gb", type=float, default=1.0, help="our search_memory_gb")
    parser.add_argument("--folder", type=Path, help="folder for the vectors; default: a temporary folder")
    args = parser.parse_args()

    def recall(folder: Path) -> dict[str, Any]:
        found, expected = (np.load(folder / f"{name}.npy").tolist() for name in ("ours", args.peer))
        hits = sum(len(set(a) & set(b)) for a, b in zip(found, expected, strict=True))
        size = f"{args.rows:,} x {args.hidden} fp16, {args.queries:,} queries, top {args.topk}"
        share = hits / (args.queries * args.topk)
        return {"recall": share, "size": size, "threads": torch.get_num_threads()}

    with work_folder(args):
        if not args.variant:
            make_store(args)
        compare(args, {"ours": ours, "blocks": blocks, "flat": flat}, ["ours", args.peer], recall)


if __name__ == "__main__":
    main()
