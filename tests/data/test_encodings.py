"""What a file that is not UTF-8 may be, for readers and messages."""

import pytest

from torch_src.data.encodings import is_gb18030, not_utf8
from torch_src.data.json_pairs import read_json_pairs
from torch_src.data.lines import FormatError, read_lines
from torch_src.data.results import load_result

TEXT = "清蒸鱼要先去腥，放姜片和葱段，水开后蒸八分钟。"


@pytest.mark.parametrize("raw, expected", [
    (TEXT.encode("gbk"), True), (TEXT.encode("gbk")[:-1], True), (TEXT.encode(), False),
    (TEXT.encode()[:-1] + b"\n", False), ("國立臺灣大學成立於一九二八年".encode("big5"), False),
    ("これは日本語の文章です".encode("shift-jis"), False), ("naïve café, élan".encode("latin-1"), False),
    (b"1\t\xff\n", False),
])  # fmt: skip
def test_gb18030_is_told_from_other_encodings(raw, expected):
    assert is_gb18030(raw) is expected


def test_messages_name_the_encoding_and_the_fix(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(f'{{"{TEXT}": "1"}}\n'.encode("gbk"))
    for read in (
        lambda: list(read_lines(path)),
        lambda: list(read_json_pairs(path)),
        lambda: load_result(path),
    ):
        with pytest.raises(FormatError, match=f"{path}:1: .*GB18030.*iconv .*{path}"):
            read()
    assert "UTF-16" in not_utf8("x".encode("utf-16"), "p") and "damaged" in not_utf8(b"\xff", "p")


@pytest.mark.parametrize("content, words", [
    (b"\xef\xbb\xbf{}", "byte order mark"), (b"", "the file ends here"),
])  # fmt: skip
def test_maps_that_an_editor_saved(tmp_path, content, words):
    path = tmp_path / "q2qid.dev.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words):
        list(read_json_pairs(path))
