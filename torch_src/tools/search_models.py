"""The retriever and the re-ranker of the search service, with its settings and messages.

Imports torch, which takes seconds: the service imports this module in the thread that loads a model.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from torch_src.dual_hparams import MODEL_SETTINGS
from torch_src.hparams import NONE
from torch_src.inference import Retriever
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.reranker import Reranker
from torch_src.retrieval.fusion import Ranking
from torch_src.runtime.devices import choose_device
from torch_src.runtime.files import read_json
from torch_src.runtime.log import log
from torch_src.runtime.stamps import JsonDict
from torch_src.saved_settings import for_vectors
from torch_src.tools.batching import Batcher
from torch_src.tools.demo_hparams import DemoHparams, how_to_fix
from torch_src.tools.page_error import NotReadyError, PageError
from torch_src.vector_search import OtherVectors, ReplacedVectors, VectorSearch

TRIAL = "问题"  # a question, searched once when the model is loaded
MOST_TEXTS, MOST_PAIRS = 64, 256  # of several callers in a batch


@dataclass(frozen=True)
class Found:
    """The ranking of a question by its vector."""

    ranking: Ranking
    cut: bool  # the question is truncated
    seconds: dict[str, float] = field(default_factory=dict)  # of the steps, for all questions of the batch


class DenseSearch:
    """A dual encoder with the vectors of all passages; computes what several callers ask together."""

    def __init__(self, hp: DemoHparams):
        """UserError when a part is missing or does not belong to the others."""
        self.hp = hp
        manifest = read_json(Path(hp.para_emb_path) / "manifest.json")
        self.retriever = retriever = Retriever(dual_settings(hp, manifest))
        with page_errors(hp):
            retriever.open_vectors()
        for found in retriever.truncation([]):
            found.report()
        self.name = retriever.source.params or retriever.source.path
        self.questions = Batcher(self._search, MOST_TEXTS)
        self.texts = Batcher(self._encode, MOST_TEXTS, lambda item: len(item[1]))
        self.submit(TRIAL, 1).result()  # a damaged block is an error now; the first question need not wait
        log(self.vectors.how)

    @property
    def vectors(self) -> VectorSearch:
        assert self.retriever.vectors is not None  # opened above
        return self.retriever.vectors

    def submit(self, question: str, topk: int) -> "Future[Found]":
        """Return the future ranking; its error is a UserError for vectors replaced on disk."""
        return self.questions.submit((question, topk))

    def encode(self, side: str, texts: list[str]) -> "Future[tuple[np.ndarray, int]]":
        """Return the future (vectors (N, H) float32, tokens) of texts of one side, query or passage."""
        return self.texts.submit((side, texts))

    def _search(self, asked: list[tuple[str, int]]) -> list[Found]:
        encoder = self.retriever.own_encoder("query")
        with self.retriever.lock, page_errors(self.hp):
            began = time.perf_counter()
            vectors = encoder.encode([question for question, _ in asked])
            cut = [bool(encoder.tokenize([question]).cut) for question, _ in asked]
            encoded = time.perf_counter()
            rows, scores = self.vectors.find(vectors, max(topk for _, topk in asked))
            seconds = {"encode": encoded - began, "search": time.perf_counter() - encoded}
        rankings = [
            # an index may find fewer than topk
            [(row, score) for row, score in zip(*found, strict=True) if row >= 0][:topk]
            for found, (_, topk) in zip(zip(rows.tolist(), scores.tolist(), strict=True), asked, strict=True)
        ]
        return [Found(ranking, was_cut, seconds) for ranking, was_cut in zip(rankings, cut, strict=True)]

    def _encode(self, asked: list[tuple[str, list[str]]]) -> list[tuple[np.ndarray, int]]:
        results: list[tuple[np.ndarray, int]] = [(np.empty(0), 0)] * len(asked)
        for side in {side for side, _ in asked}:
            items = [at for at, (other, _) in enumerate(asked) if other == side]
            encoder = self.retriever.own_encoder(side)
            with self.retriever.lock:
                table = encoder.tokenize(list(chain.from_iterable(asked[at][1] for at in items)))
                vectors, start = encoder.encode_table(table), 0
            for at in items:
                span = slice(start, start + len(asked[at][1]))
                results[at], start = (vectors[span], int(table.lengths[span].sum())), span.stop
        return results

    def best_scores(self, questions: list[str]) -> list[float]:
        """Return the score of the best passage for each of the questions."""
        with page_errors(self.hp):
            return self.retriever.rank(questions, 1)[1][:, 0].tolist()


class RerankedSearch:
    """A cross-encoder; scores the pairs of several callers together."""

    def __init__(self, hp: DemoHparams, settings: InferenceCrossHparams):
        """UserError when its weights are missing."""
        self.hp, self.reranker = hp, Reranker(settings)
        self.name = self.reranker.source.params or self.reranker.source.path
        self.pairs = Batcher(self._score, MOST_PAIRS, lambda item: len(item[1]))
        self.submit(TRIAL, [TRIAL]).result()  # loads the weights

    def submit(self, question: str, passages: list[str]) -> "Future[np.ndarray]":
        """Return the future logits (N,) float32 of the passages for a question."""
        return self.pairs.submit((question, passages))

    def _score(self, asked: list[tuple[str, list[str]]]) -> list[np.ndarray]:
        queries = [question for question, passages in asked for _ in passages]
        logits = self.reranker.score_pairs(queries, list(chain.from_iterable(found for _, found in asked)))
        return np.split(logits, np.cumsum([len(passages) for _, passages in asked])[:-1])


@contextmanager
def page_errors(hp: DemoHparams) -> Iterator[None]:
    """Raise errors about the vectors as the page shows them, with what to do."""
    try:
        yield
    except OtherVectors as error:
        fix, fix_zh = how_to_fix(hp)
        raise PageError(
            f"{hp.para_emb_path}: vectors of other weights, settings or passages ({error.details}); {fix}",
            f"{hp.para_emb_path} 里的向量属于别的权重、设置或段落（{error.details}）；{fix_zh}",
        ) from None
    except ReplacedVectors:
        raise NotReadyError(
            f"{hp.para_emb_path}: the vectors were replaced; the new ones are being loaded",
            f"{hp.para_emb_path} 里的向量已被替换，正在加载新的",
        ) from None


def dual_settings(hp: DemoHparams, manifest: JsonDict) -> InferenceDeHparams:
    """Return the settings of do_dual_infer.py for these vectors."""
    same = (
        "pretrained_model_path", "data_dir", "passage_dir", "passage_ids", "output_dir", "index",
        "search_params", "search_memory_gb", "topk", "precision", "device", "threads", "seed", "debug",
        *MODEL_SETTINGS,
    )  # fmt: skip
    settings = InferenceDeHparams(
        dual_params=hp.dual_params_path if hp.dual_params != NONE else hp.dual_params,
        para_emb=hp.para_emb_path,
        **{name: getattr(hp, name) for name in same},
    )
    return for_vectors(settings, manifest, choose_device(hp.device).type)
