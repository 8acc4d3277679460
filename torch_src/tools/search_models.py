"""The retriever and the re-ranker of the search service: models in memory, vectors in memory or on disk.

Imports torch, which takes seconds: the service imports this module in the thread that loads a model.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from torch_src.data.candidates import Candidates
from torch_src.dual_hparams import MODEL_SETTINGS
from torch_src.hparams import NONE
from torch_src.inference import (
    Retriever,
    choose_hardware,
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
from torch_src.retrieval.fusion import Ranking
from torch_src.retrieval.score_bounds import Float16, Float32
from torch_src.retrieval.search import search
from torch_src.retrieval.vectors import NOT_COMPARED, VectorStore
from torch_src.runtime.devices import choose_device, search_devices
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.log import log
from torch_src.runtime.stamps import JsonDict, changes, read_stamp
from torch_src.tools.demo_hparams import DemoHparams, how_to_fix
from torch_src.tools.page_error import PageError

TRIAL = "问题"  # a question, searched once when the model is loaded


class DenseSearch:
    """A dual encoder with the vectors of all passages; answers one question at a time."""

    def __init__(self, hp: DemoHparams):
        """UserError when a part is missing or does not belong to the others."""
        self.hp, self.lock = hp, threading.Lock()
        manifest = read_json(Path(hp.para_emb_path) / "manifest.json")
        self.retriever = Retriever(dual_settings(hp, manifest))
        self.store = open_vectors(hp, self.retriever, manifest)
        self.encoder = self.retriever.encoder("query", load_dual_model(self.retriever.source))
        for found in self.retriever.truncation([]):
            found.report()
        self.name = self.retriever.source.params or self.retriever.source.path
        self.how, self.find = self._make_search()
        self.search(TRIAL, 1, {})  # a damaged block is an error now, and the first question need not wait
        log(self.how)

    def _make_search(self) -> tuple[str, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]]:
        """Return (its description, search(queries, topk) -> (rows, scores))."""
        hp, store = self.hp, self.store
        devices = search_devices(hp.device, self.retriever.device)
        if hp.index:
            index = open_index(hp, store, devices)
            self.how_zh = f"近似检索（{hp.index}）"
            return f"approximate search ({hp.index})", index.search
        cache = DeviceCache.if_it_fits(store, devices, hp.search_memory_gb)
        # without a conversion of the passages, which takes longer than the product of one query
        kind = Float16.name if devices[0].type == "cuda" else Float32.name

        def find(queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
            return search(store, queries, topk, devices, kind, cache=cache)[:2]

        mb = store.rows * store.hidden * 2 / 1e6
        amount = f"{mb / 1000:,.1f} GB" if mb >= 1000 else f"{mb:,.1f} MB"
        place = "kept in memory" if cache else "read from disk for every question"
        self.how_zh = f"精确检索，向量 {amount}，{'已放进内存' if cache else '每次从硬盘读取'}"
        return f"exact search, {amount} of vectors {place}", find

    def search(self, question: str, topk: int, seconds: dict[str, float]) -> tuple[Ranking, bool]:
        """Return (ranking, whether the question was truncated); UserError for vectors replaced on disk.

        Adds the seconds of its steps to `seconds`.
        """
        with self.lock:
            began = time.perf_counter()
            vectors = self.encoder.encode([question])
            cut = bool(self.encoder.tokenize([question]).cut)
            encoded = time.perf_counter()
            with self._same_vectors():
                rows, scores = self.find(vectors, topk)
            seconds |= {"encode": encoded - began, "search": time.perf_counter() - encoded}
        found = rows[0] >= 0  # an index may find fewer than topk
        return list(zip(rows[0][found].tolist(), scores[0][found].tolist(), strict=True)), cut

    def best_scores(self, questions: list[str]) -> list[float]:
        """Return the score of the best passage for each of the questions."""
        with self.lock, self._same_vectors():
            return self.find(self.encoder.encode(questions), 1)[1][:, 0].tolist()

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
            raise PageError(
                f"{self.store.folder}: the vectors were replaced; the new ones are being loaded",
                f"{self.store.folder} 里的向量已被替换，正在加载新的",
            )


class Reranker:
    """A cross-encoder; scores the passages of one question at a time."""

    def __init__(self, hp: DemoHparams, settings: InferenceCrossHparams):
        """UserError when its weights are missing."""
        self.hp, self.lock = hp, threading.Lock()
        device, precision = choose_hardware(hp)
        source = find_cross_model(settings)
        log(f"re-ranker: {describe_reranker(source.settings, source.config)}")
        check_fits(source.config, source.tokenizer, {"max_seq_len": pair_rules(source)}, source.path)
        self.name = source.params or source.path
        model = load_cross_model(source)
        self.scorer = pair_scorer(source, model, settings.batch_size, device, precision)

    def logits(self, question: str, passages: list[str]) -> np.ndarray:
        """Return the logits (N,) float32 of the passages."""
        zeros, rows = np.zeros(len(passages), np.int32), np.arange(len(passages))
        candidates = Candidates([question], zeros, rows, zeros.astype(np.float32), None, None, passages)
        with self.lock:
            return self.scorer.score_all(candidates)


def dual_settings(hp: DemoHparams, manifest: JsonDict) -> InferenceDeHparams:
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


def open_vectors(hp: DemoHparams, retriever: Retriever, manifest: JsonDict) -> VectorStore:
    """Return the passage vectors; UserError when they are of other weights, settings or passages."""
    stamp = {name: value for name, value in retriever.passage_stamp().items() if name not in NOT_COMPARED}
    shape = {"rows": len(retriever.collection), "hidden": retriever.width}
    block_rows = manifest.get("block_rows", 0)
    different = changes(manifest, {**manifest, **stamp, **shape, "block_rows": block_rows})
    if different:
        details, (fix, fix_zh) = "; ".join(different), how_to_fix(hp)
        raise PageError(
            f"{hp.para_emb_path}: vectors of other weights, settings or passages ({details}); {fix}",
            f"{hp.para_emb_path} 里的向量属于别的权重、设置或段落（{details}）；{fix_zh}",
        )
    return VectorStore(hp.para_emb_path, manifest)


def open_index(hp: DemoHparams, store: VectorStore, devices: list[torch.device]) -> FaissSearch:
    """Return the index that do_dual_infer.py wrote; UserError when it is missing or of other settings."""
    path = Path(hp.output_dir) / INDEX
    stamp = read_stamp(path) or {}
    memory_gb, seed = stamp.get("memory_gb", 0.0), stamp.get("seed", 0)
    settings = IndexSettings(hp.index, hp.search_params, memory_gb, seed, hp.topk)
    stamp, gpus = {**store.manifest, "stage": "index"}, index_gpus(devices)
    return FaissSearch(store, settings, path, stamp, build=False, gpus=gpus)
