"""Windows of passages and pairs, compared with the overflow of the Hugging Face tokenizers."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from torch_src.models.pair_template import PairTemplate
from torch_src.models.tokenization import TextRules, TokenTable, tokenize, tokenize_pairs
from torch_src.models.windows import (
    tokenize_pair_windows,
    tokenize_windows,
    window_counts,
    with_windows,
)
from torch_src.runtime.errors import UserError

TEXTS = [
    "", " ", "水", "水的 water 油", "水的，油 一" * 9, "银杏 tree " * 40, "水" * 200 + " " * 9000 + "油" * 90,
    "\x00\x01", "water" * 30, "a" * 5000, "水 " * 1000,
]  # fmt: skip


def byte_level_bpe():
    """Bytes are tokens; one token before a text and two after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A </s> </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def unigram():
    """As XLM-R's: spaces become a mark, and no word boundary is a token boundary for sure."""
    pieces = [
        ("<unk>", 0.0),
        ("▁", -1.0),
        *((word, -2.0) for word in ("▁水", "水", "的", "油", "wat", "er", "tree", "a")),
    ]
    backend = Tokenizer(models.Unigram([*pieces, ("[S]", -9.0)], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        "$A [S]", "$A [S] $B:1 [S]:1", [("[S]", len(pieces))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="[S]")


@pytest.fixture(params=["WordPiece", "BPE", "Unigram"])
def any_tokenizer(request, tokenizer):
    return (
        tokenizer
        if request.param == "WordPiece"
        else {"BPE": byte_level_bpe, "Unigram": unigram}[request.param]()
    )


@pytest.fixture(params=["right", "left"])
def sided(request, any_tokenizer):
    before = any_tokenizer.truncation_side
    any_tokenizer.truncation_side = request.param
    yield any_tokenizer
    any_tokenizer.truncation_side = before


def rows(table: TokenTable) -> list[list[int]]:
    return [table.ids[a:b].tolist() for a, b in zip(table.starts, table.starts[1:], strict=False)]


def overflow(tokenizer, texts, length, stride, windows, pairs=None):
    """(ids of all windows of all texts, their number for each text, texts that need more)."""
    ids, counts, cut = [], [], 0
    for at, text in enumerate(texts):
        second = None if pairs is None else [pairs[at]]
        found = tokenizer(
            [text], second, truncation="longest_first" if second is None else "only_second",
            max_length=length, stride=stride, return_overflowing_tokens=True,
        )["input_ids"]  # fmt: skip
        ids += found[:windows]
        counts.append(len(found[:windows]))
        cut += len(found) > windows
    return ids, counts, cut


@pytest.mark.parametrize("length, stride, windows", [(12, 3, 4), (12, 0, 100), (16, 8, 2), (34, 24, 5)])
def test_windows_of_texts_are_those_of_the_tokenizers_overflow(sided, length, stride, windows):
    rules = TextRules(length, windows=windows, stride=stride)
    table = tokenize_windows(sided, TEXTS, rules)
    ids, counts, cut = overflow(sided, TEXTS, length, stride, windows)
    assert rows(table) == ids
    assert (table.windows.tolist(), table.cut) == (counts, cut)
    counted, counted_cut = window_counts(sided, TEXTS, rules)
    assert (counted.tolist(), counted_cut) == (counts, cut)


@pytest.mark.parametrize("prefix", ["", "水: ", "passage: "])
def test_first_window_is_what_remains_without_windows(sided, prefix):
    rules = TextRules(14, prefix=prefix, remove_spaces=True)
    table = tokenize_windows(sided, TEXTS, with_windows(rules, sided, 3, 2, "p_max_seq_len"))
    firsts = np.cumsum([0, *table.windows[:-1]])
    assert [rows(table)[at] for at in firsts] == tokenize(sided, TEXTS, rules)[0]


def test_every_window_has_the_prefix_and_all_tokens_are_covered(any_tokenizer):
    rules = TextRules(10, prefix="水: ", windows=50, stride=3)
    text = "".join(chr(0x4E00 + at) for at in range(40))
    table = tokenize_windows(any_tokenizer, [text], rules)
    ((whole,), _) = tokenize(any_tokenizer, [text], TextRules(1000, prefix="水: "))
    bare = any_tokenizer("水: ", add_special_tokens=False)["input_ids"]
    special = any_tokenizer("")["input_ids"]
    before = 0 if whole[0] not in special else 1
    after = len(special) - before
    tokens, position = whole[before : len(whole) - after], 0
    room, prefix = 10 - len(special), tokens[: len(bare)]
    for window in rows(table):
        inner = window[before : len(window) - after]
        if not position:
            assert inner == tokens[: len(bare) + room]
            position = len(inner)
            continue
        assert inner[: len(bare)] == bare and prefix
        new = inner[len(bare) :]
        assert new == tokens[position - 3 : position - 3 + room]
        position += len(new) - 3
    assert position == len(tokens) and not table.cut


@pytest.mark.parametrize("length, stride, windows", [(40, 3, 4), (40, 0, 100)])
def test_windows_of_pairs_are_those_of_the_tokenizers_overflow(sided, length, stride, windows):
    queries = ["水油", "water", "的"] * 4
    queries = queries[: len(TEXTS)]
    table = tokenize_pair_windows(sided, queries, TEXTS, TextRules(length, windows=windows, stride=stride))
    ids, counts, cut = overflow(sided, queries, length, stride, windows, TEXTS)
    assert rows(table) == ids
    assert (table.windows.tolist(), table.cut) == (counts, cut)


@pytest.mark.parametrize("template", [None, PairTemplate("a", "的 ", "油a", special_tokens=False)])
def test_first_window_of_a_pair_is_the_pair_without_windows(sided, template):
    rules = TextRules(24, pair=template)
    queries = ["水油" * 20, "water", "的"] * 4
    queries = queries[: len(TEXTS)]
    plain = tokenize_pairs(sided, queries, TEXTS, rules)
    table = tokenize_pair_windows(sided, queries, TEXTS, with_windows(rules, sided, 3, -1, "max_seq_len"))
    firsts = np.cumsum([0, *table.windows[:-1]])
    assert [rows(table)[at] for at in firsts] == rows(plain)
    first_types = [table.types[table.starts[at] : table.starts[at + 1]].tolist() for at in firsts]
    assert sum(first_types, []) == plain.types.tolist()
    assert table.windows.max() == 3


def test_no_texts_have_no_windows(tokenizer):
    rules = TextRules(24, windows=2, stride=3)
    assert (
        len(tokenize_windows(tokenizer, [], rules))
        == len(tokenize_pair_windows(tokenizer, [], [], rules))
        == 0
    )


def test_stride_must_leave_tokens(tokenizer):
    assert with_windows(TextRules(40), tokenizer, 4, -1, "p_max_seq_len").stride == 10
    assert with_windows(TextRules(40), tokenizer, 1, 99, "p_max_seq_len").windows == 1
    with pytest.raises(UserError, match=r"38"):
        with_windows(TextRules(40), tokenizer, 4, 38, "p_max_seq_len")
