"""Terms of texts in every script, by hand."""

import pytest

from torch_src.data.terms import terms


@pytest.mark.parametrize(("text", "expected"), [
    ("清蒸鱼", ["清蒸", "蒸鱼"]), ("鱼", ["鱼"]), ("", []), ("，。！", []),
    ("用 iPhone15 拍照", ["用", "iphone15", "拍照"]),
    ("a-b 3.5", ["a", "b", "3", "5"]), ("清。蒸鱼", ["清", "蒸鱼"]), ("𠮷野家", ["𠮷野", "野家"]),
])  # fmt: skip
def test_terms(text, expected):
    assert terms(text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("ＡＢＣ １２", ["abc", "12"]), ("カレー", ["カレ", "レー"]), ("ｶﾞｽ", ["ガス"]),
    ("서울 물", ["서울", "물"]),
    ("Привет, МИР", ["привет", "мир"]), ("Café CAFE\u0301", ["café", "café"]), ("कहानी", ["कहानी"]),
    ("مرحبا", ["مرحبا"]), ("١٢٣", ["١٢٣"]), ("C语言", ["c", "语言"]),
    ("人々〇", ["人々", "々〇"]), ("½ ①", ["1", "2", "1"]),
    ("a_b", ["a", "b"]), ("😀", []),
])  # fmt: skip
def test_terms_of_every_script(text, expected):
    assert terms(text) == expected
