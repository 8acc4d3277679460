"""Score (query, passage) pairs: tokenize ahead, batch by length across queries, restore the order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from torch_src.data.candidates import Candidates
from torch_src.models.cross_encoder import CrossEncoder
from torch_src.models.tokenization import BatchedInference, Pairs, TextRules, pad, tokenize_pairs
from torch_src.runtime.devices import autocast
from torch_src.runtime.errors import UserError
from torch_src.runtime.prefetch import one_ahead

TOKENIZE_AHEAD = 4096  # pairs tokenized at once


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

    def tokenize(self, queries: list[str], passages: list[str]) -> Pairs:
        return tokenize_pairs(self.tokenizer, queries, passages, self.rules)

    @torch.inference_mode()
    def score(self, pairs: Pairs) -> np.ndarray:
        """Return the logits (N,) float32; UserError when one is not finite."""
        was_training = self.model.training
        self.model.eval()
        logits = np.empty(len(pairs.ids), dtype=np.float32)

        def forward(rows: np.ndarray) -> None:
            with autocast(self.device, self.precision):
                batch = self.model(*pair_tensors(pairs, rows, self.tokenizer.pad_token_id, self.device))
            logits[rows] = batch.cpu().numpy()

        self.run_batches(np.asarray(pairs.lengths), forward)
        self.model.train(was_training)
        if not np.isfinite(logits).all():
            raise UserError("the scores are not finite; check the weights, or use --precision fp32")
        return logits

    def score_candidates(
        self, candidates: Candidates, first: int, last: int
    ) -> Iterator[tuple[int, np.ndarray, Pairs]]:
        """Yield (first pair, logits, pairs) of chunks, tokenizing the next chunk while this one is scored."""

        def tokenized(start: int) -> tuple[int, Pairs]:
            stop = min(last, start + TOKENIZE_AHEAD)
            queries = [candidates.queries[at] for at in candidates.query_of[start:stop]]
            return start, self.tokenize(queries, candidates.passages(start, stop))

        for start, pairs in one_ahead(tokenized, range(first, last, TOKENIZE_AHEAD)):
            yield start, self.score(pairs), pairs

    def score_rows(self, candidates: Candidates, rows: list[int]) -> tuple[np.ndarray, Pairs]:
        """Return (logits, pairs) of the candidates with these numbers."""
        pairs = self.tokenize(*candidates.texts_of(rows))
        return self.score(pairs), pairs

    def score_all(self, candidates: Candidates) -> np.ndarray:
        """Return the logits (N,) float32 of all candidates."""
        return np.concatenate(
            [logits for _, logits, _ in self.score_candidates(candidates, 0, len(candidates))]
        )


def pair_tensors(
    pairs: Pairs, rows: Sequence[int] | np.ndarray, pad_id: int, device: torch.device
) -> list[torch.Tensor]:
    """Return [input ids, attention mask, segment ids], each (B, L) int64, of the pairs `rows`."""
    input_ids, mask = pad([pairs.ids[row] for row in rows], pad_id)
    types, _ = pad([pairs.types[row] for row in rows], 0)
    return [torch.from_numpy(array).to(device, non_blocking=True) for array in (input_ids, mask, types)]


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


def fused_scores(logits: np.ndarray, retriever: np.ndarray, spans: list[slice], weight: float) -> np.ndarray:
    """Return logits + weight * retriever scores, the latter with mean 0 and variance 1 in each span."""
    fused = logits.astype(np.float64)
    for span in spans:
        scores = retriever[span].astype(np.float64)
        spread = scores.std()
        if spread > 0:
            fused[span] += weight * (scores - scores.mean()) / spread
    return fused
