"""The HTML report: a hand-worked run, hostile texts, missing inputs, and the page in a browser."""

import json
import re
import runpy
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from toy_world import ROOT, write

from script import report
from script.lib.report import curves as report_curves
from script.lib.report import data as report_data
from script.lib.report import page as report_page
from script.lib.report.hparams import ReportHparams
from torch_src.data.terms import PIECES, terms
from torch_src.runtime import program

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


class Parsed(HTMLParser):
    """The JSON scripts of a page by id, and its text without scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.scripts, self.texts, self.inside = {}, [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = dict(attributes).get("id", tag) if tag in ("script", "style") else None

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
    assert report_data.outcome(hit, hit) == "" and report_data.outcome(hit, None) == ""
    assert report_data.outcome({**hit, "recall@50": 0.0}, hit) == "missed"


@pytest.mark.tools
def test_metrics_and_hit_rates_by_hand(world):
    page = Parsed(make(world))
    row = "0.5833 0.5000 0.7500 4"  # (1 + 1/3 + 0 + 1) / 4; both stages, in another order
    assert f"retriever {row} {world.output / 'res.top50'} re-ranker {row}" in page.text()
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
    assert report_page.text("<\ud800&\"'") == "&lt;?&amp;&quot;&#x27;"


@pytest.mark.tools
def test_each_passage_once_and_truncated(world):
    page = Parsed(make(world, "--characters", "3", "--depth", "1"))
    passages = page.json("passages-0")
    assert sorted(row for row, _ in passages) == [0, 1, 2, 3, 4, 5, 6]
    assert [1, "苹果价…"] in passages and [3, "价格表"] in passages
    assert "Top 1 passages of each stage, truncated to 3 characters" in page.text()


@pytest.mark.tools
def test_the_page_needs_no_network_and_is_reproducible(world):
    first = make(world)
    assert not re.search(r"https?://|@import|src=|<link", first)
    assert first.count("<svg") == first.count('role="img"') == 3  # hit rates, scores of both stages
    assert make(world) == first


@pytest.mark.tools
def test_the_retriever_alone(world, capsys):
    (world.output / "res.rerank50").unlink()
    page = Parsed(make(world))
    assert "No re-ranked run" in page.text()
    data = page.json("data")
    assert data["stages"] == ["retriever"] and data["queries"][0]["items"][0] == [0, 1, 1.0, 1]
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
    assert "dev.json contains none of these queries" in report_data.read_report(settings(world)).notes[0]
    (world.data / "dev/dev.json").unlink()
    assert "dev.json does not exist" in report_data.read_report(settings(world)).notes[0]


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
    assert "was not made from" in report_data.read_report(settings(world)).notes[0]


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
    """Write the files of a training run: an event file of the steps from `from_step` on, and a checkpoint."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder / "tensorboard", filename_suffix=f".{name}{from_step}")
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


def test_event_files_of_two_models_in_one_folder(tmp_path):
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
    assert "without cross_checkpoint.pt" in report_curves.read_curves(tmp_path, "cross")[1]
    none, why = report_curves.read_curves(tmp_path / "gone", "dual")
    assert none is None and "no event files with curves in" in why


def test_a_truncated_event_file(tmp_path):
    train(tmp_path, "dual", {1: 3.0, 2: 2.0, 3: 1.9})
    (tmp_path / "dual_checkpoint.pt").unlink()  # a lone file needs none
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "tensorboard/events.out.tfevents.0.noise").write_bytes(bytes(range(256)))
    curves, _ = report_curves.read_curves(tmp_path, "dual")
    assert curves.points["train/loss"] == pytest.approx({1: 3.0, 2: 2.0, 3: 1.9})
    assert list(curves.points["dev/MRR@10"]) == [1, 2] and curves.best_step == 0
    for name in ("dual", "cross"):
        (tmp_path / f"{name}_params.bin").touch()
    assert "without dual_checkpoint.pt" in report_curves.read_curves(tmp_path, "dual")[1]


@pytest.mark.tools
@pytest.mark.slow
def test_a_damaged_event_file_is_reported(world):
    folder = world.output
    train(folder, "dual", {step: 3.0 / step for step in range(1, 21)})
    train(folder, "cross", {1: 0.7, 2: 0.5})
    assert "Curves of the retriever: " not in make(world)
    path = next((folder / "tensorboard").glob("*.dual0"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "Curves of the retriever: train/loss lacks 10 of 20 values, ends at step 10 of 20" in make(world)
    data[10] ^= 1  # in the first record: no value is readable
    path.write_bytes(data)
    page = make(world)
    assert f"dual_checkpoint.pt; {path}: no readable values" in page
    path.unlink()
    path.mkdir()
    assert f"dual_checkpoint.pt; {path}: Is a directory" in make(world)


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
    monkeypatch.setattr(report_page, "LENGTH_SAMPLE", 3)
    assert "queries 3 of 4" in Parsed(make(world)).text()


@pytest.mark.tools
def test_no_lengths_without_valid_model_settings(world, tokenizer):
    (world.output / "dual_model").mkdir()
    record = world.output / "dual_hparams.json"
    whole = {"query_prefix": "", "passage_prefix": "", "remove_spaces": False, "q_max_seq_len": 8,
             "p_max_seq_len": 9}  # fmt: skip
    odd = [{}, {**whole, "query_prefix": None}, {**whole, "p_max_seq_len": "9"}]
    for text in ["torn", "{}", *(json.dumps({"fixed_by_weights": fixed}) for fixed in odd)]:
        record.write_text(text)
        assert f"Omitted: {record}: " in Parsed(make(world)).text()
    record.write_text(json.dumps({"fixed_by_weights": whole}))
    assert f"Omitted: {world.output / 'dual_model'}: " in Parsed(make(world)).text()  # an empty folder


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
    make(world)
    page, trouble, asked = browser.new_page(), [], []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(world.page.as_uri())
    assert page.locator("#filters button").all_inner_texts() == [
        "all (4)", "lost by re-ranking (1)", "gained by re-ranking (1)", "missed by recall (1)",
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
    detail = page.locator("#detail").inner_text()
    assert "pid absent<pid>: not in the collection's id map" in detail and "missed by recall" in detail
    assert "retriever: not in the run" in detail
    page.locator("#search").fill("")
    page.locator("#list button").nth(0).press("ArrowDown")
    assert page.evaluate("document.activeElement.innerText").startswith("香蕉")
    assert trouble == [] and asked == [world.page.as_uri()]
