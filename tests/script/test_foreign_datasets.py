"""Data sets of other tools, against hand-worked conversions: kept, merged, dropped, counted, refused."""

import csv
import gzip
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from toy_world import lines

from script import convert_dataset
from torch_src.data.formats import read_dev
from torch_src.data.mined_files import COLUMNS, read_teacher
from torch_src.runtime.errors import UserError

UNKNOWN = "judgments of unknown queries or passages"
FISH, PORK, RICE, SOUP = "清蒸鱼要先去腥", "红烧肉要炖一小时", "米饭要焖二十分钟", "汤要最后放盐"


class Converted(NamedTuple):
    """The files of a converted data set."""

    passages: dict[str, str]  # pid -> text
    dev: dict[str, tuple[str, dict[str, int]]]  # qid -> query, {pid: grade}
    dual: list[tuple[str, str, str]]
    cross: list[tuple[str, str, int]]
    folder: Path


def read(folder: Path) -> Converted:
    ids = json.loads((folder / "passage-collection/passage2id.map.json").read_text(encoding="utf-8"))
    texts = [line.split("\t")[2] for line in lines(folder / "passage-collection/part-00")]
    dev = {}
    if (folder / "dev/dev.json").exists():
        for query in read_dev(folder / "dev/dev.json"):
            dev[query.qid] = query.query, {pid: query.grades.get(pid, 1) for pid in query.answers}
    rows = {"dual": [], "cross": []}
    for name in rows:
        if (folder / f"train/{name}.train.tsv").exists():
            rows[name] = [line.split("\t") for line in lines(folder / f"train/{name}.train.tsv")]
    dual = [(row[0], row[2], row[4]) for row in rows["dual"]]
    cross = [(row[0], row[2], int(row[3])) for row in rows["cross"]]
    return Converted({ids[str(at)]: text for at, text in enumerate(texts)}, dev, dual, cross, folder)


class Converter:
    """Converts to `folder`/D; `printed` is the output of the last conversion."""

    def __init__(self, folder: Path, capsys):
        self.target, self.capsys, self.printed = folder / "D", capsys, ""

    def __call__(self, *words) -> Converted:
        status = convert_dataset.main([*map(str, words), "--to", str(self.target)])
        output = self.capsys.readouterr()
        self.printed = output.out + output.err
        assert status == 0, self.printed
        return read(self.target)

    def error(self, *words) -> str:
        """Return the message of a refused conversion, which leaves nothing behind."""
        assert convert_dataset.main([*map(str, words), "--to", str(self.target)]) == 2
        error = self.capsys.readouterr().err
        assert error.count("\n") == 1 and not [*self.target.parent.glob("D*")], error
        return error


@pytest.fixture
def convert(tmp_path, capsys):
    return Converter(tmp_path, capsys)


def put(path: Path, content, name: str = "") -> Path:
    """Write text, JSON lines of a list, or bytes; return the path."""
    path = path / name if name else path
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(*rows: str) -> str:
    """Return rows as lines; a blank separates columns, a vertical bar is a TAB."""
    return "".join(row.replace("|", "\t") + "\n" for row in rows)


# ---- tables


@pytest.mark.parametrize("content, expected", [
    (table(f"1|{FISH}", f"2|{PORK}"), {"1": FISH, "2": PORK}),
    (table("pid|text", f"1|{FISH}"), {"1": FISH}),  # T2Ranking
    (table("id|text|title", f'1|"{FISH} ""鱼"""|菜'), {"1": f'菜 {FISH} "鱼"'}),  # DPR
    (table("id|title|text", f"1|菜|{FISH}", f"2||{PORK}"), {"1": f"菜 {FISH}", "2": PORK}),
    (table("Doc ID|Text", f"1|{FISH}"), {"1": FISH}),
    (table("编号|标题|正文", f"1|菜|{FISH}"), {"1": f"菜 {FISH}"}),
    (table("_id|url|contents", f"1|http://x|{FISH}"), {"1": FISH}),
    (table(f"1|菜|{FISH}"), {"1": f"菜 {FISH}"}),
    (table("docid|title|text", f"1|nan|{FISH}", f"2|null|{PORK}"), {"1": FISH, "2": PORK}),
    (f"\ufeffpid\ttext\r\n1\t{FISH}\r\n2\t{PORK}\r\n", {"1": FISH, "2": PORK}),
    (table("1|a", "", "  ", "2|b"), {"1": "a", "2": "b"}),
    ("1\ta\x0b\x85b\u2028c\n2\td\re\n", {"1": "a\x0b\x85b\u2028c", "2": "d e"}),
    (table('"id"|"text"', '"1"|"a ""b"""'), {"1": 'a "b"'}),
    (table('1|"你好"'), {"1": '"你好"'}),  # quotation marks of the text
])  # fmt: skip
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_passage_tables(convert, tmp_path, content, expected, pack):
    name = "corpus.tsv.gz" if pack is gzip.compress else "corpus.tsv"
    assert convert("jsonl", put(tmp_path, pack(content.encode()), name)).passages == expected


def test_csv_with_quotes_and_line_breaks_in_fields(convert, tmp_path):
    written = io.StringIO()
    csv.writer(written).writerows([("id", "text", "n"), (1, 'a,"b"\nc', 0), (2, f"{FISH}\t", 0)])
    path = put(tmp_path, written.getvalue(), "c.csv")
    assert convert("jsonl", path).passages == {"1": 'a,"b" c', "2": f"{FISH} "}


@pytest.mark.parametrize("options, expected", [(["csv"], 'a "b"'), (["none"], '"a ""b"""')])
def test_quotes_option(convert, tmp_path, options, expected):
    path = put(tmp_path, table("1|x", '2|"a ""b"""'), "c.tsv")
    assert convert("jsonl", path, "--quotes", *options).passages["2"] == expected


@pytest.mark.parametrize(
    "columns, expected", [("id,text,title", "鱼 长长的正文"), ("id,title,text", "长长的正文 鱼")]
)
def test_columns_option(convert, tmp_path, columns, expected):
    path = put(tmp_path, table("1|长长的正文|鱼"), "c.tsv")
    assert convert("jsonl", path, "--columns", columns).passages == {"1": expected}
    put(path, table("id|text|url", "1|长的正文|鱼"))
    shutil.rmtree(tmp_path / "D")
    assert "c.tsv:1: " in convert.error("jsonl", path, "--columns", columns)  # contradicts the header


@pytest.mark.parametrize("name, content, place", [
    ("c.tsv", table("1|长长的正文|鱼", "2|长长的正文|肉"), "c.tsv: "),  # DPR without its header
    ("c.tsv", table("1|x", '2|"a ""b"""'), "c.tsv:2: "),  # quotes of CSV, or of the text?
    ("c.tsv", table("1|a|b|c"), "c.tsv:1: "),
    ("c.tsv", table("1|a", "2|b|c"), "c.tsv:2: "),  # a TAB in a text
    ("c.tsv", table("1|a", "2"), "c.tsv:2: "),
    ("c.tsv", table("id|body_x", "1|a"), "c.tsv:1: "),  # a header, but not a known one
    ("c.tsv", table("id|text|contents", "1|a|b"), "c.tsv:1: "),
    ("c.tsv", table("1|a", "|b"), "c.tsv:2: "),
    ("c.tsv", table("1|a", "1|b"), "c.tsv:2: "),
    ("c.tsv", table("1|a", "1|a"), "c.tsv:2: "),
    ("c.tsv", "", "c.tsv: "),
    ("c.tsv", f"1\t{FISH}\n".encode() + "2\t國立臺灣大學".encode("big5"), "c.tsv:2: "),
    ("c.tsv", f"1\t{FISH}\n".encode() * 9 + FISH.encode()[:-1] + b"\n", "c.tsv:10: "),  # a cut character
    ("c.tsv", "1\tcaf\xe9s \xe9lan\n".encode("latin-1"), "c.tsv:1: "),
    ("c.tsv", f"1\t{FISH}\n".encode("gbk") * 9 + b"2\t\xff\n", "c.tsv:1: "),
    ("c.parquet", b"PAR1....", "c.parquet: "),
    ("c.csv", 'id,text\n1,"a\n2,b\n', "c.csv:2: "),  # the quotes do not end
    ("c.csv", 'id,text\n1,a\n2,"b"c\n', "c.csv:3: "),
    ("c.jsonl", '{"id": "1", "text": "a"}\n{"id": true, "text": "b"}\n', "c.jsonl:2: "),
    ("c.jsonl", '{"id": "1", "text": ["a"]}\n', "c.jsonl:1: "),
    ("c.jsonl", '{"id": null, "text": "a"}\n', "c.jsonl:1: "),
    ("c.jsonl", '{"id": 1.5, "text": "a"}\n', "c.jsonl:1: "),
    ("c.jsonl", '{"text": "a"}\n', "c.jsonl:1: "),
    ("c.jsonl", '{"id": "1", "text": "a"}\n{"id": "2", "text": "a", "id": "3"}\n', "c.jsonl:2: "),
    ("c.json", '[{"id": 1, "text": "a"},\n{"id": 2, "text": \n', "c.json:"),
    ("c.json", '[{"id": 1, "text": "a"},\n{"id": 2, "text": "b"}\n', "c.json:"),
    ("c.jsonl.gz", gzip.compress(b'{"id": "1", "text": "a"}\n' * 9, mtime=0)[:-9], "c.jsonl.gz: "),
])  # fmt: skip
def test_malformed_passages_are_named(convert, tmp_path, name, content, place):
    assert f"{tmp_path / place}"[:-1] in convert.error("jsonl", put(tmp_path, content, name))


def test_skip_duplicates(convert, tmp_path):
    path = put(tmp_path, table("1|a", "1|a", "2|b", "1|a"), "c.tsv")
    assert "--skip_duplicates" in convert.error("jsonl", path)
    assert convert("jsonl", path, "--skip_duplicates").passages == {"1": "a", "2": "b"}
    assert "2 passages have the id and text of an earlier one" in convert.printed
    shutil.rmtree(tmp_path / "D")
    put(path, table("1|a", "1|b"))
    assert "c.tsv:2: " in convert.error("jsonl", path, "--skip_duplicates")


def test_json_ids_titles_and_arrays(convert, tmp_path):
    entries = [
        {"_id": 1, "title": None, "text": "a"}, {"_id": 2.0, "title": float("nan"), "text": "b"},
        {"_id": "x", "title": "", "text": "c", "metadata": {}}, {"_id": "y", "title": "t", "text": None},
    ]  # fmt: skip
    expected = {"1": "a", "2": "b", "x": "c", "y": "t "}
    assert convert("jsonl", put(tmp_path, entries, "c.jsonl")).passages == expected
    (tmp_path / "D").rename(tmp_path / "first")
    array = json.dumps(entries, indent=2, ensure_ascii=False)
    assert convert("jsonl", put(tmp_path, array, "c.json")).passages == expected


def test_a_long_array_is_read_in_pieces(convert, tmp_path):
    entries = [{"id": at, "text": "字" * (at * 997 % 5000)} for at in range(200)]
    found = convert("jsonl", put(tmp_path, json.dumps(entries, indent=1), "c.json")).passages
    assert found == {str(entry["id"]): entry["text"] for entry in entries}


# ---- corpus, queries, judgments


def three_files(folder: Path, qrels: dict[str, str | list], queries=None, corpus=None) -> Path:
    """Write corpus, queries and judgments; by default the passages d0 to d2 and the queries q0 to q3."""
    put(folder / "corpus.jsonl", corpus or passages(FISH, PORK, RICE))
    put(folder / "queries.jsonl", queries or [{"_id": f"q{n}", "text": f"问{n}"} for n in range(4)])
    for name, content in qrels.items():
        put(folder / name, content)
    return folder


QRELS = [
    table("query-id|corpus-id|score", "q1|d0|2", "q1|d1|1", "q2|d2|0", "q2|d1|1"),
    table("q1|d0|2", "q1|d1|1", "q2|d2|0", "q2|d1|1"),
    table("q1 0 d0 2", "q1 0 d1 1", "q2 0 d2 0", "q2 0 d1 1"),  # TREC
    table("q1|0|d0|2", "q1|0|d1|1", "q2|0|d2|0", "q2|Q0|d1|1"),
    table("qid|-|pid|rel", "q1|-|d0|2", "q1|-|d1|1", "q2|-|d2|0", "q2|-|d1|1.0"),
    table("topic|iteration|document|relevancy", "q1|0|d0|2", "q1|0|d1|1", "q2|0|d2|0", "q2|0|d1|1"),
    table("q1  0   d0  2", "q1 0 d1 1", "", "q2 0 d2 -1", "q2 0 d1 1").replace("\n", "\r\n"),
]


@pytest.mark.parametrize("qrels", QRELS)
def test_judgment_tables(convert, tmp_path, qrels):
    found = convert("beir", three_files(tmp_path / "B", {"qrels/test.tsv": qrels}))
    assert found.dev == {"q1": ("问1", {"d0": 2, "d1": 1}), "q2": ("问2", {"d1": 1})}


@pytest.mark.parametrize("names", [("query-id", "corpus-id", "score"), ("qid", "docid", "relevance")])
def test_judgments_as_json_lines(convert, tmp_path, names):
    rows = [dict(zip(names, row, strict=True)) for row in (("q1", "d0", 2), ("q1", "d1", 1), ("q2", "d1", 0))]
    folder = three_files(tmp_path / "B", {"dev_qrels.jsonl": rows})
    assert convert("beir", folder).dev == {"q1": ("问1", {"d0": 2, "d1": 1})}


@pytest.mark.parametrize("line, fault", [
    ("q1|d0", "3"), ("q1|d0|x", "grade"), ("q1|d0|0.5", "grade"), ("q1|d0|nan", "grade"), ("q1|d0|", "grade"),
    ("q1|d0|１", "grade"), ("q9|d0|1", "q9"), ("q1|d9|1", "d9"), ("|d0|1", "id"), ("q1|d0|1|0|0", "5"),
])  # fmt: skip
def test_malformed_judgments_are_named(convert, tmp_path, line, fault):
    qrels = table("query-id|corpus-id|score", "q1|d1|1", line)
    error = convert.error("beir", three_files(tmp_path / "B", {"qrels/dev.tsv": qrels}))
    assert "qrels/dev.tsv:3: " in error and fault in error


def test_skip_dangling_drops_and_counts(convert, tmp_path):
    qrels = table("q1|d9|1", "q1|d0|1", "q8|d0|1", "q2|d9|1", "q3|d1|1", "q3|d9|0")
    folder = three_files(tmp_path / "B", {"qrels/dev.tsv": qrels})
    error = convert.error("beir", folder)
    assert "qrels/dev.tsv:1: " in error and "--skip_dangling" in error
    found = convert("beir", folder, "--skip_dangling")
    assert found.dev == {"q1": ("问1", {"d0": 1}), "q3": ("问3", {"d1": 1})}
    assert f"3 {UNKNOWN}" in convert.printed and "(first: " in convert.printed
    assert "1 queries have no positive passage" in convert.printed


SPLITS = {f"qrels/{name}.tsv": f"{qid}\td0\t1\n" for name, qid in (
    ("train", "q0"), ("dev", "q1"), ("test", "q2"), ("validation", "q3")
)}  # fmt: skip


@pytest.mark.parametrize("options, dev", [("", "q1"), ("--split test", "q2"), ("--split validation", "q3")])
def test_the_split_that_becomes_the_dev_set(convert, tmp_path, options, dev):
    found = convert("beir", three_files(tmp_path / "B", SPLITS), *options.split())
    assert [*found.dev] == [dev] and {query for query, *_ in found.dual} == {"问0"}
    assert convert.printed.count("1 lines not read; --split") == 2


@pytest.mark.parametrize("name", ["validation", "valid", "val", "test"])
def test_other_names_of_the_dev_split(convert, tmp_path, name):
    folder = three_files(tmp_path / "B", {f"qrels/{name}.tsv": "q1\td0\t1\n"})
    assert [*convert("beir", folder).dev] == ["q1"]


@pytest.mark.parametrize("split", ["train", "nowhere"])
def test_a_split_that_cannot_be_the_dev_set(convert, tmp_path, split):
    folder = three_files(tmp_path / "B", {"qrels/train.tsv": "q1\td0\t1\n"})
    assert split in convert.error("beir", folder, "--split", split)


@pytest.mark.parametrize("name", ["corpus.tsv", "corpus.jsonl.gz", "queries.tsv", "qrels/dev.jsonl"])
def test_two_files_of_one_meaning_are_refused(convert, tmp_path, name):
    folder = three_files(tmp_path / "B", {"qrels/dev.tsv": "q1\td0\t1\n", name: "x\ty\n"})
    assert "several files" in convert.error("beir", folder)


def test_other_files_are_ignored_and_logged(convert, tmp_path):
    names = ("corpus.jsonl.bak", "README.md", "corpus.old.tsv")
    folder = three_files(tmp_path / "B", {"qrels/dev.tsv": "q1\td0\t1\n", **dict.fromkeys(names, "x")})
    assert len(convert("beir", folder).passages) == 3
    assert "files not read: corpus.old.tsv" in convert.printed


def test_the_corpus_option_chooses(convert, tmp_path):
    folder = three_files(tmp_path / "B", {"qrels/dev.tsv": "q1\tx\t1\n", "corpus.tsv": f"x\t{SOUP}\n"})
    assert convert("beir", folder, "--corpus", folder / "corpus.tsv").passages == {"x": SOUP}


def test_duplicates_and_contradictions_in_judgments(convert, tmp_path):
    one = table("q1|d0|1", "q1|d0|1", "q1|d1|0", "q1|d1|1", "q1|d2|0", "q1|d2|0")
    other = table("q2|d0|1", "q2|d0|3", "q2|d1|0")
    found = convert("beir", three_files(tmp_path / "B", {"qrels/train.tsv": one + other}))
    assert found.dual == [("问1", FISH, RICE), ("问1", PORK, RICE), ("问2", FISH, PORK)]
    assert found.cross[:3] == [("问1", FISH, 1), ("问1", PORK, 1), ("问1", RICE, 0)]
    assert found.cross[3:] == [("问2", FISH, 1), ("问2", PORK, 0)]
    counts = ("2 duplicate judgments", "1 negatives are also positives", "1 passages have two grades")
    for count in (*counts, "1 training judgments have a grade above 1"):
        assert count in convert.printed


def test_min_grade(convert, tmp_path):
    qrels = table("q1|d0|1", "q1|d1|2", "q2|d1|1")
    folder = three_files(tmp_path / "B", {"qrels/train.tsv": qrels, "qrels/dev.tsv": qrels})
    found = convert("beir", folder, "--min_grade", 2)
    assert found.dual == [("问1", PORK, FISH)] and found.dev == {"q1": ("问1", {"d1": 2})}


def queries(*texts: str) -> list[dict[str, str]]:
    return [{"_id": f"q{n}", "text": text} for n, text in enumerate(texts)]


def test_queries_with_one_text(convert, tmp_path):
    dev, train = table("q0|d0|1", "q1|d1|2", "q2|d2|1"), table("q3|d0|1", "q3|d1|0")
    names = {"qrels/dev.tsv": dev, "qrels/train.tsv": train}
    found = convert("beir", three_files(tmp_path / "B", names, queries("问", "问", "答", "问")))
    assert found.dev == {"q0": ("问", {"d0": 1, "d1": 2}), "q2": ("答", {"d2": 1})}
    assert lines(found.folder / "dev/merged_qids.tsv") == ["q1\tq0"]
    assert "1 dev queries have the text of an earlier query" in convert.printed
    assert "WARNING 1 dev queries are also training queries" in convert.printed


def test_training_queries_with_one_text_share_their_judgments(convert, tmp_path):
    qrels = table("q0|d0|1", "q0|d1|0", "q1|d1|1", "q1|d2|0")
    found = convert("beir", three_files(tmp_path / "B", {"qrels/train.tsv": qrels}, queries("问", "问")))
    assert found.dual == [("问", FISH, RICE), ("问", PORK, RICE)]  # d1 is a positive of the one


def test_one_query_id_with_two_texts(convert, tmp_path):
    pairs = (("q1", "问"), ("q1", "问"), (1, "a"), ("1", "b"))
    entries = [{"_id": qid, "text": text} for qid, text in pairs]
    folder = three_files(tmp_path / "B", {"qrels/dev.tsv": "q1\td0\t1\n"}, entries)
    assert "queries.jsonl:4: " in convert.error("beir", folder)
    put(folder / "queries.jsonl", entries[:2])
    assert convert("beir", folder).dev == {"q1": ("问", {"d0": 1})}
    assert "1 duplicate lines of queries" in convert.printed


def test_an_empty_query_is_named(convert, tmp_path):
    folder = three_files(tmp_path / "B", {"qrels/dev.tsv": "q1\td0\t1\n"}, queries("问", " "))
    assert "queries.jsonl:2: " in convert.error("beir", folder)


def passages(*texts: str) -> list[dict[str, str]]:
    return [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)]


def test_empty_passages(convert, tmp_path):
    qrels = table("q0|d0|1", "q0|d1|1", "q0|d2|0", "q0|d3|0", "q1|d1|1")
    names = {"qrels/train.tsv": qrels, "qrels/dev.tsv": "q3\td1\t1\n"}
    found = convert("beir", three_files(tmp_path / "B", names, corpus=passages(FISH, " \n", "null", PORK)))
    assert found.passages == {"d0": FISH, "d1": "  ", "d2": "null", "d3": PORK}
    assert found.dual == [("问0", FISH, PORK)] and found.dev == {"q3": ("问3", {"d1": 1})}
    assert "2 passages are empty" in convert.printed
    assert "3 training judgments of empty passages" in convert.printed


def test_random_negatives_are_never_empty_nor_the_positives_text(convert, tmp_path):
    corpus = passages(FISH, FISH, "", "null", PORK)
    found = convert("beir", three_files(tmp_path / "B", {"qrels/train.tsv": "q0\td0\t1\n"}, corpus=corpus))
    assert found.dual == [("问0", FISH, PORK)]


def test_negatives_with_the_text_of_a_positive_are_dropped(convert, tmp_path):
    qrels = {"qrels/train.tsv": table("q0|d0|1", "q0|d1|0", "q0|d2|0")}
    found = convert("beir", three_files(tmp_path / "B", qrels, corpus=passages(FISH, FISH, PORK)))
    assert found.dual == [("问0", FISH, PORK)]
    assert "1 negatives have the text of a positive" in convert.printed


def test_no_negative_to_draw(convert, tmp_path):
    folder = three_files(tmp_path / "B", {"qrels/train.tsv": table("q0|d0|1", "q0|d1|1", "q0|d2|1")})
    assert convert("beir", folder).dual == []
    assert "1 training queries have no negative" in convert.printed


def test_t2ranking_counts_grades_2_and_3(convert, tmp_path):
    put(tmp_path, table("pid|text", f"0|{FISH}", f"1|{PORK}", f"2|{RICE}"), "T/collection.tsv")
    put(tmp_path, table("qid|text", "5|炖肉"), "T/queries.train.tsv")
    put(tmp_path, table("qid|text", "6|蒸鱼", "7|焖饭"), "T/queries.dev.tsv")
    graded = table("qid|-|pid|rel", "5|-|1|3", "5|-|2|1")
    put(tmp_path, graded, "T/qrels.train.tsv")
    dev = table("qid|-|pid|rel", "6|-|0|2", "6|-|1|1", "7|-|2|3", "7|-|1|0")
    put(tmp_path, dev, "T/qrels.dev.tsv")
    found = convert("t2ranking", tmp_path / "T")
    assert found.dual == [("炖肉", PORK, RICE)]
    assert found.dev == {"6": ("蒸鱼", {"0": 2}), "7": ("焖饭", {"2": 3})}
    put(tmp_path, table("qid|pid", "6|0", "6|2"), "T/qrels.retrieval.dev.tsv")
    shutil.rmtree(found.folder)
    assert [*convert("t2ranking", tmp_path / "T").dev["6"][1]] == ["0", "2"]
    assert "files not read: qrels.dev.tsv" in convert.printed


@pytest.mark.parametrize("split", ["dev", "dev.small"])
def test_msmarco_without_headers(convert, tmp_path, split):
    put(tmp_path, table(f"0|{FISH}", f"1|{PORK}"), "M/collection.tsv")
    put(tmp_path, table("9|fish", "10|pork"), f"M/queries.{split}.tsv")
    put(tmp_path, table("9|0|0|1", "10|0|1|1"), f"M/qrels.{split}.tsv")
    put(tmp_path, table("9|fish"), "M/queries.eval.tsv")
    found = convert("msmarco", tmp_path / "M")
    assert found.dev == {"9": ("fish", {"0": 1}), "10": ("pork", {"1": 1})}
    assert "files not read: queries.eval.tsv" in convert.printed


# ---- rows: a query and its passages

FLAG = [
    {"query": "蒸鱼", "pos": [FISH], "neg": [PORK, RICE], "prompt": "查找"},
    {"query": "炖肉", "pos": PORK, "neg": None, "pos_scores": None},
    {"query": "蒸鱼", "pos": [FISH, SOUP], "neg": []},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
def test_flagembedding(convert, tmp_path, suffix):
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in FLAG).encode()
    content = json.dumps(FLAG).encode() if suffix == ".json" else content
    content = gzip.compress(content) if suffix.endswith("gz") else content
    found = convert("flagembedding", put(tmp_path, content, f"minedHN{suffix}"))
    assert [*found.passages.values()] == [FISH, PORK, RICE, SOUP]
    fish = [row for row in found.dual if row[0] == "蒸鱼"]
    assert fish == [("蒸鱼", one, other) for one in (FISH, SOUP) for other in (PORK, RICE)]
    assert {row[1:] for row in found.dual if row[0] == "炖肉"} == {(PORK, x) for x in (FISH, RICE, SOUP)}
    assert "fields not read: prompt" in convert.printed and "1 duplicate judgments" in convert.printed
    assert "1 training queries had no negatives" in convert.printed


def test_flagembedding_scores_are_a_teachers_logits(convert, tmp_path):
    rows = [{"query": "蒸鱼", "pos": [FISH], "neg": [PORK, RICE], "pos_scores": [5.5], "neg_scores": [-1, 2]},
            {"query": "炖肉", "pos": [PORK], "neg": [RICE]}]  # fmt: skip
    found = convert("flagembedding", put(tmp_path, rows, "t.jsonl"))
    train, path = (found.folder / "train" / name for name in ("dual.train.tsv", "dual.train.ids.tsv"))
    assert read_teacher(train, path).tolist()[:2] == [[5.5, -1], [5.5, 2]]
    sidecar = [line.split("\t") for line in lines(path)]
    assert sidecar[0] == COLUMNS and len(sidecar) == len(found.dual) + 1
    pid = next(pid for pid, text in found.passages.items() if text == FISH)
    assert sidecar[1][:5] == ["0", pid, "", "", "5.5"] and sidecar[3][4] == ""


def test_flagembedding_with_a_dev_file_and_a_corpus(convert, tmp_path):
    train = put(tmp_path, FLAG[:1], "train.jsonl")
    dev = put(tmp_path, [{"id": 7, "query": "煲汤", "pos": [SOUP], "neg": [PORK]}], "eval.jsonl")
    pool = put(tmp_path, [{"text": text} for text in (SOUP, PORK, FISH, RICE, SOUP + "了")], "pool.jsonl")
    found = convert("flagembedding", train, "--dev", dev, "--corpus", pool)
    assert [*found.passages.values()] == [SOUP, PORK, FISH, RICE, SOUP + "了"]
    ((qid, (query, grades)),) = found.dev.items()
    assert (qid, query) == ("7", "煲汤") and [found.passages[pid] for pid in grades] == [SOUP]
    put(tmp_path, [{"id": "s", "text": SOUP}, {"id": "p", "text": PORK}], "pool.jsonl")  # with ids, by text
    shutil.rmtree(found.folder)
    assert "train.jsonl:1: " in convert.error("flagembedding", train, "--dev", dev, "--corpus", pool)
    found = convert("flagembedding", train, "--dev", dev, "--corpus", pool, "--skip_dangling")
    assert found.dev == {"7": ("煲汤", {"s": 1})} and not found.dual


def test_a_file_of_rows_as_the_dev_set(convert, tmp_path):
    found = convert("flagembedding", put(tmp_path, FLAG[:1], "rows.jsonl"), "--split", "dev")
    assert [query for query, _ in found.dev.values()] == ["蒸鱼"] and not found.dual
    assert "2 dev judgments of negatives" in convert.printed


def tevatron(qid, query, positives, negatives) -> dict:
    sides = [[{"docid": pid, "title": title, "text": text} for pid, title, text in side]
             for side in (positives, negatives)]  # fmt: skip
    return {"query_id": qid, "query": query, "positive_passages": sides[0], "negative_passages": sides[1]}


TEVATRON = [
    tevatron(1, "蒸鱼", [(10, "菜", FISH)], [(11, "", PORK)]),
    tevatron("2", "炖肉", [("11", "", PORK)], []),
]


@pytest.mark.parametrize("kind", ["tevatron", "hub"])
def test_tevatron_without_a_corpus(convert, tmp_path, kind):
    put(tmp_path, TEVATRON[:1], "T/train.jsonl")
    put(tmp_path, [*TEVATRON[1:], tevatron(3, "无", [], [])], "T/dev.jsonl")
    found = convert(kind, tmp_path / "T")
    assert found.passages == {"10": f"菜 {FISH}", "11": PORK}
    assert found.dual == [("蒸鱼", f"菜 {FISH}", PORK)] and found.dev == {"2": ("炖肉", {"11": 1})}
    assert lines(found.folder / "passage-collection/titles.tsv") == ["0\t菜"]
    assert "1 queries have no positive passage" in convert.printed


def test_tevatron_with_a_corpus(convert, tmp_path):
    put(tmp_path, TEVATRON, "T/train.jsonl")
    corpus = [{"docid": "10", "title": "菜", "text": FISH}, {"docid": 11, "text": "别的"}]
    put(tmp_path, corpus, "T/corpus.jsonl")
    found = convert("tevatron", tmp_path / "T")
    assert found.passages == {"10": f"菜 {FISH}", "11": "别的"}
    assert "2 passages with another text than in the corpus" in convert.printed
    put(tmp_path, corpus[:1], "T/corpus.jsonl")
    shutil.rmtree(found.folder)
    assert "train.jsonl:2: " in convert.error("tevatron", tmp_path / "T")


def test_an_empty_passage_with_an_id(convert, tmp_path):
    rows = [tevatron(1, "蒸鱼", [(10, "-", FISH)], [(11, "", ""), (12, "", PORK)])]
    found = convert("tevatron", put(tmp_path, rows, "t.jsonl"))
    assert found.passages == {"10": FISH, "11": "", "12": PORK} and found.dual == [("蒸鱼", FISH, PORK)]
    assert "1 passages are empty" in convert.printed


def test_tables_of_queries_are_not_rows(convert, tmp_path):
    put(tmp_path, TEVATRON, "T/train.jsonl.gz")
    put(tmp_path, table("1|蒸鱼"), "T/queries.train.tsv")
    put(tmp_path, TEVATRON, "T/old-train.jsonl")
    convert("tevatron", tmp_path / "T")
    assert "files not read: old-train.jsonl, queries.train.tsv" in convert.printed


def test_tevatron_with_ids_of_documents(convert, tmp_path):
    row = {
        "query_id": "1",
        "query_text": "蒸鱼",
        "positive_document_ids": [10],
        "negative_document_ids": ["11"],
    }
    put(tmp_path, [row], "T/train.jsonl")
    assert "train.jsonl:1: " in convert.error("tevatron", tmp_path / "T")  # no texts
    put(tmp_path, [{"docid": "10", "text": FISH}, {"docid": "11", "text": PORK}], "T/corpus.jsonl")
    assert convert("tevatron", tmp_path / "T").dual == [("蒸鱼", FISH, PORK)]


def test_missing_ids_are_counted(convert, tmp_path):
    row = TEVATRON[0] | {"positive_passages": [{"title": "", "text": FISH, "": 1}], "": [1]}
    del row["query_id"]
    found = convert("tevatron", put(tmp_path, [row], "t.jsonl"))
    assert found.dual == [("蒸鱼", FISH, PORK)] and "11" in found.passages
    for what in ("queries", "passages"):
        assert f"1 {what} without an id: a checksum" in convert.printed


def test_a_table_whose_last_line_may_be_cut(convert, tmp_path):
    assert convert("jsonl", put(tmp_path, "1\ta\n2\tb", "c.tsv")).passages == {"1": "a", "2": "b"}
    assert "1 tables end without a line break" in convert.printed


def test_one_passage_id_with_two_texts(convert, tmp_path):
    rows = [tevatron(1, "蒸鱼", [(10, "", FISH)], []), tevatron(2, "炖肉", [("10", "", PORK)], [])]
    assert "t.jsonl:2: " in convert.error("tevatron", put(tmp_path, rows, "t.jsonl"))


DPR = [{
    "question": "蒸鱼", "answers": ["x"],
    "positive_ctxs": [{"title": "菜", "text": FISH, "score": 9, "passage_id": "1"}],
    "negative_ctxs": [{"title": "", "text": SOUP, "psg_id": 4}],
    "hard_negative_ctxs": [{"title": "", "text": PORK, "psg_id": 2}],
}]  # fmt: skip


def test_dpr(convert, tmp_path):
    put(tmp_path, json.dumps(DPR, indent=4, ensure_ascii=False), "N/biencoder-nq-train.json")
    found = convert("dpr", tmp_path / "N")
    assert found.passages == {"1": f"菜 {FISH}", "2": PORK}
    assert found.dual == [("蒸鱼", f"菜 {FISH}", PORK)]
    assert "1 rows with negative_ctxs beside" in convert.printed
    corpus = table("id|text|title", f'1|"{FISH}"|菜', f'2|"{PORK}"|', f'3|"{RICE} ""饭"""|饭')
    put(tmp_path, corpus.split("\n", 1)[1], "N/psgs_w100.tsv")
    shutil.rmtree(found.folder)
    headless = convert("dpr", tmp_path / "N")
    put(tmp_path, corpus, "N/psgs_w100.tsv")
    shutil.rmtree(found.folder)
    found = convert("dpr", tmp_path / "N")
    assert found == headless
    assert found.passages == {"1": f"菜 {FISH}", "2": PORK, "3": f'饭 {RICE} "饭"'}
    assert found.dual == [("蒸鱼", f"菜 {FISH}", PORK)] and "another text" not in convert.printed


def test_dureader_and_sentence_transformers(convert, tmp_path):
    answers = [{"paragraph_id": "a", "paragraph_text": FISH}]
    row = {"question_id": "1", "question": "蒸鱼", "answer_paragraphs": answers}
    found = convert("dureader", put(tmp_path, [row], "dev.json"), "--split", "dev")
    assert found.dev == {"1": ("蒸鱼", {"a": 1})} and found.passages == {"a": FISH}
    shutil.rmtree(found.folder)
    row = {"anchor": "蒸鱼", "positive": FISH, "negative": PORK}
    assert convert("flagembedding", put(tmp_path, [row], "t.jsonl")).dual == [("蒸鱼", FISH, PORK)]


@pytest.mark.parametrize("row, words", [
    ({"query": "q"}, "pos"), ({"pos": ["a"]}, "query"), ({"query": ["q"], "pos": ["a"]}, "query"),
    ({"query": "q", "pos": [1]}, "pos"), ({"query": "q", "pos": [["a"]]}, "pos"),
    ({"query": " ", "pos": ["a"]}, "empty"),
    ({"query": "q", "pos": ["a"], "pos_scores": [1, 2]}, "pos_scores"),
    ({"query": "q", "pos": ["a"], "pos_scores": ["x"]}, "pos_scores"),
    ({"query": "q", "pos": ["a"], "pos_scores": [float("nan")]}, "pos_scores"),
    ({"query": "q", "positive_passages": [{"title": "t"}]}, "positive_passages"),
    ({"query": "q", "positive_passages": [{"docid": True, "text": "t"}]}, "id"), ([1], "object"),
])  # fmt: skip
def test_malformed_rows_are_named(convert, tmp_path, row, words):
    error = convert.error("flagembedding", put(tmp_path, [FLAG[0], row], "t.jsonl"))
    assert "t.jsonl:2: " in error and words in error


def test_nothing_to_train_on_and_nothing_to_score(convert, tmp_path):
    assert "positive" in convert.error(
        "flagembedding", put(tmp_path, [{"query": "q", "pos": [], "neg": ["a"]}], "t.jsonl")
    )


@pytest.mark.parametrize(
    "row", [FLAG[0], TEVATRON[0], DPR[0], {"id": 1, "text": "蒸鱼", "positives": ["d0"]}]
)
def test_rows_are_not_taken_for_passages(convert, tmp_path, row):
    assert "t.jsonl:1: a query with" in convert.error("jsonl", put(tmp_path, [row], "t.jsonl"))


def test_which_file_of_a_folder_of_rows(convert, tmp_path):
    put(tmp_path, FLAG, "F/toy_minedHN.jsonl")
    assert "no file train or dev" in convert.error("flagembedding", tmp_path / "F")
    for name in ("a-train.jsonl", "b-train.jsonl"):
        put(tmp_path, FLAG, f"F/{name}")
    assert "a-train.jsonl, b-train.jsonl" in convert.error("flagembedding", tmp_path / "F")


# ---- your own files


OWN = [
    {"id": 1, "text": "蒸鱼", "positives": "d0", "negatives": ["d1", "d1"]},
    {"id": "2", "text": "炖肉", "positives": ["d1"], "split": "dev"},
    {"id": "3", "text": "焖饭", "positives": ["d0", "d0"], "split": "test"},
]


@pytest.mark.parametrize("options, dev", [("", "2"), ("--split test", "3")])
def test_splits_of_your_own_rows(convert, tmp_path, options, dev):
    corpus, rows = put(tmp_path, passages(FISH, PORK), "c.jsonl"), put(tmp_path, OWN, "q.jsonl")
    found = convert("jsonl", corpus, "--queries", rows, *options.split())
    assert [*found.dev] == [dev] and found.dual == [("蒸鱼", FISH, PORK)]
    assert f"1 queries of the split {'dev' if options else 'test'}: not read" in convert.printed
    put(rows, [OWN[0] | {"split": "trian"}])
    shutil.rmtree(found.folder)
    assert "q.jsonl:1: " in convert.error("jsonl", corpus, "--queries", rows)
    for split in ("tset", "train"):
        assert f"--split {split}" in convert.error("jsonl", corpus, "--queries", rows, "--split", split)


@pytest.mark.parametrize("text", ["qid\ttext\n1\t蒸鱼\n2\t炖肉\n", "1\t蒸鱼\n2\t炖肉\n"])
def test_queries_as_tsv_with_qrels(convert, tmp_path, text):
    corpus, rows = put(tmp_path, passages(FISH, PORK), "c.jsonl"), put(tmp_path, text, "q.tsv")
    dev, train = put(tmp_path, "2 0 d1 3\n", "dev.qrels"), put(tmp_path, "1\td0\n", "train.tsv")
    words = ["jsonl", corpus, "--queries", rows]
    assert "--qrels" in convert.error(*words)
    found = convert(*words, "--qrels", dev, "--train_qrels", train)
    assert found.dev == {"2": ("炖肉", {"d1": 3})} and found.dual == [("蒸鱼", FISH, PORK)]


@pytest.mark.parametrize("words", [
    "beir B --queries x", "beir B --qrels x", "beir B --dev x", "jsonl B/corpus.jsonl --dev x",
    "flagembedding B/corpus.jsonl --min_grade 2", "to_beir B --split dev", "to_trec B --skip_dangling",
    "jsonl B/corpus.jsonl --qrels B/qrels/dev.tsv", "jsonl B/corpus.jsonl --columns id,body",
    "jsonl B/corpus.jsonl --columns id,text", "jsonl B/x --columns id,title",
    "jsonl B/x --columns id,text,id", "flagembedding B/corpus.jsonl --split train",
    "flagembedding B/corpus.jsonl --columns id,text",
])  # fmt: skip
def test_an_option_that_is_not_read_is_refused(convert, tmp_path, monkeypatch, words):
    three_files(tmp_path / "B", {"qrels/dev.tsv": "q1\td0\t1\n"})
    monkeypatch.chdir(tmp_path)
    assert "--" in convert.error(*words.split())


# ---- outputs


def test_grades_and_titles_return_to_beir(convert, tmp_path):
    corpus = [{"_id": "d0", "title": "菜", "text": FISH}, {"_id": "d1", "title": "", "text": PORK}]
    header = ("query-id", "corpus-id", "score")
    judged = table("|".join(header), "q1|d0|3", "q1|d1|1", "q2|d1|2")
    folder = three_files(tmp_path / "B", {"qrels/dev.tsv": judged}, corpus=corpus)
    data = convert("beir", folder).folder
    assert convert_dataset.main(["to_beir", str(data), "--to", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/qrels/dev.tsv").read_text() == judged
    assert [json.loads(line) for line in lines(tmp_path / "back/corpus.jsonl")] == corpus


@pytest.mark.parametrize("kind", ["beir", "to_beir", "to_trec"])
def test_the_target_must_be_new_or_empty(convert, tmp_path, monkeypatch, kind):
    folder = three_files(tmp_path / "B", {"qrels/dev.tsv": "q1\td0\t1\n"})
    data = convert("beir", folder).folder.rename(tmp_path / "data")
    result = put(tmp_path, '{"q1": ["d0"]}', "res.json")
    source = {"beir": folder, "to_beir": data, "to_trec": result}[kind]
    target = put(tmp_path, "mine", "out/notes.txt").parent
    words = [kind, str(source), "--to", str(target)]
    assert convert_dataset.main(words) == 2 and [*target.iterdir()] == [target / "notes.txt"]
    assert convert_dataset.main([*words[:3], str(source)]) == 2 and source.exists()
    (target / "notes.txt").unlink()
    assert convert_dataset.main(words) == 0 and len([*target.iterdir()]) > 0


def test_an_export_that_fails_leaves_nothing(convert, tmp_path, monkeypatch):
    data = convert("beir", three_files(tmp_path / "B", {"qrels/dev.tsv": "q1\td0\t1\n"})).folder
    data.rename(tmp_path / "data")

    def fail(*_):
        raise UserError("disk full")

    monkeypatch.setattr(convert_dataset, "write_qrels", fail)
    assert "disk full" in convert.error("to_beir", tmp_path / "data")
