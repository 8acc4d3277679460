"""Search for one question at a time with both stages, using models and vectors on disk.

Writes nothing but caches. Missing vectors or indexes, or those of other weights, are errors.
"""

import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from torch_src.data.candidates import Candidates
from torch_src.dual_hparams import MODEL_SETTINGS
from torch_src.hparams import NONE
from torch_src.inference import (
    Retriever,
    find_cross_model,
    load_cross_model,
    load_dual_model,
    pair_rules,
    pair_scorer,
)
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.models.backbones import check_fits
from torch_src.models.cross_encoder import describe_reranker
from torch_src.retrieval.chunks import DeviceCache
from torch_src.retrieval.faiss_index import INDEX, FaissSearch, IndexSettings, index_gpus
from torch_src.retrieval.reranking import PairScorer, rank_pairs
from torch_src.retrieval.score_bounds import Float16, Float32
from torch_src.retrieval.score_checks import collapsed
from torch_src.retrieval.search import search
from torch_src.retrieval.vectors import NOT_COMPARED, VectorStore
from torch_src.runtime.devices import choose_device, search_devices
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, require
from torch_src.runtime.log import log
from torch_src.runtime.stamps import changes, read_stamp
from torch_src.tools.demo_hparams import DemoHparams

LONGEST_QUESTION = 10_000  # characters; the models read far fewer


@dataclass(frozen=True)
class Hit:
    """A passage in a result list."""

    rank: int  # from 1
    row: int  # global, 0-based
    pid: str  # empty with --passage_ids none
    score: float  # inner product of the retriever, or logit of the re-ranker
    text: str
    recall_rank: int  # rank of the retriever, from 1


@dataclass
class Answer:
    """The results of both stages for a question."""

    question: str
    cut: bool = False  # truncated for the retriever
    recall: list[Hit] = field(default_factory=list)  # best first
    reranked: list[Hit] | None = None  # the same passages, best first; None without a re-ranker
    warning: str | None = None  # when the re-ranker's scores are all alike
    seconds: dict[str, float] = field(default_factory=dict)  # encode, search, read (passages), re-rank

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Record the seconds of the `with` block."""
        begun = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - begun


class SearchService:
    """Models in memory and vectors in memory or on disk; one step of one question runs at a time."""

    def __init__(self, hp: DemoHparams):
        """UserError when a part is missing or does not belong to the others."""
        self.hp, self.lock = hp, threading.Lock()
        manifest_path = Path(hp.para_emb_path) / "manifest.json"
        manifest = read_json(manifest_path) if manifest_path.exists() else {}
        self.settings = dual_settings(hp, manifest)
        self.retriever = Retriever(self.settings)
        self.store = open_vectors(hp, self.retriever)
        self.ids = self.retriever.passage_ids()
        self.encoder = self.retriever.encoder("query", load_dual_model(self.retriever.source))
        self.scorer = open_scorer(hp, self.retriever) if hp.reranks else None
        self.truncation = self.retriever.truncation([])
        self.how, self.find = self._make_search()

    def _make_search(self) -> tuple[str, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]]:
        """Return (its description, search(queries, topk) -> (rows, scores))."""
        hp, store = self.hp, self.store
        devices = search_devices(hp.device, self.retriever.device)
        if hp.index:
            index = open_index(hp, store, devices)
            return f"approximate search ({hp.index})", index.search
        cache = DeviceCache.if_it_fits(store, devices, hp.search_memory_gb)
        # without a conversion of the passages, which takes longer than the product of one query
        kind = Float16.name if devices[0].type == "cuda" else Float32.name

        def find(queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
            return search(store, queries, topk, devices, kind, cache=cache)[:2]

        mb = store.rows * store.hidden * 2 / 1e6
        size = f"{mb / 1000:,.1f} GB of vectors" if mb >= 1000 else f"{mb:,.1f} MB of vectors"
        place = "kept in memory" if cache else "read from disk for every question"
        return f"exact search, {size} {place}", find

    def answer(self, question: str, topk: int | None = None) -> Answer:
        """Return the results of both stages; UserError for an empty or too long question."""
        return self.rerank(self.retrieve(question, topk))

    def retrieve(self, question: str, topk: int | None = None) -> Answer:
        """Return the results of the retriever; UserError as in `answer`, and for vectors replaced on disk."""
        answer = Answer(clean(question))
        with self.lock:
            with answer.timed("encode"):
                vectors = self.encoder.encode([answer.question])
            answer.cut = bool(self.encoder.tokenize([answer.question]).cut)
            with answer.timed("search"), self._same_vectors():
                rows, scores = self.find(vectors, topk or self.hp.topk)
            found = rows[0] >= 0  # an index may find fewer than topk
            with answer.timed("read"):
                answer.recall = self._hits(rows[0][found].tolist(), scores[0][found].tolist())
        return answer

    def rerank(self, answer: Answer) -> Answer:
        """Add the re-ranked results to the answer, where there is a re-ranker."""
        if self.scorer and answer.recall:
            with self.lock, answer.timed("re-rank"):
                answer.reranked = reranked(self.scorer, answer.question, answer.recall)
            logits = np.array([hit.score for hit in answer.reranked])
            answer.warning = collapsed(logits, [slice(0, len(logits))])
        return answer

    @contextmanager
    def _same_vectors(self) -> Iterator[None]:
        """UserError unless the manifest on disk is the one that was opened, before and after a search.

        Nothing locks the vectors: do_dual_infer.py may replace them at any time, with those of other weights
        than the model in memory. Checked also after an error: a missing file may mean replaced vectors.
        """
        self._check_manifest()
        try:
            yield
        finally:
            self._check_manifest()

    def _check_manifest(self) -> None:
        try:
            same = read_json(self.store.manifest_path) == self.store.manifest
        except UserError:  # missing, while the vectors are replaced
            same = False
        if not same:
            where = self.store.folder
            raise UserError(f"{where}: the vectors were replaced after this page was started; restart it")

    def _hits(self, rows: list[int], scores: list[float]) -> list[Hit]:
        pids = [""] * len(rows) if self.ids is None else [pid.decode() for pid in self.ids[rows]]
        texts = [self.retriever.collection[row] for row in rows]
        columns = zip(rows, pids, scores, texts, strict=True)
        return [Hit(rank, *columns, rank) for rank, columns in enumerate(columns, start=1)]


def clean(question: str) -> str:
    """Return the question without surrounding white space; UserError for an empty or too long one."""
    question = question.encode("utf-8", "replace").decode().strip()  # a lone surrogate has no UTF-8 form
    if not question:
        raise UserError("the question is empty")
    if len(question) > LONGEST_QUESTION:
        raise UserError(f"the question has {len(question):,} characters (at most {LONGEST_QUESTION:,})")
    return question


def reranked(scorer: PairScorer, question: str, hits: list[Hit]) -> list[Hit]:
    """Return the hits sorted by the re-ranker's logits; ties keep their order."""
    rows, scores = np.array([hit.row for hit in hits]), np.array([hit.score for hit in hits], np.float32)
    query_of, texts = np.zeros(len(hits), np.int32), [hit.text for hit in hits]
    candidates = Candidates([question], query_of, rows, scores, None, None, texts)
    logits = scorer.score_all(candidates)
    ((_, order),) = rank_pairs(candidates, logits)
    ranked = enumerate(order.tolist(), start=1)
    return [replace(hits[at], rank=rank, score=float(logits[at])) for rank, at in ranked]


def dual_settings(hp: DemoHparams, manifest: dict) -> InferenceDeHparams:
    """Return the settings of do_dual_infer.py for these vectors."""
    fixed = {name: getattr(hp, name) for name in MODEL_SETTINGS}
    precision, same = hp.precision, manifest.get("device") == choose_device(hp.device).type
    if precision == "auto" and same:
        precision = manifest.get("precision", "auto")
    return InferenceDeHparams(
        dual_params=hp.dual_params_path if hp.dual_params != NONE else hp.dual_params,
        pretrained_model_path=hp.pretrained_model_path, data_dir=hp.data_dir, passage_dir=hp.passage_dir,
        passage_ids=hp.passage_ids, para_emb=hp.para_emb_path, output_dir=hp.output_dir,
        vector_dims=manifest.get("vector_dims", 0), precision=precision, device=hp.device,
        threads=hp.threads, seed=hp.seed, debug=hp.debug, **fixed,
    )  # fmt: skip


def open_vectors(hp: DemoHparams, retriever: Retriever) -> VectorStore:
    """Return the passage vectors; UserError when they are missing, incomplete, or of other weights, settings
    or passages.
    """
    folder = Path(hp.para_emb_path)
    fix = f"run {command(hp)} (with --force if it logs `up to date`)"
    manifest = read_json(require(folder / "manifest.json", "passage vectors", fix))
    stamp = {name: value for name, value in retriever.passage_stamp().items() if name not in NOT_COMPARED}
    shape = {"rows": len(retriever.collection), "hidden": retriever.width}
    block_rows = manifest.get("block_rows", 0)
    different = changes(manifest, {**manifest, **stamp, **shape, "block_rows": block_rows})
    if different:
        raise UserError(
            f"{folder}: vectors of other weights, settings or passages ({'; '.join(different)}); {fix}"
        )
    store = VectorStore(folder, manifest)
    if missing := store.missing_blocks():
        raise UserError(
            f"{folder}: {len(missing)} of {store.block_count} blocks are missing or incomplete; {fix}"
        )
    return store


def open_index(hp: DemoHparams, store: VectorStore, devices: list[torch.device]) -> FaissSearch:
    """Return the index that do_dual_infer.py wrote; UserError when it is missing or of other settings."""
    path = Path(hp.output_dir) / INDEX
    stamp = read_stamp(path) or {}
    memory_gb, seed = stamp.get("memory_gb", 0.0), stamp.get("seed", 0)
    settings = IndexSettings(hp.index, hp.search_params, memory_gb, seed, hp.topk)
    stamp, gpus = {**store.manifest, "stage": "index"}, index_gpus(devices)
    return FaissSearch(store, settings, path, stamp, build=False, gpus=gpus)


def open_scorer(hp: DemoHparams, retriever: Retriever) -> PairScorer:
    """Return the re-ranker on the retriever's device; UserError when its weights are missing."""
    settings = InferenceCrossHparams(cross_params=hp.cross_params_path, seed=hp.seed, debug=hp.debug)
    source = find_cross_model(settings)
    log(describe_reranker(source.settings, source.config))
    check_fits(source.config, source.tokenizer, {"max_seq_len": pair_rules(source)}, source.path)
    model = load_cross_model(source)
    return pair_scorer(source, model, settings.batch_size, retriever.device, retriever.precision)


def command(hp: DemoHparams) -> str:
    """Return the command line of do_dual_infer.py that writes the vectors for these settings."""
    plain = DemoHparams.defaults(hp.debug)
    words = ["--debug"] if hp.debug else []
    for name in (knob.name for knob in fields(InferenceDeHparams) if hasattr(plain, knob.name)):
        value = getattr(hp, name)
        if value != getattr(plain, name) and name not in ("debug", "topk", "search_memory_gb"):
            words += [f"--{name}", str(value)]
    return shlex.join(["python", "do_dual_infer.py", *words])
