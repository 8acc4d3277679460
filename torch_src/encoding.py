"""Texts to vectors: tokenised one block ahead, length-sorted batches, rows put back in order."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_src.collection import PassageCollection
from torch_src.devices import autocast
from torch_src.dual_model import embed
from torch_src.errors import UserError
from torch_src.helpers import duration, one_ahead, say
from torch_src.tokenization import TextRules, length_sorted_batches, pad, tokenize
from torch_src.vectors import VectorStore

TOKENIZE_AHEAD = 4096  # texts tokenised in one piece: their Python lists of ids take about 17 KB a passage


@dataclass
class Encoder:
    """One tower with all that turns a text into its vector."""

    tower: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rules: TextRules
    pooling: str
    normalize: bool
    device: torch.device
    precision: str
    batch_size: int  # texts in one forward pass, at most
    tokens_per_batch: int  # padded tokens in one forward pass, at most

    def tokenize(self, texts: list[str]) -> tuple[list[list[int]], int]:
        """Return (token ids, how many texts were cut)."""
        return tokenize(self.tokenizer, texts, self.rules)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return the vectors (len(texts), H) float32 of texts that fit into memory."""
        return self.encode_tokens(self.tokenize(texts)[0])

    @torch.inference_mode()
    def encode_tokens(self, ids: list[list[int]]) -> np.ndarray:
        """Return the vectors (len(ids), H) float32; UserError when one of them is not finite."""
        was_training = self.tower.training
        self.tower.eval()
        vectors = np.empty((len(ids), self.tower.config.hidden_size), dtype=np.float32)
        for rows in length_sorted_batches(
            [len(tokens) for tokens in ids], self.batch_size, self.tokens_per_batch
        ):
            arrays = pad([ids[row] for row in rows], self.tokenizer.pad_token_id)
            input_ids, mask = (torch.from_numpy(array).to(self.device, non_blocking=True) for array in arrays)
            with autocast(self.device, self.precision):
                batch = embed(self.tower, input_ids, mask, self.pooling, self.normalize)
            vectors[rows] = batch.float().cpu().numpy()
        self.tower.train(was_training)
        if not np.isfinite(vectors).all():
            raise UserError(
                "the model gives vectors that are not finite; are the weights sound? (try --precision fp32)"
            )
        return vectors


def encode_collection(
    encoder: Encoder, collection: PassageCollection, store: VectorStore, log_every: float
) -> None:
    """Encode the blocks of `store` that are not there yet; a log line every `log_every` seconds.

    Memory: one block of vectors, the token ids of two pieces of TOKENIZE_AHEAD passages, the model.
    """
    missing = store.missing_blocks()
    total = sum(last - first for first, last in map(store.block_range, missing))
    if len(missing) < store.block_count:
        done = store.block_count - len(missing)
        say(f"{store.folder}: {done} of {store.block_count} blocks of these settings are there and are kept")
    progress = Progress(total, log_every)
    for block in missing:
        first, last = store.block_range(block)
        vectors = np.empty((last - first, store.hidden), dtype=np.float16)
        for start, ids, cut in _tokenized_ahead(encoder, collection, first, last):
            piece = encoder.encode_tokens(ids)
            vectors[start - first : start - first + len(ids)] = to_float16(piece, start)
            progress.add(len(ids), sum(map(len, ids)), cut)
        store.write_block(block, vectors)
    progress.close()


def _tokenized_ahead(encoder: Encoder, collection, first: int, last: int) -> Iterator[tuple[int, list, int]]:
    """Return (first row, token ids, texts cut) of pieces, the next one being tokenised while this one is
    encoded.
    """

    def piece(start: int):
        return start, *encoder.tokenize(collection[start : min(last, start + TOKENIZE_AHEAD)])

    return one_ahead(piece, range(first, last, TOKENIZE_AHEAD))


def to_float16(vectors: np.ndarray, first_row: int) -> np.ndarray:
    """Return the vectors as they are stored; UserError when a value is beyond float16 (65,504)."""
    with np.errstate(over="ignore"):
        stored = vectors.astype(np.float16)
    if not np.isfinite(stored).all():
        row = first_row + int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
        raise UserError(f"the vector of row {row} has values beyond float16 (65,504); train with --normalize")
    return stored


class Progress:
    """Passages/s (or another unit), tokens/s and eta: tqdm on a terminal, plain lines elsewhere."""

    def __init__(
        self,
        total: int,
        log_every: float,
        verb: str = "encoded",
        unit: str = "passages",
        clock=time.monotonic,
    ):
        self.total, self.log_every, self.clock = total, log_every, clock
        self.verb, self.unit = verb, unit
        self.begun = self.logged = clock()
        self.texts = self.tokens = self.cut = 0
        self.bar = tqdm(total=total, unit=f" {unit}") if sys.stderr.isatty() else None

    def add(self, texts: int, tokens: int, cut: int) -> None:
        """Count a finished piece."""
        self.texts, self.tokens, self.cut = self.texts + texts, self.tokens + tokens, self.cut + cut
        if self.bar is not None:
            self.bar.update(texts)
        elif self.clock() - self.logged >= self.log_every:
            self.logged = self.clock()
            say(self._line())

    def _line(self) -> str:
        seconds = max(self.clock() - self.begun, 1e-9)
        left = (self.total - self.texts) * seconds / max(self.texts, 1)
        done = f"{self.texts:,}/{self.total:,} {self.unit} ({100 * self.texts / max(self.total, 1):.1f}%)"
        rates = f"{self.texts / seconds:,.0f} {self.unit}/s  {self.tokens / seconds:,.0f} tokens/s"
        return f"{self.verb} {done}  {rates}  eta {duration(left)}"

    def close(self) -> None:
        """Print the last line, with the share of texts that were cut."""
        if self.bar is not None:
            self.bar.close()
        if self.texts:
            seconds = self.clock() - self.begun
            done = f"{self.verb} {self.texts:,} {self.unit} in {duration(seconds)}"
            rate = f"{self.texts / max(seconds, 1e-9):,.0f} {self.unit}/s"
            say(f"{done}  {rate}  {100 * self.cut / self.texts:.1f}% of them were too long and cut")
