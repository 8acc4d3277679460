"""Readers and writers of the official layout: texts unchanged, every malformed line named as file:line."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_src.data import formats, lines, results
from torch_src.data.formats import CrossRow, DevQuery, DualRow, RunRow
from torch_src.data.lines import FormatError
from torch_src.runtime.errors import UserError

STEADY = settings(derandomize=True, deadline=None)  # the same examples each time, on a slow machine too
ODD = ' "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\ufeff\r""b\\n\' \x00 '
COLUMN = st.text(st.characters(exclude_characters="\n\t", exclude_categories=["Cs"]))
QUERY = COLUMN.filter(str.strip)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
ABSENT = st.sampled_from(["", "null", "-"])
EMPTY, REST = ("", " ", "\x0b\u2028"), ("\t0", "\t\tn\t0")  # queries; ends of a cross and a dual line


@pytest.fixture
def file(tmp_path):
    """A function that writes one file (text or bytes) and returns its path."""

    def write(content, name="file.tsv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(read, place, *words):
    """Assert that `read()` is a FormatError at exactly `place`, with all `words` in its message."""
    with pytest.raises(FormatError) as caught:
        read()
    message = str(caught.value)
    assert message.startswith(f"{place}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_only_a_newline_ends_a_line_and_is_removed(file):
    path = file(f"{ODD}\n\n {ODD}\t\r\nlast ")
    assert list(lines.read_lines(path)) == [(1, ODD), (2, ""), (3, f" {ODD}\t\r"), (4, "last ")]
    assert list(lines.read_lines(file(""))) == []
    assert list(lines.read_lines(file("a\n"))) == [(1, "a")]


def test_byte_order_mark_is_refused_in_line_one_and_kept_elsewhere(file):
    path = file("\ufeffa\n")
    refused(lambda: list(lines.read_lines(path)), f"{path}:1", "byte order mark")
    assert list(lines.read_lines(file("a\ufeff\n\ufeffb\n"))) == [(1, "a\ufeff"), (2, "\ufeffb")]


def test_line_that_is_not_utf8_is_named_with_its_byte(file):
    path = file("好\n".encode() + b"ab\xffc\n")
    refused(lambda: list(lines.read_lines(path)), f"{path}:2", "not UTF-8", "byte 3")


def test_missing_file_and_folder_are_user_errors(tmp_path):
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=f"^{path}: {words}"):
            list(lines.read_lines(path))


@pytest.mark.parametrize("empty", ["", "null", "-"])
def test_every_way_to_write_an_empty_column_is_accepted(empty):
    assert formats.parse_dual_row(f"q\t{empty}\tp\t{empty}\tn\t0", "f", 1) == DualRow("q", "p", "n")
    assert formats.parse_cross_row(f"q\t{empty}\tp\t0", "f", 1) == CrossRow("q", "p", 0)
    assert formats.parse_passage(f"-\t{empty}\tp\t0", "f", 1) == "p"


@STEADY
@given(QUERY, ABSENT, QUERY.filter(lambda text: text != "null"), ABSENT, COLUMN, st.sampled_from([0, 1]))
@example(ODD, "", ODD, "null", ODD, 1)
def test_training_lines_keep_their_texts_unchanged(query, title, passage, other, negative, label):
    line = f"{query}\t{title}\t{passage}\t{other}\t{negative}\t0"
    assert formats.parse_dual_row(line, "f", 2) == DualRow(query, passage, negative)
    line = f"{query}\t{title}\t{passage}\t{label}"
    assert formats.parse_cross_row(line, "f", 2) == CrossRow(query, passage, label)


@STEADY
@given(COLUMN)
@example(ODD)
@example("")
def test_passage_line_keeps_its_text_unchanged(passage):
    raw = f"-\t\t{passage}\t0\n".encode()
    assert formats.parse_passage(lines.decode(raw, "f", 2), "f", 2) == passage


@pytest.mark.parametrize(
    "parse, good",
    [
        (formats.parse_dual_row, "q\t\tp\t\tn\t0"),
        (formats.parse_cross_row, "q\t\tp\t1"),
        (formats.parse_passage, "-\t\tp\t0"),
    ],
)
@pytest.mark.parametrize("change", [lambda line: line + "\t", lambda line: line.rsplit("\t", 1)[0]])
def test_wrong_column_count_names_line_found_and_expected(parse, good, change):
    bad = change(good)
    found, expected = bad.count("\t") + 1, good.count("\t") + 1
    refused(lambda: parse(bad, "d/f.tsv", 7), "d/f.tsv:7", f"{found} TAB", f"expected {expected}:")


@pytest.mark.parametrize("label", ["2", "", "01", "1 ", "1\r", "-1", "true", "١"])
def test_cross_label_other_than_0_and_1_is_refused(label):
    refused(lambda: formats.parse_cross_row(f"q\t\tp\t{label}", "f", 3), "f:3", "label", repr(label))


@pytest.mark.parametrize(
    "line, word",
    [
        *((f"{empty}\t\tp{rest}", "query is empty") for empty in EMPTY for rest in REST),
        *((f"q\tT\tp{rest}", "column 2 (title)") for rest in REST),
        ("q\t \tp\t0", "column 2 (title)"),
        ("q\t\tp\tT\tn\t0", "column 4 (title)"),
    ],
)
def test_empty_query_and_title_are_refused_in_both_training_files(line, word):
    parse = formats.parse_cross_row if line.count("\t") == 3 else formats.parse_dual_row
    refused(lambda: parse(line, "f", 4), "f:4", word)


def test_dev_queries_keep_order_and_spelling_and_a_duplicate_is_an_error(file):
    path = file(f"b\t-\t-\t0\n{ODD}\t\t\t0\nb \t-\t-\t0\na\tnull\t-\t0")
    assert formats.read_queries(path) == ["b", ODD, "b ", "a"]
    path = file("a\t-\t-\t0\nb\t-\t-\t0\na\t-\t-\t0\n")
    words = ("line 1", "'a'", "merge", "q2qid.dev.json", "dev.json")
    refused(lambda: formats.read_queries(path), f"{path}:3", *words)


def test_malformed_dev_query_files(file):
    for content, line, word in (("a\t-\t-\t0\nb\t0\n", 2, "expected 4"), (" \t-\t-\t0\n", 1, "empty")):
        path = file(content)
        refused(lambda path=path: formats.read_queries(path), f"{path}:{line}", word)
    with pytest.raises(UserError, match="no queries"):
        formats.read_queries(file(""))


def test_q2qid_keeps_texts_unchanged_and_a_truncated_file_is_an_error(file):
    mapping = {ODD: "q1", "甲": "q2"}
    assert formats.read_q2qid(file(json.dumps(mapping, ensure_ascii=False))) == mapping
    path = file('{"a": "1",\n"b": "2"')
    refused(lambda: formats.read_q2qid(path), f"{path}:2", "not one JSON object")


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"a": "1", "b": "2", "b": "3"}', ["'b'", "merge"]),
        *(('{"a": "1", "b": "1"}', ["qid '1'"]), (b'{"\xff": "1"}', ["not UTF-8"])),
        *(('{"a": 1}', ["not one JSON object"]), ("[]", ["not one JSON object"])),
    ],
)
def test_bad_q2qid_is_a_user_error_naming_the_file(file, content, words):
    path = file(content)
    with pytest.raises(UserError, match=f"^{path}:1: .*" + ".*".join(words)):
        formats.read_q2qid(path)


def dev_line(**changes):
    answers = [{"paragraph_id": "p1", "paragraph_text": ODD}, {"paragraph_id": "p2", "paragraph_text": ""}]
    entry = {"question_id": "q1", "question": ODD, "answer_paragraphs": answers} | changes
    return json.dumps({key: value for key, value in entry.items() if value is not None}, ensure_ascii=False)


def test_dev_json_gives_queries_and_all_answers(file):
    path = file(f"{dev_line()}\n{dev_line(question_id='q2')}\n")
    answers = {"p1": ODD, "p2": ""}
    assert formats.read_dev(path) == [DevQuery("q1", ODD, answers), DevQuery("q2", ODD, answers)]


@pytest.mark.parametrize(
    "broken, word",
    [
        (dev_line()[:-5], "not JSON"),
        *(("", "not JSON"), ("[]", "malformed"), (dev_line(question=None), "question")),
        (dev_line(answer_paragraphs=[{"paragraph_id": "p"}]), "paragraph_text"),
        (dev_line(answer_paragraphs=["p"]), "malformed"),
        (dev_line(question=" "), "empty"),
        (dev_line(answer_paragraphs=[]), "no answer_paragraphs"),
        (dev_line(), "duplicate question_id"),
    ],
)
def test_a_malformed_dev_line_is_named(file, broken, word):
    path = file(f"{dev_line()}\n{broken}\n{dev_line(question_id='q3')}\n")
    refused(lambda: formats.read_dev(path), f"{path}:2", word)


def test_candidates_have_their_ids_and_other_lengths_are_an_error(file):
    texts, ids = file(f"q\t\t{ODD}\t0\nr\tnull\tp\t0\n"), file("1\tx\n2\ty\n", "ids")
    assert list(formats.read_candidates(texts, ids)) == [("1", "x", "q", ODD), ("2", "y", "r", "p")]
    texts, ids = file("q\t\ta\t0\nq\t\tb\t0\n"), file("1\tx\n", "ids")
    refused(lambda: list(formats.read_candidates(texts, ids)), f"{ids}:2", "ends here", str(texts))
    ids = file("1\tx\n1\ty\n1\tz\n", "ids")
    with pytest.raises(UserError, match=f"^{texts}:3: .*{ids} has more lines"):
        list(formats.read_candidates(texts, ids))


def test_malformed_candidate_or_id_line_is_named_in_its_own_file(file):
    texts, ids = file("q\t\ta\t0\n" * 2), file("1\tx\n1\n", "ids")
    refused(lambda: list(formats.read_candidates(texts, ids)), f"{ids}:2", "expected 2: qid, pid")
    texts = file("q\t\ta\t0\nq\tb\n")
    refused(lambda: list(formats.read_candidates(texts, ids)), f"{texts}:2", "expected 4")


@STEADY
@given(QUERY, st.integers(0, 2**40), st.integers(1, 10**6), FLOAT32)
@example(ODD, 0, 1, 3.4028234663852886e38)
@example("q", 1, 2, 1.401298464324817e-45)
@example("q", 1, 2, 13.554893493652344)
def test_run_row_restores_float32_exactly(tmp_path_factory, query, row, rank, score):
    path = tmp_path_factory.getbasetemp() / "run_round_trip"
    path.write_bytes(formats.format_run_row(RunRow(query, row, rank, score)).encode())
    (back,) = formats.read_run(path)
    assert (back.query, back.row, back.rank) == (query, row, rank)
    assert np.float32(back.score).tobytes() == np.float32(score).tobytes()


@pytest.mark.parametrize("row", ["1 1", "1.0 1 2", "x 1 2", "1 1 x", "-1 1 2", "1 0 2", "1 1 nan", "1 1 inf"])
def test_malformed_run_row_is_named(file, row):
    path = file("q\t1\t1\t2\nq\t" + row.replace(" ", "\t") + "\n")
    refused(lambda: list(formats.read_run(path)), f"{path}:2")


GZIPPED = pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
WITH_IDS = {
    "test1.json": '{"question_id": 7, "question": "蒸鱼"}\n{"question_id": "q2", "question": "炖肉"}\n',
    "q.jsonl": '{"_id": "7", "text": "蒸鱼"}\n{"id": "q2", "text": "炖肉", "url": null}\n',
    "queries.dev.tsv": "qid\ttext\n7\t蒸鱼\nq2\t炖肉\n",
    "topics": "7\t蒸鱼\nq2\t炖肉\n",
}


@GZIPPED
@pytest.mark.parametrize("name", WITH_IDS)
def test_query_files_with_ids(file, name, pack):
    path = file(pack(WITH_IDS[name].encode()), name + (".gz" if pack is gzip.compress else ""))
    assert formats.has_query_ids(path)
    assert formats.read_question_ids(path) == {"蒸鱼": ["7"], "炖肉": ["q2"]}
    assert formats.read_query_texts(path) == ["蒸鱼", "炖肉"]


def test_the_official_query_file_has_no_ids(file):
    path = file("蒸鱼\t0\n", "dev.q.format")  # two columns, not qid and query
    assert not formats.has_query_ids(path)
    refused(lambda: formats.read_query_texts(path), f"{path}:1", "expected 4")


@GZIPPED
def test_official_files_gzipped(file, pack):
    assert formats.read_query_texts(file(pack("蒸鱼\t-\t-\t0\n".encode()), "dev.q.format")) == ["蒸鱼"]
    assert formats.read_q2qid(file(pack(b'{"a": "1"}'))) == {"a": "1"}
    assert results.load_result(file(pack(b'{"q1": ["a"]}'))) == {"q1": ["a"]}
    damaged = file(gzip.compress(b"a\tb\n" * 1000)[:-20], "x.gz")
    for read in (formats.read_question_ids, formats.read_q2qid, results.load_result):
        with pytest.raises(UserError, match=f"^{damaged}: damaged"):
            read(damaged)


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("q.jsonl", '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n', 2),  # one id, as number and text
        *(("q.jsonl", '{"id": true, "text": "a"}\n', 1), ("q.jsonl", '{"id": 1.5, "text": "a"}\n', 1)),
        *(("q.jsonl", '{"id": "1", "text": 2}\n', 1), ("q.jsonl", '{"text": "a"}\n', 1)),
        *(("q.tsv", "1\ta\n2\tb\tc\n", 2), ("q.tsv", "1\ta\r\n", 1), ("q.tsv", "1\ta\n\tb\n", 2)),
    ],
)
def test_malformed_query_ids_are_named(file, name, content, line):
    path = file(content, name)
    refused(lambda: formats.read_question_ids(path), f"{path}:{line}")


def test_integer_ids_and_grades_of_dev_json(file):
    answers = [{"paragraph_id": 3, "paragraph_text": "a", "grade": 2}, {"paragraph_id": "4", "grade": 1}]
    line = json.dumps({"question_id": 1, "question": "q", "answer_paragraphs": answers})
    (query,) = formats.read_dev(file(line), texts=False)
    assert query == DevQuery("1", "", {"3": "", "4": ""}, {"3": 2})
    for grade in (0, -1, 1.5, "2", True, None):
        answers[0]["grade"] = grade
        path = file(json.dumps({"question_id": 1, "answer_paragraphs": answers}))
        if grade is not True:  # equals 1
            refused(lambda path=path: formats.read_dev(path, texts=False), f"{path}:1", "grade")


def test_feedback_round_trip(file):
    shown = formats.FeedbackHit("p1", 3, '第一段\u2028 "引号"')
    row = formats.FeedbackRow(
        "2026-11-26T14:02:31Z", "问题", formats.FeedbackHit("", 0, "答案"), True, "dense", 2, [shown]
    )
    path = file(formats.format_feedback(row) + formats.format_feedback(row._replace(relevant=False)))
    assert list(formats.read_feedback(path)) == [row, row._replace(relevant=False)]


@pytest.mark.parametrize("change", [{"relevant": 1}, {"row": "3"}, {"above": [{}]}, {"query": None}])
def test_malformed_feedback(file, change):
    hit = {"pid": "p", "row": 1, "passage": "答案"}
    good = {"time": "", "query": "问", **hit, "relevant": True, "column": "bm25", "rank": 1, "above": [hit]}
    path = file("".join(json.dumps(entry) + "\n" for entry in (good, {**good, **change})))
    refused(lambda: list(formats.read_feedback(path)), f"{path}:2")
