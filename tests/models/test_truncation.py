"""Shares of truncated texts and the lengths that would fit, against hand-counted texts."""

from dataclasses import replace

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
from torch_src.models.windows import tokenize_pair_windows, window_counts, with_windows


def texts(*lengths):
    return ["水" * length for length in lengths]


def test_shares_and_the_length_that_fits(tokenizer):
    rules = {"query": TextRules(10, prefix="问：" * 9), "passage": TextRules(20)}
    queries, passages = texts(*[5] * 196, 9, 10, 30, 40), texts(18, 19)
    found = truncation_of_texts(tokenizer, queries, passages, rules)
    assert found == [
        Truncation("queries", "q_max_seq_len", 10, 4 / 200, 12, 42),
        Truncation("passages", "p_max_seq_len", 20, 0.5, 21, 21, 1, 2),
    ]
    assert tokenize(tokenizer, queries, rules["query"])[1] == 4  # the number that is truncated
    assert tokenize(tokenizer, queries, TextRules(12, prefix="问：" * 9))[1] == 2  # at most 1% of 200


def test_pairs_and_their_queries(tokenizer):
    queries, passages, rules = texts(3, 50), texts(57, 5), TextRules(60)
    found = truncation_of_pairs(tokenizer, queries, passages, rules)
    assert found == [
        Truncation("queries", "max_seq_len", 60, 0.5, 66, 66),
        Truncation("pairs", "max_seq_len", 60, 0.5, 63, 63, 1, 2),
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


def test_windows_truncate_what_is_beyond_them(tokenizer):
    passages = texts(*[100] * 9, 18, 19, 31)
    rules = {"query": TextRules(10), "passage": with_windows(TextRules(20), tokenizer, 2, 5, "p_max_seq_len")}
    (found,) = truncation_of_texts(tokenizer, [], passages, rules)
    counts, cut = window_counts(tokenizer, passages, replace(rules["passage"], windows=99))
    assert found.fitting_windows == counts.max() == 8 and cut == 0
    _, cut = window_counts(tokenizer, passages, rules["passage"])
    assert found.share == cut / 12 == 9 / 12
    assert "2 windows of p_max_seq_len 20" in str(found) and "--passage_windows 8" in str(found)


def test_windows_of_pairs_truncate_what_is_beyond_them(tokenizer):
    queries, passages = texts(3, 30, 50), texts(150, 60, 7)
    rules = with_windows(TextRules(60), tokenizer, 3, -1, "max_seq_len")
    found = truncation_of_pairs(tokenizer, queries, passages, rules)
    table = tokenize_pair_windows(tokenizer, queries, passages, replace(rules, windows=99))
    assert table.windows.tolist() == [4, 4, 1] and found[1].fitting_windows == 4
    cut = tokenize_pair_windows(tokenizer, queries, passages, rules).cut
    assert found[1].share == cut / 3 and found[0].windows == 1
