"""Texts to token ids: odd texts, prefix, spaces, exact truncation, padding, batches of like length."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from token_lists import table_of

from torch_src.models import tokenization
from torch_src.models.tokenization import (
    TextRules,
    TokenTable,
    length_sorted_batches,
    load_tokenizer,
    tokenize,
    tokenizer_checksum,
)
from torch_src.runtime.errors import UserError

STEADY = settings(derandomize=True, deadline=None)  # the same examples each time, on a slow machine too
MODEL = Path(__file__).resolve().parents[1] / "tiny_bert"
RULES = TextRules(32)
CONTROLS = ["", " ", "\x00\x01\x02", "\x0b\x0c\x1c\x1d\x1e\x85", "\u2028\u2029", "\ufeff\x7f", "\ufffd"]


def tokens(tokenizer, text, rules=RULES):
    """The tokens of one text between [CLS] and [SEP], and whether it was cut."""
    (ids,), cut = tokenize(tokenizer, [text], rules)
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return tokenizer.convert_ids_to_tokens(ids[1:-1]), cut


def uncut(tokenizer, text, max_seq_len):
    """The ids of the whole text, put together without truncation, prefix or early cut."""
    inner = tokenizer.backend_tokenizer
    inner.no_truncation()
    ids = inner.encode(text, add_special_tokens=False).ids
    return [tokenizer.cls_token_id, *ids[: max_seq_len - 2], tokenizer.sep_token_id], len(
        ids
    ) + 2 > max_seq_len


def test_folder_and_its_vocab_give_the_same_ids():
    from_folder = load_tokenizer(str(MODEL))
    from_vocab = load_tokenizer("a folder that is not there", str(MODEL / "vocab.txt"))
    texts = ["水的 Water，１２", *CONTROLS, "油" * 99]
    assert tokenize(from_vocab, texts, RULES) == tokenize(from_folder, texts, RULES)


def test_ids_are_lines_of_the_vocab(tokenizer):
    vocab = (MODEL / "vocab.txt").read_text(encoding="utf-8").split("\n")
    (ids,), _ = tokenize(tokenizer, ["水油"], RULES)
    assert [vocab[at] for at in ids] == ["[CLS]", "水", "油", "[SEP]"]


@pytest.mark.parametrize("text", CONTROLS)
def test_text_of_control_characters_gives_the_special_tokens_alone(tokenizer, text):
    assert tokens(tokenizer, text) == ([], 0)


def test_no_texts_give_no_ids(tokenizer):
    assert tokenize(tokenizer, [], RULES) == ([], 0)


def test_prefix_comes_before_every_text_even_an_empty_one(tokenizer):
    rules = TextRules(32, prefix="水: ")
    assert tokens(tokenizer, "油", rules)[0] == ["水", ":", "油"]
    assert tokens(tokenizer, "", rules)[0] == ["水", ":"]


def test_remove_spaces_joins_words_and_leaves_prefix_and_other_spaces():
    rules = TextRules(32, prefix="a b: ", remove_spaces=True)
    assert rules.clean(" c d \u3000e\t") == "a b: cd\u3000e\t"
    assert TextRules(32, prefix="a b: ").clean(" c d ") == "a b:  c d "


def test_remove_spaces_changes_the_tokens(tokenizer):
    assert tokens(tokenizer, "a b")[0] == ["a", "b"]
    assert tokens(tokenizer, "a b", TextRules(32, remove_spaces=True))[0] == ["a", "##b"]


@pytest.mark.parametrize("length, cut", [(0, 0), (7, 0), (8, 0), (9, 1), (500, 1)])
def test_truncation_at_max_seq_len_special_tokens_included(tokenizer, length, cut):
    assert tokens(tokenizer, "水" * length, TextRules(10)) == (["水"] * min(length, 8), cut)


def test_cut_texts_are_counted_exactly(tokenizer):
    texts = ["水" * 8, "水" * 9, "水" * 8 + " " * 900, "水" * 8 + " " * 900 + "油", "", "水" * 60_975]
    ids, cut = tokenize(tokenizer, texts, TextRules(10))
    assert cut == 3
    assert [len(one) for one in ids] == [10, 10, 10, 10, 2, 10]


def test_prefix_does_not_count_towards_the_limit(tokenizer):
    rules = TextRules(6, prefix="水水")
    assert rules.max_tokens(tokenizer) == 8
    assert tokens(tokenizer, "油" * 4, rules) == (["水", "水", *"油油油油"], 0)
    assert tokens(tokenizer, "油" * 5, rules) == (["水", "水", *"油油油油"], 1)


def test_a_long_instruction_leaves_queries_distinct(tokenizer):
    rules = TextRules(8, prefix="请为这个问题找出能够回答它的段落并按照相关程度从高到低排列出来：")
    first, second = ("".join(tokens(tokenizer, text, rules)[0]) for text in ("清蒸鱼", "红烧肉"))
    assert first.endswith("清蒸鱼") and second.endswith("红烧肉")


def test_passage_of_60975_characters_keeps_its_first_tokens(tokenizer):
    text = ("水的，油 一" * 10_163)[:60_975]
    (ids,), cut = tokenize(tokenizer, [text], TextRules(384))
    assert (ids, bool(cut)) == uncut(tokenizer, text, 384)
    assert len(ids) == 384 and cut == 1


@pytest.mark.parametrize(
    "text",
    [
        " " * 10_000 + "水 的 油",
        "水" + " " * 10_000 + "油 water",
        "\x00" * 10_000 + "水",
        "水" * 381 + " " * 6_000 + "油" * 3,
        " " * 10_000 + "油" * 500,
    ],
)
def test_early_cut_removes_nothing_from_a_text_of_many_spaces(tokenizer, text):
    (ids,), cut = tokenize(tokenizer, [text], TextRules(384))
    assert (ids, bool(cut)) == uncut(tokenizer, text, 384)


@pytest.mark.parametrize(
    "text, max_seq_len",
    [("x" * 200, 4), ("水" * 381 + " " * 5_700 + "x" * 200, 384), ("水" + " " * 46 + "油" * 30, 4)],
)
def test_early_cut_inside_a_word_gives_the_ids_of_the_whole_text(tokenizer, text, max_seq_len):
    (ids,), cut = tokenize(tokenizer, [text], TextRules(max_seq_len))
    assert (ids, bool(cut)) == uncut(tokenizer, text, max_seq_len)


@STEADY
@given(st.lists(st.text("水油 ab,\x0b\u2028", max_size=60), max_size=4), st.integers(3, 12))
def test_ids_do_not_depend_on_the_other_texts_or_the_call(tokenizer, texts, max_seq_len):
    rules = TextRules(max_seq_len)
    ids, cut = tokenize(tokenizer, texts, rules)
    assert tokenize(tokenizer, texts, rules) == (ids, cut)
    alone = [tokenize(tokenizer, [text], rules) for text in texts]
    assert ids == [one for (one,), _ in alone]
    assert cut == sum(count for _, count in alone)
    assert all(2 <= len(one) <= max_seq_len for one in ids)


def test_checksum_is_that_of_the_vocabulary_not_of_the_last_call(tokenizer, tmp_path):
    first = tokenizer_checksum(tokenizer)
    tokenize(tokenizer, ["水" * 99], TextRules(7))
    assert tokenizer_checksum(tokenizer) == first
    vocab = (MODEL / "vocab.txt").read_text(encoding="utf-8").replace("\n水\n", "\n氵\n")
    (tmp_path / "vocab.txt").write_text(vocab, encoding="utf-8")
    assert tokenizer_checksum(load_tokenizer("", str(tmp_path / "vocab.txt"))) != first


def test_missing_vocab_or_folder_is_a_user_error_naming_it(tmp_path):
    missing = tmp_path / "none"
    for arguments in ((str(missing),), (str(tmp_path),), ("", str(missing)), ("", str(tmp_path))):
        with pytest.raises(UserError) as caught:
            load_tokenizer(*arguments)
        assert str(caught.value).startswith(f"{arguments[-1]}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "a\nb\n"])
def test_vocab_without_the_special_tokens_is_a_user_error(tmp_path, content):
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    with pytest.raises(UserError):
        load_tokenizer("", str(path))


def test_rows_are_padded_to_the_longest_with_the_pad_id():
    table = table_of([[5, 6, 7], [8], [9, 1]], [[0, 0, 1], [1], [0, 1]])
    ids, mask, types = table.padded([2, 0, 1], pad_id=4)
    assert ids.tolist() == [[9, 1, 4], [5, 6, 7], [8, 4, 4]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert types.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert table.padded(np.array([1, 2]), 4)[0].tolist() == [[8, 4], [9, 1]]
    both = TokenTable.concatenate([table, table])
    assert both.padded([3, 5], 4).tolist() == table.padded([0, 2], 4).tolist()


@STEADY
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=6), st.randoms())
def test_padded_sequences_are_unchanged_under_the_mask(sequences, draw):
    rows = draw.sample(range(len(sequences)), draw.randint(1, len(sequences)))
    inputs = table_of(sequences).padded(rows, pad_id=11)
    ids, mask = inputs
    chosen = [sequences[at] for at in rows]
    assert inputs.dtype == np.int64 and inputs.shape == (2, len(rows), max(map(len, chosen)))
    assert [row[on == 1].tolist() for row, on in zip(ids, mask, strict=True)] == chosen
    assert (ids[mask == 0] == 11).all()


@STEADY
@given(st.lists(st.integers(0, 400), max_size=60), st.integers(1, 9), st.integers(1, 900))
@example([0, 0], 1, 1)
@example([], 3, 3)
def test_batches_cover_each_text_once_within_both_limits(lengths, max_rows, max_tokens):
    batches = length_sorted_batches(lengths, max_rows, max_tokens)
    order = [int(at) for batch in batches for at in batch]
    assert order == sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    for batch in batches:
        assert 1 <= len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * max(lengths[at] for at in batch) <= max_tokens


def test_batches_are_filled_up_to_the_limits():
    assert [batch.tolist() for batch in length_sorted_batches([2, 5, 1, 5, 2], 3, 10)] == [[1, 3], [0, 4, 2]]
    assert [batch.tolist() for batch in length_sorted_batches([9, 9], 8, 4)] == [[0], [1]]


def test_checksum_and_saving_wait_for_the_thread_that_tokenizes(tokenizer, tmp_path, monkeypatch):
    """Both reset the length limit of the shared tokenizer, so both must hold its lock."""
    held = []

    class Lock:
        def __enter__(self):
            held.append(True)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(tokenization, "LOCK", Lock())
    tokenization.tokenizer_checksum(tokenizer)
    tokenization.save_tokenizer(tokenizer, tmp_path)
    assert held == [True, True]
