"""do_dual_infer.py: queries + collection + output/dual_params.bin -> query.emb.npy, para_emb/, res.top50."""

import gc
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from torch_src import hparams
from torch_src.data.formats import RunRow, format_run_row
from torch_src.inference import LOG_SECONDS, Retriever, load_dual_model
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.inference_plan import plan_retrieval
from torch_src.inputs import check_inputs
from torch_src.models.dual_encoder import DualEncoder
from torch_src.query_ids import read_query_ids
from torch_src.retrieval.encoding import encode_collection
from torch_src.retrieval.engines.milvus import MAX_HITS, PROGRAM, MilvusSearch
from torch_src.retrieval.faiss_gpu import IndexGpus
from torch_src.retrieval.faiss_index import (
    INDEX,
    FaissSearch,
    IndexSettings,
    check_memory,
    estimate,
    index_gpus,
    new_index,
    set_parameters,
    usable_gpus,
)
from torch_src.retrieval.search import choose_kind, chunk_rows, measured_recall, search
from torch_src.retrieval.vectors import NOT_COMPARED, DamagedBlock, VectorStore, new_manifest, save_vectors
from torch_src.runtime.commands import command
from torch_src.runtime.devices import peak_memory_gb, search_devices, worker_count
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import log, rank, warn
from torch_src.runtime.outputs import (
    NUMPY,
    RUN,
    Output,
    begins,
    check_apart,
    check_outputs,
    settings_of,
)
from torch_src.runtime.program import exit_status
from torch_src.runtime.progress import Progress
from torch_src.runtime.stamps import JsonDict, checksum_text, clear_stamp, up_to_date, write_stamp

LARGE = 100_000  # passages from which the log tells how the search went: fewer take no time

# search(queries (B, H) float32) -> (rows (B, K) int64, scores (B, K) float64)
SearchFunction = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def main(argv: list[str], topk: int = 50, bs: int = 1000) -> int:
    """Run with these options (they override `topk` and `bs`); return the exit status."""
    return exit_status(lambda: run(hparams.parse(InferenceDeHparams, argv), topk, bs))


def run(hp: InferenceDeHparams, topk: int, bs: int) -> None:
    """Encode, search and write the run, unless it is up to date."""
    hparams.announce("encode and search", hp)
    topk, bs = hp.topk or topk, hp.bs or bs
    hparams.check_range("topk", topk, 1)
    hparams.check_range("bs", bs, 1)
    if hp.force and _process_count() > 1:
        raise UserError(
            "--force with several processes: each would delete the vectors of the others; run once with "
            f"--force in one process, or delete {hp.para_emb_path} and omit --force"
        )
    log(f"topk {topk}  bs {bs}")
    check_paths(hp, topk)
    check_inputs(hp, hp.pretrained_model_path, passage_dir_path="passages", dev_q_path="queries")
    if hp.plan:
        job = DualInference(hp, topk, bs)
        gpus = job.usable_gpus() if hp.index else None
        return plan_retrieval(job, len(job.queries), topk, bs, gpus).report(hp.output_dir, job.device)
    with folder_lock(hp.output_dir, shared=True):
        job = DualInference(hp, topk, bs)
        if hp.dev_q == hparams.NONE:
            encode_only(job)
        else:
            encode_and_search(job)


def check_paths(hp: InferenceDeHparams, topk: int) -> None:
    """UserError when a file to write is an input or foreign."""
    output = Path(hp.output_dir)
    outputs = [
        Output(output / f"res.top{topk}", RUN, ("dual_infer",)),
        Output(output / "query.emb.npy", NUMPY),
        Output(hp.saved_to, settings_of(output / f"res.top{topk}")),
    ]
    if hp.index:
        outputs.append(Output(output / INDEX, begins(rb"I"), ("index",)))
    check_outputs(outputs, hp.inputs)
    check_apart(hp.para_emb_path, hp.inputs)


def _process_count() -> int:
    return int(os.getenv("WORLD_SIZE", "1"))


class DualInference(Retriever):
    """The inputs of one inference run, checked before any slow step."""

    def __init__(self, hp: InferenceDeHparams, topk: int, bs: int):
        self.topk, self.bs = topk, bs
        self.queries = [] if hp.dev_q == hparams.NONE else list(read_query_ids(hp))
        super().__init__(hp)
        self.milvus = self._open_milvus() if hp.engine == "milvus" else None
        self.run_path = self.output / f"res.top{topk}"
        self.search_devices = search_devices(hp.device, self.device)

    @property
    def passage_manifest(self) -> JsonDict:
        """Manifest of the passage vectors that this machine would encode."""
        return new_manifest(self.passage_stamp(), self.vector_rows, self.width, self.hp.block_rows)

    def _open_milvus(self) -> MilvusSearch:
        """Return the search on Milvus; UserError unless all vectors are loaded there."""
        hp = self.hp
        hparams.check_range("topk", self.topk, 1, MAX_HITS)
        if _process_count() > 1:
            raise UserError("--engine milvus encodes only queries: run it without torchrun")
        options = {"--output_dir": hp.output_dir, "--data_dir": hp.data_dir}
        for name in ("para_emb", "milvus_uri", "milvus_collection"):
            if getattr(hp, name):
                options[f"--{name}"] = getattr(hp, name)
        if hp.passage_ids or hp.passage_dir:
            options["--passage_ids"] = hp.passage_ids_path
        load = command(PROGRAM, *(word for option in options.items() for word in option))
        uri, name, folder = hp.milvus_uri_path, hp.milvus_collection, hp.para_emb_path
        how = (hp.search_params, load, self.windows)
        return MilvusSearch(uri, name, self.passage_manifest, folder, *how)

    def run_stamp(self) -> JsonDict:
        """Return the stamp of res.top{k}."""
        hp = self.hp
        stamp: JsonDict = {"stage": "dual_infer"}
        for side in ("query", "passage"):
            stamp |= {f"{side} {name}": value for name, value in self.vector_stamp(side).items()}
        stamp |= {
            "queries": checksum_text("\n".join(self.queries)),
            "collection": self.collection.checksum,
            "block_rows": hp.block_rows,
            "topk": self.topk,
        }
        if hp.index:
            for name in ("index", "search_params", "seed", "search_memory_gb"):
                stamp[name] = getattr(hp, name)
        if self.milvus:
            stamp |= {name: getattr(hp, name) for name in ("engine", "milvus_collection", "search_params")}
            manifest = self.milvus.manifest  # the vectors may come from another machine
            stamp |= {f"passage {name}": manifest[name] for name in NOT_COMPARED}
            stamp |= {
                "milvus_uri": hp.milvus_uri_path,
                "milvus_index": self.milvus.index,
                "scores": self.milvus.scores,
                "block_rows": manifest["block_rows"],
            }
        return stamp

    @property
    def unit(self) -> str:
        """What a vector is of, for the log."""
        return "passages" if self.windows is None else "windows"

    @cached_property
    def index_gpus(self) -> IndexGpus | None:
        """The GPUs for an index; some memory of each is left to the exact search."""
        return index_gpus(self.search_devices, self.hp.search_memory_gb)

    @property
    def index_settings(self) -> IndexSettings:
        hp = self.hp
        depth = self.topk if self.windows is None else self.windows.first_depth(self.topk)
        return IndexSettings(hp.index, hp.search_params, hp.search_memory_gb, hp.seed, depth)

    def usable_gpus(self) -> IndexGpus | None:
        """Return the GPUs that can hold the index, None where it is on the CPU."""
        if self.index_gpus is None:
            return None
        return usable_gpus(self.index_gpus, self.index_settings, self.width, self.vector_rows)

    def check_search(self) -> None:
        """UserError for search settings that would fail after the encoding."""
        hp = self.hp
        if hp.index:
            set_parameters(new_index(hp.index, self.width), hp.index, hp.search_params)
            # only the first process uses all GPUs
            checks = not (self.output / INDEX).exists() and (rank() == 0 or self.device.type == "cpu")
            if checks and not self.usable_gpus():
                check_memory(hp.index, estimate(hp.index, self.width, self.vector_rows)[0])
        elif not self.milvus:
            at_once = min(self.bs, len(self.queries))
            chunk_rows(at_once, self.width, hp.search_memory_gb, self.search_devices)


def encode_only(job: DualInference) -> None:
    """Write the passage vectors unless they are up to date, without a search."""
    job.passage_ids()  # raises UserError before the encoding
    if rank() == 0:
        for found in job.truncation([]):
            found.report()
        save_settings(job)  # first: the search page reads them while the passages are encoded
    model, store = load_dual_model(job.source), open_store(job, job.hp.force)
    encode_passages(job, model, store)
    if rank() == 0:
        log(f"{store.folder}: vectors of {store.rows:,} {job.unit}; no search (--dev_q none)")


def encode_and_search(job: DualInference) -> None:
    """Write res.top{k} unless it is up to date; with several processes, only the first searches."""
    path, passages = job.run_path, len(job.collection)
    if not job.hp.force and up_to_date(path, job.run_stamp(), log):
        log(f"{path}: up to date")
        return
    job.passage_ids()  # raises UserError before the encoding
    job.check_search()
    if rank() == 0:
        for found in job.truncation(job.queries):
            found.report()
    if passages < job.topk:
        warn(f"the collection has {passages} passages, fewer than topk {job.topk}: all of them are kept")
    deleted: set[int] = set()  # damaged blocks
    while True:
        queries, store = encode(job, force=job.hp.force and not deleted)
        if queries is None:
            return
        gc.collect()  # the encoders
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            write_run(job, queries, make_search(job, queries, store))
            break
        except DamagedBlock as damage:
            if job.milvus or store is None:
                raise  # no passages are encoded in this run, so the block would stay missing
            store.delete_damaged(damage, deleted)
    log(f"wrote {path} ({len(job.queries):,} queries x {min(job.topk, passages)})  "
        f"peak memory {peak_memory_gb(job.device):.2f} GB")  # fmt: skip


def encode(job: DualInference, force: bool) -> tuple[np.ndarray | None, VectorStore | None]:
    """Return (query vectors (B, H) float32, None except in the first process; passage vectors on disk).

    With Milvus no passages are encoded, and the vectors on disk may be None.
    """
    model = load_dual_model(job.source)
    if job.milvus:
        return encode_queries(job, model), job.milvus.store
    store = open_store(job, force)
    queries = encode_queries(job, model) if rank() == 0 else None
    encode_passages(job, model, store)
    return queries, store


def open_store(job: DualInference, force: bool) -> VectorStore:
    """Return the passage vectors on disk: those of this run, or new ones."""
    shape, shared = (job.vector_rows, job.width, job.hp.block_rows), bool(job.hp.para_emb)
    folder, stamp = job.hp.para_emb_path, job.passage_stamp()
    return VectorStore.create_or_continue(folder, stamp, *shape, log, force, shared)


def encode_queries(job: DualInference, model: DualEncoder) -> np.ndarray:
    """Return the query vectors (B, H) float32 and write them to query.emb.npy."""
    vectors = job.encoder("query", model).encode(job.queries)
    path = job.output / "query.emb.npy"
    save_vectors(path, vectors)
    write_stamp(path, job.vector_stamp("query"))
    return vectors


def encode_passages(job: DualInference, model: DualEncoder, store: VectorStore) -> None:
    """Encode the missing blocks of passage vectors."""
    if not store.missing_blocks():
        log(f"{store.folder}: vectors up to date ({store.rows:,} {job.unit})")
        store.delete_previous()  # of a run that was killed just before
        return
    if model.query_encoder is not model.passage_encoder:
        del model.query_encoder  # frees its memory for the passages
    rows = min(store.rows, len(store.missing_blocks()) * store.block_rows)
    workers = worker_count(job.hp.workers, job.device, rows)
    encoder = job.encoder("passage", model)
    encode_collection(encoder, encoder.texts_of(job.collection, job.windows), store, LOG_SECONDS, workers)


def make_search(job: DualInference, queries: np.ndarray, store: VectorStore | None) -> SearchFunction:
    """Return the search function; `queries` are all queries of the run."""
    if job.milvus:
        return _milvus_search(job, job.milvus, queries)
    assert store is not None  # only Milvus needs no store
    return _index_search(job, queries, store) if job.hp.index else _exact_search(job, store)


def _exact_search(job: DualInference, store: VectorStore) -> SearchFunction:
    devices, memory_gb = job.search_devices, job.hp.search_memory_gb
    is_large = store.rows >= LARGE
    kind = choose_kind("auto", store.hidden, devices[0], log if is_large else None)

    def find(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        progress = Progress(store.rows, LOG_SECONDS, "searched", job.unit)
        how = (devices, kind, memory_gb)
        rows, scores, stats = search(
            store, queries, job.topk, *how, bs=job.bs, searched=progress.add, windows=job.windows
        )
        progress.close()
        if is_large:
            log(f"{len(queries):,} queries: {stats}")
        return rows, scores

    return find


def _index_search(job: DualInference, queries: np.ndarray, store: VectorStore) -> SearchFunction:
    hp = job.hp
    path, stamp = job.output / INDEX, {**store.manifest, "stage": "index"}
    index = FaissSearch(
        store, job.index_settings, path, stamp, hp.force, gpus=job.index_gpus, windows=job.windows
    )
    if hp.recall_queries:
        log(index.recall(queries, job.topk, job.device, hp.recall_queries))
    return _in_batches(job.bs, lambda queries: index.search(queries, job.topk))


def _milvus_search(job: DualInference, milvus: MilvusSearch, queries: np.ndarray) -> SearchFunction:
    hp = job.hp
    milvus.check_blocks()
    if hp.recall_queries and milvus.store:
        limits = hp.recall_queries, hp.search_memory_gb, hp.seed, job.windows
        line = measured_recall(
            lambda q: milvus.search(q, job.topk), milvus.store, queries, job.topk, job.device, *limits
        )
        log(f"Milvus {milvus.index}: {line}")
    return _in_batches(job.bs, lambda queries: milvus.search(queries, job.topk))


def _in_batches(bs: int, find: SearchFunction) -> SearchFunction:
    """Return the search that calls `find` for `bs` queries at a time."""

    def find_all(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        progress, found = Progress(len(queries), LOG_SECONDS, "searched", "queries"), []
        for start in range(0, len(queries), bs):
            found.append(find(queries[start : start + bs]))
            progress.add(len(found[-1][0]))
        progress.close()
        rows, scores = zip(*found, strict=True)
        return np.concatenate(rows), np.concatenate(scores)

    return find_all


def write_run(job: DualInference, queries: np.ndarray, find: SearchFunction) -> None:
    """Search all queries and write the run in their order, then its stamp."""
    clear_stamp(job.run_path)
    rows, scores = find(queries)
    with atomic_write(job.run_path) as file:
        for query, found, values in zip(job.queries, rows, scores, strict=True):
            ranked = zip(found.tolist(), values.tolist(), strict=True)
            for number, (row, score) in enumerate(ranked, start=1):
                if row >= 0:  # an index may find fewer than topk: the missing ones come last, as -1
                    file.write(format_run_row(RunRow(query, row, number, score)))
    save_settings(job)
    write_stamp(job.run_path, job.run_stamp())  # last: marks the run as complete


def save_settings(job: DualInference) -> None:
    """Write dual_infer_hparams.json."""
    settings = {"topk": job.topk, "bs": job.bs, "fixed_by_weights": job.source.settings}
    hparams.save(job.hp, job.hp.saved_to, **settings)
