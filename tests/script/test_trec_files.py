"""Runs and judgments of other tools: order, ties, headers, errors; measures equal to trec_eval's."""

import gzip
import json

import numpy as np
import pytest
from toy_world import lines, write

from script import compare_runs, convert_dataset
from script.lib.trec_files import read_grades, read_ranking
from torch_src.data.results import load_result
from torch_src.runtime.errors import UserError

RANKING = {"q1": ["b", "a", "c"], "q2": ["a"]}
RUNS = {
    "TREC": "q1 Q0 a 2 0.5 x\nq1 Q0 b 1 7e-1 x\nq1 Q0 c 3 -1 x\nq2 Q0 a 1 3 x\n",
    "TREC with TABs": "q1\tQ0\tb\t1\t9\tx\nq1\tQ0\ta\t2\t8\tx\nq1\tQ0\tc\t3\t7\tx\nq2\tQ0\ta\t1\t3\tx\n",
    "without a name": "q1 Q0 b 0 9\nq1 Q0 a 1 8\nq1 Q0 c 2 7\nq2 Q0 a 0 1\n",
    "qid, pid, rank (MS MARCO)": "q1\tb\t1\nq1\ta\t2\nq1\tc\t3\nq2\ta\t1\n",
    "ranks in any order": "q2\ta\t1\nq1\tc\t3\nq1\tb\t1\nq1\ta\t2\n",
    "qid, pid, score (Tevatron)": "q1\tb\t9.5\nq1\ta\t3\nq1\tc\t2\nq2\ta\t1\n",
    "T2Ranking": "qid\tpid\tindex\tscore\nq1\tb\t1\t9\nq1\ta\t2\t8\nq1\tc\t3\t7\nq2\ta\t1\t5\n",
    "equal scores": "q1 Q0 a 2 1 x\nq1 Q0 b 1 1 x\nq1 Q0 c 3 1 x\nq2 Q0 a 1 1 x\n",
    "ranks that contradict": "q1 Q0 c 1 1 x\nq1 Q0 b 2 3 x\nq1 Q0 a 3 2 x\nq2 Q0 a 1 1 x\n",
    "Windows": "\ufeffq1 Q0 b 1 9 x\r\nq1 Q0 a 2 8 x\r\nq1 Q0 c 3 7 x\r\n\r\nq2 Q0 a 1 9 x\r\n",
    "result": json.dumps(RANKING),
    "scores": json.dumps({"q1": {"c": 1, "a": 2.5, "b": 3}, "q2": {"a": -1}}),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("name", RUNS)
def test_runs(tmp_path, name, pack):
    path = tmp_path / "run"
    path.write_bytes(pack(RUNS[name].encode()))
    assert {qid: pids for qid, pids in read_ranking(path).items()} == RANKING


@pytest.mark.parametrize(
    "name, words",
    [("equal scores", "1 queries have equal"), ("ranks that contradict", "1 queries the ranks")],
)
def test_doubtful_ranks_are_a_warning(tmp_path, capsys, name, words):
    (tmp_path / "run").write_text(RUNS[name])
    read_ranking(tmp_path / "run")
    error = capsys.readouterr().err
    assert "WARNING" in error and words in error


@pytest.mark.parametrize("content, line", [
    ("q1 Q0 a 1 2 x\nq1 Q0 a 2 1 x\n", 2), ("q1 Q0 a 1 nan x\n", 1), ("q1 Q0 a x 1 x\n", 1), ("q1 a\n", 1),
    ("q1 Q0 a b 1 2 x\n", 1), ("q1\ta\tx\n", 1), ("q1\ta\t1\nq1\t\t2\n", 2), ("", 0),
    ("q1 Q0 a 1 2 x\nq1 a 3\n", 2),
])  # fmt: skip
def test_malformed_runs_are_named(tmp_path, content, line):
    path = tmp_path / "run.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{path}:{line or ' '}"):
        read_ranking(path)


JUDGED = (("q1", "a", 2), ("q1", "b", 0), ("q2", "c", 1), ("q3", "a", 0), ("q1", "d", -1))
NAMES = ("query-id", "corpus-id", "score")
QRELS = {
    "qrels.txt": "".join(f"{qid} 0 {pid} {grade}\n" for qid, pid, grade in JUDGED),
    "qrels.tsv": "".join(f"{qid}\t{pid}\t{grade}\n" for qid, pid, grade in (NAMES, *JUDGED)),
    "qrels.jsonl": "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in JUDGED),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("name", QRELS)
def test_grades(tmp_path, capsys, name, pack):
    path = tmp_path / (name + (".gz" if pack is gzip.compress else ""))
    path.write_bytes(pack(QRELS[name].encode()))
    assert read_grades(path) == {"q1": {"a": 2, "b": 0, "d": -1}, "q2": {"c": 1}}
    assert "1 queries without a passage of grade 1" in capsys.readouterr().out
    assert [*read_grades(path, min_grade=2)] == ["q1"]
    with pytest.raises(UserError, match="grade 3"):
        read_grades(path, min_grade=3)


def test_grades_of_dev_json(tmp_path):
    answers = [{"paragraph_id": "a", "grade": 3}, {"paragraph_id": "b"}]
    write(tmp_path / "dev.json", [json.dumps({"question_id": "q1", "answer_paragraphs": answers})])
    assert read_grades(tmp_path / "dev.json") == {"q1": {"a": 3, "b": 1}}


@pytest.mark.tools
def test_measures_are_those_of_trec_eval_on_the_same_files(tmp_path, capsys):
    import ir_measures

    draw, qrels, runs = np.random.default_rng(0), [], {"a": [], "b": []}
    for query in range(20):
        for passage in draw.choice(60, 12, replace=False):
            qrels.append(f"q{query} 0 p{passage} {draw.integers(0, 4)}")
        for run in runs.values():
            for passage, score in zip(draw.choice(60, 40, replace=False), draw.normal(size=40), strict=True):
                run.append(f"q{query} Q0 p{passage} 1 {score:.9g} x")
    write(tmp_path / "qrels.txt", qrels)
    for name, run in runs.items():
        write(tmp_path / name, run)
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--reference", str(tmp_path / "qrels.txt")]
    for min_grade in (1, 2):
        assert compare_runs.main([*words, "--min_grade", str(min_grade)]) == 0
        printed = [line.split() for line in capsys.readouterr().out.split("\n") if "[" in line]
        table = {name: values[:2] for name, *values in printed}
        relevant = f"(rel={min_grade})@"
        names = {name: name if "DCG" in name else name.replace("@", relevant) for name in compare_runs.TREC}
        measures = {name: ir_measures.parse_measure(text) for name, text in names.items()}
        for at, name in enumerate(runs):
            run, judged = str(tmp_path / name), str(tmp_path / "qrels.txt")
            expected = ir_measures.calc_aggregate(
                measures.values(), ir_measures.read_trec_qrels(judged), ir_measures.read_trec_run(run)
            )
            for key, measure in measures.items():
                assert table[key][at] == f"{expected[measure]:.4f}"


@pytest.mark.tools
def test_graded_ndcg_by_hand(tmp_path, capsys):
    write(tmp_path / "qrels", ["q1\ta\t3", "q1\tb\t1"])
    write(tmp_path / "A", ["q1 Q0 b 1 2 x", "q1 Q0 a 2 1 x"])
    write(tmp_path / "B", ["q1 Q0 a 1 2 x", "q1 Q0 b 2 1 x", "q9 Q0 b 1 1 x"])
    words = [str(tmp_path / "A"), str(tmp_path / "B"), "--reference", str(tmp_path / "qrels")]
    assert compare_runs.main([*words, "--per_query", str(tmp_path / "out")]) == 0
    ideal = 3 + 1 / np.log2(3)
    values = json.loads(lines(tmp_path / "out")[0])
    assert values["nDCG@10"] == pytest.approx([(1 + 3 / np.log2(3)) / ideal, 1.0])
    assert values["RR@10"] == [1, 1]
    assert "1 queries are not in the reference" in capsys.readouterr().err
    assert compare_runs.main([*words, "--min_grade", "2", "--per_query", str(tmp_path / "out")]) == 0
    assert json.loads(lines(tmp_path / "out")[0])["RR@10"] == [0.5, 1.0]


def test_runs_of_other_queries_are_refused(tmp_path, capsys):
    write(tmp_path / "qrels", ["q1\ta\t3"])
    write(tmp_path / "A", ["q1 Q0 b 1 2 x"])
    write(tmp_path / "B", ["q2 Q0 b 1 2 x"])
    words = [str(tmp_path / "A"), str(tmp_path / "B"), "--reference", str(tmp_path / "qrels")]
    assert compare_runs.main(words) == 2
    assert f"ERROR {tmp_path / 'B'}: " in capsys.readouterr().err


def run(*words) -> int:
    return convert_dataset.main([str(word) for word in words])


def test_a_run_becomes_a_result_and_back(tmp_path):
    (tmp_path / "run.txt").write_text(RUNS["TREC"])
    assert run("from_trec", tmp_path / "run.txt", "--to", tmp_path / "res.json") == 0
    assert load_result(tmp_path / "res.json") == RANKING
    assert run("from_trec", tmp_path / "run.txt", "--to", tmp_path / "res.json") == 0  # its own file
    assert run("from_trec", tmp_path / "run.txt", "--to", tmp_path / "run.txt") == 2
    (tmp_path / "notes").write_text("mine")
    assert run("from_trec", tmp_path / "run.txt", "--to", tmp_path / "notes") == 2
    assert (tmp_path / "notes").read_text() == "mine"
    (tmp_path / "qrels").write_text("q1 0 b 2\nq1 0 a 1\nq2 0 a 0\n")
    assert (
        run("to_trec", tmp_path / "res.json", "--reference", tmp_path / "qrels", "--to", tmp_path / "T") == 0
    )
    assert read_ranking(tmp_path / "T/run.txt") == RANKING
    assert lines(tmp_path / "T/qrels.txt") == ["q1 0 a 1", "q1 0 b 2"]


@pytest.mark.parametrize(
    "result", ['{"q 1": ["a"]}', '{"q1": ["a b"]}', '{"q1": ["a\\u3000"]}', '{"q1": [""]}']
)
def test_ids_that_trec_columns_cannot_hold_are_refused(tmp_path, capsys, result):
    (tmp_path / "res.json").write_text(result)
    assert run("to_trec", tmp_path / "res.json", "--to", tmp_path / "T") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "res.json" in error and not (tmp_path / "T").exists()


def own_data(folder):
    """Write the maps of a data folder with two passages and a run over its query; return the run."""
    write(folder / "D/dev/q2qid.dev.json", ['{"怎么 蒸鱼": "q1"}'])
    write(folder / "D/passage-collection/passage2id.map.json", ['{"0": "a", "1": "b"}'])
    write(folder / "res.top50", ["怎么 蒸鱼\t1\t1\t2.5", "怎么 蒸鱼\t0\t2\t-0.125"])
    return folder / "res.top50"


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_run_of_this_project_keeps_its_scores(tmp_path, pack):
    path = own_data(tmp_path)
    path.write_bytes(pack(path.read_bytes()))
    assert run("to_trec", path, "--data_dir", tmp_path / "D", "--to", tmp_path / "T") == 0
    assert lines(tmp_path / "T/run.txt") == ["q1 Q0 b 1 2.5 dureader", "q1 Q0 a 2 -0.125 dureader"]
    write(tmp_path / "run.txt", ["q1 Q0 a 1 7.25 x", "q1 Q0 b 2 7 x"])
    assert run("to_trec", tmp_path / "run.txt", "--to", tmp_path / "U") == 0
    assert lines(tmp_path / "U/run.txt") == ["q1 Q0 a 1 7.25 dureader", "q1 Q0 b 2 7 dureader"]


def test_swapped_and_wrong_files_are_named(tmp_path, capsys):
    own, dev = own_data(tmp_path), tmp_path / "dev.json"
    write(dev, ['{"question_id": "q1", "answer_paragraphs": [{"paragraph_id": "a"}]}'])
    write(tmp_path / "res.json", ['{"q1": ["a"]}'])
    result, to = tmp_path / "res.json", ["--to", tmp_path / "T"]
    wrong = [
        ("to_trec", dev, "--reference", result, *to), ("to_trec", own, *to), ("from_trec", own, *to),
        ("from_trec", dev, *to), ("to_trec", result, "--data_dir", tmp_path / "D", *to),
        ("to_trec", result, "--reference", own, *to),
    ]  # fmt: skip
    for words in wrong:
        assert run(*words) == 2 and not (tmp_path / "T").exists()
        assert capsys.readouterr().err.count("\n") == 1
    for words in ([own, result, "--reference", dev], [result, dev, "--reference", result],
                  [result, result, "--reference", result], [dev, dev, "--reference", dev]):  # fmt: skip
        assert compare_runs.main([str(word) for word in words]) == 2
        assert "(expected" in capsys.readouterr().err


def test_a_tsv_run_with_numbers_is_not_one_of_this_project(tmp_path):
    write(tmp_path / "run.tsv", ["7\t3\t1\t9.5", "7\t4\t2\t9"])
    assert run("from_trec", tmp_path / "run.tsv", "--to", tmp_path / "res.json") == 0
    assert load_result(tmp_path / "res.json") == {"7": ["3", "4"]}
