"""Foreign data sets to the official layout and back: ids and texts are unchanged."""

import gzip
import json

import pytest
from toy_world import lines, make_world, write

from script import convert_dataset
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import read_dev
from torch_src.data.passage_ids import read_passage_ids
from torch_src.tools.data_check import DataCheck

CORPUS = [
    {"_id": "d1", "title": "鱼", "text": "清蒸鱼要先去腥"},
    {"_id": "d2", "title": "", "text": "红烧肉\t要\n炖"},
    {"_id": "文3", "title": "", "text": ""},
    *({"_id": f"e{n}", "title": "", "text": f"别的第{n}段"} for n in range(6)),
]


def json_lines(entries) -> list[str]:
    return [json.dumps(entry, ensure_ascii=False) for entry in entries]


def beir(folder):
    write(folder / "corpus.jsonl", json_lines(CORPUS))
    queries = [
        {"_id": "q1", "text": "蒸鱼去腥"},
        {"_id": "q2", "text": "红烧肉"},
        {"_id": "q3", "text": "没人问"},
    ]
    write(folder / "queries.jsonl", json_lines(queries))
    write(folder / "qrels/train.tsv", ["query-id\tcorpus-id\tscore", "q2\td2\t1"])
    write(folder / "qrels/test.tsv", ["query-id\tcorpus-id\tscore", "q1\td1\t2"])
    return folder


def run(*words) -> int:
    return convert_dataset.main([str(word) for word in words])


def test_beir_to_the_official_layout(tmp_path, capsys):
    assert run("beir", beir(tmp_path / "beir"), "--to", tmp_path / "D") == 0
    out = capsys.readouterr().out
    assert "1 training queries had no negatives" in out and "1 texts had TABs" in out
    collection = PassageCollection(tmp_path / "D/passage-collection")
    assert collection[0:3] == ["鱼 清蒸鱼要先去腥", "红烧肉 要 炖", ""]
    ids = read_passage_ids(tmp_path / "D/passage-collection/passage2id.map.json")
    assert [pid.decode() for pid in ids[:3]] == ["d1", "d2", "文3"]
    (query,) = read_dev(tmp_path / "D/dev/dev.json")
    assert (query.qid, query.query, query.answers) == ("q1", "蒸鱼去腥", {"d1": "鱼 清蒸鱼要先去腥"})
    rows = [line.split("\t") for line in lines(tmp_path / "D/train/dual.train.tsv")]
    assert {row[0] for row in rows} == {"红烧肉"} and all(row[2] == "红烧肉 要 炖" != row[4] for row in rows)
    assert not [fault for fault in DataCheck(str(tmp_path / "D")).run().faults if "empty" not in fault[2]]


def test_a_round_trip_through_beir(tmp_path):
    world = make_world(tmp_path)
    assert run("to_beir", world / "data", "--to", tmp_path / "beir") == 0
    assert run("beir", tmp_path / "beir", "--to", tmp_path / "back") == 0
    old, new = (
        PassageCollection(folder / "passage-collection") for folder in (world / "data", tmp_path / "back")
    )
    assert old[0 : len(old)] == new[0 : len(new)]
    maps = [
        folder / "passage-collection/passage2id.map.json" for folder in (world / "data", tmp_path / "back")
    ]
    assert read_passage_ids(maps[0]).tolist() == read_passage_ids(maps[1]).tolist()
    assert read_dev(world / "data/dev/dev.json") == read_dev(tmp_path / "back/dev/dev.json")
    assert run("to_beir", tmp_path / "back", "--to", tmp_path / "again") == 0
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv", "qrels/train.tsv"):
        assert sorted(lines(tmp_path / "beir" / name)) == sorted(lines(tmp_path / "again" / name)), name


def test_training_negatives_are_judgments_of_grade_0(tmp_path, capsys):
    folder = beir(tmp_path / "beir")
    judged = ["q2\td2\t1", "q2\td1\t0", "q2\tgone\t0", "q3\td1\t0"]  # q3 has no positive
    write(folder / "qrels/train.tsv", ["query-id\tcorpus-id\tscore", *judged])
    write(folder / "qrels/test.tsv", ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\tgone\t0"])
    assert run("beir", folder, "--to", tmp_path / "D") == 0
    assert "1 negatives are not in the corpus" in capsys.readouterr().out
    assert lines(tmp_path / "D/train/dual.train.tsv") == ["红烧肉\t\t红烧肉 要 炖\t\t鱼 清蒸鱼要先去腥\t0"]
    assert run("to_beir", tmp_path / "D", "--to", tmp_path / "out") == 0
    assert lines(tmp_path / "out/qrels/train.tsv")[1:] == ["train0\td2\t1", "train0\td1\t0"]
    assert run("beir", tmp_path / "out", "--to", tmp_path / "again") == 0
    for name in ("dual.train.tsv", "cross.train.tsv"):
        assert lines(tmp_path / "D/train" / name) == lines(tmp_path / "again/train" / name)


def test_titles_are_restored(tmp_path):
    assert run("beir", beir(tmp_path / "beir"), "--to", tmp_path / "D") == 0
    assert run("to_beir", tmp_path / "D", "--to", tmp_path / "out") == 0
    first = json.loads(lines(tmp_path / "out/corpus.jsonl")[0])
    assert first == CORPUS[0]


def test_own_jsonl_gzipped_with_negatives(tmp_path):
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(
            f"{line}\n" for line in json_lines({"id": e["_id"], "contents": e["text"]} for e in CORPUS)
        )
    queries = [
        {"id": 1, "text": "蒸鱼", "positives": ["d1"], "negatives": ["d2"]},
        {"id": 2, "text": "炖肉", "positives": ["d2"], "split": "dev"},
    ]
    write(tmp_path / "q.jsonl", json_lines(queries))
    words = ["jsonl", tmp_path / "corpus.jsonl.gz", "--queries", tmp_path / "q.jsonl", "--to", tmp_path / "D"]
    assert run(*words) == 0
    assert lines(tmp_path / "D/train/dual.train.tsv") == ["蒸鱼\t\t清蒸鱼要先去腥\t\t红烧肉 要 炖\t0"]
    assert read_dev(tmp_path / "D/dev/dev.json")[0].qid == "2"


def test_hub_and_dureader_rows(tmp_path):
    write(tmp_path / "hub/corpus.tsv", ["p1\t清蒸鱼", "p2\t红烧肉"])
    entry = {"query_id": "7", "query": "蒸鱼", "positive_passages": [{"docid": "p1", "text": "清蒸鱼"}],
             "negative_passages": [{"docid": "p2", "text": "红烧肉"}]}  # fmt: skip
    write(tmp_path / "hub/train.jsonl", json_lines([entry]))
    write(tmp_path / "hub/dev.jsonl", json_lines([entry]))
    assert run("hub", tmp_path / "hub", "--to", tmp_path / "H") == 0
    assert lines(tmp_path / "H/train/cross.train.tsv") == ["蒸鱼\t\t清蒸鱼\t1", "蒸鱼\t\t红烧肉\t0"]
    write(tmp_path / "du/passage_collection.json", json_lines(
        {"paragraph_id": pid, "paragraph_text": text} for pid, text in (("p1", "清蒸鱼"), ("p2", "红烧肉"))
    ))  # fmt: skip
    answers = [{"paragraph_id": "p2", "paragraph_text": "红烧肉"}]
    write(
        tmp_path / "du/dev.json",
        json_lines([{"question_id": "9", "question": "肉", "answer_paragraphs": answers}]),
    )
    assert run("dureader", tmp_path / "du", "--to", tmp_path / "U") == 0
    assert read_dev(tmp_path / "U/dev/dev.json")[0].answers == {"p2": "红烧肉"}


def test_trec_files(tmp_path):
    (tmp_path / "res.json").write_text(json.dumps({"q1": ["a", "b", "a"]}))
    answers = [{"paragraph_id": "b"}]
    (tmp_path / "dev.json").write_text(json.dumps({"question_id": "q1", "answer_paragraphs": answers}) + "\n")
    words = [
        "to_trec",
        tmp_path / "res.json",
        "--reference",
        tmp_path / "dev.json",
        "--to",
        tmp_path / "trec",
    ]
    assert run(*words) == 0
    assert lines(tmp_path / "trec/run.txt") == ["q1 Q0 a 1 1 dureader", "q1 Q0 b 2 0.5 dureader"]
    assert lines(tmp_path / "trec/qrels.txt") == ["q1 0 b 1"]


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: write(f / "corpus.jsonl", json_lines([CORPUS[0], CORPUS[0]])), "d1: duplicate"),
    (lambda f: write(f / "corpus.jsonl", ["{"]), "corpus.jsonl:1: "),
    (lambda f: write(f / "corpus.jsonl", ['{"_id": "x"}']), "corpus.jsonl:1: "),
    (lambda f: write(f / "qrels/test.tsv", ["q1\tnowhere\t1"]), "nowhere is not in the corpus"),
    (lambda f: write(f / "qrels/test.tsv", ["q9\td1\t1"]), "query q9 is not in"),
    (lambda f: (f / "corpus.jsonl").unlink(), "no file corpus"),
])  # fmt: skip
def test_malformed_sources_are_named(tmp_path, capsys, change, words):
    change(beir(tmp_path / "beir"))
    assert run("beir", tmp_path / "beir", "--to", tmp_path / "D") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
