"""Windows of long passages: each begins with the prefix and shares tokens with the window before it.

The windows are those of a tokenizer's overflow (return_overflowing_tokens with a stride), but each has the
prefix, or the query of a pair. The first window is what remains of the passage without windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TruncationStrategy

from torch_src.models.pair_template import PairTemplate
from torch_src.models.tokenization import (
    LOCK,
    TEXTS_PER_CALL,
    TextRules,
    TokenTable,
    cut_early,
    early_limit,
    encodings,
    flat,
    texts_of_pairs,
    tokenize,
    tokens_after,
)
from torch_src.runtime.errors import UserError

QUARTER = -1  # of --window_stride: a quarter of the length


def with_windows(
    rules: TextRules, tokenizer: PreTrainedTokenizerBase, windows: int, stride: int, knob: str
) -> TextRules:
    """Return the rules of passages of up to `windows` windows; UserError when the stride leaves no tokens.

    stride: QUARTER, or tokens that neighboring windows share. knob: the option that limits their length.
    """
    if windows == 1:
        return rules
    stride = rules.max_seq_len // 4 if stride == QUARTER else stride
    room = rules.max_seq_len - tokenizer.num_special_tokens_to_add(pair=rules.pair is not None)
    if stride >= room:
        raise UserError(
            f"--window_stride {stride}: must be below {room}, the tokens of a window without special tokens "
            f"({knob} {rules.max_seq_len})"
        )
    return replace(rules, windows=windows, stride=stride)


@dataclass(frozen=True)
class Spans:
    """Where the windows of a text begin and end, in tokens."""

    first: int  # tokens of the first window, with those of the prefix
    room: int  # tokens of the text in each later window
    stride: int  # tokens that neighboring windows share
    windows: int  # at most
    from_right: bool = False  # whether the first window is at the end of the text

    @property
    def step(self) -> int:
        return self.room - self.stride

    @property
    def covered(self) -> int:
        """The tokens that all windows cover."""
        return self.first + (self.windows - 1) * self.step

    def counts(self, tokens: np.ndarray) -> np.ndarray:
        """Return the number of windows (N,) int64 of texts with this many tokens (N,)."""
        more = -(-np.maximum(tokens - self.first, 0) // self.step)
        return np.minimum(1 + more, self.windows).astype(np.int64)

    def of(self, tokens: int) -> list[tuple[int, int]]:
        """Return (begin, end) of each window of a text with this many tokens."""
        count = int(self.counts(np.array(tokens)))
        begins = [0, *(self.first - self.room + at * self.step for at in range(1, count))]
        ends = [min(tokens, self.first + at * self.step) for at in range(count)]
        if self.from_right:
            return [(tokens - end, tokens - begin) for begin, end in zip(begins, ends, strict=True)]
        return list(zip(begins, ends, strict=True))


@dataclass(frozen=True)
class _Around:
    """The tokens around those of a text."""

    before: list[int]  # special tokens
    prefix: list[int]
    after: list[int]  # special tokens

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prefix: str) -> "_Around":
        (encoding,) = encodings(tokenizer, ["a"], TruncationStrategy.LONGEST_FIRST, 64)
        mask = encoding.special_tokens_mask
        before = mask.index(0)
        after = len(mask) - mask[::-1].index(0)
        with LOCK:
            found = tokenizer(prefix, add_special_tokens=False, verbose=False)["input_ids"] if prefix else []
        return cls(encoding.ids[:before], list(found), encoding.ids[after:])

    @property
    def special_tokens(self) -> int:
        return len(self.before) + len(self.after)

    def spans(self, tokenizer: PreTrainedTokenizerBase, rules: TextRules) -> Spans:
        room, from_right = rules.max_seq_len - self.special_tokens, tokenizer.truncation_side == "left"
        first = room + len(self.prefix)
        # cutting on the left removes the prefix, with or without windows
        return Spans(first, first if from_right else room, rules.stride, rules.windows, from_right)

    def window(self, tokens: list[int], span: tuple[int, int], from_right: bool) -> list[int]:
        """Return the ids of a window of `tokens`, which begin with the prefix and have no special tokens."""
        begin, end = span
        prefix = self.prefix if begin and not from_right else []
        return [*self.before, *prefix, *tokens[begin:end], *self.after]


def window_counts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], rules: TextRules
) -> tuple[np.ndarray, int]:
    """Return (number of windows (N,) int64 of each text, number of texts that need more than allowed)."""
    around = _Around.of(tokenizer, rules.prefix)
    spans = around.spans(tokenizer, rules)
    lengths, cut = [np.zeros(0, np.int64)], 0
    for ids, were_cut in _covered_ids(tokenizer, texts, rules, spans):
        lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)) - around.special_tokens)
        cut += were_cut
    return spans.counts(np.concatenate(lengths)), cut


def tokenize_windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], rules: TextRules) -> TokenTable:
    """Return the token ids of the windows of all texts, in their order."""
    around = _Around.of(tokenizer, rules.prefix)
    spans = around.spans(tokenizer, rules)
    tables = [TokenTable(*flat([], np.uint32), windows=np.zeros(0, np.int64))]
    for ids, cut in _covered_ids(tokenizer, texts, rules, spans):
        windows: list[list[int]] = []
        counts: list[int] = []
        for one in ids:
            tokens = one[len(around.before) : len(one) - len(around.after)]
            found = spans.of(len(tokens))
            windows += [around.window(tokens, span, spans.from_right) for span in found]
            counts.append(len(found))
        tables.append(TokenTable(*flat(windows, np.uint32), cut, windows=np.array(counts)))
    return TokenTable.concatenate(tables)


def _covered_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], rules: TextRules, spans: Spans
) -> Iterator[tuple[list[list[int]], int]]:
    """Yield (token ids that all windows cover, number of texts with more), a few hundred texts at a time."""
    whole = replace(rules, max_seq_len=rules.max_seq_len + spans.covered - spans.first)
    for start in range(0, len(texts), TEXTS_PER_CALL):
        yield tokenize(tokenizer, texts[start : start + TEXTS_PER_CALL], whole)


def tokenize_pair_windows(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: TextRules
) -> TokenTable:
    """Return the token ids of the windows of all pairs, in their order; each has the whole query.

    A query that leaves less than twice the stride to its passage halves the stride of its windows.
    """
    tables = [TokenTable(*flat([], np.uint32), 0, np.zeros(0, np.uint8), np.zeros(0, np.int64))]
    for start in range(0, len(queries), TEXTS_PER_CALL):
        chunk = slice(start, start + TEXTS_PER_CALL)
        tables.append(_pair_windows(tokenizer, queries[chunk], passages[chunk], rules))
    return TokenTable.concatenate(tables)


def _pair_windows(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: TextRules
) -> TokenTable:
    pair, max_tokens = rules.pair or PairTemplate(), rules.max_tokens(tokenizer)
    queries, passages = texts_of_pairs(tokenizer, queries, passages, rules)
    after = tokens_after(tokenizer, pair)
    covered = max_tokens - len(after) + (rules.windows - 1) * rules.max_seq_len
    limit = early_limit(tokenizer, passages, covered)
    how = (TruncationStrategy.ONLY_SECOND, covered, pair.special_tokens)
    early = [cut_early(text, limit) for text in passages]
    found = list(encodings(tokenizer, list(zip(queries, early, strict=True)), *how))
    # as in tokenize: the early cut removed tokens of a passage with few tokens per character
    redo = [at for at, text in enumerate(passages) if len(text) > limit and not found[at].overflowing]
    for at, encoding in zip(
        redo, encodings(tokenizer, [(queries[at], passages[at]) for at in redo], *how), strict=True
    ):
        found[at] = encoding
    ids: list[list[int]] = []
    types: list[list[int]] = []
    counts, cut = [], 0
    for encoding in found:
        begin, end = _passage_tokens(encoding)
        room = max(1, max_tokens - len(after) - (len(encoding.ids) - (end - begin)))
        spans = Spans(
            room, room, min(rules.stride, room // 2), rules.windows, tokenizer.truncation_side == "left"
        )
        windows = spans.of(end - begin)
        for one, other in windows:
            for out, values, rest in (
                (ids, encoding.ids, after),
                (types, encoding.type_ids, [1] * len(after)),
            ):
                out.append([*values[:begin], *values[begin + one : begin + other], *values[end:], *rest])
        counts.append(len(windows))
        cut += bool(encoding.overflowing) or end - begin > spans.covered
    return TokenTable(*flat(ids, np.uint32), cut, flat(types, np.uint8)[0], np.array(counts))


def _passage_tokens(encoding: Encoding) -> tuple[int, int]:
    """Return the positions (begin, end) of the passage in the tokens of a pair."""
    sequences = encoding.sequence_ids
    if 1 not in sequences:
        return len(sequences), len(sequences)
    begin = sequences.index(1)
    return begin, begin + sequences.count(1)
