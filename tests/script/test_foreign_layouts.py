"""`convert_dataset.py auto`: layouts, columns and encodings are recognized, or refused by name."""

import csv
import io
import json

import pytest
from test_foreign_datasets import FISH, PORK, RICE, Converter, put, table

from script.lib.foreign_files import Source, encoding_of
from script.lib.foreign_layouts import recognize
from torch_src.runtime.errors import UserError

LONGER = [text * 3 for text in (FISH, PORK, RICE)]
ROW = {"query": "怎么蒸鱼", "pos": [FISH], "neg": [PORK]}


@pytest.fixture
def convert(tmp_path, capsys):
    return Converter(tmp_path, capsys)


def as_csv(*rows: list[str]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def rows(*heads: str) -> str:
    """Return CSV with a header and rows of number, name, text and date, as many columns as names."""
    return as_csv([*heads], *([str(7 + at), f"菜{at}", text, "2020"] for at, text in enumerate(LONGER)))


NAMED = {f"{7 + at}": f"菜{at} {text}" for at, text in enumerate(LONGER)}
LINES = {f"t.csv:{2 + at}": text for at, text in enumerate(LONGER)}


@pytest.mark.parametrize("content, expected", [
    (rows("编号", "标题", "正文", "日期"), NAMED),
    (rows("id", "question", "answer", "date"), NAMED),
    (rows("No.", "x", "Content", "y"), LINES),
    (rows("a", "b", "c", "d"), LINES),  # unknown names: the longest column
    (as_csv(["doc_id", "text"], *(["d", text] for text in LONGER)), LINES),  # ids that repeat are not read
    (as_csv(["text", "answer", "id"], *([text, "是", str(at)] for at, text in enumerate(LONGER))),
     {str(at): text for at, text in enumerate(LONGER)}),  # the most usual name of a text
    (as_csv(*([text] for text in LONGER)), {f"t.csv:{1 + at}": text for at, text in enumerate(LONGER)}),
    (as_csv(*([f"p{at}", text] for at, text in enumerate(LONGER))),
     {f"p{at}": text for at, text in enumerate(LONGER)}),
])  # fmt: skip
def test_columns_are_guessed(convert, tmp_path, content, expected):
    assert convert("auto", put(tmp_path / "t.csv", content)).passages == expected
    assert "columns read as" in convert.printed and "--columns" in convert.printed


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "utf-16"])
def test_encodings_are_found(convert, tmp_path, encoding):
    content = rows("编号", "标题", "正文", "日期").encode(encoding)
    assert convert("auto", put(tmp_path / "t.csv", content)).passages == NAMED
    assert ("read as" in convert.printed.partition("columns")[0]) == (not encoding.startswith("utf-8"))


def test_encoding_option(convert, tmp_path):
    path = put(tmp_path / "t.csv", as_csv(["id", "text"], ["1", "國立臺灣大學"]).encode("big5"))
    assert "t.csv:2: neither UTF-8" in convert.error("auto", path)
    assert convert("auto", path, "--encoding", "big5").passages == {"1": "國立臺灣大學"}


def test_an_encoding_is_never_guessed_from_few_signs():
    with pytest.raises(UserError):
        encoding_of("naïve café, élan".encode("latin-1"), "x")
    with pytest.raises(UserError):
        encoding_of("これは日本語の文章です。".encode("shift-jis"), "x")
    assert encoding_of("name,价格\n".encode("gbk"), "x") == "gb18030"


@pytest.mark.parametrize("columns, expected", [
    ("text=正文", LINES),
    ("title=日期,text=正文", {pid: f"2020 {text}" for pid, text in LINES.items()}),
])  # fmt: skip
def test_columns_by_name(convert, tmp_path, columns, expected):
    path = put(tmp_path / "t.csv", rows("编号", "标题", "正文", "日期"))
    assert convert("auto", path, "--columns", columns).passages == expected


def test_fields_of_json_by_name(convert, tmp_path):
    path = put(tmp_path / "p.jsonl", [{"body_zh": FISH, "key": "k"}])
    assert "p.jsonl:1: " in (error := convert.error("auto", path)) and "--columns text=" in error
    assert convert("auto", path, "--columns", "text=body_zh,id=key").passages == {"k": FISH}


def test_a_column_that_does_not_exist(convert, tmp_path):
    path = put(tmp_path / "p.csv", rows("a", "b", "c", "d"))
    assert "p.csv:1: " in convert.error("auto", path, "--columns", "text=gone")


@pytest.mark.parametrize("content, expected", [
    (f"{FISH}\n{PORK}\r\n", {"n.txt:1": FISH, "n.txt:2": PORK}),
    (f"\n　　{FISH}\n\n{PORK}\n\n", {"n.txt:2": FISH, "n.txt:4": PORK}),
    (f"{FISH[:3]}\n{FISH[3:]}\n\nsteamed\nrice\n", {"n.txt:1": FISH, "n.txt:4": "steamed rice"}),
    (f"{FISH}。\n{PORK}。\n\n{RICE}\n", {"n.txt:1": f"{FISH}。", "n.txt:2": f"{PORK}。", "n.txt:4": RICE}),
    (f"{FISH}\n" * 50 + "\n" + PORK, {**{f"n.txt:{at}": FISH for at in range(1, 51)}, "n.txt:52": PORK}),
    (f"a\t{FISH}\nb\t{PORK}\n", {"a": FISH, "b": PORK}),  # a table
])  # fmt: skip
def test_text_files(convert, tmp_path, content, expected):
    assert convert("auto", put(tmp_path / "n.txt", content)).passages == expected


def test_a_folder_of_text_files(convert, tmp_path):
    put(tmp_path / "F/a.txt", f"{FISH}\n")
    put(tmp_path / "F/b.md", f"{PORK}\n".encode("gbk"))
    assert convert("auto", tmp_path / "F").passages == {"a.txt:1": FISH, "b.md:1": PORK}


def test_rows_and_folders_are_recognized(convert, tmp_path):
    found = convert(
        "auto", put(tmp_path / "rows.json", json.dumps([ROW], ensure_ascii=False)), "--split", "x"
    )
    assert {*found.passages.values()} == {FISH, PORK} and len(found.dev) == 1
    beir = tmp_path / "beir"
    put(beir / "corpus.jsonl", [{"_id": "1", "text": FISH}])
    put(beir / "queries.jsonl", [{"_id": "q", "text": "鱼"}])
    put(beir / "qrels/test.tsv", table("query-id|corpus-id|score", "q|1|1"))
    assert recognize(beir, Source()) == ("beir", beir)
    put(tmp_path / "rows/train.jsonl", [ROW])
    assert recognize(tmp_path / "rows", Source()) == ("flagembedding", tmp_path / "rows")
    put(tmp_path / "own/passage-collection/part-00", f"-\t\t{FISH}\t0\n")
    assert recognize(tmp_path / "own", Source())[0] == "official"


@pytest.mark.parametrize("name, content", [
    ("x.pdf", b"%PDF-1.4"), ("x.xlsx", b"PK\x03\x04"), ("x.csv", ""), ("x.csv", "text\n"), ("x.txt", "\n \n"),
    ("x.csv", "\n\n"),
    ("part-00", f"-\t\t{FISH}\t0\n"), ("F/a.csv", "id,text\n"), ("res.top50", f"{FISH}\t7\t1\t0.5\n"),
    ("dual.train.tsv", f"{FISH}\t\t{PORK}\t\t{RICE}\t0\n"), ("dev.q.format", f"{FISH}\t-\t-\t0\n"),
    ("cross.train.tsv", f"{FISH}\tnull\t{PORK}\t1\n"),
])  # fmt: skip
def test_what_is_not_passages_is_refused(convert, tmp_path, name, content):
    put(tmp_path / "F/b.jsonl", [{"text": "x"}])
    path = put(tmp_path / name, content)
    assert str(tmp_path) in convert.error("auto", path.parent if "F/" in name else path)
