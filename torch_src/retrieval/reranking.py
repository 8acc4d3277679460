"""Score (query, passage) pairs: tokenize ahead, batch by length across queries, restore the order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from torch_src.data.candidates import Candidates
from torch_src.models.cross_encoder import CrossEncoder
from torch_src.models.tokenization import BatchedInference, TextRules, TokenTable, tokenize_pairs
from torch_src.models.windows import tokenize_pair_windows
from torch_src.retrieval.fusion import fused_scores
from torch_src.retrieval.tokenizing import TOKENIZE_AHEAD, Span, tokenized_spans
from torch_src.runtime.errors import UserError


@dataclass
class PairScorer(BatchedInference):
    """A cross-encoder with its tokenizer and settings: (query, passage) pairs to logits (N,)."""

    model: CrossEncoder
    tokenizer: PreTrainedTokenizerBase
    rules: TextRules
    device: torch.device
    precision: str
    batch_size: int  # maximum pairs per forward pass
    tokens_per_batch: int  # maximum padded tokens per forward pass; halved when memory runs out
    bf16_weights: bool = False

    def tokenize(self, queries: list[str], passages: list[str]) -> TokenTable:
        """Return the pairs, each in windows where the rules allow several."""
        return pair_table(self.tokenizer, queries, passages, self.rules)

    def score(self, pairs: TokenTable, done: Callable | None = None) -> np.ndarray:
        """Return the logits (N,) float32, of a pair in windows that of its best; UserError if not finite.

        Calls done(pairs, tokens) after each forward pass.
        """
        if pairs.windows is not None and done is not None:
            done = _of_pairs(done, pairs.windows)
        on_device = torch.empty(len(pairs), device=self.device)
        self.write_outputs(on_device, pairs, self.model, self.model, done)
        logits = on_device.cpu().numpy()  # one copy, so that CUDA does not wait after each batch
        if not np.isfinite(logits).all():
            raise UserError("the scores are not finite; check the weights, or use --precision fp32")
        if pairs.windows is None or not len(pairs):
            return logits
        return np.maximum.reduceat(logits, np.cumsum(pairs.windows) - pairs.windows)

    def score_candidates(
        self, candidates: Candidates, spans: Sequence[Span], workers: int = 0, done: Callable | None = None
    ) -> Iterator[tuple[Span, np.ndarray, TokenTable]]:
        """Yield (span, its logits, its pairs) for chunks of these spans of pairs, in order.

        A thread, or `workers` processes, tokenizes ahead. `done`: as in score.
        """
        # Many passes' worth of pairs are sorted by length; more than a thread would tokenize in time.
        size = max(TOKENIZE_AHEAD, self.tokens_per_batch) if workers else TOKENIZE_AHEAD
        chunks = [
            (start, min(last, start + size)) for first, last in spans for start in range(first, last, size)
        ]
        tokenize = partial(_tokenize, self.tokenizer, self.rules, candidates)
        max_rows = max((last - first for first, last in chunks), default=0)
        for span, pairs in tokenized_spans(tokenize, chunks, max_rows, workers):
            yield span, self.score(pairs, done), pairs

    def score_rows(self, candidates: Candidates, rows: list[int]) -> tuple[np.ndarray, TokenTable]:
        """Return (logits, pairs) of the candidates with these numbers."""
        pairs = self.tokenize(*candidates.texts_of(rows))
        return self.score(pairs), pairs

    def score_all(self, candidates: Candidates) -> np.ndarray:
        """Return the logits (N,) float32 of all candidates."""
        scored = self.score_candidates(candidates, [(0, len(candidates))])
        return np.concatenate([logits for _, logits, _ in scored])


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, rules: TextRules, candidates: Candidates, first: int, last: int
) -> TokenTable:
    queries = [candidates.queries[at] for at in candidates.query_of[first:last].tolist()]
    return pair_table(tokenizer, queries, candidates.passages(first, last), rules)


def pair_table(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: TextRules
) -> TokenTable:
    """Return the token ids of the pairs, or of their windows where the rules allow several."""
    tokenize = tokenize_pairs if rules.windows == 1 else tokenize_pair_windows
    return tokenize(tokenizer, queries, passages, rules)


def _of_pairs(done: Callable[[int, int], None], windows: np.ndarray) -> Callable[[int, int], None]:
    """Return the function that counts finished windows and calls done(pairs, tokens) in proportion."""
    total, finished = int(windows.sum()), 0

    def add(rows: int, tokens: int) -> None:
        nonlocal finished
        before, finished = finished, finished + rows
        done(finished * len(windows) // total - before * len(windows) // total, tokens)

    return add


def rank_pairs(candidates: Candidates, scores: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (query, its pairs best first); ties keep the order of the retriever."""
    for query, span in candidates.spans():
        order = np.argsort(-scores[span].astype(np.float64), kind="stable")
        yield query, span.start + order


def fuse(candidates: Candidates, logits: np.ndarray, weight: float) -> np.ndarray:
    """Return the fused scores (N,) float32 of candidates; with weight 0 the logits unchanged."""
    if not weight:
        return logits
    spans = [span for _, span in candidates.spans()]
    return fused_scores(logits, candidates.scores, spans, weight).astype(np.float32)
