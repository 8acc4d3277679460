"""Reports how many queries, passages and pairs are longer than their limit in tokens."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from torch_src.models.tokenization import LENGTHS, TextRules, cut_early, passage_reserve, token_counts
from torch_src.runtime.log import log, warn
from torch_src.runtime.planning import evenly_spaced

SAMPLE = 2048  # texts that are measured: the standard error of a share of 1% is 0.2%
LONGEST = 100_000  # characters of a text that are measured
TOLERATED = 0.01  # share of truncated texts that needs no warning


@dataclass(frozen=True)
class Truncation:
    """How many texts of one kind are truncated; lengths in tokens, without those of a prefix."""

    kind: str  # queries, passages or pairs
    knob: str  # option that limits their length
    limit: int  # value of the option
    share: float  # fraction of the texts that is truncated
    fitting: int  # limit that truncates at most 1%
    longest: int  # length of the longest text
    windows: int = 1  # of a text; with several, those that need more are truncated
    fitting_windows: int = 0  # that truncate at most 1%; 0: this kind of text has none

    @property
    def is_tolerated(self) -> bool:
        return self.share <= TOLERATED

    def __str__(self) -> str:
        windows = f"{self.windows} windows of " if self.windows > 1 else ""
        line = f"{self.kind}: {100 * self.share:.1f}% truncated ({windows}{self.knob} {self.limit}, longest"
        return f"{line} {self.longest}){'' if self.is_tolerated else self._advice}"

    @property
    def _advice(self) -> str:
        more = f"--passage_windows {self.fitting_windows}"
        if self.windows > 1:
            return f"; {more} fits 99%"
        advice = f"; --{self.knob} {self.fitting} (for training as well) fits 99%"
        windows = f"{more} (at inference only)" if self.fitting_windows else ""
        return f"{advice}, and so does {windows}" if windows else advice

    def report(self) -> "Truncation":
        """Log it, above 1% as a warning; return it."""
        (log if self.is_tolerated else warn)(str(self))
        return self


def sampled(count: int) -> list[int]:
    """Return at most SAMPLE evenly spaced rows of `count`."""
    return evenly_spaced(count, SAMPLE)


def truncation_of_texts(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: dict[str, TextRules]
) -> list[Truncation]:
    """Return how many queries and how many passages the `rules` of the two sides truncate."""
    found, special = [], tokenizer.num_special_tokens_to_add(pair=False)
    for side, kind, texts in (("query", "queries", queries), ("passage", "passages", passages)):
        if texts:
            counts = np.array(token_counts(tokenizer, _shortened(texts, rules[side])))
            step = rules[side].max_seq_len - special - _stride(rules[side]) if side == "passage" else None
            found.append(_truncation(kind, LENGTHS[side], rules[side], counts, step))
    return found


def truncation_of_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: TextRules
) -> list[Truncation]:
    """Return how many queries and how many pairs a cross-encoder truncates."""
    queries, reserve = _shortened(queries, rules), passage_reserve(rules.max_seq_len)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    alone = np.array(token_counts(tokenizer, queries, add_special_tokens=False))
    pairs = np.array(token_counts(tokenizer, queries, _shortened(passages, rules)))
    room = np.maximum(1, np.maximum(rules.max_seq_len - alone, reserve) - special)
    return [
        _truncation("queries", "max_seq_len", rules, alone + reserve),
        _truncation("pairs", "max_seq_len", rules, pairs, room - np.minimum(_stride(rules), room // 2)),
    ]


def _stride(rules: TextRules) -> int:
    """Return the tokens that windows share; without windows those of the default."""
    return rules.stride if rules.windows > 1 else rules.max_seq_len // 4


def _shortened(texts: list[str], rules: TextRules) -> list[str]:
    return [cut_early(rules.without_prefix(text), LONGEST) for text in texts]


def _truncation(
    kind: str, knob: str, rules: TextRules, counts: np.ndarray, step: np.ndarray | int | None = None
) -> Truncation:
    """Return the truncation of texts with `counts` (N,) tokens.

    step: tokens that a window adds, for all texts or for each; None for texts without windows.
    """
    limit, needed, windows = rules.max_seq_len, 1 + (counts > rules.max_seq_len), 1
    if step is not None:
        needed, windows = 1 + -(-np.maximum(counts - limit, 0) // np.maximum(1, step)), rules.windows
    share = float((needed > windows).mean())
    fitting_windows = 0 if step is None else _fitting(needed)
    return Truncation(kind, knob, limit, share, _fitting(counts), int(counts.max()), windows, fitting_windows)


def _fitting(values: np.ndarray) -> int:
    """Return the limit that at most 1% of the values exceed."""
    return int(np.sort(values)[len(values) - 1 - int(TOLERATED * len(values))])
