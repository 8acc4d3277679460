"""do_cross_train.py, do_cross_infer.py, the converters, run_all.py and fuse_curve.py on a tiny data set:
output, and errors for bad input.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_world import lines, make_model, make_world, options, write

from metric import convert_recall_res_to_json, convert_rerank_res_to_json
from script import fuse_curve, run_all
from torch_src import cross_infer, cross_train, dual_infer, dual_train
from torch_src.models.backbones import load_config
from torch_src.models.cross_encoder import build_cross_encoder
from torch_src.retrieval.reranking import PairScorer
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import write_checked_json

OFFICIAL = "auxiliary/dev.retrieval.top50.res.tsv"
QUERIES, DEPTH = 6, 50


def train(world: Path, *more: str, output: str = "output") -> int:
    short = ["--epoch", "2", "--batch_size", "16", "--lr", "1e-5", "--log_every", "2", "--max_seq_len", "96"]
    model = ["--pretrained_model_path", str(world / "model")]
    return cross_train.main([*options(world, world / output), *model, *short, *more])


def infer(world: Path, *more: str, output: str = "output") -> int:
    return cross_infer.main([*options(world, world / output), *more])


def retrieve(world: Path, *more: str) -> int:
    """Stage one with random weights: the candidates are any 50 of the 60 passages, in some order."""
    model = [
        "--dual_params",
        "none",
        "--pretrained_model_path",
        str(world / "model"),
        "--p_max_seq_len",
        "64",
    ]
    return dual_infer.main([*options(world, world / "output"), *model, *more], topk=DEPTH, bs=100)


def write_official(world: Path) -> None:
    """The candidates of the run as the official pair of files."""
    data = world / "data"
    texts = [row for part in ("part-00", "part-01") for row in lines(data / f"passage-collection/{part}")]
    qids = load(data / "dev/q2qid.dev.json")
    pids = load(data / "passage-collection/passage2id.map.json")
    rows = [row.split("\t") for row in lines(world / "output/res.top50")]
    write(data / OFFICIAL, [f"{query}\t\t{texts[int(at)].split(chr(9))[2]}\t0" for query, at, *_ in rows])
    ids = data / OFFICIAL.replace(".tsv", ".id_map.tsv")
    write(ids, [f"{qids[query]}\t{pids[at]}" for query, at, *_ in rows])


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A world in which both stages have run; tests change only copies of it."""
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world / "model", deviation=0.1)  # so that the scores of a query differ clearly
    assert retrieve(world) == 0
    write_official(world)
    assert train(world) == 0 and infer(world) == 0
    return world


@pytest.fixture
def world(trained, tmp_path) -> Path:
    """A copy of that world that a test may break."""
    shutil.copytree(trained, tmp_path / "world")
    return tmp_path / "world"


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of every result; caches and curves (which hold times) omitted."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not {"tensorboard", "cache"} & set(path.parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(capsys, status: int, *words: str) -> None:
    """Assert exit status 2 and one error line with all `words`, without a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and all(" WARNING " in line for line in lines[:-1])
    error = lines[-1]
    assert " ERROR " in error
    for word in words:
        assert word in error


def ranking(path: Path) -> dict[str, list[tuple[int, int, float]]]:
    """{query: [(row, rank, score)]} of a run."""
    found = {}
    for line in lines(path):
        query, row, rank, score = line.split("\t")
        found.setdefault(query, []).append((int(row), int(rank), float(score)))
    return found


# ---- what the programs write


def test_training_writes_the_files_in_the_readme(trained):
    output = trained / "output"
    state = torch.load(output / "cross_params.bin", weights_only=True)
    assert state["classifier.weight"].shape == (1, 32) and "bert.pooler.dense.weight" in state
    saved = load(output / "cross_hparams.json")
    assert saved["fixed_by_weights"] == {"max_seq_len": 96, "remove_spaces": False, "vocab_path": ""}
    assert saved["epoch"] == 2 and (output / "cross_model/config.json").exists()
    assert (output / "cross_checkpoint.pt").exists() and (output / "cross_params.bin.stamp.json").exists()


def test_training_continues_from_another_rerankers_weights(world, capsys):
    start = str(world / "output/cross_params.bin")
    none = ["--lr", "1e-9", "--weight_decay", "0", "--max_steps", "1", "--eval_every", "-1"]
    assert train(world, "--cross_params", start, *none, output="second") == 0
    assert "encoder and head initialized" in capsys.readouterr().out
    first, second = (
        torch.load(world / f"{name}/cross_params.bin", weights_only=True) for name in ("output", "second")
    )
    assert all(torch.allclose(value, second[name], atol=1e-6) for name, value in first.items())
    assert train(world, "--cross_params", start, *none, output="second") == 0
    assert "up to date" in capsys.readouterr().out
    torch.save({name: value + 1 for name, value in first.items()}, start)
    assert train(world, "--cross_params", start, *none, output="second") == 0
    assert "start_weights" in capsys.readouterr().out


def test_training_starts_from_the_finished_retriever_of_its_folder(world, capsys):
    none = ["--lr", "1e-9", "--weight_decay", "0", "--max_steps", "1", "--eval_every", "-1"]
    config = load(world / "model/config.json")
    write(world / "model/config.json", [json.dumps({**config, "architectures": ["BertModel"]})])
    dual = [*options(world, world / "second"), "--pretrained_model_path", str(world / "model"), *none]
    assert dual_train.main([*dual, "--batch_size", "4"]) == 0
    retriever = world / "second/dual_params.bin"
    stamp = (world / "second/dual_params.bin.stamp.json").read_bytes()
    state = torch.load(retriever, weights_only=True)
    shutil.copytree(world / "second", world / "third")
    torch.save({name: value + 1 for name, value in state.items()}, retriever)

    assert train(world, *none, output="second") == 0  # changed since it was finished
    out = capsys.readouterr().out
    assert "not used as the start: its training is not finished" in out and "initialized from" not in out
    shutil.copytree(world / "third", world / "second", dirs_exist_ok=True)
    assert train(world, *none, output="second") == 0
    assert "dual_params.bin: encoder initialized from its passage tower" in capsys.readouterr().out
    trained = torch.load(world / "second/cross_params.bin", weights_only=True)
    tower = "passage_encoder.embeddings.word_embeddings.weight"
    assert torch.allclose(trained["bert.embeddings.word_embeddings.weight"], state[tower], atol=1e-6)
    assert load(world / "second/cross_hparams.json")["dual_params"].endswith("second/dual_params.bin")
    assert train(world, *none, output="second") == 0
    assert "up to date" in capsys.readouterr().out
    assert train(world, *none, "--dual_params", "none", output="second") == 0
    assert "start_weights" in capsys.readouterr().out

    vocab = lines(world / "model/vocab.txt")
    write(world / "vocab.txt", [*vocab[:-2], vocab[-1], vocab[-2]])
    swapped = ["--dual_params", str(retriever), "--vocab_path", str(world / "vocab.txt")]
    refused(capsys, train(world, *none, *swapped, output="fourth"), "dual_params.bin", "another vocabulary")

    other = {**json.loads(stamp), "start": "another"}
    write(world / "third/dual_params.bin.stamp.json", [json.dumps(other)])
    assert train(world, *none, output="third") == 0
    out = capsys.readouterr().out
    assert "trained from another model" in out and "initialized from" not in out


def test_another_model_than_the_start_is_refused(world, capsys):
    start = ["--cross_params", str(world / "output/cross_params.bin")]
    refused(capsys, train(world, *start), "one of the inputs")  # its own output
    refused(capsys, train(world, *start, "--dual_params", start[1], output="second"), "name one model")
    config = load(world / "model/config.json")
    write(world / "model/config.json", [json.dumps({**config, "hidden_act": "relu"})])
    refused(capsys, train(world, *start, output="second"), "another configuration")
    vocab = lines(world / "model/vocab.txt")
    write(world / "vocab.txt", [*vocab[:-2], vocab[-1], vocab[-2]])
    status = train(world, *start, "--vocab_path", str(world / "vocab.txt"), output="second")
    refused(capsys, status, "another tokenizer")
    (world / "output/cross_hparams.json").unlink()
    refused(capsys, train(world, *start, output="second"), "cross_hparams.json")


def test_a_plan_needs_no_start_that_is_not_trained_yet(world, capsys):
    for knob in ("--dual_params", "--cross_params"):
        start = [knob, str(world / "later/params.bin")]
        assert train(world, *start, "--plan", "--eval_every", "-1", output="second") == 0
        assert "plan of do_cross_train.py" in capsys.readouterr().out
        refused(capsys, train(world, *start, output="second"), "params.bin: no such file")


def test_a_learning_rate_of_a_head_that_is_trained_already_is_logged(world, capsys):
    short = ["--max_steps", "1", "--eval_every", "-1", "--head_lr", "1e-3"]
    assert train(world, *short, output="second") == 0
    assert "--head_lr 0.001: has no effect" in capsys.readouterr().out


def test_inference_writes_all_its_files(trained):
    names = {
        "res.rerank50",
        "cross_res.json",
        "cross_scores.txt",
        "cross_id_map.tsv",
        "cross_infer_hparams.json",
    }
    assert names <= {path.name for path in (trained / "output").iterdir()}
    assert not list(trained.rglob("*.tmp"))


def test_the_run_has_four_columns_and_every_query(trained):
    before, after = ranking(trained / "output/res.top50"), ranking(trained / "output/res.rerank50")
    assert list(after) == list(before) and len(after) == QUERIES
    for query, found in after.items():
        assert [rank for _, rank, _ in found] == list(range(1, DEPTH + 1))
        scores = [score for _, _, score in found]
        assert (
            scores == sorted(scores, reverse=True) and len(set(scores)) > DEPTH / 2 and np.std(scores) > 0.003
        )
        assert {row for row, _, _ in found} == {row for row, _, _ in before[query]}


def test_cross_res_is_in_score_order(trained):
    """Sorted again from the score file and the retriever's run, line by line."""
    output, data = trained / "output", trained / "data"
    scores = [float(line) for line in lines(output / "cross_scores.txt")]
    qids, pids = load(data / "dev/q2qid.dev.json"), load(data / "passage-collection/passage2id.map.json")
    found = {}
    for line, score in zip(lines(output / "res.top50"), scores, strict=True):
        query, row, rank, _ = line.split("\t")
        found.setdefault(qids[query], []).append((-score, int(rank), pids[row]))
    assert load(output / "cross_res.json") == {
        qid: [pid for *_, pid in sorted(rows)] for qid, rows in found.items()
    }


def test_the_official_converter_gives_the_same_list(trained, tmp_path):
    output = trained / "output"
    files = [
        str(output / "cross_scores.txt"),
        str(output / "cross_id_map.tsv"),
        str(tmp_path / "converted.json"),
    ]
    assert convert_rerank_res_to_json.main(files) == 0
    assert load(tmp_path / "converted.json") == load(output / "cross_res.json")


def test_the_recall_converter_gives_the_same_list(world):
    output, data = world / "output", world / "data"
    before = load(output / "cross_res.json")
    (output / "cross_res.json").unlink()
    maps = [str(data / "dev/q2qid.dev.json"), str(data / "passage-collection/passage2id.map.json")]
    assert convert_recall_res_to_json.main([*maps, str(output / "res.rerank50"), "50"]) == 0
    assert load(output / "cross_res.json") == before and not (output / "dual_res.json").exists()


@pytest.mark.slow
def test_the_official_candidates_give_the_same_ranking(world):
    files = ["--retrieval_result", str(world / "data" / OFFICIAL)]
    files += ["--cross_params", str(world / "output/cross_params.bin")]
    assert infer(world, *files, output="o") == 0
    one, other = ranking(world / "output/res.rerank50"), ranking(world / "o/res.rerank50")
    assert {query: [row for row, *_ in found] for query, found in one.items()} == {
        query: [row for row, *_ in found] for query, found in other.items()
    }
    assert np.allclose([s for f in one.values() for *_, s in f], [s for f in other.values() for *_, s in f])
    assert load(world / "o/cross_res.json") == load(world / "output/cross_res.json")
    assert lines(world / "o/cross_id_map.tsv") == lines(
        world / "data" / OFFICIAL.replace(".tsv", ".id_map.tsv")
    )


@pytest.mark.slow
def test_training_and_inference_print_the_same_dev_metrics(trained, capsys):
    """Training evaluates on the run that inference re-ranks, so both print the same, fused as well."""
    assert train(trained, "--force", output="again") == 0
    log = capsys.readouterr().out
    kept = re.search(r"in the retriever's order ([\d.]+), re-ranked ([\d.]+)", log).groups()
    fused = re.search(r"--fuse_retriever_weight (0.5 gives .*)", log)[1]
    assert f"dev re-ranking: {QUERIES} queries, {QUERIES * DEPTH} pairs" in log
    params = trained / "again/cross_params.bin"
    run = ["--retrieval_result", str(trained / "output/res.top50"), "--cross_params", str(params)]
    assert infer(trained, *run, output="again") == 0
    log = capsys.readouterr().out
    assert re.search(r"in the retriever.s order ([\d.]+), re-ranked ([\d.]+)", log).groups() == kept
    assert re.search(r"--fuse_retriever_weight (0.5 gives .*)", log)[1] == fused
    assert params.read_bytes() == (trained / "output/cross_params.bin").read_bytes()  # same seed, same bytes


@pytest.mark.slow
def test_inference_warns_of_training_negatives_that_are_too_easy(world, capsys):
    """The scores of some training negatives are saved with the weights; here they are lowered."""
    path = world / "output/cross_negatives.json"
    assert len(load(path)["scores"]) > 10
    assert infer(world, "--force") == 0
    assert "are easier than the candidates" not in capsys.readouterr().err
    lower = {"weights": load(path)["weights"], "scores": [-50.0] * 100}
    path.write_text(json.dumps(lower))  # no checksum: ignored as damaged
    assert infer(world, "--force") == 0
    assert "are easier than the candidates" not in capsys.readouterr().err
    write_checked_json(path, lower)
    assert infer(world, "--force") == 0
    assert "are easier than the candidates" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_or_damaged_scores_of_training_negatives_are_rewritten(world, capsys):
    path = world / "output/cross_negatives.json"
    assert train(world) == 0
    before = path.read_bytes()
    changed = before.replace(b"scores", b"Scores")
    for damage in (path.unlink, lambda: path.write_bytes(before[:-9]), lambda: path.write_bytes(changed)):
        damage()
        assert train(world) == 0
        assert "cross_negatives.json: missing or damaged" in capsys.readouterr().out
        assert path.read_bytes() == before


@pytest.mark.slow
def test_missing_or_damaged_settings_are_rewritten(world, capsys):
    record, config = world / "output/cross_hparams.json", world / "output/cross_model/config.json"
    record.unlink()
    assert train(world) == 0  # the record names the output folder, and this is a copy of it
    before = content(world / "output")
    capsys.readouterr()
    for damage in (
        record.unlink,
        lambda: record.write_text("{"),
        config.unlink,
        lambda: config.write_text("{}"),
    ):
        damage()
        assert infer(world) == 2
        assert train(world) == 0
        assert "missing or damaged" in capsys.readouterr().out
        assert content(world / "output") == before
        assert infer(world) == 0


@pytest.mark.slow
def test_topk_shortens_the_result_but_not_the_scores(world):
    assert infer(world, "--topk", "7") == 0
    few, many = ranking(world / "output/res.rerank7"), ranking(world / "output/res.rerank50")
    assert few == {query: found[:7] for query, found in many.items()}
    assert len(lines(world / "output/cross_scores.txt")) == QUERIES * DEPTH


@pytest.mark.parametrize("official", [False, True])
def test_depth_limits_what_is_scored(world, official):
    """The first three candidates, in the order that they have among all."""
    files = ["--retrieval_result", str(world / "data" / OFFICIAL)] if official else []
    every = ranking(world / "output/res.rerank50")
    assert infer(world, "--depth", "3", *files) == 0
    first = {q: {row for row, *_ in found[:3]} for q, found in ranking(world / "output/res.top50").items()}
    cut = {q: [row for row, *_ in found if row in first[q]] for q, found in every.items()}
    found = ranking(world / "output/res.rerank50")
    assert {q: [row for row, *_ in rows] for q, rows in found.items()} == cut
    assert len(lines(world / "output/cross_scores.txt")) == QUERIES * 3


@pytest.mark.slow
def test_fusion_with_a_large_weight_has_the_retrievers_order(world):
    path = world / "output/res.top50"
    write(path, [f"{line.rsplit(chr(9), 1)[0]}\t{-int(line.split(chr(9))[2])}" for line in lines(path)])
    assert infer(world, "--fuse_retriever_weight", "100000") == 0
    before, after = ranking(world / "output/res.top50"), ranking(world / "output/res.rerank50")
    assert {q: [row for row, *_ in f] for q, f in after.items()} == {
        q: [row for row, *_ in f] for q, f in before.items()
    }


@pytest.mark.parametrize("weight", ["0.5", "2"])
def test_the_printed_gain_of_a_weight_is_that_of_a_run_with_it(world, capsys, weight):
    assert infer(world, "--force") == 0
    printed = re.search(rf"{weight} gives ([\d.]+)", capsys.readouterr().out)[1]
    assert infer(world, "--fuse_retriever_weight", weight) == 0
    assert re.search(r"re-ranked ([\d.]+)", capsys.readouterr().out)[1] == printed


@pytest.mark.slow
def test_a_query_without_candidates_is_kept_with_an_empty_list(world, capsys):
    path = world / "output/res.top50"
    lost = lines(path)[0].split("\t")[0]
    write(path, [line for line in lines(path) if not line.startswith(f"{lost}\t")])
    before = load(world / "output/cross_res.json")
    capsys.readouterr()
    assert infer(world) == 0
    log = capsys.readouterr().err
    assert "WARNING 1 queries of " in log and "have no candidates" in log
    qid = load(world / "data/dev/q2qid.dev.json")[lost]
    found = load(world / "output/cross_res.json")
    assert found[qid] == [] and len(found) == QUERIES
    assert all(sorted(found[other]) == sorted(before[other]) for other in found if other != qid)


@pytest.mark.slow
def test_competition_queries_through_both_stages(world):
    """test1.json: two qids have the same question, and both get its list."""
    queries = [line.split("\t")[0] for line in lines(world / "data/dev/dev.q.format")]
    entries = [
        {"question_id": f"t{at}", "question": query} for at, query in enumerate([*queries, queries[2]])
    ]
    test1 = world / "data/test1.json"
    write(test1, [json.dumps(entry, ensure_ascii=False) for entry in entries])
    asked = ["--dev_q", str(test1), "--output_dir", str(world / "test")]
    assert retrieve(world, *asked) == 0
    assert len(lines(world / "test/res.top50")) == QUERIES * DEPTH
    assert infer(world, *asked, "--cross_params", str(world / "output/cross_params.bin")) == 0
    found = load(world / "test/cross_res.json")
    assert sorted(found) == [f"t{at}" for at in range(7)] and found["t6"] == found["t2"] != found["t1"]
    assert all(len(set(pids)) == DEPTH for pids in found.values())


@pytest.mark.slow
def test_few_negatives_are_logged_once(world, capsys):
    """Of 24 queries with a positive each, four keep two negatives, the others one more than they need."""
    path, rows, kept = world / "data/train/cross.train.tsv", {}, []
    for line in lines(path):
        rows.setdefault(line.split("\t")[0], []).append(line)
    for at, found in enumerate(rows.values()):
        positives = [line for line in found if line.endswith("\t1")][:1]
        kept += positives + [line for line in found if line.endswith("\t0")][: 2 if at < 4 else 4]
    write(path, kept)
    more = ["--loss", "listwise", "--group_size", "4", "--groups_per_step", "4", "--eval_every", "-1"]
    assert train(world, *more, output="list") == 0
    log = capsys.readouterr().out
    assert log.count("4 of 24 positives have fewer than 3 negatives") == 1
    assert "12/12" in log  # 24 groups, 4 a step, 2 epochs


@pytest.mark.slow
def test_enough_negatives_are_not_logged(world, capsys):
    more = ["--loss", "listwise", "--group_size", "3", "--groups_per_step", "4", "--max_steps", "1"]
    assert train(world, *more, "--eval_every", "-1", output="list") == 0
    assert "fewer than" not in capsys.readouterr().out


@pytest.mark.slow
def test_fgm_changes_the_weights_and_zero_does_not(world):
    for name, epsilon in (("off", "0"), ("on", "0.5"), ("none", None)):
        more = ["--fgm_epsilon", epsilon] if epsilon else []
        assert train(world, "--max_steps", "3", "--eval_every", "-1", *more, output=name) == 0
    weights = {name: (world / name / "cross_params.bin").read_bytes() for name in ("off", "on", "none")}
    assert weights["off"] == weights["none"] != weights["on"]


@pytest.mark.slow
def test_a_changed_epsilon_is_detected(world, capsys):
    assert train(world, "--fgm_epsilon", "0.01", "--max_steps", "1", "--eval_every", "-1") == 0
    assert "fgm_epsilon: 0.0 -> 0.01" in capsys.readouterr().out


# ---- resuming


def test_the_same_command_again_is_up_to_date(world, capsys):
    before = content(world / "output")
    assert train(world) == 0 and infer(world) == 0
    assert capsys.readouterr().out.count(": up to date") == 2
    assert content(world / "output") == before


@pytest.mark.slow
def test_cross_res_is_of_the_latest_topk(world):
    """cross_res.json has the latest of two results, even if that one is up to date."""
    before = load(world / "output/cross_res.json")
    assert infer(world, "--topk", "7") == 0
    assert {len(pids) for pids in load(world / "output/cross_res.json").values()} == {7}
    assert infer(world) == 0
    assert load(world / "output/cross_res.json") == before


@pytest.mark.slow
def test_a_missing_result_is_rewritten(world):
    before = content(world / "output")
    (world / "output/cross_res.json").unlink()
    assert infer(world) == 0
    assert content(world / "output")["cross_res.json"] == before["cross_res.json"]


def test_a_killed_scoring_resumes_after_its_finished_blocks(world, monkeypatch):
    files = ["--retrieval_result", str(world / "output/res.top50")]
    files += ["--cross_params", str(world / "output/cross_params.bin"), "--block_pairs", "70"]
    assert infer(world, *files, output="new") == 0
    folder, result = world / "new/cross_scores", world / "new/res.rerank50"
    blocks = sorted(folder.glob("block-*.npy"))
    assert [len(np.load(block)) for block in blocks] == [70, 70, 70, 70, 20]
    before, times = content(world / "new"), [block.stat().st_mtime_ns for block in blocks]
    for path in (blocks[1], result, world / "new/res.rerank50.stamp.json"):
        path.unlink()
    scored = []
    usual = PairScorer.score
    monkeypatch.setattr(
        PairScorer,
        "score",
        lambda self, pairs, *done: scored.append(len(pairs)) or usual(self, pairs, *done),
    )
    assert infer(world, *files, output="new") == 0
    assert sum(scored) == 70  # only the missing block
    now = [block.stat().st_mtime_ns for block in blocks]
    assert [one == other for one, other in zip(now, times, strict=True)] == [True, False, True, True, True]
    assert content(world / "new") == before


def test_blocks_do_not_change_the_scores(world):
    """Other blocks and batches round differently, by too little to change the ranking."""
    one = ranking(world / "output/res.rerank50")
    files = ["--retrieval_result", str(world / "output/res.top50")]
    files += ["--cross_params", str(world / "output/cross_params.bin")]
    assert infer(world, *files, "--block_pairs", "33", "--batch_size", "5", output="new") == 0
    assert len(list((world / "new/cross_scores").glob("block-*.npy"))) == 10
    other = ranking(world / "new/res.rerank50")
    for query, found in one.items():
        scores = {row: score for row, _, score in found}
        again = {row: score for row, _, score in other[query]}
        assert scores.keys() == again.keys()
        assert max(abs(scores[row] - again[row]) for row in scores) < 1e-5


@pytest.mark.slow
def test_replaced_weights_are_detected(world, capsys):
    old = (world / "output/cross_scores.txt").read_bytes()
    assert train(world, "--seed", "7", "--max_steps", "2", "--eval_every", "-1") == 0
    assert "seed: 42 -> 7" in capsys.readouterr().out
    assert infer(world) == 0
    log = capsys.readouterr().out
    assert "res.rerank50: out of date (weights: " in log and "of another run (weights: " in log
    assert (world / "output/cross_scores.txt").read_bytes() != old


@pytest.mark.slow
def test_replaced_candidates_are_detected(world, capsys):
    path = world / "output/res.top50"
    write(path, [line for line in lines(path) if int(line.split("\t")[2]) <= 20])
    assert infer(world) == 0
    assert "(candidates: " in capsys.readouterr().out
    assert len(lines(world / "output/res.rerank50")) == QUERIES * 20


@pytest.mark.slow
def test_a_replaced_official_id_map_is_detected(world, capsys):
    """Two passages swap their pids but keep their texts: the result must change."""
    files = ["--retrieval_result", str(world / "data" / OFFICIAL)]
    assert infer(world, *files) == 0
    before = load(world / "output/cross_res.json")
    path = world / "data" / OFFICIAL.replace(".tsv", ".id_map.tsv")
    write(path, [lines(path)[1], lines(path)[0], *lines(path)[2:]])
    assert infer(world, *files) == 0
    assert load(world / "output/cross_res.json") != before


# ---- bad input: an error of one line, exit status 2, nothing overwritten


def untouched(capsys, world: Path, run, *words: str) -> None:
    """Assert that `run()` is refused and changes no byte of the results."""
    before = content(world / "output")
    capsys.readouterr()
    refused(capsys, run(), *words)
    assert content(world / "output") == before


@pytest.mark.slow
def test_weights_of_another_backbone(world, capsys):
    make_model(world / "wide", hidden=48)
    wide = build_cross_encoder(load_config(str(world / "wide")))
    torch.save(wide.model.state_dict(), world / "output/cross_params.bin")
    untouched(capsys, world, lambda: infer(world), "cross_params.bin: weights of another model")


def test_weights_of_another_backbone_by_option(world, capsys):
    make_model(world / "wide", hidden=48)
    wide = ["--pretrained_model_path", str(world / "wide"), "--force"]
    untouched(capsys, world, lambda: infer(world, *wide), "not the configuration that")


@pytest.mark.slow
def test_truncated_weights(world, capsys):
    path = world / "output/cross_params.bin"
    path.write_bytes(path.read_bytes()[:1000])
    untouched(capsys, world, lambda: infer(world), "cross_params.bin: damaged")


def test_no_run_and_no_weights(world, capsys):
    (world / "output/res.top50").unlink()
    untouched(capsys, world, lambda: infer(world), "res.top50: no such file", "run do_dual_infer.py first")
    more = ["--retrieval_result", str(world / "data" / OFFICIAL)]
    (world / "output/cross_params.bin").unlink()
    untouched(
        capsys, world, lambda: infer(world, *more), "cross_params.bin: no such file", "do_cross_train.py"
    )


def test_an_option_that_contradicts_the_weights(world, capsys):
    longer = ["--max_seq_len", "128"]
    untouched(capsys, world, lambda: infer(world, *longer), "--max_seq_len 128", "was trained with 96")
    assert infer(world, "--max_seq_len", "96") == 0


def test_groups_of_one(world, capsys):
    alone = ["--loss", "listwise", "--group_size", "1"]
    untouched(capsys, world, lambda: train(world, *alone), "--group_size 1: must be at least 2")


@pytest.mark.parametrize("label", ["0", "1"])
def test_all_labels_equal(world, capsys, label):
    path = world / "data/train/cross.train.tsv"
    write(path, [f"{line[:-1]}{label}" for line in lines(path)])
    untouched(capsys, world, lambda: train(world), f"cross.train.tsv: every label is {label}")


def test_a_malformed_training_line(world, capsys):
    path = world / "data/train/cross.train.tsv"
    write(path, [*lines(path)[:5], "问\t\t文\tyes", *lines(path)[5:]])
    untouched(capsys, world, lambda: train(world), f"{path}:6: ")


def test_more_tokens_than_the_model_has_positions(world, capsys):
    untouched(
        capsys, world, lambda: train(world, "--max_seq_len", "600"), "--max_seq_len 600", "512 positions"
    )


def test_a_candidate_outside_the_collection(world, capsys):
    path = world / "output/res.top50"
    query, _, rank, score = lines(path)[3].split("\t")
    write(path, [*lines(path)[:3], f"{query}\t60\t{rank}\t{score}", *lines(path)[4:]])
    untouched(
        capsys, world, lambda: infer(world), f"{path}:4: row 60 is outside the collection of 60 passages"
    )


def test_a_candidate_of_an_unknown_query(world, capsys):
    path = world / "output/res.top50"
    write(path, [*lines(path), "不在其中的问题\t0\t1\t1"])
    untouched(capsys, world, lambda: infer(world), "1 of its queries are not in", "不在其中的问题")


@pytest.mark.slow
def test_an_official_id_map_of_another_length(world, capsys):
    path = world / "data" / OFFICIAL.replace(".tsv", ".id_map.tsv")
    write(path, lines(path)[:-1])
    run = ["--retrieval_result", str(world / "data" / OFFICIAL)]
    untouched(capsys, world, lambda: infer(world, *run), f"{path}:300: the file ends here")
    untouched(capsys, world, lambda: train(world, "--seed", "7"), f"{path}:300: the file ends here")


def short_map(world: Path) -> Path:
    """Delete the last passage from the map row -> pid."""
    path = world / "data/passage-collection/passage2id.map.json"
    ids = load(path)
    write(path, [json.dumps({row: pid for row, pid in ids.items() if row != "59"})])
    return path


def test_a_pid_map_shorter_than_the_collection(world, capsys):
    path = short_map(world)
    untouched(capsys, world, lambda: infer(world), f"{path}: 59 ids, but the collection has 60 passages")


def test_a_bad_pid_map_is_found_before_the_pairs_are_scored(world, capsys):
    path = short_map(world)
    files = ["--retrieval_result", str(world / "output/res.top50")]
    status = infer(world, *files, "--cross_params", str(world / "output/cross_params.bin"), output="new")
    refused(capsys, status, f"{path}: 59 ids, but the collection has 60 passages")
    assert not list((world / "new").glob("cross_scores*"))


@pytest.mark.slow
def test_training_with_dev_candidates_and_a_bad_pid_map(world, capsys):
    path = short_map(world)
    capsys.readouterr()
    status = train(world, "--dev_candidates", str(world / "output/res.top50"), output="new")
    refused(capsys, status, f"{path}: 59 ids, but the collection has 60 passages")


@pytest.mark.slow
def test_an_unknown_option(world):
    with pytest.raises(SystemExit) as stopped:
        infer(world, "--top_k", "3")
    assert stopped.value.code == 2


# ---- run_all.py


def test_options_are_split_by_program():
    asked = [
        "--data_dir",
        "D",
        "--dual_train.epoch",
        "3",
        "--debug",
        "--cross_infer.topk",
        "9",
        "--loss",
        "listwise",
    ]
    assert run_all.split_options(asked) == {
        "dual_train": ["--data_dir", "D", "--epoch", "3", "--debug"],
        "dual_infer": ["--data_dir", "D", "--debug"],
        "cross_train": ["--data_dir", "D", "--debug", "--loss", "listwise"],
        "cross_infer": ["--data_dir", "D", "--debug", "--topk", "9"],
    }
    assert run_all.split_options([]) == dict.fromkeys(run_all.PROGRAMS, [])


def test_negative_values_and_flags_belong_to_their_knob():
    found = run_all.split_options(["--eval_every", "-1", "--no_normalize", "--force"])
    assert found["cross_train"] == ["--eval_every", "-1", "--force"]
    assert found["dual_infer"] == ["--no_normalize", "--force"]


@pytest.mark.parametrize(
    "word", ["--epochs", "--cross_infer.epoch", "--nostage.epoch", "epoch", "--no_such_knob"]
)
def test_an_unknown_knob_is_refused(word):
    with pytest.raises(UserError, match=f"{word}: no program"):
        run_all.split_options(["--debug", word, "3"] if word.startswith("--") else [word, "3"])


def test_has_knob():
    train, infer, dual = (run_all.PROGRAMS[name] for name in ("cross_train", "cross_infer", "dual_train"))
    assert run_all.has_knob(train, "fgm_epsilon") and run_all.has_knob(train, "no_force")
    assert not run_all.has_knob(infer, "fgm_epsilon") and not run_all.has_knob(dual, "topk")


def test_run_all_refuses_bad_options_before_the_first_stage(capsys):
    refused(capsys, run_all.main(["--from", "cross"]), "--from cross: expected one of check, dual_train")
    refused(capsys, run_all.main(["--debug", "--epochs", "3"]), "--epochs: no program")
    for kind in ("dual", "cross"):
        start = ["--debug", f"--{kind}_params", "none"]
        refused(capsys, run_all.main(start), f"--cross_train.{kind}_params")
        run_all.check_starts(start, f"{kind}_infer")


# ---- fuse_curve.py, by hand: 甲 is right once the weight is 0.5 or more, 乙 as long as it is below 1.5


@pytest.fixture
def curve_files(tmp_path) -> list[str]:
    """Relevant are 甲's first and 乙's second candidate; the retriever's scores scale to 1 and -1."""
    write(tmp_path / "run", ["甲\t0\t1\t2", "甲\t1\t2\t0", "乙\t2\t1\t70", "乙\t3\t2\t50"])
    write(tmp_path / "scores", ["0", "1", "0", "3"])
    write(tmp_path / "ids", ["q1\tp0", "q1\tp1", "q2\tp2", "q2\tp3"])
    reference = [
        {"question_id": q, "answer_paragraphs": [{"paragraph_id": p}]}
        for q, p in (("q1", "p0"), ("q2", "p3"))
    ]
    write(tmp_path / "dev.json", [json.dumps(entry) for entry in reference])
    names = {"run": "run", "scores": "scores", "id_map": "ids", "reference": "dev.json"}
    return [word for name, file in names.items() for word in (f"--{name}", str(tmp_path / file))]


def test_fuse_curve_by_hand(curve_files, capsys):
    assert fuse_curve.main(curve_files) == 0
    printed = capsys.readouterr().out
    points = {
        float(w): float(value) for w, value in re.findall(r"^ +([\d.]+)  ([\d.]+)", printed, re.MULTILINE)
    }
    expected = {w: 1.0 if 0.5 <= w < 1.5 else 0.75 for w in fuse_curve.WEIGHTS}
    assert points == expected and 0.0 in points and 1.0 in points
    assert "use: do_cross_infer.py --fuse_retriever_weight 0.5\n" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.endswith("best")] == ["0.50"]


def test_fuse_curve_of_the_programs_own_files(trained, capsys):
    """MRR@10 at weight 0 is what inference printed; the files are aligned line by line."""
    output = trained / "output"
    files = ["--run", "res.top50", "--scores", "cross_scores.txt", "--id_map", "cross_id_map.tsv"]
    files = [word if word.startswith("--") else str(output / word) for word in files]
    dev = str(trained / "data/dev/dev.json")
    assert fuse_curve.main([*files, "--reference", dev]) == 0
    first = capsys.readouterr().out.splitlines()[1].split()[1]
    metrics = run_all.compute_metrics(run_all.load_reference(dev), load(output / "cross_res.json"))
    assert first == f"{metrics['MRR@10']:.4f}"


def test_fuse_curve_of_the_first_candidates(world, capsys):
    """With --depth the scores are those of the first candidates of each query."""
    output = world / "output"
    assert infer(world, "--depth", "3") == 0
    metrics = re.search(r"re-ranked ([\d.]+)", capsys.readouterr().out)[1]
    files = [f"--run={output}/res.top50", f"--scores={output}/cross_scores.txt"]
    files += [f"--id_map={output}/cross_id_map.tsv", f"--reference={world}/data/dev/dev.json"]
    assert fuse_curve.main(files) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1] == metrics


def test_fuse_curve_refuses_files_that_are_not_aligned(curve_files, tmp_path, capsys):
    write(tmp_path / "scores", ["0", "1", "0"])
    refused(capsys, fuse_curve.main(curve_files), f"4 lines in {tmp_path / 'run'}, 3 in")
    write(tmp_path / "scores", ["0", "1", "x", "3"])
    refused(capsys, fuse_curve.main(curve_files), f"{tmp_path / 'scores'}:3: ")


@pytest.mark.slow
def test_truncated_pairs_are_reported(trained_copy, capsys):
    world = trained_copy
    assert (
        infer(
            world,
            "--cross_params",
            "none",
            "--pretrained_model_path",
            str(world / "model"),
            "--max_seq_len",
            "12",
        )
        == 0
    )
    warned = capsys.readouterr().err
    assert "pairs: 100.0% truncated (max_seq_len 12" in warned
