"""BM25: terms by hand, scores by the formula, fusion by hand, the run format."""

import math

import pytest
from toy_world import lines, make_world, write

from metric import convert_recall_res_to_json
from script import bm25
from torch_src.data.terms import terms


def collection(tmp_path, texts: list[str]):
    write(tmp_path / "data/passage-collection/part-00", [f"-\t\t{text}\t0" for text in texts])
    return tmp_path / "data"


def search(tmp_path, data, queries: list[str], topk: int = 50) -> list[list[str]]:
    write(data / "dev/dev.q.format", [f"{query}\t-\t-\t0" for query in queries])
    words = ["--data_dir", str(data), "--index", str(tmp_path / "bm25"), "--topk", str(topk)]
    assert bm25.main(["index", *words]) == 0
    assert bm25.main(["search", *words]) == 0
    return [line.split("\t") for line in lines(tmp_path / f"bm25/res.top{topk}")]


@pytest.mark.tools
def test_scores_are_bm25s(tmp_path):
    """k1 1.2, b 0.75; texts short enough that the engine stores their lengths exactly."""
    texts = ["清蒸鱼", "清蒸鱼的味汁", "红烧肉", "清蒸 清蒸 rice", "米饭 rice rice"]
    rows = search(tmp_path, collection(tmp_path, texts), ["清蒸rice"])
    documents = [terms(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)

    def score(document):
        total = 0.0
        for term in terms("清蒸rice"):
            holding = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = document.count(term)
            total += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(document) / mean))
        return total

    expected = sorted(((score(d), -row) for row, d in enumerate(documents) if score(d) > 0), reverse=True)
    assert [int(row) for _, row, _, _ in rows] == [-row for _, row in expected]
    assert [float(value) for *_, value in rows] == pytest.approx([value for value, _ in expected], rel=1e-4)


@pytest.mark.tools
def test_the_converter_reads_the_run_and_the_index_is_kept(tmp_path, capsys):
    world = make_world(tmp_path)
    words = ["--data_dir", str(world / "data"), "--index", str(world / "bm25")]
    assert bm25.main(["index", *words]) == 0 and bm25.main(["index", *words]) == 0
    assert "up to date" in capsys.readouterr().out
    assert bm25.main(["search", *words]) == 0
    maps = [world / "data/dev/q2qid.dev.json", world / "data/passage-collection/passage2id.map.json"]
    run = world / "bm25/res.top50"
    assert convert_recall_res_to_json.main([*map(str, maps), str(run), "50"]) == 0


@pytest.mark.tools
def test_ties_rank_by_row_and_queries_without_hits_are_reported(tmp_path, capsys):
    rows = search(tmp_path, collection(tmp_path, ["清蒸鱼"] * 5 + ["别的"]), ["蒸鱼", "xyz"])
    assert [int(row) for _, row, _, _ in rows] == [0, 1, 2, 3, 4]
    assert "1 queries share no term" in capsys.readouterr().out


def test_search_before_index(tmp_path, capsys):
    words = ["--data_dir", str(collection(tmp_path, ["鱼"])), "--index", str(tmp_path / "i")]
    assert bm25.main(["search", *words]) == 2
    assert "bm25.py index" in capsys.readouterr().err


def test_fusion_by_hand(tmp_path):
    write(tmp_path / "a", ["q\t5\t1\t3", "q\t6\t2\t1"])
    write(tmp_path / "b", ["q\t6\t1\t10", "q\t7\t2\t8"])
    runs = ["--runs", str(tmp_path / "a"), str(tmp_path / "b"), "--run", str(tmp_path / "c")]
    assert bm25.main(["fuse", *runs]) == 0
    rows = [line.split("\t") for line in lines(tmp_path / "c")]
    assert [row[1] for row in rows] == ["6", "5", "7"]
    assert [float(row[3]) for row in rows] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])
    # by scores: 5 has +1, 6 -1 in a (2 and 0 above the least), 6 has +1, 7 -1 in b, times 3
    assert bm25.main(["fuse", *runs, "--weights", "1", "3"]) == 0
    rows = [line.split("\t") for line in lines(tmp_path / "c")]
    assert [(row[1], float(row[3])) for row in rows] == [("6", 6.0), ("5", 2.0), ("7", 0.0)]
    assert bm25.main(["fuse", *runs, "--weights", "1"]) == 2


def test_fusing_runs_of_other_queries(tmp_path, capsys):
    write(tmp_path / "a", ["q\t5\t1\t3", "r\t6\t1\t3"])
    write(tmp_path / "b", ["q\t6\t1\t10"])
    write(tmp_path / "c", ["s\t6\t1\t10"])

    def fuse(*names: str) -> int:
        return bm25.main(
            ["fuse", "--runs", *(str(tmp_path / name) for name in names), "--run", str(tmp_path / "o")]
        )

    assert fuse("a", "c") == 2 and "no query is in all runs" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert fuse("a", "b") == 0 and "1 of 2 queries" in capsys.readouterr().err


@pytest.mark.tools
@pytest.mark.parametrize(("query", "rows"), [
    ("鱼", {0, 1}), ("清", {0}), ("물", {3}), ("ア", {4}), ("C", {5}), ("c语", {5}), ("ｉＰｈｏｎｅ", {2}),
    ("iphone", {2}), ("café", {6}), ("ПРИВЕТ", {7}), ("用", {2}), ("醋", set()), ("，", set()),
])  # fmt: skip
def test_a_query_of_one_character_or_another_width_matches(tmp_path, query, rows):
    texts = [
        "清蒸鱼",
        "鱼",
        "用 iPhone 拍照",
        "물을 마시다",
        "ｱｲｽ",
        "C语言入门",
        "un cafe\u0301",
        "привет мир",
    ]
    found = search(tmp_path, collection(tmp_path, texts), [query])
    assert {int(row) for _, row, _, _ in found} == rows


@pytest.mark.tools
def test_more_passages_than_there_are_and_the_smallest_memory(tmp_path):
    data = collection(tmp_path, ["清蒸鱼", "鱼"])
    assert len(search(tmp_path, data, ["鱼"], topk=10**15)) == 2
    words = ["--data_dir", str(data), "--index", str(tmp_path / "small")]
    for wrong in (
        ["--memory_mb", "14"],
        ["--memory_mb", "4001"],
        ["--memory_mb", "100000000"],
        ["--topk", "0"],
    ):
        with pytest.raises(SystemExit) as done:
            bm25.main(["index", *words, *wrong])
        assert done.value.code == 2 and not (tmp_path / "small").exists()
    assert bm25.main(["index", *words, "--memory_mb", "15"]) == 0


@pytest.mark.tools
@pytest.mark.parametrize("damage", ["full", "empty", "panic"])
def test_what_the_engine_raises_is_one_line(tmp_path, monkeypatch, capsys, damage):
    data = collection(tmp_path, ["清蒸鱼"])
    words = ["--data_dir", str(data), "--index", str(tmp_path / "i")]
    if damage == "full":

        def full(*_):
            raise ValueError("An IO error occurred: 'No space left on device (os error 28)'\nmore")

        monkeypatch.setattr("torch_src.retrieval.bm25._document", full)
        assert bm25.main(["index", *words]) == 2
        assert not (tmp_path / "i/tantivy").exists()
    else:
        write(data / "dev/dev.q.format", ["鱼\t-\t-\t0"])
        assert bm25.main(["index", *words]) == 0
        if damage == "empty":
            for path in (tmp_path / "i/tantivy").iterdir():
                path.unlink()
        else:
            panic = type("PanicException", (BaseException,), {})
            monkeypatch.setattr(
                "torch_src.retrieval.bm25.terms", lambda _: (_ for _ in ()).throw(panic("assertion failed"))
            )
        assert bm25.main(["search", *words]) == 2
        assert not (tmp_path / "i/res.top50").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'i'}: " in line
    monkeypatch.undo()
    (tmp_path / "i/tokens.txt.stamp.json").write_text(
        "{}"
    )  # as after a kill: the folder is still the program's
    assert bm25.main(["index", *words]) == 0


@pytest.mark.parametrize("weights", [["0", "0"], ["1"]])
def test_weights_that_leave_nothing(tmp_path, weights):
    write(tmp_path / "a", ["q\t5\t1\t3"])
    write(tmp_path / "b", ["q\t6\t1\t10"])
    runs = ["--runs", str(tmp_path / "a"), str(tmp_path / "b"), "--run", str(tmp_path / "c")]
    assert bm25.main(["fuse", *runs, "--weights", *weights]) == 2 and not (tmp_path / "c").exists()
