"""Distillation of a small encoder: it learns a teacher's vectors, and to rank the passages of questions.

The vectors follow MiniLM-style sentence distillation (Reimers and Gurevych 2020, arXiv 2004.09813) with a
second term for the similarities within a batch (Tung and Mori 2019). One encoder serves both stages: its
pooled vectors retrieve, a head of one logit re-ranks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from transformers import PreTrainedTokenizerBase

from torch_src.models.cross_encoder import CrossEncoder
from torch_src.models.dual_encoder import embed
from torch_src.models.losses import contrastive_scores, listwise_loss
from torch_src.models.tokenization import TextRules, TokenTable, tokenize_pairs
from torch_src.retrieval.encoding import Encoder
from torch_src.runtime.files import atomic_write
from torch_src.runtime.progress import Progress
from torch_src.runtime.stamps import checksum_text
from torch_src.runtime.tensor_files import load_tensors
from torch_src.training.checkpoints import checksum, save_tensors
from torch_src.training.grad_cache import ChunkedForward, Chunking
from torch_src.training.trainer import Output, TrainingTask

SENTENCE = re.compile(r"[^。！？!?；;\n]+[。！？!?；;\n]?")
CLAUSE = re.compile(r"[^。！？!?；;，,：:、\n]{5,40}")
CLAUSES, QUESTIONS = 2, 2  # of a document, as queries
SPAN = 3  # sentences of a span, at most
LOG_SECONDS = 10.0
BLOCK = 1024  # texts in a file of the teacher's vectors
SIMILARITY_TEMPERATURE = 0.03
RANK_TEMPERATURE = 0.02
RANK_WEIGHT = 0.3  # of the contrastive loss over questions; the loss of the head has the weight 1
HEAD_LR_FACTOR = 2.0  # the head starts from random weights


@dataclass(frozen=True)
class Question:
    """A training question with passages that answer it and others that do not."""

    text: str
    positives: list[str]
    negatives: list[str]


@dataclass
class Texts:
    """The texts whose vectors are learned; those of a document are neighbors."""

    texts: list[str] = field(default_factory=list)
    is_query: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])  # of each document in `texts`, and the end

    def add(self, queries: Sequence[str], passages: Sequence[str]) -> None:
        """Add a document."""
        self.texts += [*queries, *passages]
        self.is_query += [True] * len(queries) + [False] * len(passages)
        self.starts.append(len(self.texts))

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.starts) - 1


def make_texts(passages: Sequence[str], questions: Sequence[Question], seed: int) -> Texts:
    """Return each passage with a span of its sentences, some clauses, and questions that it answers."""
    asked: dict[str, list[str]] = {}
    for question in questions:
        for positive in question.positives:
            asked.setdefault(positive, []).append(question.text)
    random, texts = np.random.default_rng([seed, 1]), Texts()
    for passage in passages:
        sentences, clauses = SENTENCE.findall(passage), CLAUSE.findall(passage)
        start = int(random.integers(max(1, len(sentences) - 1)))
        span = "".join(sentences[start : start + int(random.integers(1, SPAN + 1))])
        chosen = [clauses[at] for at in sorted(random.permutation(len(clauses))[:CLAUSES])]
        texts.add(chosen + asked.get(passage, [])[:QUESTIONS], [passage, span] if span else [passage])
    return texts


def teacher_vectors(teacher: dict[str, Encoder], texts: Texts, folder: Path, source: str) -> np.ndarray:
    """Return the teacher's vectors (N, H) float16 of the texts, cached in `folder` block by block.

    teacher: its encoders of queries and of passages. source: checksum of the teacher and its settings.
    """
    blocks, progress = [], Progress(len(texts.texts), LOG_SECONDS, "teacher: encoded", "texts")
    for start in range(0, len(texts.texts), BLOCK):
        chunk = slice(start, start + BLOCK)
        block, is_query = texts.texts[chunk], np.array(texts.is_query[chunk])
        path = folder / f"{checksum_text(repr((source, block, is_query.tolist())))}.npy"
        if not path.exists():
            vectors = np.zeros((len(block), teacher["query"].width), np.float16)
            for side, rows in (("query", is_query), ("passage", ~is_query)):
                if rows.any():
                    wanted = [text for text, take in zip(block, rows, strict=True) if take]
                    vectors[rows] = teacher[side].encode(wanted)
            with atomic_write(path, "wb") as file:
                np.save(file, vectors)
        blocks.append(np.load(path, allow_pickle=False))
        progress.add(len(block))
    progress.close()
    return np.concatenate(blocks)


def window(passage: str, question: str, characters: int) -> str:
    """Return the run of sentences within `characters` that shares most character pairs with the question."""
    if len(passage) <= characters:
        return passage
    wanted = {question[at : at + 2] for at in range(len(question) - 1)}
    starts = [found.start() for found in SENTENCE.finditer(passage)] or [0]
    windows = [passage[start : start + characters] for start in starts]
    return max(windows, key=lambda text: sum(pair in text for pair in wanted))


@dataclass(frozen=True)
class DistillationBatch:
    """Texts with the teacher's vectors (N, H) float32; questions, their passages and pairs, or None."""

    place: tuple[int, int]  # (epoch, step)
    documents: np.ndarray
    texts: TokenTable
    targets: np.ndarray
    questions: TokenTable | None = None
    passages: TokenTable | None = None  # the positive of each question, then a negative of each
    pairs: TokenTable | None = None  # groups of one positive and its negatives


@dataclass(frozen=True)
class DistillationBatches:
    """Draws and tokenizes the batch of (epoch, step): a pure function of both and the seed."""

    tokenizer: PreTrainedTokenizerBase
    rules: dict[str, TextRules]  # of query, passage and pair
    texts: Texts
    vectors: np.ndarray  # (N, H) float16, of the teacher
    questions: list[Question]
    documents: int  # in a batch
    question_count: int  # in a batch; 0: none
    group_size: int
    window: int  # characters of a ranked passage
    seed: int

    def __call__(self, place: tuple[int, int]) -> DistillationBatch:
        """Return the batch."""
        epoch, step = place
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(self.texts.documents)
        chosen = order[step * self.documents : (step + 1) * self.documents]
        rows = [row for at in chosen for row in range(self.texts.starts[at], self.texts.starts[at + 1])]
        is_query = np.array([self.texts.is_query[row] for row in rows])
        tables, places = [], []
        for side, mine in (("query", is_query), ("passage", ~is_query)):
            places.append(np.flatnonzero(mine))
            tables.append(self._tokens([self.texts.texts[rows[at]] for at in places[-1]], side))
        of_rows = np.array(rows)[np.concatenate(places)]
        targets = self.vectors[of_rows].astype(np.float32)
        return DistillationBatch(
            place, chosen, TokenTable.concatenate(tables), targets, *self._ranking(epoch, step)
        )

    def _tokens(self, texts: list[str], side: str) -> TokenTable:
        return TokenTable.of_texts(self.tokenizer, texts, self.rules[side])

    def _ranking(self, epoch: int, step: int) -> tuple[TokenTable, TokenTable, TokenTable] | tuple[()]:
        """Return questions, their passages and pairs; empty without questions."""
        if not self.question_count:
            return ()
        random = np.random.default_rng([self.seed, epoch, 1, step])
        chosen = [self.questions[at] for at in random.permutation(len(self.questions))[: self.question_count]]
        groups = [self._group(question, random) for question in chosen]
        texts = [question.text for question in chosen]
        passages = [group[0] for group in groups] + [group[1] for group in groups]
        queries = [text for text in texts for _ in range(self.group_size)]
        pairs = [passage for group in groups for passage in group]
        return (
            self._tokens(texts, "query"),
            self._tokens(passages, "passage"),
            tokenize_pairs(self.tokenizer, queries, pairs, self.rules["pair"]),
        )

    def _group(self, question: Question, random: np.random.Generator) -> list[str]:
        """Return a positive and negatives of a question; positives of other questions fill the group."""
        positive = question.positives[random.integers(len(question.positives))]
        own = [question.negatives[at] for at in random.permutation(len(question.negatives))]
        group = [positive, *own[: self.group_size - 1]]
        while len(group) < self.group_size:
            other = self.questions[random.integers(len(self.questions))].positives[0]
            if other not in question.positives:
                group.append(other)
        return [window(text, question.text, self.window) for text in group]


class DistillationTask(TrainingTask):
    """Training of the student: the interface for Trainer."""

    model: CrossEncoder
    make_batch: DistillationBatches
    unit = "documents"

    def __init__(
        self, model: CrossEncoder, batches: DistillationBatches, chunking: Chunking, params: Path, lr: float
    ):
        """params: file of the finished weights."""
        self.model, self.make_batch, self.chunking, self.params = model, batches, chunking, params
        self.batches_per_epoch = batches.texts.documents // batches.documents
        self.units_per_batch = batches.documents
        self.accuracy_name = "group" if batches.question_count else "nearest"
        # the variance of the teacher's vectors: a loss of 1 is that of predicting their mean
        self.variance = float(batches.vectors.astype(np.float32).var(0).sum())
        self.peak_lr = dict.fromkeys(model.random_parameters, HEAD_LR_FACTOR * lr)

    def forward(self, batch: DistillationBatch) -> Output:
        """Return the sum of the losses."""
        vectors = self._embed(batch, batch.texts, 0)
        targets = torch.from_numpy(batch.targets).to(self.chunking.device)
        loss, accuracy = vector_loss(vectors.outputs, targets, self.variance)
        if batch.questions is None or batch.passages is None or batch.pairs is None:
            return Output(loss, accuracy, [vectors])
        questions, passages = self._embed(batch, batch.questions, 1), self._embed(batch, batch.passages, 2)
        loss = loss + RANK_WEIGHT * question_loss(questions.outputs, passages.outputs)
        pad = self.make_batch.tokenizer.pad_token_id
        logits = self.chunking.run(self.model, batch.pairs, pad, (*batch.place, 3))
        ranked, accuracy = listwise_loss(logits.outputs, self.make_batch.group_size)
        return Output(loss + ranked, accuracy, [vectors, questions, passages, logits])

    def _embed(self, batch: DistillationBatch, tokens: TokenTable, number: int) -> ChunkedForward:
        """Return the normalized mean vectors of the texts."""

        def forward(input_ids: Tensor, mask: Tensor) -> Tensor:
            return embed(self.model.model.base_model, input_ids, mask, "mean", True)

        pad = self.make_batch.tokenizer.pad_token_id
        return self.chunking.run(forward, tokens, pad, (*batch.place, number))

    def describe(self, batch: DistillationBatch) -> str:
        """Return the documents of the batch."""
        return f"documents {', '.join(map(str, batch.documents[:5]))}, ..."

    def evaluate(self) -> dict[str, float]:
        """Return nothing: the last weights are kept."""
        return {}

    def save(self) -> str:
        """Write the weights."""
        save_tensors(self.params, self.model.model.state_dict())
        return checksum(self.model.model.state_dict())

    def saved_checksum(self) -> str | None:
        """Return the checksum of the weights on disk, None when there are none."""
        return checksum(load_tensors(self.params)) if self.params.exists() else None


def vector_loss(vectors: Tensor, targets: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Return (loss, share of vectors whose nearest target is their own); both (N, H), of length 1.

    The squared distance over the targets' variance, plus half the KL divergence of the similarities of each
    text with the others.
    """
    distance = (vectors - targets).square().sum(1).mean() / variance
    own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    ours, theirs = (
        (found @ found.T / SIMILARITY_TEMPERATURE).masked_fill(own, -1e4) for found in (vectors, targets)
    )
    divergence = kl_div(log_softmax(ours, 1), softmax(theirs, 1), reduction="batchmean")
    nearest = (vectors.detach() @ targets.T).argmax(1) == torch.arange(len(vectors), device=vectors.device)
    return distance + divergence / 2, nearest.double().mean()


def question_loss(questions: Tensor, passages: Tensor) -> Tensor:
    """Return the contrastive loss of questions (B, H) over passages (2 B, H): positives, then negatives."""
    scores = contrastive_scores(questions, passages, RANK_TEMPERATURE)
    return cross_entropy(scores, torch.arange(len(questions), device=scores.device))
