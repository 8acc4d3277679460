"""The check of a data folder: no fault in valid data, and each fault by file and line."""

import gzip
import json
import subprocess
import sys

import pytest
from toy_world import ROOT, SAMPLE, lines, make_world, write

from script import check_data
from torch_src.tools.data_check import DataCheck, Lengths


@pytest.fixture
def data(tmp_path):
    folder = make_world(tmp_path) / "data"
    rows = lines(SAMPLE / "dev/dev.json")[:3]
    answers = [(json.loads(row)["question_id"], a["paragraph_id"]) for row in rows
               for a in json.loads(row)["answer_paragraphs"]]  # fmt: skip
    texts = folder / "auxiliary/dev.retrieval.top50.res.tsv"
    write(texts, [f"问\t\t段{at}\t0" for at in range(len(answers))])
    write(texts.with_name("dev.retrieval.top50.res.id_map.tsv"), [f"{qid}\t{pid}" for qid, pid in answers])
    return folder


def faults(data) -> list[tuple[str, int, str]]:
    found = DataCheck(str(data)).run().faults
    return [(path.removeprefix(f"{data}/"), line, what) for path, line, what in found]


def change(path, line: int, new: str | None) -> None:
    rows = lines(path)
    rows[line - 1 : line] = [] if new is None else [new]
    write(path, rows)


def test_a_valid_folder(data):
    found = DataCheck(str(data)).run()
    assert found.faults == []
    assert found.rows["passage-collection/part-00"] + found.rows["passage-collection/part-01"] == 60
    assert found.rows["train/dual.train.tsv, distinct queries"] == 24


FAULTS = {
    "train/dual.train.tsv": (2, "问\t\t答", "3 TAB-separated columns"),
    "train/cross.train.tsv": (5, "问\t\t答\t2", "label '2'"),
    "passage-collection/part-01": (7, "-\t\t段", "expected 4"),
    "dev/dev.q.format": (3, " \t-\t-\t0", "is empty"),
    "auxiliary/dev.retrieval.top50.res.id_map.tsv": (1, "q\tnobody", "nobody is not in passage2id"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_line_is_named_and_the_rest_is_checked(data, name):
    line, new, what = FAULTS[name]
    change(data / name, line, new)
    found = [fault for fault in faults(data) if fault[0] == name]
    assert [fault[:2] for fault in found] == [(name, line)] and what in found[0][2]


def test_all_faults_of_a_file_are_found(data):
    path = data / "train/dual.train.tsv"
    for line in (1, 4, 9):
        change(path, line, "x")
    path.write_bytes(path.read_bytes() + b"\xff\n")
    found = faults(data)
    assert [line for _, line, _ in found] == [1, 4, 9, len(lines_of(path))]
    assert "not UTF-8" in found[-1][2]


def lines_of(path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def test_a_missing_row_shifts_the_ids_and_gives_two_faults(data):
    """The map has one id more, and a dev positive has the text of its neighbour."""
    change(data / "passage-collection/part-00", 1, None)
    found = faults(data)
    assert ("passage-collection/passage2id.map.json", 1) in [fault[:2] for fault in found]
    assert any("are the ids shifted?" in what for _, _, what in found)


def test_unknown_and_duplicate_ids(data):
    path = data / "dev/dev.json"
    entry = json.loads(lines(path)[1])
    entry["answer_paragraphs"][0]["paragraph_id"] = "nowhere"
    change(path, 2, json.dumps(entry, ensure_ascii=False))
    assert ("dev/dev.json", 2, "the positive nowhere is not in passage2id.map.json") in faults(data)
    ids = data / "passage-collection/passage2id.map.json"
    mapping = json.loads(ids.read_text())
    ids.write_text(json.dumps(mapping | {"0": mapping["1"]}))
    last = max(map(int, mapping))
    ids.write_text(json.dumps(mapping | {"0": mapping["1"], str(last): mapping["2"]}))
    named = sorted(what for _, _, what in faults(data) if "same pid" in what)
    assert named == sorted(
        f"the rows {one} and {other} have the same pid {mapping[row]}"
        for row, one, other in (("1", 0, 1), ("2", 2, last))
    )
    ids.write_text(json.dumps({row: pid for row, pid in mapping.items() if row != "7"}))
    assert any("row 7 is missing" in what for _, _, what in faults(data))


def test_every_bad_line_of_the_dev_set_is_named(data):
    path = data / "dev/dev.json"
    first = json.loads(lines(path)[0])["question_id"]
    change(path, 2, '{"question_id": "x"}')
    change(path, 4, json.dumps({**json.loads(lines(path)[3]), "question_id": first}))
    change(path, 5, "{")
    found = [(line, what) for name, line, what in faults(data) if name == "dev/dev.json"]
    assert [line for line, _ in found if "q2qid" not in _] == [2, 4, 5]
    assert "first in line 1" in dict(found)[4]


def test_a_duplicate_query_and_a_query_without_qid(data):
    path = data / "dev/dev.q.format"
    rows = lines(path)
    write(path, [*rows, rows[0], "新\t-\t-\t0"])
    found = [fault for fault in faults(data) if fault[0] == "dev/dev.q.format"]
    assert [line for _, line, _ in found] == [len(rows) + 1, len(rows) + 2]
    assert "the same query as line 1" in found[0][2] and "has no qid" in found[1][2]


def test_notes_are_not_faults(data):
    dev = lines(data / "dev/dev.q.format")[0].split("\t")[0]
    write(data / "train/dual.train.tsv", [*lines(data / "train/dual.train.tsv"), f"{dev}\t\t答\t\t错\t0"])
    part = data / "passage-collection/part-01"
    rows = lines(part)
    change(part, len(rows), rows[0])
    found = DataCheck(str(data)).run()
    leak, place = len(lines(data / "train/dual.train.tsv")), f"part-01:{len(rows)}, as part-01:1"
    assert any(f"dev queries, too (the first in line {leak})" in note for note in found.notes)
    assert any(f"1 passages repeat the text of an earlier one; the first: {place}" in n for n in found.notes)


def test_missing_files_are_notes_but_a_missing_part_is_a_fault(data):
    (data / "train/cross.train.tsv").unlink()
    found = DataCheck(str(data)).run()
    assert found.faults == [] and any("cross.train.tsv: no such file" in note for note in found.notes)
    (data / "passage-collection/part-00").unlink()
    assert any("part-00 is missing" in what for _, _, what in faults(data))


def test_lengths_by_hand():
    lengths = Lengths()
    for size in [1, 2, 3, 4, 5, 6, 7, 8, 9, 100_000]:
        lengths.add("字" * size)
    assert [lengths.percentile(p) for p in (10, 50, 90, 100)] == [1, 5, 9, 65536]
    assert lengths.share_above(8) == 0.2 and lengths.share_above(65536) == 0


@pytest.mark.slow
def test_the_program(data, tmp_path):
    command = [sys.executable, str(ROOT / "script/check_data.py"), str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "no faults" in done.stdout
    change(data / "train/dual.train.tsv", 2, "x")
    done = subprocess.run(
        [*command, "--fix-report", str(tmp_path / "out.tsv")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "train/dual.train.tsv:2: 1 TAB-separated columns" in done.stdout
    assert lines(tmp_path / "out.tsv")[1].split("\t")[1] == "2"
    done = subprocess.run([*command[:2], str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2 and "no such file or folder" in done.stderr


def test_only_the_first_faults_are_kept_but_all_are_counted(data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch_src.tools.data_check.MAX_FAULTS", 3)
    path = data / "passage-collection/part-00"
    path.write_text("broken\n" * 200, encoding="utf-8")
    reported = []
    found = DataCheck(str(data), lambda *fault: reported.append(fault)).run()
    assert len(found.faults) == 3 and found.fault_count == len(reported) > 200
    assert check_data.main([str(data), "--fix-report", str(tmp_path / "report.tsv")]) == 1
    assert len((tmp_path / "report.tsv").read_text(encoding="utf-8").split("\n")) == len(reported) + 2


def test_qids_of_another_data_set_are_faults(data):
    path = data / "dev/q2qid.dev.json"
    qids = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({query: f"other-{qid}" for query, qid in qids.items()}), encoding="utf-8")
    assert any("is not in q2qid.dev.json" in what for _, _, what in faults(data))


@pytest.mark.parametrize("name", ["train/dual.train.tsv", "passage-collection/part-00"])
@pytest.mark.parametrize("change, words", [
    (lambda raw: raw.decode().encode("gbk"), "GB18030"), (gzip.compress, "gzipped"),
])  # fmt: skip
def test_a_file_in_another_form_is_one_fault(tmp_path, name, change, words):
    data = make_world(tmp_path) / "data"
    path = data / name
    path.write_bytes(change(path.read_bytes()))
    (fault,) = DataCheck(str(data)).run().faults
    assert fault[0] == str(path) and words in fault[2]
    dev = data / "dev/dev.json"
    dev.write_bytes(gzip.compress(dev.read_bytes()))  # readable by all programs
    assert len(DataCheck(str(data)).run().faults) == 1
