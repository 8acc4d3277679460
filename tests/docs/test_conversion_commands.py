"""The conversion commands of docs/your_own_corpus.md and --help, run on one data set in every layout."""

import json
import re
from pathlib import Path

import pytest
from doc_commands import ROOT, commands
from toy_world import lines, write

from script import convert_dataset
from torch_src.data.formats import read_dev
from torch_src.data.results import load_result
from torch_src.tools.data_check import DataCheck

TEXTS = {"1": "清蒸鱼要先去腥", "2": "红烧肉要炖一小时", "3": "米饭要焖二十分钟"}
TRAIN, DEV = ("10", "怎么蒸鱼", "1", "2"), ("11", "米饭焖多久", "3", "1")  # qid, query, positive, negative
# folder of the document -> kind, where FOLDER of --help is read
FOLDERS = {
    "beir": "scifact", "t2ranking": "T2Ranking", "msmarco": "msmarco", "tevatron": "tevatron", "dpr": "nq",
    "hub": "dureader-retrieval-ranking", "dureader": "dureader_retrieval-data",
}  # fmt: skip


def json_lines(path: Path, rows: list[dict]) -> None:
    write(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def table(path: Path, *rows: tuple[str, ...]) -> None:
    write(path, ["\t".join(row) for row in rows])


def in_three_files(folder: Path) -> None:
    """Write the layouts of corpus, queries and judgments."""
    items, pairs = [*TEXTS.items()], [(qid, query) for qid, query, *_ in (TRAIN, DEV)]
    (qid, _, yes, no), (dev, _, answer, _) = TRAIN, DEV
    json_lines(
        folder / "scifact/corpus.jsonl", [{"_id": pid, "title": "", "text": text} for pid, text in items]
    )
    json_lines(folder / "scifact/queries.jsonl", [{"_id": qid, "text": text} for qid, text in pairs])
    names = ("query-id", "corpus-id", "score")
    table(folder / "scifact/qrels/train.tsv", names, (qid, yes, "1"), (qid, no, "0"))
    table(folder / "scifact/qrels/test.tsv", names, (dev, answer, "1"))
    for name, header in (("T2Ranking", True), ("msmarco", False)):
        table(folder / name / "collection.tsv", *[("pid", "text")] * header, *items)
        for split, pair in (("train", pairs[0]), ("dev", pairs[1])):
            table(folder / name / f"queries.{split}.tsv", *[("qid", "text")] * header, pair)
    table(
        folder / "T2Ranking/qrels.train.tsv",
        ("qid", "-", "pid", "rel"),
        (qid, "-", yes, "3"),
        (qid, "-", no, "1"),
    )
    table(folder / "T2Ranking/qrels.retrieval.dev.tsv", ("qid", "pid"), (dev, answer))
    table(folder / "msmarco/qrels.train.tsv", (qid, "0", yes, "1"), (qid, "0", no, "0"))
    table(folder / "msmarco/qrels.dev.tsv", (dev, "0", answer, "1"))
    table(folder / "passages.tsv", ("id", "text"), *items)
    write(folder / "passages.csv", ["id,text", *(",".join(item) for item in items)])
    table(folder / "queries.tsv", *pairs)
    write(folder / "train.qrels.txt", [f"{qid} 0 {yes} 1", f"{qid} 0 {no} 0"])
    write(folder / "qrels.txt", [f"{dev} 0 {answer} 2"])


def in_rows(folder: Path) -> None:
    """Write the layouts of a query and its passages per row."""
    for split, (qid, query, yes, no) in (("train", TRAIN), ("dev", DEV)):
        json_lines(folder / f"{split}.jsonl", [{"query": query, "pos": [TEXTS[yes]], "neg": [TEXTS[no]]}])
        sides = [[{"docid": pid, "title": "", "text": TEXTS[pid]}] for pid in (yes, no)]
        row = {"query_id": qid, "query": query, "positive_passages": sides[0], "negative_passages": sides[1]}
        for name in ("tevatron", "dureader-retrieval-ranking"):
            json_lines(folder / f"{name}/{split}.jsonl", [row])
        passages = [[{"passage_id": pid, "title": "", "text": TEXTS[pid]}] for pid in (yes, no)]
        entry = {
            "question": query,
            "answers": [],
            "positive_ctxs": passages[0],
            "hard_negative_ctxs": passages[1],
        }
        write(folder / f"nq/biencoder-nq-{split}.json", [json.dumps([entry], indent=4)])
        answers = [{"paragraph_id": yes, "paragraph_text": TEXTS[yes]}]
        row = {"question_id": qid, "question": query, "answer_paragraphs": answers}
        json_lines(folder / f"dureader_retrieval-data/{split}.json", [row])
    collection = folder / "dureader-retrieval-ranking/passage_collection.tsv"
    table(collection, *TEXTS.items())
    paragraphs = [{"paragraph_id": pid, "paragraph_text": text} for pid, text in TEXTS.items()]
    json_lines(folder / "dureader_retrieval-data/passage_collection.json", paragraphs)
    table(
        folder / "nq/psgs_w100.tsv",
        ("id", "text", "title"),
        *((pid, f'"{text}"', "") for pid, text in TEXTS.items()),
    )
    json_lines(folder / "passages.jsonl", [{"id": int(pid), "text": text} for pid, text in TEXTS.items()])
    own = [{"id": qid, "text": query, "positives": [yes], "negatives": [no], "split": split}
           for split, (qid, query, yes, no) in (("train", TRAIN), ("dev", DEV))]  # fmt: skip
    json_lines(folder / "queries.jsonl", own)
    write(folder / "run.txt", [f"{DEV[0]} Q0 {pid} {rank} {9 - rank} x" for rank, pid in enumerate("132", 1)])
    sides = [{"pid": pid, "row": int(pid) - 1, "passage": TEXTS[pid]} for pid in DEV[2:]]
    click = {"time": "t", "query": DEV[1], **sides[0], "relevant": True, "column": "dense", "rank": 2}
    for name in ("feedback.jsonl", "output/my/feedback.jsonl"):
        json_lines(folder / name, [{**click, "above": sides[1:]}])
    for name in ("res.top50", "output/my/res.top50"):
        table(
            folder / name, *((DEV[1], str(int(pid) - 1), str(rank), "1") for rank, pid in enumerate("32", 1))
        )
    (folder / "dual_res.json").write_text(json.dumps({DEV[0]: ["3", "1"]}))


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    in_three_files(tmp_path)
    in_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_converted(folder: Path) -> None:
    """Assert that a folder holds the data set; DuReader's rows have no negatives."""
    assert not DataCheck(str(folder)).run().faults
    collection = {line.split("\t")[2] for line in lines(folder / "passage-collection/part-00")}
    assert collection == {*TEXTS.values()}
    (dev,) = read_dev(folder / "dev/dev.json")
    assert dev.query == DEV[1] and [*dev.answers.values()] == [TEXTS[DEV[2]]]
    if not (folder / "train").exists():  # qrels for dev alone
        return
    rows = [line.split("\t") for line in lines(folder / "train/dual.train.tsv")]
    assert {(row[0], row[2]) for row in rows} == {(TRAIN[1], TEXTS[TRAIN[2]])}
    negatives = {TEXTS["2"], TEXTS["3"]} if "dureader" == folder.name else {TEXTS[TRAIN[3]]}
    assert {row[4] for row in rows} == negatives


def run(words: list[str]) -> str:
    """Run a conversion command; return what it wrote."""
    assert convert_dataset.main(words) == 0, words
    target = Path(words[words.index("--to") + 1])
    if words[0] == "from_trec":
        assert load_result(target) == {DEV[0]: ["1", "3", "2"]}
    elif words[0] == "to_trec":
        assert lines(target / "run.txt")[0].startswith(f"{DEV[0]} Q0 3 1 ")
        if "--reference" in words:
            assert lines(target / "qrels.txt") == [f"{DEV[0]} 0 3 2"]
    elif words[0] == "to_beir":
        assert lines(target / "qrels/dev.tsv")[1].startswith(f"{DEV[0]}\t3\t")
    elif words[0] == "feedback":
        assert {path.name for path in target.iterdir()} == {"passage-collection", "train"}
    elif words[0] == "auto":
        texts = [line.split("\t")[2] for line in lines(target / "passage-collection/part-00")]
        assert texts == [*TEXTS.values()]
    else:
        check_converted(target)
    return words[0]


def test_the_commands_of_the_document(sources):
    text = (ROOT / "docs/your_own_corpus.md").read_text(encoding="utf-8")
    found = [words[2:] for words in commands(text) if words[1] == "script/convert_dataset.py"]
    kinds = [run(words) for words in found]
    assert {*kinds} == {*convert_dataset.KINDS}


def test_the_commands_of_the_help(sources, capsys):
    with pytest.raises(SystemExit):
        convert_dataset.main(["--help"])
    shown = re.findall(r"^    python script/convert_dataset.py (.*)", capsys.readouterr().out, re.MULTILINE)
    kinds = []
    for number, line in enumerate(shown):
        kind, source, *rest = ("out0" if word == "D" else word for word in line.split())
        source = FOLDERS.get(kind, source) if source == "FOLDER" else source
        at = rest.index("--to") + 1
        rest[at] = f"out{number}" if kind not in FOLDERS else f"out/{kind}"
        kinds.append(run([kind, source, *rest]))
    assert {*kinds} == {*convert_dataset.KINDS}
