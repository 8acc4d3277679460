"""Texts and pairs to token ids (prefix, spaces, truncation), and token ids to batches of similar length."""

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, normalizers
from torch import Tensor, nn
from transformers import AutoTokenizer, BertTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from torch_src.data.lines import read_lines
from torch_src.models.hub import is_hub_name
from torch_src.models.model_folder import read_model_folder, read_reranker_folder
from torch_src.models.pair_template import PairTemplate, template_of
from torch_src.runtime.commands import pip_install
from torch_src.runtime.devices import autocast, tensors_to
from torch_src.runtime.errors import UserError, is_out_of_memory
from torch_src.runtime.files import read_json
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import checksum_text

LENGTHS = {"query": "q_max_seq_len", "passage": "p_max_seq_len"}  # side -> knob

# long texts are cut to this many characters per token before tokenization, to save time
CHARACTERS_PER_TOKEN = 16
TOKENIZER_FILES = ("tokenizer.json", "vocab", "spiece", "spm", "sentencepiece", "tokenizer.model")
MIN_PASSAGE_TOKENS = 16  # of a pair, with special tokens: queries that leave less are truncated
HAN = re.compile("[\u4e00-\u9fff]")
MIN_TOKENS_PER_BATCH = 512  # the token budget is not halved below this
TEXTS_PER_CALL = 512  # the tokenizer keeps the truncated tokens in memory until a call returns

# A fast tokenizer stores the length limit, so calls of two threads must not overlap.
LOCK = threading.Lock()


@dataclass(frozen=True)
class TextRules:
    """How the texts of one side (queries or passages) become token ids."""

    max_seq_len: int  # tokens of a text with special tokens; those of the prefix are not counted
    prefix: str = ""
    remove_spaces: bool = False
    prompt_tokens: int = 0  # first tokens that are not pooled
    pair: PairTemplate | None = None  # text around query and passage of a pair; not counted either
    windows: int = 1  # most windows of a passage (windows.py)
    stride: int = 0  # tokens that neighboring windows share

    def clean(self, text: str) -> str:
        """Return the text to tokenize: ASCII spaces removed (with `remove_spaces`), then prefixed."""
        return self.prefix + self.without_prefix(text)

    def without_prefix(self, text: str) -> str:
        return text.replace(" ", "") if self.remove_spaces else text

    def max_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the most tokens of an input: `max_seq_len` and those of prefix and template."""
        around = [self.prefix]
        if self.pair:
            around += [self.pair.before, self.pair.between, self.pair.after]
        around = [text for text in around if text]
        return self.max_seq_len + sum(token_counts(tokenizer, around, add_special_tokens=False))


def retriever_rules(settings: Mapping[str, Any]) -> dict[str, TextRules]:
    """Return the rules of both sides, query and passage, from the settings of a retriever."""
    return {
        side: TextRules(settings[knob], settings[f"{side}_prefix"], settings["remove_spaces"])
        for side, knob in LENGTHS.items()
    }


def reranker_rules(settings: Mapping[str, Any], config: PretrainedConfig) -> TextRules:
    """Return the rules of pairs from the settings of a re-ranker and its configuration."""
    return TextRules(settings["max_seq_len"], "", settings["remove_spaces"], pair=template_of(config))


def load_tokenizer(
    pretrained_model_path: str, vocab_path: str = "", kind: str = "dual"
) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, or a WordPiece one from vocab.txt; UserError when loading fails.

    `kind`: dual for a retriever, cross for a re-ranker.
    """
    lower_case = False
    try:
        if vocab_path:
            if not os.path.isfile(vocab_path):
                raise UserError(f"{vocab_path}: no such file (vocab_path: a WordPiece vocab.txt)")
            _check_vocabulary(vocab_path)
            tokenizer: PreTrainedTokenizerBase = BertTokenizer(vocab=vocab_path)
        else:
            tokenizer, lower_case = _load_own_tokenizer(pretrained_model_path, kind)
    except UserError:
        raise
    except Exception as error:  # each kind of tokenizer raises its own errors for a broken folder
        reason = str(error).strip().split("\n")[0]
        path = vocab_path or pretrained_model_path
        raise UserError(f"{path}: the tokenizer cannot be loaded ({reason})") from error
    if not tokenizer.is_fast:
        raise UserError(f"{pretrained_model_path}: needs a fast tokenizer (tokenizer.json or vocab.txt)")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{pretrained_model_path}: the tokenizer needs a pad token or an end token")
        tokenizer.pad_token = tokenizer.eos_token  # masked, so any token will do
    if lower_case:
        _lower_case(tokenizer)
    return tokenizer


def _load_own_tokenizer(path: str, kind: str) -> tuple[PreTrainedTokenizerBase, bool]:
    """Return (the tokenizer of a folder or hub name, whether texts become lower case first)."""
    if not os.path.isdir(path) and not is_hub_name(path):
        raise UserError(f"{path}: no such folder (pretrained_model_path)")
    folder = read_model_folder(path) if kind == "dual" else read_reranker_folder(path)
    towers = [folder.tower(side) for side in ("passage", "query")[: 1 + folder.separate]]
    loaded = []
    for tower in towers:
        _check_folder(path, Path(tower))
        loaded.append(AutoTokenizer.from_pretrained(tower, trust_remote_code=False))
    if folder.separate and tokenizer_checksum(loaded[0]) != tokenizer_checksum(loaded[1]):
        raise UserError(f"{path}: two towers with different tokenizers are not supported")
    return loaded[0], folder.lower_case


def _check_folder(path: str, tower: Path) -> None:
    names = sorted(os.listdir(tower)) if tower.is_dir() else []
    # Without these files transformers builds a tokenizer with an empty vocabulary.
    if names and not any(name.startswith(TOKENIZER_FILES) for name in names):
        raise UserError(f"{path}: contains no tokenizer.json or vocab.txt; download the model again")
    file = tower / "tokenizer_config.json"
    stated = read_json(file) if file.exists() else {}
    if own_code := [code for code in (stated.get("auto_map") or {}).values() if code]:
        raise UserError(f"{file}: auto_map names a tokenizer's own code ({own_code[0]}), which is not run")
    if stated.get("tokenizer_class") in ("RoFormerTokenizer", "RoFormerTokenizerFast"):
        raise UserError(
            f"{file}: RoFormerTokenizer splits words by jieba and is not supported; use another model"
        )
    if "tokenizer.json" not in names and (models := [name for name in names if name.endswith(".model")]):
        if find_spec("sentencepiece") is None:
            raise UserError(
                f"{tower / models[0]}: a sentencepiece tokenizer without tokenizer.json; get tokenizer.json, "
                f"or run {pip_install('sentencepiece', 'protobuf')}"
            )


def _lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Turn texts into lower case before the tokenizer's own normalization, unless that already does."""
    own: Any = tokenizer.backend_tokenizer.normalizer
    steps: list[Any] = [] if own is None else [own]
    if isinstance(own, normalizers.Sequence):
        steps = [own[at] for at in range(len(own))]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def exclude_prompt(rules: TextRules, tokenizer: PreTrainedTokenizerBase) -> TextRules:
    """Return the rules of a model that does not pool the tokens of a prefix."""
    return replace(rules, prompt_tokens=count_prompt_tokens(tokenizer, rules.prefix))


def count_prompt_tokens(tokenizer: PreTrainedTokenizerBase, prefix: str) -> int:
    """Return the number of tokens of a prefix, special tokens before it included."""
    if not prefix:
        return 0
    with LOCK:
        _clear_limits(tokenizer)
        ids = tokenizer(prefix, verbose=False)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def _check_vocabulary(vocab_path: str) -> None:
    # transformers appends missing special tokens to the vocabulary, where the model has no embedding.
    tokens = {text for _, text in read_lines(vocab_path)}
    missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in tokens]
    if missing:
        raise UserError(f"{vocab_path}: not a WordPiece vocabulary ({', '.join(missing)} missing)")


def tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits over everything that affects the token ids."""
    with LOCK:
        _clear_limits(tokenizer)
        return checksum_text(tokenizer.backend_tokenizer.to_str())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer's files, without the length limit of the latest call."""
    with LOCK:
        _clear_limits(tokenizer)
        tokenizer.save_pretrained(folder)


def _clear_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], rules: TextRules
) -> tuple[list[list[int]], int]:
    """Return (token ids of each text, number of truncated texts); an empty text has only special tokens."""
    max_tokens = rules.max_tokens(tokenizer)
    cleaned = [rules.clean(text) for text in texts]
    limit = early_limit(tokenizer, cleaned, max_tokens)
    ids, cut = _tokenize_texts(tokenizer, [cut_early(text, limit) for text in cleaned], max_tokens)
    # the early cut removed tokens of texts with few tokens per character, e.g. runs of spaces: repeat
    redo = [at for at, text in enumerate(cleaned) if len(text) > limit and not cut[at]]
    if redo:
        redone = _tokenize_texts(tokenizer, [cleaned[at] for at in redo], max_tokens)
        for at, tokens, was_cut in zip(redo, *redone, strict=True):
            ids[at], cut[at] = tokens, was_cut
    return ids, sum(cut)


def token_counts(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    passages: list[str] | None = None,
    add_special_tokens: bool = True,
) -> list[int]:
    """Return the number of tokens of each text, or of each (text, passage) pair, without truncation."""
    counts: list[int] = []
    for start in range(0, len(texts), TEXTS_PER_CALL):
        chunk = slice(start, start + TEXTS_PER_CALL)
        with LOCK:
            batch = tokenizer(
                texts[chunk],
                passages[chunk] if passages is not None else None,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        counts += map(len, batch["input_ids"])
    return counts


def early_limit(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_seq_len: int) -> int:
    """Return the characters that cut_early keeps: all of them when the tokenizer cuts at the beginning."""
    if tokenizer.truncation_side == "left":
        return max(map(len, texts), default=0)
    return max_seq_len * CHARACTERS_PER_TOKEN


def cut_early(text: str, limit: int) -> str:
    """Return the text up to its last word boundary within `limit` characters, or whole if it has none."""
    if len(text) <= limit:
        return text
    boundary = next((at for at in range(limit, 0, -1) if _between_words(text, at)), None)
    return text if boundary is None else text[:boundary]


def _between_words(text: str, at: int) -> bool:
    # All tokenizers split at spaces, BERT's also around Han characters. No other boundary is safe for all.
    return text[at - 1].isspace() or text[at].isspace() or HAN.match(text[at - 1]) is not None


def _tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_seq_len: int
) -> tuple[list[list[int]], list[bool]]:
    """Return (token ids of each text, whether it was truncated)."""
    ids: list[list[int]] = []
    cut: list[bool] = []
    for encoding in encodings(tokenizer, texts, TruncationStrategy.LONGEST_FIRST, max_seq_len):
        ids.append(encoding.ids)
        cut.append(bool(encoding.overflowing))
    return ids, cut


def encodings(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str] | Sequence[tuple[str, str]],
    strategy: TruncationStrategy,
    max_tokens: int,
    add_special_tokens: bool = True,
) -> Iterator[Encoding]:
    """Yield what the tokenizer's backend makes of each text or pair.

    As tokenizer(...) does, but without character offsets, which takes less time.
    """
    fast: Any = tokenizer  # of class TokenizersBackend
    backend = fast.backend_tokenizer
    for start in range(0, len(inputs), TEXTS_PER_CALL):
        with LOCK:
            fast.set_truncation_and_padding(PaddingStrategy.DO_NOT_PAD, strategy, max_tokens, 0, None, None)
            backend.encode_special_tokens = fast.split_special_tokens
            found = backend.encode_batch_fast(
                inputs[start : start + TEXTS_PER_CALL], add_special_tokens=add_special_tokens
            )
        yield from found


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: TextRules
) -> "TokenTable":
    """Return the token ids of the pairs; only passages are truncated, unless the query leaves no room."""
    max_tokens, pair = rules.max_tokens(tokenizer), rules.pair or PairTemplate()
    queries, passages = texts_of_pairs(tokenizer, queries, passages, rules)
    limit = early_limit(tokenizer, passages, max_tokens)
    early = [cut_early(text, limit) for text in passages]
    ids, types, cut = _tokenize_pairs(tokenizer, queries, early, max_tokens, pair)
    redo = [at for at, text in enumerate(passages) if len(text) > limit and not cut[at]]  # as in tokenize
    if redo:
        whole = [queries[at] for at in redo], [passages[at] for at in redo]
        redone = _tokenize_pairs(tokenizer, *whole, max_tokens, pair)
        for at, tokens, segments, was_cut in zip(redo, *redone, strict=True):
            ids[at], types[at], cut[at] = tokens, segments, was_cut
    return TokenTable(*flat(ids, np.uint32), sum(cut), flat(types, np.uint8)[0])


def texts_of_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: TextRules
) -> tuple[list[str], list[str]]:
    """Return the (queries, passages) to tokenize: cleaned, with their template, long queries shortened."""
    pair = rules.pair or PairTemplate()
    queries = _shorten_queries(tokenizer, [rules.clean(text) for text in queries], rules.max_seq_len)
    # a space before the passage is part of its first token
    between = pair.between.rstrip(" ")
    lead = pair.between[len(between) :]
    queries = [pair.before + text + between for text in queries]
    return queries, [lead + rules.clean(text) for text in passages]


def _tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    queries: list[str],
    passages: list[str],
    max_tokens: int,
    pair: PairTemplate,
) -> tuple[list[list[int]], list[list[int]], list[bool]]:
    """Return (token ids, segment ids, whether the passage was truncated) of each pair."""
    ids: list[list[int]] = []
    types: list[list[int]] = []
    cut: list[bool] = []
    after = tokens_after(tokenizer, pair)
    pairs = list(zip(queries, passages, strict=True))
    limits = (TruncationStrategy.ONLY_SECOND, max_tokens - len(after), pair.special_tokens)
    for encoding in encodings(tokenizer, pairs, *limits):
        ids.append(encoding.ids + after)
        types.append(encoding.type_ids + [1] * len(after))
        cut.append(bool(encoding.overflowing))
    return ids, types, cut


def tokens_after(tokenizer: PreTrainedTokenizerBase, pair: PairTemplate) -> list[int]:
    """Return the token ids of the template's text after the passage."""
    if not pair.after:
        return []
    with LOCK:
        return list(tokenizer(pair.after, add_special_tokens=False, verbose=False)["input_ids"])


def passage_reserve(max_seq_len: int) -> int:
    """Return the tokens of a pair that a long query leaves to passage and special tokens."""
    return min(MIN_PASSAGE_TOKENS, max_seq_len // 2)


def _shorten_queries(tokenizer: PreTrainedTokenizerBase, queries: list[str], max_seq_len: int) -> list[str]:
    """Return the queries, truncated where they leave less than MIN_PASSAGE_TOKENS."""
    room = max_seq_len - passage_reserve(max_seq_len)
    # A character gives at most four tokens (its UTF-8 bytes, in byte-level vocabularies).
    for query in {query for query in queries if 4 * len(query) > room}:
        with LOCK:
            offsets = tokenizer(query, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
        if len(offsets) > room:
            queries = [query[: offsets[room][0]] if other == query else other for other in queries]
    return queries


class TokenTable:
    """Token ids of many texts in two flat arrays: 4 bytes per token, where Python lists take 40.

    `ids` (tokens,) uint32, text after text; `lengths` (N,) int64; `cut`: number of truncated texts.
    `types` (tokens,) uint8 of (query, passage) pairs: segment ids, 0 query and 1 passage.
    `windows` (texts,) int64 where an entry of the table is a window: the number of windows of each text.
    """

    def __init__(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        cut: int = 0,
        types: np.ndarray | None = None,
        windows: np.ndarray | None = None,
    ):
        self.ids, self.lengths, self.cut, self.types, self.windows = ids, lengths, cut, types, windows
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    @classmethod
    def of_texts(cls, tokenizer: PreTrainedTokenizerBase, texts: list[str], rules: TextRules) -> "TokenTable":
        ids, cut = tokenize(tokenizer, texts, rules)
        return cls(*flat(ids, np.uint32), cut)

    @classmethod
    def concatenate(cls, tables: list["TokenTable"]) -> "TokenTable":
        ids = np.concatenate([np.empty(0, np.uint32), *(table.ids for table in tables)])
        lengths = np.concatenate([np.empty(0, np.int64), *(table.lengths for table in tables)])
        types = [table.types for table in tables if table.types is not None]
        windows = [table.windows for table in tables if table.windows is not None]
        cut = sum(table.cut for table in tables)
        joined = [np.concatenate(arrays) if arrays else None for arrays in (types, windows)]
        return cls(ids, lengths, cut, *joined)

    def __len__(self) -> int:
        return len(self.lengths)

    def slice(self, first: int, last: int) -> "TokenTable":
        """Return the table of the texts first..last-1."""
        tokens = slice(self.starts[first], self.starts[last])
        types = None if self.types is None else self.types[tokens]
        return TokenTable(self.ids[tokens], self.lengths[first:last], 0, types)

    def padded(self, rows: Sequence[int] | np.ndarray, pad_id: int, length: int = 0) -> np.ndarray:
        """Return input ids, attention mask and, of pairs, segment ids of these rows: (2 or 3, B, L) int64.

        L is `length`, or that of the longest row.
        """
        lengths = self.lengths[rows]
        mask = np.arange(length or lengths.max())[None, :] < lengths[:, None]
        inputs = np.zeros((2 if self.types is None else 3, *mask.shape), dtype=np.int64)
        tokens = self._tokens_of(rows)
        inputs[0] = pad_id
        inputs[0][mask] = self.ids[tokens]
        inputs[1] = mask
        if self.types is not None:
            inputs[2][mask] = self.types[tokens]
        return inputs

    def _tokens_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the positions in `ids` of all tokens of these rows."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        return np.arange(ends[-1]) + np.repeat(self.starts[rows] - (ends - lengths), lengths)


def flat(sequences: list[list[int]], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return (all values one after the other, length of each sequence int64)."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    values = np.fromiter(chain.from_iterable(sequences), dtype=dtype, count=int(lengths.sum()))
    return values, lengths


def length_sorted_batches(
    lengths: Sequence[int] | np.ndarray, max_rows: int, max_tokens: int, one_length: bool = False
) -> list[np.ndarray]:
    """Return index arrays of all texts, each of at most `max_rows` texts and `max_tokens` padded tokens.

    Sorted by length, which avoids padding, longest first, so that out of memory occurs early. With
    `one_length`, the texts of a batch have the same length.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        length = int(lengths[order[start]])
        rows = max(1, min(max_rows, max_tokens // max(1, length)))
        if one_length:
            rows = int(np.count_nonzero(lengths[order[start : start + rows]] == length))
        batches.append(order[start : start + rows])
        start += rows
    return batches


class BatchedInference:
    """Forward passes over length-sorted batches, for an encoder of texts or a scorer of pairs."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    precision: str
    batch_size: int  # maximum rows per forward pass
    tokens_per_batch: int  # maximum padded tokens per forward pass; halved when memory runs out
    bf16_weights: bool  # weights are in bf16 already, so that no autocast is needed

    @property
    def pad_multiple(self) -> int:
        """Each row is padded to a multiple of it; above 1 a batch has rows of one such length only."""
        return 1

    @torch.inference_mode()
    def write_outputs(
        self,
        outputs: Tensor,
        table: TokenTable,
        model: nn.Module,
        forward: Callable[..., Tensor],
        done: Callable[[int, int], None] | None = None,
    ) -> None:
        """Set outputs[rows] to forward(inputs of `rows`) for batches that cover the table.

        The inputs are those of TokenTable.padded, on the device. `model` is in eval mode meanwhile. Calls
        done(rows, tokens) after each batch. Waits for no result (the length of a GPU's queue bounds how far
        batches are prepared ahead), but transformers reads each padded attention mask: one wait per batch.
        """
        was_training = model.training
        model.eval()

        lengths = table.lengths
        if self.pad_multiple > 1:
            most = getattr(model.config, "max_position_embeddings", lengths.max(initial=0))
            rounded = -(-lengths // self.pad_multiple) * self.pad_multiple
            lengths = np.maximum(lengths, np.minimum(rounded, most))

        def compute(rows: np.ndarray) -> None:
            padded = table.padded(rows, self.tokenizer.pad_token_id, int(lengths[rows[0]]))
            inputs, at = tensors_to(self.device, padded, rows)
            outputs[at] = forward(*inputs.unbind()).to(outputs.dtype)
            if done is not None:
                done(len(rows), int(table.lengths[rows].sum()))

        precision = "fp32" if self.bf16_weights else self.precision
        with autocast(self.device, precision):  # one context, so that weights are cast only once
            self.run_batches(lengths, compute)
        model.train(was_training)

    def run_batches(self, lengths: np.ndarray, forward: Callable[[np.ndarray], None]) -> None:
        """Call forward(rows) on batches that cover all rows; `lengths`: token counts (N,).

        When memory runs out, the batch is repeated with half the token budget; UserError at the minimum.
        """
        order, done = np.argsort(-lengths, kind="stable"), 0
        while done < len(order):
            limits = self.batch_size, self.tokens_per_batch, self.pad_multiple > 1
            for batch in length_sorted_batches(lengths[order[done:]], *limits):
                rows = order[done : done + len(batch)]  # `order` is sorted already: batches are slices of it
                if not _fits_in_memory(forward, rows):
                    self._halve_tokens(row_tokens=int(lengths[rows[0]]))
                    break
                done += len(batch)

    def _halve_tokens(self, row_tokens: int) -> None:
        if self.tokens_per_batch // 2 < max(MIN_TOKENS_PER_BATCH, row_tokens):
            raise UserError(
                f"{self.device}: out of memory at {self.tokens_per_batch} tokens per forward pass, the "
                "minimum; use a smaller model or a shorter length, or free memory on the device"
            )
        self.tokens_per_batch //= 2
        warn(f"{self.device}: out of memory; tokens_per_batch halved to {self.tokens_per_batch}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _fits_in_memory(forward: Callable[[np.ndarray], None], rows: np.ndarray) -> bool:
    """Return False if forward(rows) ran out of memory; its traceback, which holds tensors, is freed."""
    try:
        forward(rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
