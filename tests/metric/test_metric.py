"""The programs of metric/: hand-worked rankings, a second implementation, every malformed input."""

import functools
import json
import operator
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from metric import convert_recall_res_to_json as recall
from metric import convert_rerank_res_to_json as rerank
from metric import evaluation
from torch_src.data import json_pairs
from torch_src.data.lines import FormatError
from torch_src.data.passage_ids import pids_of
from torch_src.data.results import load_result, warn_if_stale, write_result

METRIC = Path(evaluation.__file__).resolve().parent
Q2QID = '{"甲\\u000b乙": "q1",\n "b\u2028": "q2",\n "c": "q3"}'
MAP = '{"2": "p2", "0": "p0",\n "1": "p1", "3": "p\\u4e00"}'
RUN = "甲\x0b乙\t3\t2\t0.5\nb\u2028\t0\t1\t-1e-3\n甲\x0b乙\t1\t10\t.25\n甲\x0b乙\t0\t1\t7\nc\t2\t1\t0\n"
LISTS = {"q1": ["p0", "p一", "p1"], "q2": ["p0"], "q3": ["p2"]}
SCORES, IDS = "1.5\n-2\n1.5\n3e0\n", "q1\tb\nq2\tx\nq1\ta\nq1\tc\n"
ANSWERS = {"q1": ["a", "b"], "q2": ["c"], "q3": ["d"], "q4": ["e", "e"]}
REFERENCE = "".join(
    json.dumps({"question_id": qid, "answer_paragraphs": [{"paragraph_id": pid} for pid in pids]}) + "\n"
    for qid, pids in ANSWERS.items()
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, holding one good set of inputs."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "q2qid": Q2QID,
        "map": MAP,
        "res.top3": RUN,
        "scores": SCORES,
        "ids": IDS,
        "dev.json": REFERENCE,
        "res.json": '{\n"q1": ["a"]}',
    }.items():
        Path(name).write_bytes(text.encode())
    return tmp_path


def convert(topk=3, run="res.top3", *output):
    return recall.main(["q2qid", "map", run, str(topk), *output])


def read(name):
    return json.loads(Path(name).read_text(encoding="utf-8"))


def failure(program, capsys):
    """Return the message of a program that must fail: status 2, one line, no change in the folder."""
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert program() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *_, last = levels = messages(printed.err)
    assert last[0] == "ERROR" and [level for level, _ in levels].count("ERROR") == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    return last[1]


def messages(err):
    """(level, message) of each line on stderr."""
    return [tuple(line.split(" ", 2)[1:]) for line in err.split("\n")[:-1]]


def warnings(capsys):
    """The warnings printed since the last call; nothing else may be on stderr."""
    found = messages(capsys.readouterr().err)
    assert all(level == "WARNING" for level, _ in found)
    return [message for _, message in found]


# ---- the programs as a user runs them


@pytest.mark.slow
def test_programs_run_by_path_from_any_directory(folder):
    def run(name, *arguments):
        done = subprocess.run(
            [sys.executable, METRIC / name, *arguments],
            cwd=folder / "..",
            text=True,
            capture_output=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    at = {name: str(folder / name) for name in ("q2qid", "map", "res.top3", "scores", "ids", "dev.json")}
    status, out, err = run("convert_recall_res_to_json.py", at["q2qid"], at["map"], at["res.top3"], "3")
    assert (status, out) == (0, f"3 queries, 5 results -> {folder / 'dual_res.json'}\n")
    (warning,) = messages(err)
    assert warning[0] == "WARNING" and f"{at['res.top3']}: 2 of 3 queries" in warning[1]
    assert read("dual_res.json") == LISTS
    assert run("convert_rerank_res_to_json.py", at["scores"], at["ids"])[0] == 0
    status, out, err = run("evaluation.py", at["dev.json"], str(folder / "cross_res.json"))
    assert (status, out) == (0, '{"MRR@10": 0.125, "QueriesRanked": 2, "recall@1": 0.0, "recall@50": 0.25}\n')
    assert "WARNING" in err and ": 2 of the 4 reference queries" in err
    assert run("evaluation.py", at["dev.json"], at["scores"])[0] == 2
    assert run("convert_recall_res_to_json.py", at["q2qid"], at["map"], at["res.top3"], "0")[0] == 2


def test_the_programs_do_not_import_torch():
    names = ", ".join(path.stem for path in METRIC.glob("*.py"))
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "faiss"]))  # importing them is an error
from metric import {names}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=METRIC.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- a run to JSON


@pytest.mark.parametrize(
    "name, output",
    [
        ("res.top50", "dual_res.json"),
        ("res.rerank50", "cross_res.json"),
        ("bm25.txt", "dual_res.json"),
        ("res.rerank", "cross_res.json"),
    ],
)
def test_output_is_beside_the_run(folder, name, output):
    Path("runs").mkdir()
    Path("res.top3").rename(Path("runs", name))
    assert convert(10, f"runs/{name}") == 0
    assert {path.name for path in Path("runs").iterdir()} == {name, output, f"{output}.stamp.json"}
    assert read(f"runs/{output}") == LISTS
    assert convert(10, f"runs/{name}", "mine.json") == 0 and read("mine.json") == LISTS


def test_a_stale_or_changed_result_gives_a_warning(folder, capsys):
    assert convert(10) == 0
    stamp = read("dual_res.json.stamp.json")
    assert stamp["topk"] == 10 and set(stamp["inputs"]) == {"q2qid", "map", "res.top3"}
    capsys.readouterr()
    warn_if_stale("dual_res.json")
    assert warnings(capsys) == []
    whole = Path("res.top3").read_text(encoding="utf-8")
    Path("res.top3").write_text(whole + "\n", encoding="utf-8")
    warn_if_stale("dual_res.json")
    (warning,) = warnings(capsys)
    assert "res.top3 has changed" in warning
    Path("res.top3").write_text(whole, encoding="utf-8")
    Path("dual_res.json").write_text("{}", encoding="utf-8")
    warn_if_stale("dual_res.json")
    (warning,) = warnings(capsys)
    assert "dual_res.json: changed" in warning
    for stamp in ("[", "[]", '{"inputs": 3}'):  # not written by the converters: the result is used as it is
        Path("dual_res.json.stamp.json").write_text(stamp, encoding="utf-8")
        warn_if_stale("dual_res.json")
        assert warnings(capsys) == []


def test_output_never_replaces_an_input_or_the_first_stage(folder, capsys):
    Path("res.rerank3").write_bytes(RUN.encode())
    assert "dual_res.json" in failure(lambda: convert(3, "res.rerank3", "./dual_res.json"), capsys)
    assert "one of the inputs" in failure(lambda: convert(3, "res.top3", str(folder / "map")), capsys)
    assert "one of the inputs" in failure(lambda: rerank.main(["scores", "ids", "ids"]), capsys)


def test_warnings_for_valid_but_suspicious_runs(folder, capsys):
    Path("res.top3").write_bytes("b\u2028\t0\t1\t1\nb\u2028\t1\t2\t1\nc\t1\t3\t2\nc\t0\t1\t1".encode())
    assert convert() == 0
    found = warnings(capsys)
    keys = ("res.top3: the last line", "2 of 2 queries", "1 of the 3 queries", "res.top3:3: the score rises")
    assert len(found) == 4 and all(key in warning for key, warning in zip(keys, found, strict=True))


def test_short_lists_of_bm25_are_expected(folder, capsys):
    Path("res.top3").write_text("b\u2028\t0\t1\t1\nc\t1\t1\t2\n", encoding="utf-8")
    Path("res.top3.stamp.json").write_text('{"stage": "bm25"}')
    assert convert() == 0
    assert not [found for found in warnings(capsys) if "fewer" in found]


BAD_RECALL = [
    ("res.top3", "c\t0\t1\t1\nc\t1\t2\n", "res.top3:2: 3 TAB-separated columns (expected 4"),
    ("res.top3", "c\t0\t1\t1\t\n", "res.top3:1: 5 TAB-separated columns"),
    ("res.top3", "\n", "res.top3:1: 1 TAB-separated columns"),
    ("res.top3", "", "res.top3: no results"),
    ("res.top3", b"c\t0\t1\t1\n\xff\t0\t1\t1\n", "res.top3:2: not UTF-8"),
    *[
        ("res.top3", f"c\t{row}\t1\t1\n", "res.top3:1: row ")
        for row in ("-1", "1.0", "", " 1", "1_0", "٣", "9" * 5000)
    ],
    *[("res.top3", f"c\t0\t{rank}\t1\n", "res.top3:1: rank ") for rank in ("0", "-1", "1.0", "x", "9" * 12)],
    *[
        ("res.top3", f"c\t0\t1\t{score}\n", "res.top3:1: score ")
        for score in ("nan", "-inf", "1e999", "", "1_0", "0.5\r", "0x1")
    ],
    (
        "res.top3",
        "c\t0\t1\t1\nc\t4\t2\t1\nb\u2028\t5\t1\t1\n",
        "res.top3:2: row 4 is not in map, which lacks 2 rows",
    ),
    (
        "res.top3",
        "c\t0\t1\t1\nd\x85\t0\t1\t1\n",
        "res.top3:2: the query 'd\\x85' is not in the query map",
    ),
    (
        "res.top3",
        "c\t0\t2\t1\nc\t1\t1\t1\nc\t2\t2\t1\n",
        "res.top3:3: duplicate rank 2 of a query (first in line 1)",
    ),
    (
        "res.top3",
        "c\t1\t2\t1\nc\t0\t3\t1\nc\t1\t1\t1\n",
        "res.top3:3: duplicate row 1 of a query (first in line 1)",
    ),
    ("res.top3", "".join(f"c\t{i}\t{i + 1}\t1\n" for i in range(4)), "res.top3:4: "),
    ("q2qid", '{"a": "q1",\n"c": "q2",\n"b": "q1"}', "q2qid:3: the qid 'q1'"),
    ("q2qid", '{"a": "q1",\n"c": "q2",\n"a": "q3"}', "q2qid:3: duplicate query 'a'"),
    ("q2qid", '{"a": "q1",\n"c": 2}', "q2qid:2: not one JSON object of strings"),
    ("q2qid", '["a"]', "q2qid:1: not one JSON object"),
    ("q2qid", b'{"c": "q\xff"}', "q2qid:1: not UTF-8"),
    ("q2qid", '{"c": "\\q"}', "q2qid:1: invalid escape"),
    ("map", '{"0": "p0",\n "01": "p1"}', "map:2: the key '01' is not a row number"),
    ("map", '{"0": "p0",\n "1": "p1",\n\n "0": "p2"}', "map:4: row 0 is a duplicate"),
    ("map", '{"0": "p0",\n}', "map:2: not one JSON object"),
    ("map", '{"0": "p0"}\n {', "map:2: not one JSON object"),
    ("map", '{"0": "p0"', "is the file truncated?"),
    ("map", "", "map:1: not one JSON object"),
]


@pytest.mark.parametrize("name, text, message", BAD_RECALL)
def test_bad_run_or_map_is_named_by_file_and_line(folder, capsys, name, text, message):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in failure(convert, capsys)
    Path("dual_res.json").write_text("older", encoding="utf-8")
    failure(convert, capsys)  # also checks that the old result is unchanged


def test_duplicate_query_and_missing_file(folder, capsys):
    Path("q2qid").write_text('{"c": "q1", "c": "q2"}', encoding="utf-8")
    message = failure(convert, capsys)
    assert "merge" in message and "dev.q.format" in message
    Path("q2qid").unlink()
    assert failure(convert, capsys) == "q2qid: no such file"


def random_map(rng):
    """A passage map in an unusual layout: any order, blanks, escapes, scripts."""

    def blank():
        return "".join(rng.choices(" \n\t\r", k=rng.choice((0, 0, 1, 3))))

    def string(text):
        if rng.random() < 0.2:
            return '"' + "".join(f"\\u{ord(c):04X}" if ord(c) < 0x10000 else c for c in text) + '"'
        return json.dumps(text, ensure_ascii=rng.random() < 0.5)

    pairs = [
        blank()
        + string(str(row))
        + blank()
        + ":"
        + blank()
        + string("".join(rng.choices('ab"\\/,:{}\n\x0b\x85\u2028é文😀', k=rng.randrange(8))))
        + blank()
        for row in rng.sample(range(40), rng.randrange(20))
    ]
    return blank() + "{" + (",".join(pairs) or blank()) + "}" + blank()


@pytest.mark.slow
def test_streamed_map_equals_json_loads_for_any_chunk_size(folder, monkeypatch):
    rng = random.Random(5)
    for trial in range(300):
        text = random_map(rng)
        Path("map").write_bytes(text.encode())
        whole = {int(row): pid for row, pid in json.loads(text).items()}
        rows = sorted(rng.sample(range(45), rng.randrange(45)))
        for size in (1, rng.randrange(2, 9), rng.randrange(9, 400), 1 << 18):
            read_in_chunks(monkeypatch, size)
            found = pids_of("map", np.array(rows, dtype=np.int64))
            assert found == [whole.get(row) for row in rows], (trial, size)


def read_in_chunks(monkeypatch, size):
    """Read JSON maps `size` bytes at a time."""
    monkeypatch.setattr(json_pairs.read_json_pairs, "__defaults__", (size,))


def test_map_cut_anywhere_is_an_error(folder, monkeypatch):
    for length in range(len(MAP.encode())):
        Path("map").write_bytes(MAP.encode()[:length])
        read_in_chunks(monkeypatch, 1 + length % 7)
        with pytest.raises(FormatError, match="map:[12]: not"):
            pids_of("map", np.array([0]))


@pytest.mark.slow
def test_streamed_map_stays_in_bounded_memory(folder):
    pids = [f"{row * 2654435761 % 2**128:032x}" for row in range(300_000)]
    Path("map").write_text(json.dumps(dict(enumerate(pids))), encoding="utf-8")
    Path("noise").write_bytes(b'{"0": "' + b"x" * 13_000_000)
    rows = np.arange(0, 300_000, 1000)
    tracemalloc.start()
    try:
        assert pids_of("map", rows) == pids[::1000]
        with pytest.raises(FormatError, match="noise:1"):
            pids_of("noise", rows)
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20  # bytes; the file itself is 13 MB
    finally:
        tracemalloc.stop()


def test_a_result_is_written_whole_or_not_at_all(folder):
    def breaks():
        yield "q1", ["a"]
        raise KeyboardInterrupt

    Path("out.json").write_text("older", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        write_result("out.json", breaks())
    assert Path("out.json").read_text(encoding="utf-8") == "older" and not list(Path().glob("out.json*tmp"))
    write_result("out.json", iter(()))
    assert read("out.json") == {}


# ---- scores to JSON


def test_scores_rank_a_query_and_ties_keep_the_order_of_the_map(folder, capsys):
    assert rerank.main(["scores", "ids"]) == 0
    assert read("cross_res.json") == {"q1": ["c", "b", "a"], "q2": ["x"]}
    assert capsys.readouterr() == ("2 queries, 4 results -> cross_res.json\n", "")
    pids = [f"{number:02d}" for number in range(60)]
    Path("ids").write_text("".join(f"q1\t{pid}\n" for pid in reversed(pids)), encoding="utf-8")
    Path("scores").write_text("0.0\n-0.0\n" * 30, encoding="utf-8")
    assert rerank.main(["scores", "ids", "mine.json"]) == 0
    assert read("mine.json") == {"q1": pids[:9:-1]}
    (warning,) = warnings(capsys)
    assert "scores: 1 of 1 queries" in warning


@pytest.mark.parametrize(
    "scores, ids, message",
    [
        ("1\n2\n", "q\ta\n", "ids:2: the file ends here"),
        ("1\n", "q\ta\nq\tb\n", "scores:2: the file ends here"),
        ("", "", "scores: no scores"),
        *[
            (f"1\n{score}\n", "q\ta\nq\tb\n", "scores:2: ")
            for score in ("nan", "inf", "1e400", "", "1 2", "0,5", "1\t2")
        ],
        *[("1\n2\n", f"q\ta\n{ids}\n", "ids:2: ") for ids in ("q", "q\tb\t", "\tb", "q\t", "")],
        ("1\n2\n3\n", "q\ta\nr\ta\nq\ta\n", "ids:3: duplicate passage 'a'"),
        ("1\n", "q\ta\r\n", "ids:1: ends in \\r\\n"),
    ],
)
def test_bad_scores_or_ids_are_named_by_file_and_line(folder, capsys, scores, ids, message):
    Path("scores").write_bytes(scores.encode())
    Path("ids").write_bytes(ids.encode())
    assert message in failure(lambda: rerank.main(["scores", "ids"]), capsys)


# ---- the measures


def test_hand_worked_measures():
    reference = {"q1": {"a", "b"}, **{f"q{number}": {pid} for number, pid in enumerate("cdefgh", 2)}}
    fill = [f"x{number}" for number in range(60)]
    result = {
        "q1": ["x", "b", "a"],  # first relevant at rank 2; the second one does not count
        "q2": ["c"],  # a short list that hits at rank 1
        "q3": ["x", "x", "d"],  # a duplicate at rank 2
        "q4": fill[:10] + ["e"],  # rank 11: beyond the depth of MRR@10
        "q5": fill[:50] + ["f"],  # rank 51: cut
        "q6": [],  # no results; q7 is missing
        "unknown": ["a"],  # counted in QueriesRanked only
    }
    values = evaluation.per_query(reference, result)
    assert list(values) == list(reference)
    assert {qid: tuple(value.values()) for qid, value in values.items()} == {
        "q1": (0.5, 0, 1),
        "q2": (1, 1, 1),
        "q3": (1 / 3, 0, 1),
        "q4": (0, 0, 1),
        "q5": (0, 0, 0),
        "q6": (0, 0, 0),
        "q7": (0, 0, 0),
    }
    assert evaluation.compute_metrics(reference, result) == {
        "MRR@10": (0.5 + 1 + 1 / 3) / 7,
        "QueriesRanked": 7,
        "recall@1": 1 / 7,
        "recall@50": 4 / 7,
    }
    result["q4"], result["q5"] = fill[:9] + ["e"], fill[:49] + ["f"]  # the last ranks that count
    assert evaluation.compute_metrics(reference, result) == {
        "MRR@10": (0.5 + 1 + 1 / 3 + 0.1) / 7,
        "QueriesRanked": 7,
        "recall@1": 1 / 7,
        "recall@50": 5 / 7,
    }


def by_position(reference, result):
    """The measures from a table over positions, query by query in reference order."""
    gain = [1 / (position + 1) for position in range(10)] + [0.0] * 41
    first = [
        min(
            [
                position
                for pid in answers
                for position in range(50)
                if position < len(result.get(qid, [])) and result[qid][position] == pid
            ],
            default=50,
        )
        for qid, answers in reference.items()
    ]
    return {
        "MRR@10": functools.reduce(operator.add, [gain[position] for position in first]) / len(first),
        "QueriesRanked": len(result),
        "recall@1": first.count(0) / len(first),
        "recall@50": 1 - first.count(50) / len(first),
    }


def test_measures_equal_a_second_implementation_on_random_runs():
    rng = random.Random(11)
    for trial in range(3000):
        pids = [str(number) for number in range(rng.choice((6, 30, 120)))]
        reference = {
            f"q{number}": set(rng.choices(pids, k=rng.randrange(1, 5)))
            for number in range(rng.randrange(1, 9))
        }
        asked = rng.sample(sorted(reference), rng.randrange(1, len(reference) + 1)) + ["u"] * rng.randrange(2)
        result = {qid: rng.choices(pids, k=rng.choice((0, 1, 9, 10, 11, 50, 51, 70))) for qid in asked}
        measured, expected = evaluation.compute_metrics(reference, result), by_position(reference, result)
        assert measured.pop("recall@50") == pytest.approx(expected.pop("recall@50"), abs=1e-15)
        assert measured == expected, trial


def test_evaluation_warns_of_duplicate_missing_and_unknown_queries(folder, capsys):
    Path("res.json").write_text('{"q1": ["x", "x", "a", "x"], "q2": ["c", "c"], "z": []}', encoding="utf-8")
    assert evaluation.load_reference("dev.json") == {qid: set(pids) for qid, pids in ANSWERS.items()}
    assert load_result("res.json") == {"q1": ["x", "x", "a", "x"], "q2": ["c", "c"], "z": []}
    assert evaluation.main(["dev.json", "res.json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "MRR@10": (1 / 3 + 1) / 4,
        "QueriesRanked": 3,
        "recall@1": 0.25,
        "recall@50": 0.5,
    }
    found = messages(err)
    keys = ("res.json: 3 duplicate pids", "res.json: 2 of the 4 reference queries", "res.json: 1 queries")
    assert [level for level, _ in found] == ["WARNING"] * 3
    assert all(key in warning for key, (_, warning) in zip(keys, found, strict=True))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("res.json", '{"z": ["a"]}', "res.json: none of the 1 queries"),
        ("res.json", "{}", "none of the 0 queries of the result is among the 4"),
        ("res.json", '{"q1":\n ["a"', "res.json:2: not JSON"),
        ("res.json", "", "res.json:1: not JSON"),
        ("res.json", "[" * 100_000, "res.json:1: JSON that cannot be read"),
        ("res.json", b'{"q1":\n ["\xff"]}', "res.json:2: not UTF-8"),
        ("res.json", '[["q1", "a"]]', "res.json: a JSON list"),
        ("res.json", '{"q1": ["a"],\n"q2": "c"}', "res.json:2: "),
        ("res.json", '{"q1": ["a"],\n"q2": ["c", 0]}', "res.json:2: "),
        ("res.json", '{"q1": ["a"],\n"q1": ["b"]}', "res.json:2: duplicate qid 'q1'"),
        ("dev.json", "", "dev.json: contains no queries"),
        ("dev.json", REFERENCE + "\n", "dev.json:5: not JSON"),
        ("dev.json", REFERENCE[:-3], "dev.json:4: not JSON"),
        ("dev.json", REFERENCE * 2, "dev.json:5: duplicate question_id 'q1'"),
        ("dev.json", '{"question_id": "q1", "answer_paragraphs": []}', "dev.json:1: no answer_paragraphs"),
        *[
            ("dev.json", text, "dev.json:1: ")
            for text in (
                "[]",
                '{"question_id": 1, "answer_paragraphs": []}',
                '{"question_id": "q1", "question": "none"}',
                '{"question_id": "q1", "answer_paragraphs": ["a"]}',
                '{"question_id": "q1", "answer_paragraphs": [{"paragraph_id": ["a"]}]}',
            )
        ],
    ],
)
def test_bad_reference_or_result_is_named_by_file_and_line(folder, capsys, name, text, message):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in failure(lambda: evaluation.main(["dev.json", "res.json"]), capsys)
