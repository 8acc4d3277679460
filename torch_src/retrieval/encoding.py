"""Texts to vectors: tokenised ahead, sorted by length within a block, batches cut by a token budget, rows put
back in order; blocks shared out between processes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_src.data.collection import PassageCollection
from torch_src.models.dual_encoder import embed, shorten
from torch_src.models.tokenization import BatchedInference, TextRules, TokenTable
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.devices import autocast, tensors_to
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log
from torch_src.runtime.prefetch import one_ahead
from torch_src.runtime.progress import Progress

TOKENIZE_AHEAD = 4096  # texts tokenised in one piece: their Python lists of ids take about 17 KB a passage
POLL_SECONDS = 1.0  # between looks whether the other processes are done with their blocks


@dataclass
class Encoder(BatchedInference):
    """One tower with all that turns a text into its vector."""

    tower: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rules: TextRules
    pooling: str
    normalize: bool
    device: torch.device
    precision: str
    batch_size: int  # texts in one forward pass, at most
    tokens_per_batch: int  # padded tokens in one forward pass, at most; halved when memory does not suffice
    dims: int = 0  # of a vector that are kept, the first ones; 0: all

    @property
    def width(self) -> int:
        """Return the dimensions of a vector."""
        return self.dims or self.tower.config.hidden_size

    def tokenize(self, texts: list[str]) -> TokenTable:
        """Return the texts' token ids."""
        return TokenTable.of_texts(self.tokenizer, texts, self.rules)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return the vectors (len(texts), H) float32 of texts that fit into memory."""
        vectors = self.encode_tokens(self.tokenize(texts))
        if not np.isfinite(vectors).all():
            raise UserError(
                "the model gives vectors that are not finite; are the weights sound? (try --precision fp32)"
            )
        return vectors

    @torch.inference_mode()
    def encode_tokens(
        self, table: TokenTable, dtype: torch.dtype = torch.float32, done: Callable | None = None
    ) -> np.ndarray:
        """Return the vectors (N, H) of `dtype`; done(texts, tokens) is called after each forward pass.

        The vectors stay on the device until the last: on CUDA nothing waits for a single batch.
        """
        was_training = self.tower.training
        self.tower.eval()
        vectors = torch.empty((len(table), self.width), dtype=dtype, device=self.device)

        def forward(rows: np.ndarray) -> None:
            self._forward(table, rows, vectors)
            if done is not None:
                done(len(rows), int(table.lengths[rows].sum()))

        with autocast(self.device, self.precision):  # one context: the cast weights are kept for all batches
            self.run_batches(table.lengths, forward)
        self.tower.train(was_training)
        return vectors.cpu().numpy()

    def _forward(self, table: TokenTable, rows: np.ndarray, vectors: torch.Tensor) -> None:
        arrays = (*table.padded(rows, self.tokenizer.pad_token_id), rows)
        input_ids, mask, at = tensors_to(self.device, *arrays)
        found = embed(self.tower, input_ids, mask, self.pooling, self.normalize)
        vectors[at] = shorten(found, self.width, self.normalize).to(vectors.dtype)


def encode_collection(
    encoder: Encoder, collection: PassageCollection, store: VectorStore, log_every: float, workers: int = 0
) -> None:
    """Encode the blocks of `store` that are not there yet; a log line every `log_every` seconds.

    Other processes may do the same on the same folder: each takes the next block that nobody has, and what a
    dead one left undone is taken over. Returns when every block is there. `workers` processes tokenise ahead
    (0: a thread). Memory: two blocks of token ids, one of vectors, the model.
    """
    missing = store.missing_blocks()
    if len(missing) < store.block_count:
        done = store.block_count - len(missing)
        log(f"{store.folder}: {done} of {store.block_count} blocks of these settings are there and are kept")
    progress = Progress(sum(last - first for first, last in map(store.block_range, missing)), log_every)
    waiting = False
    try:
        while store.missing_blocks():
            blocks = store.locks.acquire_missing(store.missing_blocks(), store.is_missing)
            first = next(blocks, None)  # worker processes are started when there is work for them
            if first is not None:
                mine = chain([first], blocks)
                for block, table in _tokenized_blocks(encoder, collection, store, mine, workers):
                    _encode_block(encoder, store, block, table, progress)
                    store.locks.release(block)
            else:
                if not waiting:
                    log(
                        f"waiting for other processes: they have {len(store.missing_blocks())} blocks in hand"
                    )
                waiting = True
                time.sleep(POLL_SECONDS)
    finally:
        store.locks.release_all()
    progress.close()


def _encode_block(encoder: Encoder, store: VectorStore, block: int, table: TokenTable, progress) -> None:
    vectors = encoder.encode_tokens(table, torch.float16, progress.add)
    check_float16(vectors, store.block_range(block)[0])
    progress.cut += table.cut
    made_with = {
        "threads": torch.get_num_threads(), "batch_size": encoder.batch_size,
        "tokens_per_batch": encoder.tokens_per_batch, "torch": torch.__version__,
    }  # fmt: skip
    store.write_block(block, vectors, made_with)


class _Pieces(Dataset):
    """Tokenised pieces of a collection by (block, first row, last row)."""

    def __init__(self, encoder: Encoder, collection: PassageCollection):
        self.tokenizer, self.rules, self.collection = encoder.tokenizer, encoder.rules, collection

    def __getitem__(self, piece: tuple[int, int, int]) -> tuple | UserError:
        """Return (block, last row, ids, lengths, texts cut)."""
        block, first, last = piece
        try:
            table = TokenTable.of_texts(self.tokenizer, self.collection[first:last], self.rules)
        except (UserError, OSError) as error:
            # raised where it is read: a loader would wrap it in a traceback
            named = getattr(error, "filename", None)
            return UserError(f"{named}: {error.strerror}" if named else str(error))
        return block, last, table.ids, table.lengths, table.cut


def _tokenized_blocks(
    encoder: Encoder, collection, store: VectorStore, blocks: Iterator[int], workers: int
) -> Iterator[tuple[int, TokenTable]]:
    """Yield (block, its token ids), the next pieces being tokenised while this block is encoded."""

    def pieces() -> Iterator[tuple[int, int, int]]:
        for block in blocks:
            first, last = store.block_range(block)
            for start in range(first, last, TOKENIZE_AHEAD):
                yield block, start, min(last, start + TOKENIZE_AHEAD)

    data = _Pieces(encoder, collection)
    if workers:
        # A loader with workers keeps their order, and ends them with this process.
        ready = DataLoader(data, sampler=pieces(), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    else:
        ready = one_ahead(data.__getitem__, pieces())
    parts: list[TokenTable] = []
    for piece in ready:
        if isinstance(piece, UserError):
            raise piece
        block, last, ids, lengths, cut = piece
        parts.append(TokenTable(ids, lengths, cut))
        if last == store.block_range(block)[1]:
            yield block, TokenTable.concatenate(parts)
            parts = []


def _as_it_is(item):
    return item


def to_float16(vectors: np.ndarray, first_row: int) -> np.ndarray:
    """Return the vectors as they are stored; UserError when a value is beyond float16 (65,504)."""
    with np.errstate(over="ignore"):
        stored = vectors.astype(np.float16)
    check_float16(stored, first_row)
    return stored


def check_float16(stored: np.ndarray, first_row: int) -> None:
    """UserError that names the row when a stored vector is not finite."""
    finite = np.isfinite(stored).all(axis=1)
    if not finite.all():
        row = first_row + int(np.flatnonzero(~finite)[0])
        raise UserError(
            f"the vector of row {row} has values that are not finite or beyond float16 (65,504); "
            "train with --normalize, or look at the weights"
        )
