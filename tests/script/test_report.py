"""The HTML report: a hand-worked run, hostile texts, missing inputs, and the page in a browser."""

import json
import re
import runpy
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from toy_world import ROOT, write

from metric.evaluation import per_query
from script import compare_runs, report
from script.lib.paired_test import Difference
from script.lib.report import curves as report_curves
from script.lib.report import data as report_data
from script.lib.report import findings, verdict
from script.lib.report import page as report_page
from script.lib.report.hparams import ReportHparams
from script.lib.report.origin import read_origin
from script.lib.report.words import Both, text
from torch_src.data.terms import PIECES, terms
from torch_src.runtime import program
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import write_json
from torch_src.runtime.stamps import stamp_path, write_stamp

HOSTILE = (
    '苹果</script><script>document.title="x"</script><!--<script>\u2028\u2029\x0b\x85 "\'\\ &amp; <b>'
    "𠮷野 {{data}}"
)
PASSAGES = [
    "梨的产地在北方", "苹果价格由市场决定，苹果的价格会变", "香蕉的 Vitamin C 含量", "价格表", "西瓜",
    HOSTILE, "葡萄酒要平放保存",
]  # fmt: skip
QUERIES = {"苹果价格𠮷野": "q1", "香蕉 vitamin C 含量": "q2", "葡萄酒怎么保存": "q3", "西瓜": "q4"}
GOLD = {"q1": ["p1"], "q2": ["p2"], "q3": ["absent<pid>", "p6"], "q4": ["p4"]}
DUAL = {"苹果价格𠮷野": [1, 5, 3], "香蕉 vitamin C 含量": [3, 4, 2], "葡萄酒怎么保存": [0, 3], "西瓜": [4, 0]}
CROSS = {
    "苹果价格𠮷野": [5, 3, 1],
    "香蕉 vitamin C 含量": [2, 3, 4],
    "葡萄酒怎么保存": [3, 0],
    "西瓜": [4, 0],
}


def run_lines(run: dict[str, list[int]]) -> list[str]:
    return [f"{query}\t{row}\t{rank}\t{1 / rank}" for query, rows in run.items()
            for rank, row in enumerate(rows, 1)]  # fmt: skip


@pytest.fixture
def world(tmp_path):
    """A data set and two runs, without models."""
    data, output = tmp_path / "data", tmp_path / "output"
    write(data / "passage-collection/part-00", [f"-\t\t{text}\t0" for text in PASSAGES])
    ids = {str(row): f"p{row}" for row in range(len(PASSAGES))}
    write(data / "passage-collection/passage2id.map.json", [json.dumps(ids)])
    write(data / "dev/dev.q.format", [f"{query}\t-\t-\t0" for query in QUERIES])
    write(data / "dev/q2qid.dev.json", [json.dumps(QUERIES, ensure_ascii=False)])
    write(data / "dev/dev.json", [
        json.dumps({"question_id": qid, "answer_paragraphs": [{"paragraph_id": pid} for pid in pids]})
        for qid, pids in GOLD.items()
    ])  # fmt: skip
    write(output / "res.top50", run_lines(DUAL))
    write(output / "res.rerank50", run_lines(CROSS))
    return SimpleNamespace(data=data, output=output, page=output / "report.html")


def settings(world, **more) -> ReportHparams:
    return ReportHparams(data_dir=str(world.data), output_dir=str(world.output), **more)


def make(world, *options: str) -> str:
    """Run the program; return the page."""
    words = ["--data_dir", str(world.data), "--output_dir", str(world.output), *options]
    assert report.main(words) == 0
    return world.page.read_text(encoding="utf-8")


def weaker_retriever(world) -> None:
    """Let the re-ranker win: only then it may judge what lacks a label."""
    write(world.output / "res.top50", run_lines(DUAL | {"西瓜": [0, 4]}))


class Parsed(HTMLParser):
    """The JSON scripts of a page by id, and its English text without scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.scripts, self.texts, self.inside = {}, [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = dict(attributes).get("id", tag) if tag in ("script", "style") else None
        if dict(attributes).get("class") == "zh":
            self.inside = "zh"

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data
        else:
            self.texts.append(data)

    def json(self, name: str):
        return json.loads(self.scripts[name])

    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_outcomes_ranks_and_items_by_hand(world):
    found = report_data.read_report(settings(world))
    entries = report_data.query_entries(found, report_data.Passages(), depth=2)
    assert [entry["kind"] for entry in entries] == ["lost", "gained", "missed", ""]
    assert [entry["first"] for entry in entries] == [[1, 3], [3, 1], [0, 0], [1, 1]]
    assert [entry["change"] for entry in entries] == [-0.6667, 0.6667, 0, 0]
    # q1: rows 1 and 5 are shown of the retriever, 5 and 3 of the re-ranker; 1 is gold
    assert entries[0]["items"] == [[0, 1, 1.0, 3, 0.33333, 1], [1, 2, 0.5, 1, 1.0, 0],
                                   [2, 3, 0.33333, 2, 0.5, 0]]  # fmt: skip
    # q2's gold passage at rank 3 is shown although depth is 2
    assert entries[1]["items"][2][1:] == [3, 0.33333, 1, 1.0, 1]
    # q3: one gold passage is in no run, the other not in the collection
    assert entries[2]["items"][-1][1:] == [0, 0, 0, 0, 1] and entries[2]["absent"] == ["absent<pid>"]


def test_a_change_below_rank_10_is_neither_lost_nor_gained():
    hit = {"recall@50": 1.0, "MRR@10": 0.0}
    assert report_data.outcome(hit, hit) == ""
    assert report_data.outcome({**hit, "recall@50": 0.0}, hit) == "missed"


def test_figures_by_length_by_hand(world):
    found = findings.find(report_data.read_report(settings(world)))
    # lengths 2, 6, 7 and 15: q4, q1, q3 and q2
    assert [(each.shortest, each.longest, each.queries) for each in found.by_query] == [
        (2, 2, 1), (6, 6, 1), (7, 7, 1), (15, 15, 1)]  # fmt: skip
    assert [each.mrr for each in found.by_query] == [
        [1, 1], [1, pytest.approx(1 / 3)], [0, 0], [pytest.approx(1 / 3), 1]]  # fmt: skip
    assert [each.found for each in found.by_query] == [1, 1, 0, 1]
    # gold passages of 2 (q4), 8 (q3: the other is not in the collection), 16 (q2) and 17 characters
    assert [each.longest for each in found.by_passage] == [len(PASSAGES[row]) for row in (4, 6, 2, 1)]
    assert [each.mrr[0] for each in found.by_passage] == [1, 0, pytest.approx(1 / 3), 1]


def test_equal_lengths_are_in_one_group():
    values = {"MRR@10": np.arange(8) / 8, "recall@50": np.ones(8)}
    found = findings.Findings([values], [None], 0, [], 0.0)
    lengths = dict(enumerate([5, 5, 5, 5, 5, 5, 9, 30]))
    groups = findings.buckets(lengths, found)
    assert [(each.shortest, each.longest, each.queries) for each in groups] == [(5, 5, 6), (9, 30, 2)]
    assert groups[0].mrr == [pytest.approx(15 / 48)] and groups[0].low < 15 / 48 < groups[0].high
    assert findings.buckets({}, found) == []


def test_passages_that_are_probably_right_by_hand(world):
    found = report_data.read_report(settings(world))
    right, mrr = findings.probably_right(found, found.stages[0])
    # gold passages in first place score 1; so do rows 3 and 0, above the gold ones; row 4 scores .5
    assert [(each.qid, each.row, each.rows) for each in right] == [("q2", 3, [3, 2]), ("q3", 0, [0, 6])]
    assert mrr == 1.0  # of 1, 1/3, 0 and 1
    for row in (1, 4):  # no gold passage in first place: no score to compare with
        found.reference = {qid: pids - {f"p{row}"} | {"none"} for qid, pids in found.reference.items()}
    assert findings.probably_right(found, found.stages[0])[0] == []


def test_the_figures_are_those_of_compare_runs(world):
    found = report_data.read_report(settings(world))
    known = findings.find(found)
    results = [found.result(stage) for stage in found.stages]
    values = [[per_query(found.reference, result)[qid]["MRR@10"] for qid in GOLD] for result in results]
    line = compare_runs.table(*({"MRR@10": np.array(each)} for each in values), seed=42)[1]
    difference = known.differences[1]
    shown = f"[{difference.low:+.4f}, {difference.high:+.4f}]   {difference.p:.4f}  1/1/2"
    assert line.endswith(shown) and known.differences[0] is None


def verdict_on(
    *differences: Difference, missed: int = 0, unlabeled: int = 0, limit: int = 64
) -> verdict.Verdict:
    """Return the verdict on a re-ranked run (and a fused one) of 200 queries."""
    values = {"MRR@10": np.ones(200), "recall@50": np.arange(200) >= missed}
    right = [findings.Unlabeled("q", f"{at}", 1, 1.0, 2) for at in range(unlabeled)]
    runs = 1 + len(differences)
    found = findings.Findings([values] * runs, [None, *differences], 1, right, 1.0)
    names = (report_data.RETRIEVER, report_data.RERANKER, report_data.FUSED)[:runs]
    stages = [report_data.Stage(name, ROOT, {}) for name in names]
    tokens = np.repeat([10, 60, 90], [150, 49, 1])
    lengths = {"queries": report_curves.Lengths(tokens, 200, limit)}
    return verdict.judge(report_data.Report(None, stages, {}, {}), found, "output", lengths)


def test_the_verdict_follows_the_test():
    better = Difference(0.5, 0.6, 0.1, 0.05, 0.15, 0.001, 50, 20, 130)
    good = verdict_on(better)
    assert good.kind == "good" and len(good.steps) == 1
    assert "raises MRR@10" in good.sentences[0].en
    figures = ["0.5000", "0.6000", "+0.1000", "+0.0500", "+0.1500", "0.0010"]
    for sentence in (good.sentences[0].en, good.sentences[0].zh):
        assert re.findall(r"[+-]?\d\.\d{4}", sentence) == figures
    worse = verdict_on(replace(better, second=0.4, mean=-0.1, low=-0.15, high=-0.05))
    assert worse.kind == "bad" and "lowers MRR@10" in worse.sentences[0].en
    assert "keep the retriever's order" in worse.steps[0].en
    same = verdict_on(replace(better, p=0.2, low=-0.02), missed=20, unlabeled=3)
    assert same.kind == "open" and "no proven difference" in same.sentences[0].en
    assert "20 of 200 queries (10 %)" in same.steps[1].en and "(3 queries)" in same.steps[2].en
    assert len(verdict_on(better, missed=10).steps) == 1  # 5 %: recall is not the limit
    cut = verdict_on(better, limit=32).steps[1].en
    assert cut.startswith("25 % of the queries are truncated at 32 tokens: --q_max_seq_len 60 ")
    fused = verdict_on(replace(better, p=0.2, low=-0.02), better)
    assert fused.kind == "open" and "Fusing raises" in fused.sentences[1].en and len(fused.sentences) == 2
    assert "Use the fused run" in fused.steps[0].en and "Train the re-ranker" in fused.steps[0].en
    assert "Keep the re-ranker" in verdict_on(better, replace(better, p=0.2)).steps[0].en
    for each in (good, worse, same, fused):
        assert all(word.zh and word.zh != word.en for word in (*each.sentences, *each.steps))


def test_other_runs_are_found_if_they_are_of_the_same_data(world):
    def names() -> list[str]:
        return [stage.name.en for stage in report_data.read_report(settings(world)).stages]

    run = world.output / "bm25/res.top50"
    write(run, run_lines(DUAL))
    assert names() == ["retriever", "re-ranker"]  # no stamp: nobody knows its collection
    collection = report_data.read_report(settings(world)).collection.checksum
    write_stamp(run, {"stage": "bm25", "collection": collection})
    assert names() == ["retriever", "re-ranker", "BM25"]
    other = world.output.parent / "hybrid/res.top50"
    write(other, run_lines(CROSS))
    write_stamp(other, {"stage": "fuse", "collection": "of another data set"})
    assert names() == ["retriever", "re-ranker", "BM25"]
    stamp_path(other).unlink()
    named = settings(world, fused_run=str(other), bm25_run="none")
    found = report_data.read_report(named)
    assert [stage.name.en for stage in found.stages] == ["retriever", "re-ranker", "fused"]
    entry = report_data.query_entries(found, report_data.Passages(), depth=2)[0]
    assert entry["first"] == [1, 3, 3] and entry["items"][0] == [0, 1, 1.0, 3, 0.33333, 3, 0.33333, 1]
    with pytest.raises(UserError, match="gone"):
        report_data.read_report(settings(world, bm25_run=str(other.with_name("gone"))))


def test_a_retriever_alone_finds_no_missing_labels(world):
    found = report_data.read_report(settings(world, cross_run="none"))
    assert findings.probably_right(found, found.stages[0])[0]  # by its scores there would be some
    assert findings.find(found).unlabeled == []


def test_the_browser_has_the_queries_with_an_error_first(world):
    found = report_data.read_report(settings(world))
    known = findings.find(found)
    queries = list(QUERIES)
    assert (
        findings.chosen_queries(found, known, 0) is None and findings.chosen_queries(found, known, 4) is None
    )
    assert findings.chosen_queries(found, known, 3) == {*queries[:3]}  # the last one has no error
    right, _ = findings.probably_right(found, found.stages[0])
    known.unlabeled = right
    assert findings.chosen_queries(found, known, 2) == {queries[1], queries[2]}  # missing labels first
    assert findings.chosen_queries(found, None, 1) == {queries[0]}
    entries = report_data.query_entries(found, report_data.Passages(), 2, {queries[1]})
    assert [entry["qid"] for entry in entries] == ["q2"]
    assert "3 of 4 queries" in report_page.shown_queries(settings(world, max_queries=3), found).en


def test_the_header_names_models_commit_and_changed_settings(world):
    found = report_data.read_report(settings(world))
    facts = dict(read_origin(settings(world), found).facts)
    assert "retriever" not in {name.en for name in facts} and len(facts) >= 2  # nothing is saved
    write_json(world.output / "dual_infer_hparams.json", {
        "dual_params": "none", "pretrained_model_path": "m3e<b>", "normalize": True, "commit": "v1-3-gabc",
        "output_dir": "elsewhere", "unknown": 1, "topk": 50, "bs": 500})  # fmt: skip
    write_json(
        world.output / "cross_hparams.json", {"pretrained_model_path": "bge", "epoch": 2, "debug": True}
    )
    origin = read_origin(settings(world), found)
    facts = {name.en: value.en for name, value in origin.facts}
    assert facts["retriever"] == "m3e<b>, not fine-tuned" and facts["commit of the runs"] == "v1-3-gabc"
    assert facts["re-ranker"] == "bge, fine-tuned (2 epochs)" and "4 queries, 7 passages" in facts["data"]
    shown = {tuple(row[:3]) for row in origin.settings}
    assert {("do_dual_infer.py", "normalize", "True"), ("do_dual_infer.py", "bs", "500")} <= shown
    assert not {"topk", "output_dir", "unknown", "commit", "debug"} & {name for _, name, _ in shown}
    (world.output / "dual_infer_hparams.json").write_text("[")
    assert "retriever" not in {name.en for name, _ in read_origin(settings(world), found).facts}


def test_the_data_are_those_of_the_run(world):
    words = ["--output_dir", str(world.output)]
    assert report.settings(words).data_dir == ReportHparams().data_dir
    saved = {"data_dir": str(world.data), "dev_q": "none", "passage_ids": "", "topk": 7}
    write_json(world.output / "dual_infer_hparams.json", saved)
    hp = report.settings(words)
    assert hp.data_dir == str(world.data) and hp.dev_q == "" and hp.output_dir == str(world.output)
    other = str(world.output.parent)
    assert report.settings([*words, "--data_dir", other]).data_dir == other
    with pytest.raises(UserError, match="--data_dir D: no such folder"):
        report.settings([*words, "--data_dir", "D"])
    elsewhere = ["--dual_run", str(world.output / "res.top50")]
    assert report.settings(elsewhere).data_dir == str(world.data)


def test_texts_in_both_languages():
    assert text(Both("a<", "甲")) == '<span class="en">a&lt;</span><span class="zh">甲</span>'
    assert text(Both("BM25", "BM25")) == "BM25" and text(7) == "7"
    assert text("<\ud800&\"'") == "&lt;?&amp;&quot;&#x27;"


@pytest.mark.tools
def test_metrics_and_hit_rates_by_hand(world):
    page = Parsed(make(world))
    row = "0.5833 0.5000 0.7500"  # (1 + 1/3 + 0 + 1) / 4; both stages, in another order
    assert f"retriever {row} 4 re-ranker {row} +0.0000 -0.5000 … +0.5000 1.0000 1 / 1 / 2 4" in page.text()
    found = report_data.read_report(settings(world))
    rates = report_data.hit_rates(report_data.first_ranks(found, found.stages[0]))
    assert rates[:3] == [0.5, 0.5, 0.75] and rates[3:] == [0.75] * 47
    positives, negatives = report_data.split_scores(found, found.stages[1])
    assert sorted(positives) == pytest.approx([1 / 3, 1, 1]) and len(negatives) == 7


@pytest.mark.tools
def test_hostile_texts_are_unchanged(world):
    html = make(world, "--characters", "1000")
    page = Parsed(html)
    assert page.json("data")["queries"][2]["absent"] == ["absent<pid>"]
    assert [5, HOSTILE] in page.json("passages-0")
    assert "\u2028" not in html and html.count("</script>") == html.count("<script")
    halves = ["\ud800</script>", "\U0002f800", "\x00\r"]
    assert json.loads(report_page.as_json(halves)) == halves
    report_page.as_json(halves).encode("utf-8")


@pytest.mark.tools
def test_each_passage_once_and_truncated(world):
    page = Parsed(make(world, "--characters", "3", "--depth", "1"))
    passages = page.json("passages-0")
    assert sorted(row for row, _ in passages) == [0, 1, 2, 3, 4, 5, 6]
    assert [1, "苹果价…"] in passages and [3, "价格表"] in passages
    assert "Top 1 passages of each stage, truncated to 3 characters" in page.text()


@pytest.mark.tools
def test_the_page_needs_no_network_and_is_reproducible(world, capsys):
    first = make(world)
    assert re.findall(r"https?://[^\s\"<]*", first) == ["http://127.0.0.1:7860/?q="]  # a link, if clicked
    assert not re.search(r"@import|src=|<link", first)
    assert first.count("<svg") == first.count('role="img"') == 3  # hit rates, scores of both stages
    assert make(world) == first
    assert "Re-ranking makes no proven difference: MRR@10 goes from 0.5833" in capsys.readouterr().out


@pytest.mark.tools
def test_the_retriever_alone(world, capsys):
    (world.output / "res.rerank50").unlink()
    page = Parsed(make(world))
    assert "No re-ranked run" in page.text()
    data = page.json("data")
    assert data["stages"] == [["retriever", "检索"]] and data["queries"][0]["items"][0] == [0, 1, 1.0, 1]
    assert [query["kind"] for query in data["queries"]] == ["", "", "missed", ""]
    assert "No re-ranked run" in capsys.readouterr().out
    assert report.main(["--data_dir", str(world.data), "--output_dir", str(world.output),
                        "--cross_run", str(world.output / "gone")]) == 2  # fmt: skip
    assert "gone: no such file or folder (the re-ranked run)" in capsys.readouterr().err


@pytest.mark.tools
def test_without_a_reference(world):
    page = Parsed(make(world, "--dev_set", "none"))
    assert "No reference (--dev_set none)" in page.text()
    assert page.json("data")["scored"] is False and "kind" not in page.json("data")["queries"][0]
    other = '{"question_id": "z", "answer_paragraphs": [{"paragraph_id": "p"}]}'
    write(world.data / "dev/dev.json", [other])
    assert "dev.json contains none of these queries" in report_data.read_report(settings(world)).notes[0].en
    (world.data / "dev/dev.json").unlink()
    assert "dev.json does not exist" in report_data.read_report(settings(world)).notes[0].en


@pytest.mark.tools
def test_reference_queries_missing_from_the_run_count_as_zero(world):
    write(world.output / "res.top50", run_lines({query: DUAL[query] for query in list(QUERIES)[:2]}))
    (world.output / "res.rerank50").unlink()
    page = Parsed(make(world))
    assert "2 queries of" in page.text() and "retriever 0.3333 0.2500 0.5000 2" in page.text()
    assert [query["qid"] for query in page.json("data")["queries"]] == ["q1", "q2"]


@pytest.mark.tools
def test_times(world):
    hp, path = settings(world), world.output / "run_all.json"
    assert "run_all.json does not exist" in report_page.times_section(hp)
    path.write_text('{"seconds": {"dual_train": 90, "convert": 30.0}}')
    shown = Parsed(report_page.times_section(hp)).text()
    assert "dual_train 1m30s 75 % convert 30.0s 25 % total 2m00s" in shown
    for odd in ('{"seconds": ["x"]}', "{}", '{"seconds": {"convert": NaN}}', '{"seconds": {"convert": -1}}',
                '{"seconds": {"convert": 1' + 400 * "0" + "}}"):  # fmt: skip
        path.write_text(odd)
        assert "Omitted: " in (left_out := Parsed(report_page.times_section(hp)).text())
        assert "run_all.json: expected the seconds of each stage" in left_out
    path.write_text('{"sec')
    assert "Omitted: " + str(world.output / "run_all.json") in Parsed(make(world)).text()


def test_a_re_ranked_run_with_other_candidates_gives_a_note(world):
    write(world.output / "res.rerank50.stamp.json", ['{"candidates": "0123456789abcdef"}'])
    assert "was not made from" in report_data.read_report(settings(world)).notes[0].en


@pytest.mark.tools
def test_user_errors_are_one_line(world, capsys, monkeypatch):
    words = ["--data_dir", str(world.data), "--output_dir", str(world.output)]
    write(world.output / "res.top50", [*run_lines(DUAL), "谁也没问\t0\t1\t1"])
    assert report.main(words) == 2 and "query '谁也没问' is not in" in capsys.readouterr().err
    write(world.output / "res.top50", run_lines({"西瓜": [4]}))
    assert report.main(words) == 2 and f"is not in {world.output / 'res.top50'}" in capsys.readouterr().err
    (world.output / "res.top50").unlink()
    assert report.main(words) == 2 and "run do_dual_infer.py first" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(words) == 2 and "matplotlib is not installed" in capsys.readouterr().err
    assert not world.page.exists()


def train(folder, name: str, losses: dict[int, float], from_step: int = 0) -> None:
    """Write the files of a training run: an event file of the steps from `from_step` on, and a checkpoint.

    `name` is the model, or old: of an earlier retriever.
    """
    import torch
    from torch.utils.tensorboard import SummaryWriter

    model = "cross" if name == "cross" else "dual"
    board = SummaryWriter(folder / "tensorboard" / model, filename_suffix=f".{name}{from_step}")
    for step, loss in losses.items():
        if step >= from_step:
            board.add_scalar("train/loss", loss, step)
            board.add_scalar("train/lr", 1e-3, step)
            board.add_scalar("dev/MRR@10", loss / 10, step)
    board.close()
    history = [{"step": step, "loss": round(loss, 5), "lr": 1e-3} for step, loss in losses.items()]
    torch.save({"progress": {"history": history, "best_step": 2}}, folder / f"{name}_checkpoint.pt")


def test_event_files_sort_by_age(tmp_path):
    names = [
        "events.out.tfevents.17.h.5.9.x",
        "events.out.tfevents.17.h.5.10.x",
        "events.out.tfevents.18.h.4.0.x",
    ]
    found = sorted((tmp_path / name for name in reversed(names)), key=report_curves.numbers_in_name)
    assert [path.name for path in found] == names


def test_event_files_of_several_runs(tmp_path):
    train(tmp_path, "old", {1: 9.0, 2: 8.0})  # an earlier run without its checkpoint
    train(tmp_path, "dual", {1: 3.0, 2: 2.0, 3: 1.9})
    train(tmp_path, "dual", {1: 3.0, 2: 2.0, 3: 1.8, 4: 1.7}, from_step=3)  # killed and resumed after step 2
    train(tmp_path, "cross", {1: 0.7, 2: 0.5})
    dual, why = report_curves.read_curves(tmp_path, "dual")
    assert why == "" and dual.best_step == 2
    assert dual.points["train/loss"] == pytest.approx({1: 3.0, 2: 2.0, 3: 1.8, 4: 1.7})
    cross, _ = report_curves.read_curves(tmp_path, "cross")
    assert cross.points["dev/MRR@10"] == pytest.approx({1: 0.07, 2: 0.05})
    (tmp_path / "cross_checkpoint.pt").write_bytes(b"torn")
    assert report_curves.read_curves(tmp_path, "cross")[0].best_step == 0  # a lone file needs none
    (tmp_path / "dual_checkpoint.pt").unlink()
    assert "without dual_checkpoint.pt" in report_curves.read_curves(tmp_path, "dual")[1]
    none, why = report_curves.read_curves(tmp_path / "gone", "dual")
    assert none is None and "no event files with curves in" in why


def test_a_truncated_event_file(tmp_path):
    train(tmp_path, "dual", {1: 3.0, 2: 2.0, 3: 1.9})
    (tmp_path / "dual_checkpoint.pt").unlink()  # a lone file needs none
    (path,) = (tmp_path / "tensorboard/dual").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "tensorboard/dual/events.out.tfevents.0.noise").write_bytes(bytes(range(256)))
    curves, _ = report_curves.read_curves(tmp_path, "dual")
    assert curves.points["train/loss"] == pytest.approx({1: 3.0, 2: 2.0, 3: 1.9})
    assert list(curves.points["dev/MRR@10"]) == [1, 2] and curves.best_step == 0


@pytest.mark.tools
@pytest.mark.slow
def test_a_damaged_event_file_is_reported(world):
    folder = world.output
    train(folder, "dual", {step: 3.0 / step for step in range(1, 21)})
    train(folder, "cross", {1: 0.7, 2: 0.5})
    assert "Curves of the retriever: " not in make(world)
    path = next((folder / "tensorboard/dual").glob("*.dual0"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "Curves of the retriever: train/loss lacks 10 of 20 values, ends at step 10 of 20" in make(world)
    data[10] ^= 1  # in the first record: no value is readable
    path.write_bytes(data)
    page = make(world)
    assert f"No curves of the retriever: {path}: no readable values" in page
    path.unlink()
    path.mkdir()
    assert f"No curves of the retriever: {path}: Is a directory" in make(world)


@pytest.mark.tools
def test_lengths_and_the_truncated_share(world, tokenizer, monkeypatch):
    tokenizer.save_pretrained(world.output / "dual_model")
    fixed = {"query_prefix": "", "passage_prefix": "苹果", "remove_spaces": False,
             "q_max_seq_len": 8, "p_max_seq_len": 9}  # fmt: skip
    write(world.output / "dual_hparams.json", [json.dumps({"fixed_by_weights": fixed})])
    found = report_data.read_report(settings(world))
    lengths, why = report_curves.measure_lengths(world.output, list(QUERIES), found.collection, 1000, 1)
    # a token a character: 6, 7 and 2 with [CLS] and [SEP] are 8, 9 and 4; the Latin one is longer than 8
    assert why == "" and lengths["queries"].truncated == 0.5 and lengths["queries"].of == 4
    assert lengths["passages"].tokens.tolist()[0] == 7 + 2 and lengths["passages"].tokens[4] == 4  # no prefix
    few, _ = report_curves.measure_lengths(world.output, list(QUERIES), found.collection, 3, 1)
    assert len(few["passages"].tokens) == 3 and few["passages"].of == 7
    (world.output / "dual_hparams.json").unlink()  # a model that was not fine-tuned
    used = {"fixed_by_weights": fixed, "pretrained_model_path": str(world.output / "dual_model")}
    write_json(world.output / "dual_infer_hparams.json", used)
    same, _ = report_curves.measure_lengths(world.output, list(QUERIES), found.collection, 1000, 1)
    assert same["queries"].truncated == 0.5
    write_json(world.output / "dual_infer_hparams.json", {**used, "pretrained_model_path": "BAAI/bge"})
    assert report_curves.measure_lengths(world.output, list(QUERIES), found.collection, 1000, 1)[0] == {}
    write_json(world.output / "dual_hparams.json", {"fixed_by_weights": fixed})
    monkeypatch.setattr(report_page, "LENGTH_SAMPLE", 3)
    assert "queries 3 of 4" in Parsed(make(world)).text()


def test_no_lengths_without_valid_model_settings(world, tokenizer):
    (world.output / "dual_model").mkdir()
    record = world.output / "dual_hparams.json"
    whole = {"query_prefix": "", "passage_prefix": "", "remove_spaces": False, "q_max_seq_len": 8,
             "p_max_seq_len": 9}  # fmt: skip
    odd = [{}, {**whole, "query_prefix": None}, {**whole, "p_max_seq_len": "9"}]
    found = report_data.read_report(settings(world))
    for content in ["torn", "{}", *(json.dumps({"fixed_by_weights": fixed}) for fixed in odd)]:
        record.write_text(content)
        assert (
            f"Omitted: {record}: "
            in Parsed(report_page.lengths_section(*report_page.lengths_of(found))).text()
        )
    record.write_text(json.dumps({"fixed_by_weights": whole}))
    empty = Parsed(report_page.lengths_section(*report_page.lengths_of(found))).text()
    assert f"Omitted: {world.output / 'dual_model'}: " in empty


def marks(text: str, query: str) -> list[str]:
    """Return the parts of a text that terms of the query cover, by torch_src/data/terms.py."""
    wanted, covered = set(terms(query)), [False] * len(text)
    for piece in PIECES.finditer(text.lower()):
        size = 2 if not piece[0][0].isascii() and len(piece[0]) > 1 else len(piece[0])
        for at in range(piece.start(), piece.end() - size + 1):
            if text.lower()[at : at + size] in wanted:
                covered[at : at + size] = [True] * size
    stretches, before = [], False
    for character, on in zip(text, covered, strict=True):
        if on:
            stretches[-1:] = [stretches[-1] + character] if before else [*stretches[-1:], character]
        before = on
    return stretches


@pytest.mark.parametrize("name", ["demo", "report", "milvus_load"])
def test_ctrl_c_gives_no_traceback_at_any_time(name, monkeypatch):
    left = []
    monkeypatch.setattr(program, "exit_with", left.append)
    runpy.run_path(str(ROOT / f"script/{name}.py"), run_name="__main__")
    assert len(left) == 1


@pytest.fixture
def browser(chromium):
    """Headless Chromium."""
    from playwright import sync_api

    arguments = ("--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--no-first-run")  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=list(arguments))
        yield opened
        opened.close()


@pytest.mark.tools
@pytest.mark.browser
@pytest.mark.slow
def test_in_a_browser(world, browser):
    weaker_retriever(world)
    make(world)
    page, trouble, asked = browser.new_page(), [], []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(world.page.as_uri())
    assert page.locator("#filters button").all_inner_texts() == [
        "all (4)", "lost by re-ranking (1)", "gained by re-ranking (2)", "missed by recall (1)",
        "probably unlabeled (2)",
    ]  # fmt: skip
    page.get_by_role("button", name="lost by re-ranking (1)").click()
    assert page.locator("#list button").count() == 1
    page.locator("#list button").click()
    cards = page.locator(".columns section")
    assert cards.nth(0).locator("strong").all_inner_texts() == [
        "rank 1, score 1", "rank 2, score 0.5", "rank 3, score 0.33333",
    ]  # fmt: skip
    first = cards.nth(0).locator(".card").nth(0)
    assert "re-ranker: rank 3, score 0.33333" in first.inner_text()
    assert "gold" in first.get_attribute("class") and first.locator(".tag").inner_text() == "gold"
    assert marks(PASSAGES[1], "苹果价格") == ["苹果价格", "苹果", "价格"]
    assert first.locator("mark").all_inner_texts() == marks(PASSAGES[1], "苹果价格")
    hostile = cards.nth(1).locator(".card p").nth(0)
    assert hostile.evaluate("p => p.textContent") == HOSTILE
    assert hostile.locator("mark").all_inner_texts() == ["苹果", "𠮷野"]
    assert page.title() == f"Report of {world.output}"
    page.get_by_role("button", name="all (4)").click()
    page.keyboard.press("/")
    page.keyboard.type("C 含")
    page.locator("#list button").press("Enter")
    gold = page.locator("#detail > .card.gold")
    assert gold.locator("mark").all_inner_texts() == marks(PASSAGES[2], "香蕉 vitamin C 含量")
    assert gold.locator("mark").all_inner_texts() == ["香蕉", "Vitamin", "C", "含量"]
    page.locator("#search").fill("q3")
    page.locator("#list button").click()
    assert page.evaluate("location.hash") == "#q3"
    detail = page.locator("#detail").inner_text()
    assert "pid absent<pid>: not in the collection's id map" in detail and "missed by recall" in detail
    assert "retriever: not in the run" in detail
    page.locator("#search").fill("")
    page.locator("#list button").nth(0).press("ArrowDown")
    assert page.evaluate("document.activeElement.innerText").startswith("香蕉")
    assert trouble == [] and asked == [world.page.as_uri()]


@pytest.mark.tools
@pytest.mark.browser
@pytest.mark.slow
def test_in_a_browser_on_a_phone_in_chinese(world, browser):
    """A link to a query, the language of the browser, the switch, and nothing wider than the screen."""
    weaker_retriever(world)
    make(world)
    screen = {"width": 390, "height": 800}
    page, trouble = browser.new_page(locale="zh-CN", viewport=screen, color_scheme="dark"), []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(f"{world.page.as_uri()}#q2")
    title, links = page.locator("#detail h3"), page.locator("#detail .links a")
    assert title.inner_text() == "香蕉 vitamin C 含量" and "正例" in page.locator("#detail").inner_text()
    assert links.all_inner_texts() == ["本问题的链接", "在搜索页提问", "↑ 列表"]
    address = "http://127.0.0.1:7860/?q=%E9%A6%99%E8%95%89%20vitamin%20C%20%E5%90%AB%E9%87%8F"
    assert links.nth(1).get_attribute("href") == address
    shown = page.locator(".columns > section:visible h4")
    assert shown.all_inner_texts() == ["重排"]  # the better one first
    page.get_by_role("button", name="检索", exact=True).click()
    assert shown.all_inner_texts() == ["检索"]
    assert page.title() == f"报告：{world.output}"
    page.get_by_role("button", name="English").click()
    assert page.title() == f"Report of {world.output}"
    assert page.locator("#search").get_attribute("placeholder") == "words in the query, or a qid"
    assert "前" not in page.locator("header").inner_text() and "下一步" not in page.inner_text("main")
    assert page.locator(".unlabeled a").all_inner_texts() == ["苹果价格𠮷野", "葡萄酒怎么保存"]
    page.locator(".unlabeled a").nth(1).click()
    assert title.inner_text() == "葡萄酒怎么保存"
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and trouble == []


def test_the_model_of_a_run_is_found_from_any_folder(tmp_path, monkeypatch):
    saved = {"pretrained_model_path": "script/sample_data/tiny_encoder"}
    write(tmp_path / "dual_infer_hparams.json", [json.dumps(saved)])
    monkeypatch.chdir(tmp_path)
    _, model = report_curves.retriever_files(tmp_path)
    assert (model / "config.json").exists()
