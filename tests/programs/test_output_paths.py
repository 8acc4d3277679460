"""No program replaces an input or a file that it did not write, under any name of that file."""

import json
import os
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from toy_world import lines, options, write

from torch_src.runtime.stamps import checksum_files, write_stamp

MODULES = {
    "dual_train": "torch_src.dual_train", "dual_infer": "torch_src.dual_infer",
    "cross_train": "torch_src.cross_train", "cross_infer": "torch_src.cross_infer",
    "recall": "metric.convert_recall_res_to_json", "rerank": "metric.convert_rerank_res_to_json",
}  # fmt: skip
INFER = "dual_infer --data_dir data --output_dir out --dual_params trained/dual_params.bin --topk 10"
RERANK = "cross_infer --data_dir data --cross_params none --pretrained_model_path model"
TRAIN = "dual_train --data_dir data --pretrained_model_path model --batch_size 4"
MINE = "mine_negatives --data_dir data --output_dir out --dual_params trained/dual_params.bin"
COMPARE = "compare_runs trained/res.json trained/other.json --reference data/dev/dev.json --per_query"
SEARCH = "bm25 search --data_dir data --index index --run"
MAPS = "data/dev/q2qid.dev.json data/passage-collection/passage2id.map.json"
RECALL = f"recall {MAPS}"
CASES = [
    f"{COMPARE} trained/res.json",
    f"{COMPARE} trained/./../trained/other.json",
    f"{COMPARE} data/dev/dev.json",
    f"{COMPARE} notes.txt",
    f"{COMPARE} hard.json",
    f"{COMPARE} symbolic.json",
    f"{COMPARE} trained",
    f"{COMPARE} /dev/stdout",
    f"{COMPARE} /dev/null",
    f"{COMPARE} trained/res.top10",
    f"{SEARCH} data/dev/dev.q.format",
    f"{SEARCH} data/passage-collection/part-00",
    f"{SEARCH} data/passage-collection/part-02",
    f"{SEARCH} data/passage-collection/passage2id.map.json",
    f"{SEARCH} trained/res.top10",
    f"{SEARCH} foreign.run",
    f"{SEARCH} index/tokens.txt",
    f"{SEARCH} notes.txt",
    "bm25 index --data_dir data --index data",
    "bm25 index --data_dir data --index trained",
    "bm25 index --data_dir data --index data/passage-collection/bm25",
    "bm25 index --data_dir data --index foreign",
    "bm25 fuse --runs trained/res.top10 foreign.run --run foreign.run",
    "bm25 fuse --runs trained/res.top10 foreign.run --run ./trained/../trained/res.top10",
    "bm25 fuse --runs trained/res.top10 foreign.run --run notes.txt",
    "check_data data --fix-report data/dev/dev.json",
    "check_data data --fix-report data/train/dual.train.tsv",
    "check_data data --fix-report data/passage-collection/part-02",
    "check_data data --fix-report notes.txt",
    f"{RECALL} trained/res.top10 10 notes.txt",
    f"{RECALL} trained/res.top10 10 hard.run",
    f"{RECALL} foreign/res.top10 10",
    "rerank scores.txt ids.tsv scores.txt",
    "rerank scores.txt ids.tsv trained/res.json",
    "export_model dual --output_dir trained --to trained",
    "export_model dual --output_dir trained --to model",
    "export_model dual --output_dir trained --to notes.txt",
    f"{INFER} --dev_q out/res.top10 --dev_q2qid none",
    f"{INFER} --para_emb data/passage-collection",
    f"{INFER} --output_dir foreign",
    f"{INFER} --para_emb foreign --force",
    f"{RERANK} --retrieval_result out/res.rerank50 --output_dir out",
    f"{RERANK} --output_dir foreign",
    f"{TRAIN} --output_dir foreign",
    f"{TRAIN} --output_dir out --dev_set out/dual_hparams.json",
    f"{TRAIN} --output_dir pretrained",
    f"{TRAIN} --output_dir model/out",
    f"{MINE} --mined_dir data/train",
    f"{MINE} --mined_dir foreign",
    "report --data_dir data --output_dir foreign",
    "report --data_dir data --to trained/res.top10",
    "report --data_dir data --to data/dev/dev.json",
    "report --data_dir data --to /dev/stdout",
    "run_all --data_dir data --output_dir foreign",
]


def main(words: str) -> int:
    """Run a program in this process; return its exit status."""
    name, *argv = shlex.split(words)
    return import_module(MODULES.get(name, f"script.{name}")).main(argv)


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A data set, a model, results, and files of the user under names that programs would like to use."""
    import shutil

    folder = tmp_path_factory.mktemp("paths")
    for name in ("data", "model"):
        shutil.copytree(trained / name, folder / name)
    shutil.copytree(trained / "output", folder / "trained")
    (folder / "notes.txt").write_text("mine\n")
    (folder / "foreign.run").write_bytes((folder / "trained/res.top10").read_bytes())
    names = "report.html res.top10 res.rerank50 cross_res.json dual_res.json run_all.json dual_params.bin"
    for name in f"{names} dual.train.tsv manifest.json mining.json".split():
        write(folder / "foreign" / name, ['{"mine": 1}'])
    write(folder / "pretrained/dual_model/pytorch_model.bin", ["mine"])
    for name in ("res.json", "other.json"):
        write(folder / "trained" / name, ['{"1": ["a"]}'])
    write(folder / "scores.txt", ["1", "2"])
    write(folder / "ids.tsv", ["q\ta", "q\tb"])
    write(folder / "out/res.top10", lines(folder / "trained/res.top10"))
    write(folder / "out/res.rerank50", lines(folder / "trained/res.top10"))
    write(folder / "out/dual_hparams.json", ['{"output_dir": 1}'])
    write(folder / "index/tokens.txt", ["60 passages"])
    write(folder / "index/tokens.txt.stamp.json", ['{"stage": "bm25"}'])
    os.link(folder / "trained/res.json", folder / "hard.json")
    os.link(folder / "trained/res.top10", folder / "hard.run")
    (folder / "symbolic.json").symlink_to("data/dev/dev.json")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return {path: checksum} of all files but locks and caches."""
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    files = [path for path in files if not path.name.endswith("lock")]
    return {str(path.relative_to(folder)): checksum_files([path]) for path in sorted(files)}


@pytest.mark.parametrize("words", CASES)
def test_the_path_is_refused_and_every_file_stays(world, words, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = contents(world)
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert " ERROR " in error
    reasons = ("output", "exists and", "not empty", "is a folder", "another folder", "regular file")
    assert any(reason in error for reason in reasons)
    assert contents(world) == before


def test_own_files_are_replaced(world, monkeypatch, capsys, tmp_path):
    """The same command twice, and after a stamp or a run was damaged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(world / "data", target_is_directory=True)
    run = tmp_path / "o/res.top10"
    write(run, lines(world / "foreign.run"))
    for _ in range(2):
        assert main(f"recall {MAPS} o/res.top10 10") == 0
        assert main(f"recall {MAPS} o/res.top10 10 named.json") == 0
        assert main("check_data data --fix-report faults.tsv") in (0, 1)
        assert main("bm25 fuse --runs o/res.top10 o/res.top10 --run o/fused") == 0
    (tmp_path / "o/fused.stamp.json").write_text("{}")  # killed while it was written
    assert main("bm25 fuse --runs o/res.top10 o/res.top10 --run o/fused") == 0
    (tmp_path / "o/dual_res.json.stamp.json").unlink()  # under its own name the content tells
    assert main(f"recall {MAPS} o/res.top10 10") == 0
    (tmp_path / "named.json.stamp.json").unlink()
    assert main(f"recall {MAPS} o/res.top10 10 named.json") == 2


@pytest.mark.parametrize("field", ["candidates", "passages", "qids"])
def test_scores_with_the_id_map_of_another_run_are_refused(tmp_path, monkeypatch, capsys, field):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "scores", ["1", "2"])
    write(tmp_path / "ids", ["q\ta", "q\tb"])
    for name in ("scores", "ids"):
        write_stamp(name, {"stage": "cross_infer", "candidates": "a", "passages": "b", "qids": "c"})
    assert main("rerank scores ids") == 0
    write_stamp(
        "ids", {"stage": "cross_infer", "candidates": "a", "passages": "b", "qids": "c"} | {field: "x"}
    )
    assert main("rerank scores ids") == 2 and f"({field}: " in capsys.readouterr().err


def test_runs_and_maps_of_other_collections_are_refused(trained_copy, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(trained_copy)
    part = Path("data/passage-collection/part-00")
    first = Path("output/res.top10")
    maps = "other/dev/q2qid.dev.json other/passage-collection/passage2id.map.json"
    Path("other").symlink_to("data", target_is_directory=True)
    assert main(f"recall {maps} output/res.top10 10 a.json") == 0
    rows = lines(part)
    write(part, rows[::-1])  # the same passages in another order
    assert main("dual_infer " + shlex.join([*options(Path("."), "second"), "--dual_params",
                                            "output/dual_params.bin", "--topk", "10"])) == 0  # fmt: skip
    assert main(f"recall {maps} second/res.top10 10 b.json") == 0
    capsys.readouterr()
    refused = [
        f"recall {maps} output/res.top10 10 a.json",
        "bm25 fuse --runs output/res.top10 second/res.top10 --run fused",
        f"{RERANK} --output_dir third --retrieval_result output/res.top10",
        f"{MINE} --dual_params output/dual_params.bin --retrieval_result output/res.top10",
        "cross_train --data_dir data --pretrained_model_path model --output_dir fourth --dev_candidates "
        "output/res.top10 --max_steps 1",
    ]
    for words in refused:
        assert main(words) == 2, words
        assert "another collection" in capsys.readouterr().err, words
    assert json.loads(Path("output/res.top10.stamp.json").read_text())["collection"]
    with open(first, "a", encoding="utf-8") as file:
        file.write("")
    assert main("bm25 fuse --runs second/res.top10 second/res.top10 --run fused") == 0
    assert main("bm25 fuse --runs fused output/res.top10 --run more") == 2  # a fused run names it, too
