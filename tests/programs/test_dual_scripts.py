"""do_dual_train.py, do_dual_infer.py and the converters on a tiny data set: output, and bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_world import lines, make_model, make_world, options, train_options, write

from metric import evaluation
from torch_src import dual_infer, dual_train


@pytest.fixture
def world(trained_copy) -> Path:
    return trained_copy


def infer(world: Path, *more: str) -> int:
    return dual_infer.main([*options(world, world / "output"), *more], topk=10, bs=4)


def train(world: Path, *more: str) -> int:
    return dual_train.main([*train_options(world, world / "output"), *more])


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of every result; caches and curves (which hold times) omitted."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not {"tensorboard", "cache"} & set(path.parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(capsys, world: Path, status: int, *words: str) -> None:
    """Assert exit status 2 and one error line with all `words`, without a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and all(" WARNING " in line for line in lines[:-1])
    error = lines[-1]
    assert " ERROR " in error
    for word in words:
        assert word in error


def test_the_run_does_not_depend_on_the_queries_at_once(world, capsys):
    run = world / "output/res.top10"
    expected = run.read_bytes()
    for bs in ("1", "1000"):
        run.unlink()
        assert infer(world, "--bs", bs) == 0
        assert run.read_bytes() == expected
    assert capsys.readouterr().out.count("vectors up to date") == 2  # only searched


def test_passages_are_encoded_without_queries(world, capsys):
    """With `--dev_q none` the vectors are those of a search, and no run is written."""
    expected = content(world / "output/para_emb")
    shutil.rmtree(world / "output/para_emb")
    run = (world / "output/res.top10").read_bytes()
    shutil.rmtree(world / "data/dev")
    assert infer(world, "--dev_q", "none") == 0
    assert content(world / "output/para_emb") == expected and (world / "output/res.top10").read_bytes() == run
    assert infer(world, "--dev_q", "none") == 0
    assert "vectors up to date" in capsys.readouterr().out
    refused(capsys, world, infer(world, "--dev_q", "none", "--index", "Flat"), "--dev_q none")


@pytest.mark.slow
def test_scripts_run_as_in_the_readme(tmp_path, programs):
    """The four commands as processes of their own, from the repository root."""
    world = make_world(tmp_path, passages=40)

    def run(program: str, *words: str) -> str:
        done = programs.run(program, list(words), tmp_path / "log")
        assert done.returncode == 0, done.output()
        return done.output()

    output, data = world / "output", world / "data"
    run("do_dual_train.py", *train_options(world, output))
    log = run("do_dual_infer.py", *options(world, output))
    assert "fewer than topk 50: all of them are kept" in log
    collection = data / "passage-collection"
    maps = [str(data / "dev/q2qid.dev.json"), str(collection / "passage2id.map.json")]
    run("metric/convert_recall_res_to_json.py", *maps, str(output / "res.top50"), "50")
    printed = run("metric/evaluation.py", str(data / "dev/dev.json"), str(output / "dual_res.json"))
    assert json.loads(printed).keys() == {"MRR@10", "QueriesRanked", "recall@1", "recall@50"}


@pytest.mark.slow
def test_truncated_texts_are_reported_by_training_and_inference(world, capsys):
    shorter = ["--q_max_seq_len", "3", "--p_max_seq_len", "40", "--max_steps", "1", "--eval_every", "-1"]
    assert train(world, *shorter) == 0 and infer(world, "--force") == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "q_max_seq_len 3" in line]
    assert len(warned) == 2 and all("WARNING" in line and "100.0%" in line for line in warned)
    saved = json.loads((world / "output/dual_hparams.json").read_text(encoding="utf-8"))
    assert [found["kind"] for found in saved["truncation"]] == ["queries", "passages"]
    assert saved["truncation"][0]["share"] == 1 and saved["truncation"][1]["limit"] == 40


def test_training_writes_the_files_in_the_readme(trained):
    output = trained / "output"
    state = torch.load(output / "dual_params.bin", weights_only=True)
    assert {name.split(".")[0] for name in state} == {"query_encoder", "passage_encoder"}
    saved = json.loads((output / "dual_hparams.json").read_text(encoding="utf-8"))
    assert saved["fixed_by_weights"]["p_max_seq_len"] == 64 and saved["epoch"] == 2
    assert (output / "dual_model/config.json").exists() and (output / "dual_checkpoint.pt").exists()


def test_run_has_the_four_columns_and_every_query(trained):
    rows = [line.split("\t") for line in lines(trained / "output/res.top10")]
    queries = [line.split("\t")[0] for line in lines(trained / "data/dev/dev.q.format")]
    assert [row[0] for row in rows] == [query for query in queries for _ in range(10)]
    assert [int(row[2]) for row in rows] == list(range(1, 11)) * len(queries)
    assert all(0 <= int(row[1]) < 60 for row in rows)


def test_run_equals_a_full_sort_of_the_stored_vectors(trained):
    output = trained / "output"
    queries = np.load(output / "query.emb.npy").astype(np.float64)
    blocks = [np.load(path) for path in sorted((output / "para_emb").glob("*.npy"))]
    passages = np.concatenate(blocks).astype(np.float64)
    scores = (queries[:, None, :] * passages[None]).sum(-1)
    best = np.lexsort((np.broadcast_to(np.arange(len(passages)), scores.shape), -scores), axis=1)[:, :10]
    found = np.array([int(line.split("\t")[1]) for line in lines(output / "res.top10")]).reshape(-1, 10)
    assert (found == best).all()


def test_the_same_command_again_is_up_to_date(world, capsys):
    before = content(world / "output")
    assert train(world) == 0 and infer(world) == 0
    assert capsys.readouterr().out.count(": up to date") == 2
    assert content(world / "output") == before


def test_same_seed_gives_the_same_bytes(trained, tmp_path):
    assert dual_train.main(train_options(trained, tmp_path / "again")) == 0
    again, first = tmp_path / "again/dual_params.bin", trained / "output/dual_params.bin"
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.slow
def test_vectors_do_not_depend_on_blocks(world):
    whole = np.load(world / "output/para_emb/block-00000.npy")
    assert infer(world, "--block_rows", "59") == 0
    blocks = [np.load(path) for path in sorted((world / "output/para_emb").glob("*.npy"))]
    assert [len(block) for block in blocks] == [59, 1]
    assert np.abs(np.concatenate(blocks).astype(np.float32) - whole.astype(np.float32)).max() < 1e-3


def test_retrained_weights_are_detected(world, capsys):
    old = (world / "output/para_emb/block-00000.npy").read_bytes()
    assert train(world, "--seed", "7") == 0
    assert "seed: 42 -> 7" in capsys.readouterr().out
    assert infer(world) == 0
    assert "the vectors of another run (weights: " in capsys.readouterr().out
    assert (world / "output/para_emb/block-00000.npy").read_bytes() != old


@pytest.mark.slow
def test_a_changed_collection_is_detected(world, capsys):
    part = world / "data/passage-collection/part-00"
    write(part, [lines(part)[0].replace("\t0", "改\t0"), *lines(part)[1:]])
    assert infer(world) == 0
    assert "(collection: " in capsys.readouterr().out


@pytest.mark.slow
def test_zero_shot_needs_no_training(world):
    out = world / "zero"
    command = [*options(world, out), "--dual_params", "none", "--pretrained_model_path", str(world / "model")]
    assert dual_infer.main([*command, "--pooling", "mean", "--normalize"], topk=5, bs=100) == 0
    assert len(lines(out / "res.top5")) == 6 * 5
    assert np.allclose(np.linalg.norm(np.load(out / "query.emb.npy"), axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_metrics_in_the_training_log_equal_those_of_inference(trained, tmp_path, capsys):
    """The pool is the whole collection here, so the dev line of the saved weights and the run must agree."""
    assert dual_train.main([*train_options(trained, tmp_path / "o"), "--force"]) == 0
    log = capsys.readouterr().out.splitlines()
    saved = [line for line in log if line.endswith("best so far") or "saved; not better" in line][-1]
    assert dual_infer.main(options(trained, tmp_path / "o"), topk=50, bs=4) == 0
    ids = json.loads((trained / "data/passage-collection/passage2id.map.json").read_text(encoding="utf-8"))
    qids = json.loads((trained / "data/dev/q2qid.dev.json").read_text(encoding="utf-8"))
    result = {}
    for line in lines(tmp_path / "o/res.top50"):
        query, row, *_ = line.split("\t")
        result.setdefault(qids[query], []).append(ids[row])
    metrics = evaluation.compute_metrics(evaluation.load_reference(trained / "data/dev/dev.json"), result)
    assert f"MRR@10 {metrics['MRR@10']:.4f}  recall@1 {metrics['recall@1']:.4f}" in saved


# ---- bad input: a message with the file and line, exit status 2, nothing overwritten


def test_wrong_column_count(world, capsys):
    path = world / "data/train/dual.train.tsv"
    write(path, [*lines(path)[:5], "只有一列", *lines(path)[5:]])
    before = content(world / "output")
    refused(capsys, world, train(world), f"{path}:6: ")
    assert content(world / "output") == before


def test_not_utf8(world, capsys):
    path = world / "data/passage-collection/part-01"
    path.write_bytes(path.read_bytes().replace(b"\t0\n", b"\xff\t0\n", 1))
    refused(capsys, world, infer(world), f"{path}:1: not UTF-8")


def test_empty_query(world, capsys):
    path = world / "data/dev/dev.q.format"
    write(path, [*lines(path), "\t-\t-\t0"])
    refused(capsys, world, infer(world), f"{path}:7: ", "query")


def test_dev_query_missing_in_q2qid(world, capsys):
    path = world / "data/dev/dev.q.format"
    write(path, [*lines(path), "没有编号的问题\t-\t-\t0"])
    refused(capsys, world, infer(world), "q2qid.dev.json: ", "1 queries of", "没有编号的问题")


def test_two_dev_queries_with_the_same_text(world, capsys):
    path = world / "data/dev/dev.q.format"
    write(path, [*lines(path), lines(path)[1]])
    refused(capsys, world, infer(world), f"{path}:7: the same query as line 2", "merge the two")


def test_pid_map_shorter_than_the_collection(world, capsys):
    path = world / "data/passage-collection/passage2id.map.json"
    ids = json.loads(path.read_text(encoding="utf-8"))
    write(path, [json.dumps({row: pid for row, pid in ids.items() if row != "59"})])
    refused(capsys, world, infer(world, "--force"), f"{path}: 59 ids, but the collection has 60 passages")


@pytest.mark.slow
def test_missing_and_half_downloaded_model_folder(world, capsys):
    nowhere = ["--pretrained_model_path", str(world / "nowhere")]
    refused(capsys, world, train(world, *nowhere), "nowhere: no such folder")
    (world / "model/model.safetensors").unlink()
    refused(capsys, world, train(world), "contains no weights")
    (world / "model/model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    refused(capsys, world, train(world), "the weights cannot be read")
    (world / "model/config.json").unlink()
    refused(capsys, world, train(world), "contains no config.json")


@pytest.mark.slow
def test_weights_of_another_hidden_size(world, capsys):
    make_model(world / "wide", hidden=48)
    wide = ["--pretrained_model_path", str(world / "wide")]
    before = content(world / "output")
    refused(capsys, world, infer(world, *wide, "--force"), "not the configuration that")
    assert content(world / "output") == before
    shutil.rmtree(world / "output/dual_model")
    refused(capsys, world, infer(world, *wide, "--force"), "dual_params.bin: weights of another model")


def test_option_that_contradicts_the_weights(world, capsys):
    refused(capsys, world, infer(world, "--pooling", "mean"), "--pooling 'mean'", "was trained with 'cls'")
    refused(capsys, world, infer(world, "--p_max_seq_len", "32"), "was trained with 64")


@pytest.mark.slow
def test_long_passage_is_cut_and_counted(world, capsys):
    part = world / "data/passage-collection/part-00"
    write(part, [f"-\t\t{'长' * 60975}\t0", *lines(part)[1:]])
    assert infer(world) == 0
    assert "% truncated" in capsys.readouterr().out


def test_fewer_hard_negatives_than_asked_for_are_counted(world, capsys):
    short = ["--max_steps", "1", "--eval_every", "-1", "--batch_size", "4", "--force"]
    assert train(world, *short, "--hard_negatives", "1") == 0
    assert "hard negatives:" not in capsys.readouterr().out
    assert train(world, *short, "--hard_negatives", "40") == 0
    assert "24 of 24 queries have fewer than 40 hard negatives" in capsys.readouterr().out


def test_empty_training_file(world, capsys):
    write(world / "data/train/dual.train.tsv", [])
    refused(capsys, world, train(world), "dual.train.tsv: contains no training rows")


@pytest.mark.slow
def test_unknown_option(world, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(world, "--epochs", "3")
    assert stopped.value.code == 2
    assert "--epochs" in capsys.readouterr().err


def test_infer_before_training(world, capsys):
    (world / "output/dual_params.bin").unlink()
    refused(capsys, world, infer(world), "dual_params.bin: no such file", "run do_dual_train.py first")


def test_non_finite_loss_stops_and_names_the_rows(world, capsys):
    status = train(world, "--lr", "1e30", "--force")
    refused(capsys, world, status, "at step", "dual.train.tsv")
