"""Sections of gpu.py: exact search against torch and faiss, and faiss's inverted lists on the GPU."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch

from script.bench.gpu_runs import OURS, PART, PEER, Bench
from torch_src.retrieval.chunks import DeviceCache
from torch_src.retrieval.faiss_gpu import IndexGpus
from torch_src.retrieval.faiss_index import (
    FILL_ROWS,
    MAX_TRAINING,
    index_gpus,
    inverted_lists,
    load_faiss,
    new_index,
    set_parameters,
)
from torch_src.retrieval.search import choose_kind, search
from torch_src.retrieval.vectors import VectorStore, new_manifest
from torch_src.runtime.devices import free_gpu_memory

GENERATED_ROWS = 65536  # vectors generated, or compared by a peer, at once
VECTOR_FRACTION = 0.35  # of the free GPU memory, for the vectors to search: faiss holds a copy of them
INDEX_QUERIES = 1000
PROBES = 64  # inverted lists that a query searches

# search(queries (B, H) fp16, top k) -> (rows (B, K) int64, a note)
Find = Callable[[torch.Tensor, int], tuple[np.ndarray, str]]


def exact_search(bench: Bench) -> None:
    """The top k of all queries over random unit vectors that lie on the device from the start.

    Ours gets them as a search leaves them cached on the GPU, and returns exact results with fp64 scores. The
    peers return the results of 16-bit products. Ours is also measured with vectors that are copied from the
    memory of the host, chunk by chunk, as they would come from a disk of that speed.
    """
    sizes = bench.sizes
    comparison = SearchComparison(bench)
    vectors, first = comparison.vectors, sizes.queries[0]
    comparison.add("ours", OURS, resident(bench, vectors).find)
    if bench.profiling:
        part = resident(bench, vectors[: 10 * GENERATED_ROWS])
        bench.profile(lambda: part.find(comparison.queries[:first], sizes.topk[0]))
    comparison.add("torch matmul + topk, fp16", PEER, partial(blockwise_topk, vectors))
    name = "faiss GpuIndexFlatIP, fp16"
    bench.attempt(name, 20 * bench.on_gpu, partial(_add_flat_index, bench, comparison, name))
    name = "ours, from host memory"
    bench.attempt(name, 20 * bench.on_gpu, partial(_add_streamed, bench, comparison, name))
    for number in range(1, len(sizes.queries)):
        comparison.measure_all(number)


class SearchComparison:
    """The vectors, the queries, and the searches that are compared."""

    def __init__(self, bench: Bench):
        self.bench, sizes, self.rows = bench, bench.sizes, bench.sizes.rows
        if bench.on_gpu:
            room = int(VECTOR_FRACTION * free_gpu_memory(bench.device))
            self.rows = min(self.rows, room // (2 * sizes.hidden))
        if self.rows < sizes.rows:
            bench.skip(f"{sizes.rows:,} rows", f"the GPU's memory allows {self.rows:,}")
        self.vectors = unit_vectors(self.rows, sizes.hidden, bench.device)
        self.queries = unit_vectors(max(sizes.queries), sizes.hidden, bench.device, seed=1)
        self.variants: dict[str, tuple[str, Find, float]] = {}
        self.seconds_per_query: dict[str, float] = {}
        self.expected: dict[int, np.ndarray] = {}  # position in sizes.queries -> our rows

    def add(self, name: str, side: str, find: Find, memory_gb: float = 0.0) -> None:
        """Measure a search with the smallest number of queries, and keep it for the others.

        memory_gb: what it holds outside of torch; 0 for a search in torch.
        """
        self.variants[name] = side, find, memory_gb
        self.attempt(name, 0)

    def measure_all(self, number: int) -> None:
        """Measure the faster of ours, and the peers, with sizes.queries[number] queries."""
        for side in (OURS, PEER):
            names = [name for name in self.seconds_per_query if self.variants[name][0] == side]
            names.sort(key=lambda name: self.seconds_per_query[name])
            for name in names[:1] if side == OURS else names:
                if side == OURS or number in self.expected:
                    self.attempt(name, number)
                else:
                    count = self.bench.sizes.queries[number]
                    self.bench.skip(f"{name}, {count:,} queries", "ours was not measured")

    def attempt(self, name: str, number: int) -> None:
        count = self.bench.sizes.queries[number]
        seconds = self.seconds_per_query.get(name, 0.0) * count
        self.bench.attempt(f"{name}, {count:,} queries", seconds, partial(self._measure, name, number))

    def _measure(self, name: str, number: int) -> None:
        sizes = self.bench.sizes
        count, topk = sizes.queries[number], sizes.topk[min(number, len(sizes.topk) - 1)]
        (side, find, memory_gb), queries = self.variants[name], self.queries[:count]
        if name not in self.seconds_per_query:
            find(queries[: max(1, count // 8)], topk)  # a warm-up
        (rows, note), figures = self.bench.time(lambda: find(queries, topk))
        figures["peak_gb"] = memory_gb or figures["peak_gb"]
        self.seconds_per_query[name] = figures["seconds"] / count
        figures |= {"work": f"{count:,} queries", "count": count, "unit": "queries", "rows": self.rows}
        figures |= {"flops": 2.0 * count * self.rows * self.bench.sizes.hidden, "note": note}
        if side == OURS:
            self.expected.setdefault(number, rows)
        if number in self.expected:
            figures["recall_against_ours"] = agreement(rows, self.expected[number])
        self.bench.record(f"{name}, {count:,} queries", side, figures)


class OurSearch:
    """The project's exact search."""

    def __init__(self, bench: Bench, store: VectorStore, cache: DeviceCache | None = None):
        self.store, self.device, self.cache = store, bench.device, cache
        self.bs, self.kind = bench.sizes.queries_at_once, choose_kind("auto", store.hidden, bench.device)

    def find(self, queries: torch.Tensor, topk: int) -> tuple[np.ndarray, str]:
        asked, devices = queries.float().cpu().numpy(), [self.device]
        rows, _, stats = search(self.store, asked, topk, devices, self.kind, cache=self.cache, bs=self.bs)
        return rows, f"{self.kind}: {stats}"


def resident(bench: Bench, vectors: torch.Tensor) -> OurSearch:
    """Return the search over vectors (N, H) fp16 that are already on the device."""
    cache = DeviceCache([bench.device])
    cache.chunks[0], cache.complete = [(0, vectors)], True  # nothing is read from the store
    store = VectorStore(
        bench.folder / "none", new_manifest({}, len(vectors), vectors.shape[1], GENERATED_ROWS)
    )
    return OurSearch(bench, store, cache)


class HostVectors(VectorStore):
    """Vectors (N, H) float16 in the memory of the host instead of blocks on disk."""

    def __init__(self, vectors: np.ndarray):
        super().__init__("", new_manifest({}, len(vectors), vectors.shape[1], GENERATED_ROWS))
        self.vectors = vectors

    def read_into(self, first: int, out: np.ndarray) -> None:
        np.copyto(out, self.vectors[first : first + len(out)])


def _add_streamed(bench: Bench, comparison: SearchComparison, name: str) -> None:
    """Copy the vectors to the host and add a search that streams them to the GPU."""
    comparison.add(name, OURS, OurSearch(bench, HostVectors(comparison.vectors.cpu().numpy())).find)


def unit_vectors(rows: int, hidden: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return random vectors (rows, hidden) float16 of length 1 on the device."""
    vectors = torch.empty(rows, hidden, dtype=torch.float16, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for chunk in vectors.split(GENERATED_ROWS):
        random = torch.randn(chunk.shape, generator=generator, device=device)
        chunk.copy_(torch.nn.functional.normalize(random, dim=1))
    return vectors


def blockwise_topk(
    vectors: torch.Tensor, queries: torch.Tensor, topk: int, at_once: int = 2000
) -> tuple[np.ndarray, str]:
    """Return the rows (B, K) int64 of the best fp16 products, block after block of the vectors."""
    found = []
    for part in queries.split(at_once):
        scores = torch.full((len(part), topk), -torch.inf, dtype=vectors.dtype, device=vectors.device)
        rows = torch.zeros(scores.shape, dtype=torch.int64, device=vectors.device)
        for at, block in enumerate(vectors.split(GENERATED_ROWS)):
            best = torch.topk(part @ block.T, min(topk, len(block)), dim=1)
            both = torch.cat([rows, best.indices + at * GENERATED_ROWS], 1)
            scores, order = torch.topk(torch.cat([scores, best.values], 1), topk, dim=1)
            rows = both.gather(1, order)
        found.append(rows)
    return torch.cat(found).cpu().numpy(), ""


def _add_flat_index(bench: Bench, comparison: SearchComparison, name: str) -> None:
    """Fill a flat faiss index on the GPU and add its search to the comparison."""
    faiss, resources = faiss_on_gpu(bench)
    if resources is None:
        return bench.skip(name, "faiss has no GPU here")
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16, config.device = True, bench.device.index or 0
    index = faiss.GpuIndexFlatIP(resources, bench.sizes.hidden, config)

    def fill() -> None:
        for chunk in comparison.vectors.split(GENERATED_ROWS):
            index.add(chunk.float())

    def find(queries: torch.Tensor, topk: int) -> tuple[np.ndarray, str]:
        parts = queries.float().split(bench.sizes.queries_at_once)
        found = [index.search(part, topk)[1] for part in parts]
        return torch.cat(found).cpu().numpy(), ""

    before = free_gpu_memory(bench.device)
    _, figures = bench.time(fill)
    held = (before - free_gpu_memory(bench.device)) / 1e9  # faiss has an allocator of its own
    bench.record(f"{name}, filling", PART, figures | {"count": index.ntotal, "unit": "rows", "peak_gb": held})
    comparison.add(name, PEER, find, held)


def faiss_on_gpu(bench: Bench) -> tuple[Any, Any]:
    """Return (faiss, its resources on the GPU, None without a GPU); faiss then takes torch tensors too."""
    faiss = load_faiss()
    if not bench.on_gpu or not getattr(faiss, "get_num_gpus", lambda: 0)():
        return faiss, None
    import_module("faiss.contrib.torch_utils")
    return faiss, faiss.StandardGpuResources()


# Inverted lists


def inverted_file(bench: Bench) -> None:
    """Training and filling an IVF index on the GPU (ours, in the ratio) and on the CPU (the peer).

    The vectors are in clusters, as those of passages are, and come from host memory. Recall: of the exact
    top k, with 64 probed lists.
    """
    sizes = bench.sizes
    vectors = clustered_vectors(sizes.index_rows, sizes.hidden, bench.device)
    queries = clustered_vectors(min(INDEX_QUERIES, sizes.index_rows), sizes.hidden, bench.device, seed=1)
    exact, _ = blockwise_topk(vectors, queries, sizes.topk[0])
    host, asked = vectors.cpu(), queries.float().cpu().numpy()
    del vectors, queries
    bench.free_memory()
    work, gpus = partial(_build_index, bench, host, asked, exact), index_gpus([bench.device])
    if gpus is None:
        bench.skip("GPU", "faiss has no GPU here")
    else:
        bench.attempt("GPU", 10, partial(work, "GPU", OURS, gpus))
    bench.attempt("CPU", 40 * bench.on_gpu, partial(work, "CPU", PEER, None))


def _build_index(
    bench: Bench, host: torch.Tensor, queries: np.ndarray, exact: np.ndarray,
    name: str, side: str, gpus: IndexGpus | None,
) -> None:  # fmt: skip
    """Measure an index as do_dual_infer.py builds it; gpus: those that hold it, None: the CPU."""
    sizes = bench.sizes
    index = new_index(sizes.index, sizes.hidden)
    lists = inverted_lists(index)
    sample = host[: min(len(host), 64 * lists, MAX_TRAINING)].float().numpy()
    free = gpus.free_bytes(gpus.devices[0]) if gpus else 0
    _, training = bench.time(lambda: gpus.train(index, sample) if gpus else index.train(sample))
    training.pop("peak_gb")  # torch's
    more = {"work": "training", "count": len(sample), "unit": "vectors"}
    bench.record(f"{name}: {sizes.index}, training", side, training | more)

    def fill() -> Any:
        chunks = ((at, host[at : at + FILL_ROWS].numpy()) for at in range(0, len(host), FILL_ROWS))
        if gpus:
            return gpus.fill(index, len(host), chunks)
        for _, chunk in chunks:
            index.add(torch.from_numpy(chunk).float().numpy())
        return index

    index, filling = bench.time(fill)
    filling.pop("peak_gb")
    if gpus:
        filling["peak_gb"] = (free - gpus.free_bytes(gpus.devices[0])) / 1e9
    more = {"work": "filling", "count": len(host), "unit": "vectors"}
    bench.record(f"{name}: {sizes.index}, filling", side, filling | more)
    probes = min(PROBES, lists)
    set_parameters(index, sizes.index, f"nprobe={probes}")
    found, searching = bench.time(lambda: index.search(queries, sizes.topk[0])[1])
    searching.pop("peak_gb")
    more = {"work": "searching", "count": len(queries), "unit": "queries"}
    recall = {"recall": agreement(found, exact)}
    bench.record(f"{name}: {sizes.index}, {probes} probes", side, searching | more | recall)


def clustered_vectors(rows: int, hidden: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return fp16 vectors (rows, hidden) of length 1 around 1,000 centers, the same for every seed."""
    centers = unit_vectors(1000, hidden, device)
    vectors = unit_vectors(rows, hidden, device, seed=1 + seed)
    generator = torch.Generator(device).manual_seed(seed)
    for chunk in vectors.split(GENERATED_ROWS):
        center = centers[torch.randint(len(centers), (len(chunk),), generator=generator, device=device)]
        chunk.copy_(torch.nn.functional.normalize((chunk + center).float(), dim=1))
    return vectors


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of the rows (B, K) `expected` that `found` contains, query by query."""
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True))
    return hits / expected.size
