"""Encode texts: tokenize ahead, batch by length within a block, restore the order; processes share blocks."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_src.data.collection import PassageCollection
from torch_src.models.dual_encoder import embed, shorten, vector_width
from torch_src.models.tokenization import BatchedInference, TextRules, TokenTable
from torch_src.models.windows import tokenize_windows
from torch_src.retrieval.known_vectors import KnownVectors
from torch_src.retrieval.passage_windows import PassageWindows, WindowTexts
from torch_src.retrieval.tokenizing import Span, tokenized_groups
from torch_src.retrieval.vectors import HASH_BYTES, VectorStore
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log
from torch_src.runtime.prefetch import finish_in_thread
from torch_src.runtime.progress import Progress
from torch_src.runtime.stamps import JsonDict

POLL_SECONDS = 1.0  # between checks for blocks of other processes


class VectorTexts(Protocol):
    """The texts of the vectors of a store, by vector row; picklable for processes that tokenize."""

    unit: ClassVar[str]  # what a vector is of, for the log

    def __len__(self) -> int: ...

    def tokenize(self, first: int, last: int) -> TokenTable:
        """Return the token ids of the vector rows first..last-1."""

    def hashes(self, first: int, last: int) -> np.ndarray:
        """Return the hashes (last - first, 16) uint8 of what these vectors are made from."""


@dataclass
class PassageTexts:
    """One vector per passage of a collection (VectorTexts)."""

    unit: ClassVar[str] = "passages"

    tokenizer: PreTrainedTokenizerBase
    rules: TextRules
    collection: PassageCollection

    def __len__(self) -> int:
        return len(self.collection)

    def tokenize(self, first: int, last: int) -> TokenTable:
        return TokenTable.of_texts(self.tokenizer, self.collection[first:last], self.rules)

    def hashes(self, first: int, last: int) -> np.ndarray:
        return text_hashes(self.collection[first:last])


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Return the XXH3-128 hashes (N, 16) uint8 of the texts."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode("utf-8")) for text in texts)
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, HASH_BYTES)


@dataclass
class Encoder(BatchedInference):
    """A tower with its tokenizer and settings: texts to vectors (N, H)."""

    tower: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rules: TextRules
    pooling: str
    normalize: bool
    device: torch.device
    precision: str
    batch_size: int  # maximum texts per forward pass
    tokens_per_batch: int  # maximum padded tokens per forward pass; halved when memory runs out
    dims: int = 0  # keep only the first dimensions of a vector; 0: all
    bf16_weights: bool = False

    @property
    def pad_multiple(self) -> int:
        """The numbers of a vector register: each text fills whole registers of a matrix product.

        The last bits of its vector then depend on the text alone, not on the others of its batch: products
        treat the rows beyond whole registers differently. Measured with AVX2; not promised on a GPU.
        """
        return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8

    @property
    def width(self) -> int:
        """The number of dimensions of a vector."""
        return self.dims or vector_width(self.tower.config)

    def tokenize(self, texts: list[str]) -> TokenTable:
        return TokenTable.of_texts(self.tokenizer, texts, self.rules)

    def texts_of(self, collection: PassageCollection, windows: PassageWindows | None = None) -> VectorTexts:
        """Return the texts of a collection for encode_collection: one vector per passage, or per window."""
        if windows is not None:
            return WindowTexts(self.tokenizer, self.rules, collection, windows)
        return PassageTexts(self.tokenizer, self.rules, collection)

    def tokenize_windows(self, texts: list[str]) -> TokenTable:
        """Return the token ids of the texts, or of their windows where the rules allow several."""
        if self.rules.windows == 1:
            return self.tokenize(texts)
        return tokenize_windows(self.tokenizer, texts, self.rules)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return the vectors (N, H) float32 of N texts."""
        return self.encode_table(self.tokenize(texts))

    def encode_table(self, table: TokenTable) -> np.ndarray:
        """Return the vectors (N, H) float32 of N tokenized texts; UserError when one is not finite."""
        vectors = self.encode_tokens(table)
        if not np.isfinite(vectors).all():
            raise UserError("the vectors are not finite; check the weights, or use --precision fp32")
        return vectors

    def encode_tokens(self, table: TokenTable) -> np.ndarray:
        """Return the vectors (N, H) float32 of N tokenized texts."""
        return self.encode_on_device(table, torch.float32).cpu().numpy()

    def encode_on_device(self, table: TokenTable, dtype: torch.dtype, done: Callable | None = None) -> Tensor:
        """Return the vectors (N, H) of `dtype` on the device; on CUDA the kernels may still be running.

        Calls done(texts, tokens) after each forward pass.
        """
        vectors = torch.empty((len(table), self.width), dtype=dtype, device=self.device)
        self.write_outputs(vectors, table, self.tower, self._embed, done)
        return vectors

    def _embed(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        found = embed(self.tower, input_ids, mask, self.pooling, self.normalize, self.rules.prompt_tokens)
        return shorten(found, self.width, self.normalize)


def encode_collection(
    encoder: Encoder, texts: VectorTexts, store: VectorStore, log_every: float, workers: int = 0
) -> None:
    """Encode `texts` into the missing blocks of `store`, logging progress every `log_every` seconds.

    Several processes may share a folder: each takes the next free block, including unfinished blocks of a
    killed process, and returns when all are finished. `workers` processes tokenize ahead (0: a thread).
    A thread copies and writes the vectors of a block while the next one is encoded.
    Memory: the model, two blocks of token ids, two of vectors.
    """
    missing, known = store.missing_blocks(), KnownVectors.of(store, texts.hashes)
    if len(missing) < store.block_count:
        done = store.block_count - len(missing)
        log(f"{store.folder}: {done} of {store.block_count} blocks are already encoded")
    left, copied = sum(last - first for first, last in map(store.block_range, missing)), known.count(missing)
    if known.sources:
        log(f"{store.folder}: copying {copied:,} vectors of unchanged texts, encoding {left - copied:,}")
    progress = Progress(left - copied, log_every, unit=texts.unit)
    workers = workers if left > copied else 0
    waiting = False
    try:
        while store.missing_blocks():
            blocks = store.locks.acquire_missing(store.missing_blocks(), store.is_missing)
            first = next(blocks, None)  # start no worker processes without work
            if first is not None:
                plans = (_BlockPlan.of(known, texts, block) for block in chain([first], blocks))
                tables = tokenized_groups(
                    texts.tokenize, ((plan, plan.spans()) for plan in plans), store.block_rows, workers
                )
                finish_in_thread(partial(_write_block, known), _encoded(encoder, tables, progress))
            else:
                if not waiting:
                    count = len(store.missing_blocks())
                    log(f"{store.folder}: waiting for other processes to encode {count} blocks")
                waiting = True
                time.sleep(POLL_SECONDS)
    finally:
        store.locks.release_all()
    progress.close()
    store.delete_previous()


@dataclass
class _BlockPlan:
    """Where the vectors of a block come from."""

    block: int
    first: int  # row of the collection
    source_rows: np.ndarray  # (rows,) int64 in the known vectors; -1: to be encoded
    hashes: np.ndarray | None  # (rows, 16) uint8

    @classmethod
    def of(cls, known: KnownVectors, texts: VectorTexts, block: int) -> "_BlockPlan":
        first, last = known.store.block_range(block)
        hashes = texts.hashes(first, last) if known.store.hashed else None
        return cls(block, first, known.rows_of(block, hashes), hashes)

    @property
    def encoded(self) -> np.ndarray:
        """Positions in the block of the texts to encode."""
        return np.flatnonzero(self.source_rows < 0)

    def spans(self) -> list[Span]:
        """Return the rows of the texts to encode as spans of the collection."""
        rows = self.first + self.encoded
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []
        return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def _encoded(
    encoder: Encoder, tables: Iterable[tuple[_BlockPlan, TokenTable]], progress: Progress
) -> Iterator[tuple[_BlockPlan, Tensor, JsonDict]]:
    """Yield (plan of a block, the encoded vectors on the device, the settings for its stamp)."""
    for plan, table in tables:
        vectors = encoder.encode_on_device(table, torch.float16, progress.add)
        if progress.unit == PassageTexts.unit:
            progress.add_truncated(table.cut)
        settings = {
            "threads": torch.get_num_threads(), "batch_size": encoder.batch_size,
            "tokens_per_batch": encoder.tokens_per_batch, "torch": torch.__version__,
        }  # fmt: skip
        yield plan, vectors, settings


def _write_block(known: KnownVectors, encoded: tuple[_BlockPlan, Tensor, JsonDict]) -> None:
    """Write a block: the encoded vectors, and copies of the known ones."""
    plan, on_device, settings = encoded
    vectors = on_device.cpu().numpy()
    if len(on_device) < len(plan.source_rows):
        both = np.empty((len(plan.source_rows), vectors.shape[1]), vectors.dtype)
        both[plan.encoded] = vectors
        known.copy(plan.source_rows, both)
        vectors = both
    check_float16(vectors, plan.first)
    known.store.write_block(plan.block, vectors, settings, plan.hashes)
    known.store.locks.release(plan.block)


def to_float16(vectors: np.ndarray, first_row: int) -> np.ndarray:
    """Return the vectors in float16; UserError when a value is beyond its range (65,504)."""
    with np.errstate(over="ignore"):
        stored = vectors.astype(np.float16)
    check_float16(stored, first_row)
    return stored


def check_float16(stored: np.ndarray, first_row: int) -> None:
    """UserError with the row number when a stored vector is not finite."""
    finite = np.isfinite(stored).all(axis=1)
    if not finite.all():
        row = first_row + int(np.flatnonzero(~finite)[0])
        raise UserError(f"the vector of row {row} is not finite or beyond float16 (65,504); use --normalize")
