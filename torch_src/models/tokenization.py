"""Texts to token ids: prefixes, spaces, truncation; padding of a batch."""

import os
import re
import threading
from dataclasses import dataclass

import numpy as np
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase

from torch_src.data.formats import read_lines
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import fingerprint_text

# A text is first cut at so many characters a token: one of 60,975 would be tokenised for nothing.
CHARACTERS_A_TOKEN = 16
TOKENIZER_FILES = ("tokenizer.json", "vocab", "spiece", "sentencepiece", "tokenizer.model")
ROOM_FOR_PASSAGE = 16  # tokens, special ones included, that are left to the passage of a pair
HAN = re.compile("[\u4e00-\u9fff]")


# The length limit is a state of the fast tokenizer, and texts are tokenised ahead in a thread: one call at a
# time.
LOCK = threading.Lock()
AT_ONCE = 512  # texts in one call: what truncation cuts off is held until it returns


@dataclass(frozen=True)
class TextRules:
    """How one side's texts (queries or passages) become token ids."""

    max_seq_len: int  # tokens, special ones included
    prefix: str = ""
    remove_spaces: bool = False

    def clean(self, text: str) -> str:
        """Return the text as it is tokenised: ASCII spaces removed (when asked), then the prefix put before
        it.
        """
        return self.prefix + (text.replace(" ", "") if self.remove_spaces else text)


def load_tokenizer(pretrained_model_path: str, vocab_path: str = "") -> PreTrainedTokenizerBase:
    """Return the model's own tokenizer, or a WordPiece one from vocab.txt; UserError when it cannot be
    loaded.
    """
    try:
        if vocab_path:
            if not os.path.isfile(vocab_path):
                raise UserError(f"{vocab_path}: no such file (vocab_path: a WordPiece vocab.txt)")
            _check_vocabulary(vocab_path)
            tokenizer = BertTokenizerFast(vocab=vocab_path)
        else:
            _check_folder(pretrained_model_path)
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_path, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a broken folder fails in as many ways as there are tokenizer kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{vocab_path or pretrained_model_path}: no tokenizer could be loaded ({reason})"
        ) from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(
            f"{pretrained_model_path}: needs a fast tokenizer with a pad token (tokenizer.json or vocab.txt)"
        )
    return tokenizer


def _check_folder(path: str) -> None:
    # Without these files transformers makes up a tokenizer that knows no word.
    if os.path.isdir(path) and not any(name.startswith(TOKENIZER_FILES) for name in os.listdir(path)):
        raise UserError(
            f"{path}: no tokenizer in it (tokenizer.json or vocab.txt); is the download complete?"
        )


def _check_vocabulary(vocab_path: str) -> None:
    # transformers would add the missing ones behind the vocabulary, where the model has no embedding.
    tokens = {text for _, text in read_lines(vocab_path)}
    missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in tokens]
    if missing:
        raise UserError(f"{vocab_path}: not a WordPiece vocabulary, {', '.join(missing)} missing")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits over everything that decides the token ids."""
    with LOCK:
        _clear_limits(tokenizer)
        return fingerprint_text(tokenizer.backend_tokenizer.to_str())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder) -> None:
    """Write the tokenizer's files, without the length limit of whichever call came last."""
    with LOCK:
        _clear_limits(tokenizer)
        tokenizer.save_pretrained(folder)


def _clear_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], rules: TextRules
) -> tuple[list[list[int]], int]:
    """Return (token ids of each text, how many texts were cut). An empty text gives the special
    tokens alone.
    """
    limit = rules.max_seq_len * CHARACTERS_A_TOKEN
    cleaned = [rules.clean(text) for text in texts]
    ids, cut = _encode(tokenizer, [cut_early(text, limit) for text in cleaned], rules.max_seq_len)
    # Few tokens from many characters (long runs of spaces, say): the early cut took something away, so do
    # without it.
    again = [at for at, text in enumerate(cleaned) if len(text) > limit and not cut[at]]
    if again:
        whole, whole_cut = _encode(tokenizer, [cleaned[at] for at in again], rules.max_seq_len)
        for at, tokens, was_cut in zip(again, whole, whole_cut, strict=True):
            ids[at], cut[at] = tokens, was_cut
    return ids, sum(cut)


def cut_early(text: str, limit: int) -> str:
    """Return the first `limit` characters, less the word that the cut falls into, so that no token changes.

    A word that goes on for longer than that is kept whole: its one token is decided by all of it.
    """
    if len(text) <= limit:
        return text
    boundary = next((at for at in range(limit, 0, -1) if _between_words(text, at)), None)
    return text if boundary is None else text[:boundary]


def _between_words(text: str, at: int) -> bool:
    # Tokenizers split at spaces; around a Han character BERT's do too. Nothing else is a boundary for all.
    return text[at - 1].isspace() or text[at].isspace() or HAN.match(text[at - 1]) is not None


def _encode(tokenizer, texts: list[str], max_seq_len: int) -> tuple[list[list[int]], list[bool]]:
    ids, cut = [], []
    for start in range(0, len(texts), AT_ONCE):
        found, was_cut = _encode_some(tokenizer, texts[start : start + AT_ONCE], max_seq_len)
        ids += found
        cut += was_cut
    return ids, cut


def _encode_some(tokenizer, texts: list[str], max_seq_len: int) -> tuple[list[list[int]], list[bool]]:
    with LOCK:
        batch = tokenizer(
            texts,
            truncation=True,
            max_length=max_seq_len,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
    return list(batch["input_ids"]), [bool(encoding.overflowing) for encoding in batch.encodings]


@dataclass(frozen=True)
class Pairs:
    """Token ids and segment ids (0 query, 1 passage) of (query, passage) pairs, and how many were cut."""

    ids: list[list[int]]
    types: list[list[int]]
    cut: int

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.ids]


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: TextRules
) -> Pairs:
    """Return the pairs' ids: only passages are cut, so that the query is whole.

    A query that alone leaves less than ROOM_FOR_PASSAGE tokens is cut to that: a pair needs a passage.
    """
    limit = rules.max_seq_len * CHARACTERS_A_TOKEN
    passages = [rules.clean(text) for text in passages]
    queries = _shorten(tokenizer, [rules.clean(text) for text in queries], rules.max_seq_len)
    pairs, cut = _encode_pairs(
        tokenizer, queries, [cut_early(text, limit) for text in passages], rules.max_seq_len
    )
    again = [at for at, text in enumerate(passages) if len(text) > limit and not cut[at]]  # as in tokenize
    if again:
        whole = ([queries[at] for at in again], [passages[at] for at in again])
        redone, redone_cut = _encode_pairs(tokenizer, *whole, rules.max_seq_len)
        for at, pair, was_cut in zip(again, redone, redone_cut, strict=True):
            pairs[at], cut[at] = pair, was_cut
    return Pairs([ids for ids, _ in pairs], [types for _, types in pairs], sum(cut))


def _encode_pairs(
    tokenizer, queries: list[str], passages: list[str], max_seq_len: int
) -> tuple[list, list[bool]]:
    """Return ([(ids, segment ids)], was the passage cut)."""
    pairs, cut = [], []
    for start in range(0, len(passages), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        with LOCK:
            batch = tokenizer(
                queries[some], passages[some], truncation="only_second", max_length=max_seq_len,
                return_attention_mask=False, return_token_type_ids=True,
            )  # fmt: skip
        pairs += zip(batch["input_ids"], batch["token_type_ids"], strict=True)
        cut += [bool(encoding.overflowing) for encoding in batch.encodings]
    return pairs, cut


def _shorten(tokenizer, queries: list[str], max_seq_len: int) -> list[str]:
    room = max_seq_len - min(ROOM_FOR_PASSAGE, max_seq_len // 2)
    # A character gives four tokens at most (the bytes of UTF-8, in byte-level vocabularies).
    for query in {query for query in queries if 4 * len(query) > room}:
        with LOCK:
            offsets = tokenizer(
                query, add_special_tokens=False, return_offsets_mapping=True, truncation=False
            )["offset_mapping"]
        if len(offsets) > room:
            queries = [query[: offsets[room][0]] if other == query else other for other in queries]
    return queries


def pad(sequences: list[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (input ids, attention mask), both (B, L) int64, L the longest of the batch."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate(sequences)
    return input_ids, mask.astype(np.int64)


def length_sorted_batches(lengths, max_rows: int, max_tokens: int) -> list[np.ndarray]:
    """Return index arrays that cover all texts, longest first, each at most `max_rows` texts and `max_tokens`
    padded.

    Texts of like length stand together, so that hardly a padded token is computed. Longest first: a batch
    that does not fit into memory fails in the first minute, not in the last. Ties keep their order (stable
    sort).
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, min(max_rows, max_tokens // max(1, int(lengths[order[start]]))))
        batches.append(order[start : start + rows])
        start += rows
    return batches
