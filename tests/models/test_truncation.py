"""Shares of truncated texts and the lengths that would fit, against hand-counted texts."""

import pytest
from token_lists import pair_lists

from torch_src.models.tokenization import TextRules, tokenize
from torch_src.models.truncation import (
    SAMPLE,
    Truncation,
    sampled,
    truncation_of_pairs,
    truncation_of_texts,
)


def texts(*lengths):
    return ["水" * length for length in lengths]


def test_shares_and_the_length_that_fits(tokenizer):
    rules = {"query": TextRules(10, prefix="问：" * 9), "passage": TextRules(20)}
    queries, passages = texts(*[5] * 196, 9, 10, 30, 40), texts(18, 19)
    found = truncation_of_texts(tokenizer, queries, passages, rules)
    assert found == [
        Truncation("queries", "q_max_seq_len", 10, 4 / 200, 12, 42),
        Truncation("passages", "p_max_seq_len", 20, 0.5, 21, 21),
    ]
    assert tokenize(tokenizer, queries, rules["query"])[1] == 4  # the number that is truncated
    assert tokenize(tokenizer, queries, TextRules(12, prefix="问：" * 9))[1] == 2  # at most 1% of 200


def test_pairs_and_their_queries(tokenizer):
    queries, passages, rules = texts(3, 50), texts(57, 5), TextRules(60)
    found = truncation_of_pairs(tokenizer, queries, passages, rules)
    assert found == [
        Truncation("queries", "max_seq_len", 60, 0.5, 66, 66),
        Truncation("pairs", "max_seq_len", 60, 0.5, 63, 63),
    ]
    for limit, cut in ((63, 1), (66, 0)):
        pairs = pair_lists(tokenizer, queries, passages, TextRules(limit))
        assert pairs.cut == 0 and max(pairs.lengths) == 63
        shortened = sum(types.count(0) < 50 + 2 for types in pairs.types[1:])
        assert shortened == cut


def test_only_queries_or_only_passages(tokenizer):
    rules = {"query": TextRules(10), "passage": TextRules(20)}
    (found,) = truncation_of_texts(tokenizer, [], texts(3), rules)
    assert (found.kind, found.share) == ("passages", 0.0)


@pytest.mark.parametrize("share, stream", [(0.01, "out"), (0.011, "err")])
def test_more_than_one_percent_is_a_warning(share, stream, capsys):
    Truncation("queries", "q_max_seq_len", 32, share, 777, 888).report()
    printed = getattr(capsys.readouterr(), stream)
    assert "q_max_seq_len 32" in printed and ("WARNING" in printed) == ("777" in printed) == (stream == "err")


def test_sample_is_spread_over_all_rows():
    assert sampled(3) == [0, 1, 2] and sampled(1) == [0] and sampled(0) == []
    rows = sampled(8_096_668)
    assert len(rows) == SAMPLE and rows[0] == 0 and rows[-1] == 8_096_667
