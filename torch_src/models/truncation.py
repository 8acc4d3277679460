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

    @property
    def is_tolerated(self) -> bool:
        return self.share <= TOLERATED

    def __str__(self) -> str:
        line = f"{self.kind}: {100 * self.share:.1f}% truncated ({self.knob} {self.limit}, longest"
        more = "" if self.is_tolerated else f"; --{self.knob} {self.fitting} (for training as well) fits 99%"
        return f"{line} {self.longest}){more}"

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
    found = []
    for side, kind, texts in (("query", "queries", queries), ("passage", "passages", passages)):
        if texts:
            counts = token_counts(tokenizer, _shortened(texts, rules[side]))
            found.append(_truncation(kind, LENGTHS[side], rules[side], counts))
    return found


def truncation_of_pairs(
    tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], rules: TextRules
) -> list[Truncation]:
    """Return how many queries and how many pairs a cross-encoder truncates."""
    queries, reserve = _shortened(queries, rules), passage_reserve(rules.max_seq_len)
    alone = [count + reserve for count in token_counts(tokenizer, queries, add_special_tokens=False)]
    pairs = token_counts(tokenizer, queries, _shortened(passages, rules))
    return [
        _truncation("queries", "max_seq_len", rules, alone),
        _truncation("pairs", "max_seq_len", rules, pairs),
    ]


def _shortened(texts: list[str], rules: TextRules) -> list[str]:
    return [cut_early(rules.without_prefix(text), LONGEST) for text in texts]


def _truncation(kind: str, knob: str, rules: TextRules, counts: list[int]) -> Truncation:
    tokens = np.sort(counts)
    fitting = int(tokens[len(tokens) - 1 - int(TOLERATED * len(tokens))])
    share = float((tokens > rules.max_seq_len).mean())
    return Truncation(kind, knob, rules.max_seq_len, share, fitting, int(tokens[-1]))
