"""The re-ranker of do_cross_infer.py, the search page, the HTTP service and the Python API."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from torch_src.inference import (
    check_texts,
    choose_hardware,
    find_cross_model,
    load_cross_model,
    pair_rules,
    pair_scorer,
)
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.models.backbones import check_fits
from torch_src.models.cross_encoder import CrossEncoder, describe_reranker
from torch_src.retrieval.fusion import fused_scores
from torch_src.retrieval.hits import Hit
from torch_src.retrieval.reranking import PairScorer
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log, silent
from torch_src.runtime.stamps import JsonDict
from torch_src.saved_settings import reranker_settings


class Reranker:
    """A cross-encoder with its settings, checked before its weights are loaded.

    `Reranker.load(...)` returns one for the Python API, usable from several threads.
    """

    def __init__(self, hp: InferenceCrossHparams, own_process: bool = True):
        """`own_process`: set the threads of the process."""
        self.hp, self.lock = hp, threading.RLock()
        self.device, self.precision = choose_hardware(hp, own_process)
        self.source = source = find_cross_model(hp)
        self.rules = pair_rules(source, hp.passage_windows, hp.window_stride)
        log(f"re-ranker: {describe_reranker(source.settings, source.config)}")
        check_fits(source.config, source.tokenizer, {"max_seq_len": self.rules}, source.path)

    @classmethod
    def load(
        cls,
        path: str | Path = "output",
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int = 0,
        **options: Any,
    ) -> "Reranker":
        """Return the re-ranker of an output folder of the programs, of a model folder, or of a hub name.

        device, precision, threads: as for Retriever.load. options: as those of do_cross_infer.py, such as
        max_seq_len. UserError, a ValueError, when something is missing.
        """
        hardware = {"device": device, "precision": precision, "threads": threads}
        with silent():
            reranker = Reranker(reranker_settings(str(path), {**options, **hardware}), own_process=False)
            reranker.own_scorer  # noqa: B018 (loads the weights)
        return reranker

    def stamp(self) -> JsonDict:
        """Return what decides the logit of a pair."""
        windows = {"passage_windows": self.rules.windows, "window_stride": self.rules.stride}
        return {
            **self.source.stamp,
            **self.source.settings,
            **(windows if self.hp.passage_windows > 1 else {}),
            "precision": self.precision,
            "device": self.device.type,
        }

    def scorer(self, model: CrossEncoder) -> PairScorer:
        """Return the scorer of this model, which is moved to the device."""
        return pair_scorer(self.source, model, self.hp.batch_size, self.device, self.precision, self.rules)

    @cached_property
    def own_scorer(self) -> PairScorer:
        return self.scorer(load_cross_model(self.source))

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """Return the logits (N,) float32 of N passages for a question; higher is more relevant."""
        return self.score_pairs([query] * len(passages), passages)

    def score_pairs(self, queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
        """Return the logits (N,) float32 of N pairs."""
        queries, passages = check_texts(queries, "queries"), check_texts(passages, "passages")
        with self.lock:
            return self.own_scorer.score(self.own_scorer.tokenize(queries, passages))

    def rerank(
        self, query: str, passages: Sequence[str | Hit], topk: int = 0, retriever_weight: float = 0.0
    ) -> list[Hit]:
        """Return the passages, or the hits of Retriever.search, best first; topk: how many, 0: all.

        The score is the logit, plus `retriever_weight` times the retriever's score at mean 0 and variance 1.
        Of a text, `row` is its place in `passages`.
        """
        hits = [
            each if isinstance(each, Hit) else Hit(0, row, "", 0.0, each) for row, each in enumerate(passages)
        ]
        if topk < 0:
            raise UserError(f"topk {topk}: must be at least 0")
        logits = self.score(query, [hit.text for hit in hits])
        before = np.array([hit.score for hit in hits])
        scores = fused_scores(logits, before, [slice(0, len(hits))], retriever_weight)
        order = np.argsort(-scores, kind="stable").tolist()[: topk or None]
        return [
            replace(hits[at], rank=rank, score=float(scores[at]), logit=float(logits[at]))
            for rank, at in enumerate(order, start=1)
        ]
