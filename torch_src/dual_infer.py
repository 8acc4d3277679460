"""do_dual_infer.py: queries + collection + output/dual_params.bin -> query.emb.npy, para_emb/, res.top50."""

import gc
import os
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from torch_src import hparams
from torch_src.data.formats import RunRow, format_run_row
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.inference_stage import LOG_SECONDS, read_query_ids
from torch_src.models.dual_encoder import DualEncoder
from torch_src.retrieval.encoding import encode_collection
from torch_src.retrieval.engines.milvus import COMMAND, MOST_HITS, MilvusSearch
from torch_src.retrieval.faiss_index import (
    FaissSearch,
    IndexSettings,
    check_memory,
    estimate,
    new_index,
    set_parameters,
)
from torch_src.retrieval.search import (
    CACHE_SHARE,
    DeviceCache,
    choose_kind,
    chunk_rows,
    measured_recall,
    search,
)
from torch_src.retrieval.vectors import NOT_COMPARED, DamagedBlock, VectorStore, new_manifest, save_vectors
from torch_src.retriever import Retriever, load_model
from torch_src.runtime.devices import free_gpu_memory, peak_memory_gb, search_devices, worker_count
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import duration, log, rank, warn
from torch_src.runtime.planning import KEPT_GB, Plan, evenly, memory_gb, seconds_a_text, seconds_of
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import checksum_text, clear_stamp, up_to_date, write_stamp

INDEX = "para.index"


class DualInference(Retriever):
    """One inference run, its inputs checked before anything long starts."""

    def __init__(self, hp: InferenceDeHparams, topk: int, bs: int):
        self.topk, self.bs = topk, bs
        self.queries = list(read_query_ids(hp))
        super().__init__(hp)
        self.milvus = self.open_milvus() if hp.engine == "milvus" else None

    @property
    def passage_manifest(self) -> dict:
        """Return the manifest that vectors of this model and collection have, when made here."""
        stamp = {**self.vector_stamp("passage"), "collection": self.collection.checksum}
        return new_manifest(stamp, len(self.collection), self.width, self.hp.block_rows)

    def open_milvus(self) -> MilvusSearch:
        """Return the search on Milvus; UserError where these vectors are not all there."""
        hp = self.hp
        hparams.check_range("topk", self.topk, 1, MOST_HITS)
        if int(os.getenv("WORLD_SIZE", "1")) > 1:
            raise UserError("--engine milvus encodes only queries: run it without torchrun")
        names = ("para_emb", "milvus_uri", "milvus_collection")
        given = {"--output_dir": hp.output_dir, "--data_dir": hp.data_dir}
        given |= {f"--{name}": getattr(hp, name) for name in names if getattr(hp, name)}
        if hp.passage_ids or hp.passage_dir:
            given["--passage_ids"] = hp.passage_ids_path
        load = shlex.join([*COMMAND.split(), *(word for knob in given.items() for word in knob)])
        return MilvusSearch(
            hp.milvus_uri_path, hp.milvus_collection, self.passage_manifest, hp.para_emb_path,
            hp.search_params, load,
        )  # fmt: skip

    def run_stamp(self) -> dict:
        """Return what decides res.top{k}."""
        sides = {
            f"{side} {k}": v for side in ("query", "passage") for k, v in self.vector_stamp(side).items()
        }
        texts = {
            "queries": checksum_text("\n".join(self.queries)),
            "collection": self.collection.checksum,
        }
        names = ("index", "search_params", "seed", "search_memory_gb")  # all of which decide an index
        index = {name: getattr(self.hp, name) for name in names} if self.hp.index else {}
        engine = {}
        if self.milvus:
            names = ("engine", "milvus_collection", "search_params")
            engine = {name: getattr(self.hp, name) for name in names}
            engine["milvus_uri"] = self.hp.milvus_uri_path
            engine |= {"milvus_index": self.milvus.index, "scores": self.milvus.scores}
            made = self.milvus.manifest  # perhaps on another machine
            engine |= {f"passage {name}": made[name] for name in NOT_COMPARED}
            engine["block_rows"] = made["block_rows"]
        return {
            "stage": "dual_infer",
            **sides,
            **texts,
            **index,
            "block_rows": self.hp.block_rows,
            "topk": self.topk,
            **engine,
        }

    def check_search(self) -> None:
        """UserError for what the search could only say after the encoding."""
        hp, devices = self.hp, search_devices(self.hp.device, self.device)
        if self.milvus:
            return
        if not hp.index:
            at_once = min(self.bs, len(self.queries))
            chunk_rows(at_once, self.width, hp.search_memory_gb, devices)
            return
        set_parameters(new_index(hp.index, self.width), hp.index, hp.search_params)
        if not (self.output / INDEX).exists():
            check_memory(hp.index, estimate(hp.index, self.width, len(self.collection))[0])

    def open_store(self, force: bool) -> VectorStore:
        """Return the vectors on disk; with `force` they are deleted first."""
        stamp = {**self.vector_stamp("passage"), "collection": self.collection.checksum}
        return VectorStore.create_or_continue(
            self.hp.para_emb_path, stamp, len(self.collection), self.width, self.hp.block_rows, log,
            force, shared=bool(self.hp.para_emb),
        )  # fmt: skip

    def encode_queries(self, model: DualEncoder) -> np.ndarray:
        """Return the query vectors (B, H) float32, and write them."""
        queries = self.encoder("query", model).encode(self.queries)
        save_vectors(self.output / "query.emb.npy", queries)
        write_stamp(self.output / "query.emb.npy", self.vector_stamp("query"))
        return queries

    def encode(self, force: bool) -> tuple[np.ndarray | None, VectorStore | None]:
        """Return the query vectors (B, H) float32 and the passage vectors on disk; one tower on the device at
        a time. Only the first of several processes encodes the queries; all of them share the passages.

        With Milvus no passage is encoded: None where their vectors are not here.
        """
        model, queries = load_model(self.model, self.hp.seed), None
        if self.milvus:
            return self.encode_queries(model), self.milvus.store
        store = self.open_store(force)
        if rank() == 0:
            queries = self.encode_queries(model)
        if model.query_encoder is not model.passage_encoder:
            model.query_encoder = None  # its memory is the passage tower's now
        if store.missing_blocks():
            workers = worker_count(self.hp.workers, self.device)
            encode_collection(self.encoder("passage", model), self.collection, store, LOG_SECONDS, workers)
        else:
            log(f"{store.folder}: vectors up to date ({store.rows:,} passages)")
        return queries, store

    def plan(self) -> Plan:
        """Return what encoding and exact search would take."""
        planned, rows = Plan("do_dual_infer.py"), len(self.collection)
        encoder = self.encoder("passage", load_model(self.model, self.hp.seed))
        texts = [self.collection[row] for row in evenly(rows)]
        tokens = np.mean(encoder.tokenize(texts).lengths)
        each = seconds_a_text(encoder.encode, texts)
        what = f"encode {rows:,} passages ({tokens:.0f} tokens, {tokens / each:,.0f} tokens/s)"
        planned.add(what, each * rows)
        # a block's tokens and vectors, and the next one's, tokenised ahead
        block = min(rows, self.hp.block_rows) * (2 * 4 * tokens + 2 * encoder.width) / 1e9
        planned.ram_gb = memory_gb(self.device)[0] + block
        queries, index_bytes = len(self.queries), 0
        encoding_gb = memory_gb(self.device)[1]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # the model is gone when the search begins
        if self.hp.index:
            queries = min(queries, self.hp.recall_queries)
            index_bytes, seconds = estimate(self.hp.index, encoder.width, rows)
            planned.add(f"fill {self.hp.index} (training and searching it not counted)", seconds)
        if queries:
            planned.add(f"search {queries:,} queries, exactly", self.search_seconds(encoder.width, queries))
        ram, planned.gpu_gb = memory_gb(self.device)
        devices = search_devices(self.hp.device, self.device)
        if self.device.type == "cuda" and queries > self.bs and not self.hp.index:
            share = rows * encoder.width * 2 / len(devices)  # stays on each from one round to the next
            kept = share if share < CACHE_SHARE * free_gpu_memory(self.device) else 0
            planned.gpu_gb += kept / 1e9
        planned.gpu_gb = max(planned.gpu_gb, encoding_gb)
        planned.ram_gb = max(planned.ram_gb, ram + index_bytes / 1e9) + KEPT_GB
        planned.disk_gb = (rows * (2 * encoder.width + 8) + index_bytes) / 1e9
        planned.advice = "lower --search_memory_gb, --bs or --block_rows"
        if self.hp.index:
            planned.advice = "take a smaller --index, or none: exact search needs no memory for it"
        return planned

    def search_seconds(self, width: int, queries: int) -> float:
        """Return about how long an exact search takes, by one over a few generated vectors."""
        devices, memory = search_devices(self.hp.device, self.device), self.hp.search_memory_gb
        at_once, rows = min(self.bs, queries), len(self.collection)
        kind = choose_kind("auto", width, devices[0], log)
        some = min(rows, 3 * chunk_rows(at_once, width, memory, devices))
        draw = np.random.default_rng(0)
        probes = draw.standard_normal((at_once, width), dtype=np.float32)
        with tempfile.TemporaryDirectory() as folder:
            store = VectorStore.create_or_continue(folder, {}, some, width, some, log)
            store.write_block(0, draw.standard_normal((some, width), dtype=np.float32).astype(np.float16))
            took = seconds_of(lambda: search(store, probes, self.topk, devices, kind, memory))
        return took * rows / some * queries / at_once

    def searcher(self, queries: np.ndarray, store: VectorStore | None) -> Callable:
        """Return search(round of queries) -> (rows, scores, what to say of it): exact, or by an index."""
        hp, devices = self.hp, search_devices(self.hp.device, self.device)
        if self.milvus:
            return self.milvus_searcher(self.milvus, queries)
        if hp.index:
            settings = IndexSettings(hp.index, hp.search_params, hp.search_memory_gb, hp.seed)
            path, stamp = self.output / INDEX, {**store.manifest, "stage": "index"}
            index = FaissSearch(store, settings, path, stamp, hp.force)
            if hp.recall_queries:
                log(index.recall(queries, self.topk, self.device, hp.recall_queries))
            return lambda some: (*index.search(some, self.topk), "")
        kind = choose_kind("auto", store.hidden, devices[0], log)
        at_once = min(self.bs, len(queries))
        chunk_rows(at_once, store.hidden, hp.search_memory_gb, devices)  # UserError

        resident = DeviceCache.if_it_fits(store, devices) if len(queries) > self.bs else None

        def exact(some: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
            memory = hp.search_memory_gb
            rows, scores, effort = search(store, some, self.topk, devices, kind, memory, resident)
            return rows, scores, str(effort)

        return exact

    def milvus_searcher(self, milvus: MilvusSearch, queries: np.ndarray) -> Callable:
        """Return the search on Milvus, as `searcher` does."""
        hp = self.hp
        milvus.check_blocks()
        if hp.recall_queries and milvus.store:
            line = measured_recall(
                lambda some: milvus.search(some, self.topk), milvus.store, queries, self.topk, self.device,
                hp.recall_queries, hp.search_memory_gb, hp.seed,
            )  # fmt: skip
            log(f"Milvus {milvus.index}: {line}")
        return lambda some: (*milvus.search(some, self.topk), "")

    def write_run(self, path: Path, queries: np.ndarray, store: VectorStore | None) -> None:
        """Search `bs` queries a round and write the run, in the order of the queries."""
        find = self.searcher(queries, store)
        clear_stamp(path)
        with atomic_write(path) as file:
            for start in range(0, len(queries), self.bs):
                begun = time.monotonic()
                rows, scores, note = find(queries[start : start + self.bs])
                texts = self.queries[start : start + self.bs]
                for query, found, values in zip(texts, rows.tolist(), scores.tolist(), strict=True):
                    pairs = (pair for pair in zip(found, values, strict=True) if pair[0] >= 0)
                    for place, (row, score) in enumerate(pairs, start=1):
                        file.write(format_run_row(RunRow(query, row, place, score)))
                done = f"searched {min(start + self.bs, len(queries)):,}/{len(queries):,} queries"
                log(f"{done} in {duration(time.monotonic() - begun)}  {note}".rstrip())
        settings = {"topk": self.topk, "bs": self.bs, "fixed_by_weights": self.model.fixed}
        hparams.save(self.hp, self.output / "dual_infer_hparams.json", **settings)
        write_stamp(path, self.run_stamp())  # last: it says that all is done


def search_soundly(inference: DualInference, path: Path, deleted: set[int]) -> bool:
    """Encode what is missing and write the run; False when a damaged block of vectors had to be `deleted`."""
    queries, store = inference.encode(inference.hp.force and not deleted)
    if queries is None:
        return True  # not the first process
    gc.collect()
    if inference.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        inference.write_run(path, queries, store)
    except DamagedBlock as damage:
        if inference.milvus:
            raise  # no passage is encoded in this run: nothing would make the block again
        store.delete_damaged(damage, deleted)
        return False
    return True


def run(hp: InferenceDeHparams, topk: int, bs: int) -> None:
    """Encode, search and write the run, unless it is up to date."""
    hparams.announce("encode and search", hp)
    topk, bs = hp.topk or topk, hp.bs or bs
    hparams.check_range("topk", topk, 1)
    hparams.check_range("bs", bs, 1)
    if hp.force and int(os.getenv("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--force with several processes: each would delete the vectors of the others; run once with "
            f"--force in one process, or delete {hp.para_emb_path} and omit --force"
        )
    log(f"topk {topk}  bs {bs}")
    if hp.plan:
        inference = DualInference(hp, topk, bs)
        return inference.plan().say(hp.output_dir, inference.device)
    with folder_lock(hp.output_dir, shared=True):
        _run(hp, topk, bs)


def _run(hp: InferenceDeHparams, topk: int, bs: int) -> None:
    inference = DualInference(hp, topk, bs)
    path = inference.output / f"res.top{topk}"
    if not hp.force and up_to_date(path, inference.run_stamp(), log):
        log(f"{path}: up to date")
        return
    inference.passage_ids()  # UserError before the encoding, not after it
    if len(inference.collection) < topk:
        warn(
            f"the collection has {len(inference.collection)} passages, fewer than topk {topk}: "
            "all of them are kept"
        )
    inference.check_search()
    deleted: set[int] = set()
    while not search_soundly(inference, path, deleted):
        continue  # a damaged block was deleted: encode it again
    if rank():
        return  # the first process has searched
    log(f"wrote {path} ({len(inference.queries):,} queries x {min(topk, len(inference.collection))})  "
        f"peak memory {peak_memory_gb(inference.device):.2f} GB")  # fmt: skip


def main(argv: list[str], topk: int = 50, bs: int = 1000) -> int:
    """Run with these options (they win over `topk` and `bs`); return the exit status."""
    return exit_status(lambda: run(hparams.parse(InferenceDeHparams, argv), topk, bs))
