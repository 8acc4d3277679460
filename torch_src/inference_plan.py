"""--plan of the inference programs: time, memory and disk, estimated from short probes."""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torch_src.data.candidates import Candidates
from torch_src.data.collection import PassageCollection
from torch_src.inference import Retriever, load_dual_model
from torch_src.models.tokenization import TokenTable
from torch_src.models.windows import window_counts
from torch_src.retrieval.encoding import text_hashes
from torch_src.retrieval.faiss_gpu import IndexGpus
from torch_src.retrieval.faiss_index import estimate, new_index
from torch_src.retrieval.reranking import PairScorer
from torch_src.retrieval.search import choose_kind, chunk_rows, search, state_bytes
from torch_src.retrieval.vectors import COLLECTION_FIELDS, HASH_BYTES, VectorStore, new_manifest
from torch_src.runtime.devices import search_devices
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.log import log
from torch_src.runtime.planning import (
    PROBED_TEXTS,
    UNPROBED_GB,
    Plan,
    evenly_spaced,
    memory_gb,
    seconds_of,
    seconds_per_text,
)

SAMPLED_LENGTHS = 2048  # passages whose windows are counted
SAMPLED_HASHES, HASHES_PER_READ = 1 << 16, 16  # passages that are looked up among the vectors on disk
LOOKUP_BYTES = 32  # per vector while old ones are copied: a hash, its row, and the row of each new one
PROBED_ON_GPU = 4096  # texts or pairs
BYTES_PER_PAIR = 150  # on disk: one line in each of four files, and the score


def plan_retrieval(
    retriever: Retriever, queries: int, topk: int, bs: int, gpus: IndexGpus | None = None
) -> Plan:
    """Return the plan of encoding the collection and searching it for queries in batches of `bs`.

    gpus: those that hold the index; None: it is on the CPU.
    """
    plan, hp = Plan("do_dual_infer.py"), retriever.hp
    width = retriever.width
    rows = _vector_rows(retriever)
    stores = _stores_on_disk(retriever, rows)
    encoding_ram, encoding_gpu = _plan_encoding(plan, retriever, rows, stores)
    index_bytes = index_gpu_bytes = saved_bytes = 0
    if hp.index:
        queries = min(queries, hp.recall_queries)
        if gpus:
            empty = new_index(hp.index, width)
            index_gpu_bytes, saved_bytes = gpus.bytes_needed(empty, rows), gpus.saved_bytes(empty, rows)
        else:
            index_bytes, seconds = estimate(hp.index, width, rows)
            saved_bytes = index_bytes
            plan.add(f"fill {hp.index} (without training and search)", seconds)
    if queries:
        if retriever.hp.passage_windows > 1:  # at worst, see PassageWindows.depth
            topk = min(rows, (topk - 1) * retriever.hp.passage_windows + 1)
        seconds = _search_seconds(retriever, rows, queries, topk, bs)
        plan.add(f"exact search of {queries:,} queries", seconds)
    ram, gpu = memory_gb(retriever.device)
    state = state_bytes(max(0, queries - 2 * bs), width, topk) / 1e9  # of the queries that were not probed
    ram += state if retriever.device.type == "cpu" else 0.0
    ram += (16 * topk + 4 * width) * queries / 1e9  # results and queries
    plan.gpu_gb = max(gpu + state + index_gpu_bytes / 1e9, encoding_gpu)
    plan.ram_gb = max(encoding_ram, ram + index_bytes / 1e9) + UNPROBED_GB
    # vectors, their hashes and offsets of the collection; old vectors stay until the new ones are complete
    row_bytes = 2 * width + HASH_BYTES + 8 + (LOOKUP_BYTES if stores else 0)
    plan.disk_gb = (rows * row_bytes + saved_bytes) / 1e9
    plan.advice = "lower --search_memory_gb, --bs or --block_rows"
    if retriever.device.type == "cuda":  # the search takes its GPU memory from what is free
        plan.advice = "lower --bs or --block_rows"
    if hp.index:
        plan.advice = "use a smaller --index, or none: exact search needs no memory for it"
    return plan


def _vector_rows(retriever: Retriever) -> int:
    """Return the number of vectors; with windows estimated from a sample of the passages."""
    rows = len(retriever.collection)
    if retriever.hp.passage_windows == 1:
        return rows
    sample = evenly_spaced(rows, SAMPLED_LENGTHS)
    texts = [retriever.collection[row] for row in sample]
    counts, _ = window_counts(retriever.source.tokenizer, texts, retriever.rules["passage"])
    return round(rows * float(counts.mean()))


def _stores_on_disk(retriever: Retriever, rows: int) -> list[VectorStore]:
    """Return the stores whose vectors the run keeps or copies where the texts are equal."""
    hp = retriever.hp
    stamp = retriever.passage_stamp()
    store = VectorStore(hp.para_emb_path, new_manifest(stamp, rows, retriever.width, hp.block_rows))
    if hp.force:
        return []
    try:
        found = read_json(store.manifest_path)
    except UserError:
        return store.old_stores()
    if hp.para_emb and any(found.get(name) != store.manifest[name] for name in COLLECTION_FIELDS):
        return []  # shared vectors are replaced only with --force
    own = [VectorStore(store.folder, found)] if store.differs_only_in_collection(found) else []
    return [*own, *store.old_stores()]


def _share_on_disk(collection: PassageCollection, stores: list[VectorStore]) -> float:
    """Return the share of the passages whose vectors are in the stores, of a sample of a large collection."""
    count = len(collection)
    spans = [(0, count)]
    if count > SAMPLED_HASHES:
        starts = evenly_spaced(count - HASHES_PER_READ, SAMPLED_HASHES // HASHES_PER_READ)
        spans = [(start, start + HASHES_PER_READ) for start in starts]
    texts = [text for first, last in spans for text in collection[first:last]]
    wanted = _as_bytes(text_hashes(texts))
    distinct, known = set(wanted), set()
    for store in stores:
        for block in range(store.block_count):
            if not store.is_missing(block) and (hashes := store.read_hashes(block)) is not None:
                known |= distinct.intersection(_as_bytes(hashes))
    return sum(text_hash in known for text_hash in wanted) / len(wanted)


def _as_bytes(hashes: np.ndarray) -> list[bytes]:
    return hashes.view(f"V{HASH_BYTES}").ravel().tolist()


def _plan_encoding(
    plan: Plan, retriever: Retriever, rows: int, stores: list[VectorStore]
) -> tuple[float, float]:
    """Add the encoding of the collection to `rows` vectors, except those of texts in the stores.

    Return its peak (memory, GPU memory) in GB.
    """
    passages = len(retriever.collection)
    encoder = retriever.encoder("passage", load_dual_model(retriever.source))
    texts = [retriever.collection[row] for row in _probes(passages, retriever.device)]
    how = (encoder.tokenize_windows, encoder.encode_tokens)
    seconds, tokens = _seconds_and_tokens(retriever.device, *how, texts)
    new = 1.0 - _share_on_disk(retriever.collection, stores) if stores else 1.0
    about = "about " if passages > SAMPLED_HASHES else ""
    what = f"{about}{round(new * passages):,} of {passages:,}" if stores else f"{passages:,}"
    windows = f" in {round(new * rows):,} windows" if retriever.hp.passage_windows > 1 else ""
    speed = f"{tokens:.0f} tokens, {tokens / seconds:,.0f} tokens/s"
    plan.add(f"encode {what} passages{windows} ({speed})", seconds * new * rows)
    if stores:
        hashing = seconds_of(lambda: text_hashes(retriever.collection[: len(texts)])) / len(texts)
        plan.add("find known texts (without copying their vectors)", 2 * hashing * passages)
    if windows:
        count = seconds_of(lambda: window_counts(encoder.tokenizer, texts, encoder.rules)) / len(texts)
        plan.add("count the windows", count * passages)
    # the tokens and vectors of one block, and the tokens of the next
    block_rows = min(rows, retriever.hp.block_rows)
    block = block_rows * (2 * 4 * tokens + 2 * encoder.width) / 1e9
    ram, gpu = memory_gb(retriever.device)
    if retriever.device.type == "cuda":
        gpu += 2 * block_rows * 2 * encoder.width / 1e9  # vectors of a block, and of the one being written
        torch.cuda.reset_peak_memory_stats(retriever.device)  # the model is deleted before the search
    return ram + block, gpu


def _probes(count: int, device: torch.device) -> list[int]:
    """Return evenly spaced rows of 0..count-1: enough on a GPU for full forward passes."""
    return evenly_spaced(count, PROBED_ON_GPU if device.type == "cuda" else PROBED_TEXTS)


def _seconds_and_tokens(
    device: torch.device,
    tokenize: Callable[[list[Any]], TokenTable],
    compute: Callable[[TokenTable], object],
    texts: list[Any],
) -> tuple[float, float]:
    """Return the seconds and the tokens of an entry of the table: a text, or a window of one.

    On CUDA both steps overlap, and the slower one counts.
    """
    table = tokenize(texts)
    if device.type != "cuda":
        seconds = seconds_per_text(lambda texts: compute(tokenize(texts)), texts) * len(texts)
    else:
        compute(table)
        seconds = max(seconds_of(lambda: tokenize(texts)), seconds_of(lambda: compute(table)))
    return seconds / len(table), float(np.mean(table.lengths))


def _search_seconds(retriever: Retriever, rows: int, queries: int, topk: int, bs: int) -> float:
    """Return the estimated seconds of an exact search, extrapolated from random vectors."""
    devices, memory = search_devices(retriever.hp.device, retriever.device), retriever.hp.search_memory_gb
    bs, width = min(bs, queries), retriever.width
    kind = choose_kind("auto", width, devices[0])
    probed = min(rows, 3 * chunk_rows(bs, width, memory, devices))
    draw = np.random.default_rng(0)
    probes = draw.standard_normal((2 * bs, width), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        store = VectorStore.create_or_continue(folder, {}, probed, width, probed, log)
        store.write_block(0, draw.standard_normal((probed, width), dtype=np.float32).astype(np.float16))

        def seconds(count: int) -> float:
            return seconds_of(lambda: search(store, probes[:count], topk, devices, kind, memory, bs=bs))

        seconds(bs)  # a warm-up
        one, two = seconds(bs), seconds(2 * bs)
    # the vectors are read once, whatever the number of batches
    return rows / probed * (one + (queries / bs - 1) * max(0.0, two - one))


def plan_reranking(scorer: PairScorer, candidates: Candidates, pairs: int) -> Plan:
    """Return the plan of scoring `pairs` pairs, estimated from `candidates`."""

    def tokenize(rows: list[int]) -> TokenTable:
        return scorer.tokenize(*candidates.texts_of(rows))

    plan = Plan("do_cross_infer.py")
    rows = _probes(len(candidates), scorer.device)
    seconds, tokens = _seconds_and_tokens(scorer.device, tokenize, scorer.score, rows)
    inputs, windows = pairs, ""
    if scorer.rules.windows > 1:
        inputs = round(pairs * len(tokenize(rows)) / len(rows))
        windows = f" in {inputs:,} windows"
    speed = f"{tokens:.0f} tokens, {tokens / seconds:,.0f} tokens/s"
    plan.add(f"score {pairs:,} pairs{windows} ({speed})", seconds * inputs)
    plan.ram_gb, plan.gpu_gb = memory_gb(scorer.device)
    plan.ram_gb += UNPROBED_GB
    plan.disk_gb = BYTES_PER_PAIR * pairs / 1e9
    plan.advice = "lower --batch_size or --block_pairs"
    return plan


def sample_pairs(queries: list[str], collection: PassageCollection, device: torch.device) -> Candidates:
    """Return pairs of a few queries and passages, for a plan on `device` without a run to re-rank."""
    rows = np.array(_probes(len(collection), device))
    queries = queries[: len(rows)]
    query_of = np.arange(len(rows), dtype=np.int32) % len(queries)
    texts = [collection[row] for row in rows.tolist()]
    return Candidates(queries, query_of, rows, np.zeros(len(rows), np.float32), None, None, texts)
