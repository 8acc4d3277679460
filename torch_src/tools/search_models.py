"""The retriever and the re-ranker of the search service, with its settings and messages.

Imports torch, which takes seconds: the service imports this module in the thread that loads a model.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from torch_src.tools.demo_hparams import DemoHparams, how_to_fix
from torch_src.tools.page_error import PageError
from torch_src.vector_search import OtherVectors, ReplacedVectors, VectorSearch

TRIAL = "问题"  # a question, searched once when the model is loaded


class DenseSearch:
    """A dual encoder with the vectors of all passages; answers one question at a time."""

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
        self.search(TRIAL, 1, {})  # a damaged block is an error now, and the first question need not wait
        log(self.vectors.how)

    @property
    def vectors(self) -> VectorSearch:
        assert self.retriever.vectors is not None  # opened above
        return self.retriever.vectors

    def search(self, question: str, topk: int, seconds: dict[str, float]) -> tuple[Ranking, bool]:
        """Return (ranking, whether the question was truncated); UserError for vectors replaced on disk.

        Adds the seconds of its steps to `seconds`.
        """
        encoder = self.retriever.own_encoder("query")
        with self.retriever.lock, page_errors(self.hp):
            began = time.perf_counter()
            vectors = encoder.encode([question])
            cut = bool(encoder.tokenize([question]).cut)
            encoded = time.perf_counter()
            rows, scores = self.vectors.find(vectors, topk)
            seconds |= {"encode": encoded - began, "search": time.perf_counter() - encoded}
        found = rows[0] >= 0  # an index may find fewer than topk
        return list(zip(rows[0][found].tolist(), scores[0][found].tolist(), strict=True)), cut

    def best_scores(self, questions: list[str]) -> list[float]:
        """Return the score of the best passage for each of the questions."""
        with page_errors(self.hp):
            return self.retriever.rank(questions, 1)[1][:, 0].tolist()


class RerankedSearch:
    """A cross-encoder; scores the passages of one question at a time."""

    def __init__(self, hp: DemoHparams, settings: InferenceCrossHparams):
        """UserError when its weights are missing."""
        self.hp, self.reranker = hp, Reranker(settings)
        self.name = self.reranker.source.params or self.reranker.source.path
        self.logits(TRIAL, [TRIAL])  # loads the weights

    def logits(self, question: str, passages: list[str]) -> np.ndarray:
        """Return the logits (N,) float32 of the passages."""
        return self.reranker.score(question, passages)


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
        raise PageError(
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
