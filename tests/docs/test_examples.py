"""examples/: the notebooks, executed with short trainings in a copy of the repository, and the program."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from doc_commands import ROOT
from toy_world import make_world, options

from metric.convert_recall_res_to_json import main as convert
from metric.evaluation import MEASURES, compute_metrics, load_reference, load_result
from script import export_model
from torch_src import cross_infer, cross_train, dual_infer, dual_train
from torch_src.runtime.errors import UserError

NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))
SHORT = "--max_steps 2 --batch_size 8"
# In the notebook's own process, which imports torch once and not for each program.
RUN_HERE = """
    import contextlib, io, runpy
    sys.argv, printed = words[1:], io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as end:
            assert not end.code, printed.getvalue()
    print(printed.getvalue()[-1500:])
"""


def test_notebooks_are_stored_without_outputs():
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / "examples" / name).read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells), name


def copy_repository(folder):
    for package in ("torch_src", "metric", "script"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("do_*.py"):
        shutil.copy(path, folder)


def execute(name, folder):
    """Execute a notebook in a copy of the repository; return the outputs of its cells."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    copy_repository(folder)
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("--eval_every -1", f"--eval_every -1 {SHORT}")
        start = cell.source.partition("    done = subprocess.run(words")[0]
        cell.source = start if start == cell.source else start + RUN_HERE
    assert sum(RUN_HERE in cell.source for cell in notebook.cells) == 1
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.tools
@pytest.mark.slow
def test_the_notebook_from_passages_to_a_comparison(tmp_path):
    outputs = execute("passages_to_search.ipynb", tmp_path)
    assert any("after_training - before_training" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.tools
@pytest.mark.slow
def test_the_notebook_that_loads_the_exports_elsewhere(tmp_path, programs, monkeypatch, capsys):
    """In this process, which has imported torch already."""
    for program in ("do_dual_train.py", "do_cross_train.py"):
        words = ["--debug", "--output_dir", str(tmp_path / "output/debug"), "--eval_every", "-1"]
        done = programs.run(program, [*words, "--max_steps", "1"], tmp_path / "log")
        assert not done.returncode, done.output()
    copy_repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples/export_elsewhere.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # in the notebook's own names
    printed = capsys.readouterr().out
    scores = [line for line in printed.splitlines() if line.startswith("[")]  # of retriever and re-ranker
    assert len(scores) == 2 and all(len(line.split()) == 2 for line in scores), printed


def our_figures(data: Path, run: Path, topk: int) -> list[float]:
    """Return the measures of a run by the programs of metric/."""
    maps = [data / "dev/q2qid.dev.json", data / "passage-collection/passage2id.map.json"]
    assert convert([*map(str, [*maps, run]), str(topk), str(run.with_suffix(".json"))]) == 0
    metrics = compute_metrics(load_reference(data / "dev/dev.json"), load_result(run.with_suffix(".json")))
    return [metrics[name] for name in MEASURES]


def test_a_run_of_other_data_is_refused_by_the_mteb_example(tmp_path):
    first_pids = runpy.run_path(str(ROOT / "examples/evaluate_with_mteb.py"))["first_pids"]
    (tmp_path / "run").write_text("a\t1\t1\t2\na\t0\t2\t1\n")
    assert first_pids(tmp_path / "run", 1, {"a": "q1"}, ["p0", "p1"]) == {"q1": ["p1"]}
    for qids, pids in (({"b": "q1"}, ["p0", "p1"]), ({"a": "q1"}, ["p0"])):
        with pytest.raises(UserError, match="run: of other data .query 'a'"):
            first_pids(tmp_path / "run", 1, qids, pids)


@pytest.mark.tools
@pytest.mark.slow
def test_mteb_computes_our_figures(tmp_path, tiny_encoder, capsys):
    """With a real encoder: scores of a random one are so close that fp16 decides their order."""
    pytest.importorskip("mteb", reason="not installed: mteb (requirements-mteb.txt)")
    data, output = make_world(tmp_path) / "data", tmp_path / "output"
    evaluate = runpy.run_path(str(ROOT / "examples/evaluate_with_mteb.py"))["main"]
    same, start = options(tmp_path, output), ["--pretrained_model_path", str(tiny_encoder)]
    short = [*start, "--batch_size", "8", "--max_steps", "1", "--eval_every", "-1"]
    pooled = ["--pooling", "mean", "--normalize", "--temperature", "0.05", "--share_encoder"]
    assert dual_train.main([*same, *short, *pooled]) == 0
    assert dual_infer.main(same, topk=10) == 0
    assert cross_train.main([*same, *short]) == 0
    ranked = ["--retrieval_result", str(output / "res.top10"), "--topk", "5", "--depth", "5"]
    assert cross_infer.main([*same, *ranked]) == 0
    for kind, run, topk, more in (
        ("dual", "res.top10", 10, []),
        ("cross", "res.rerank5", 5, ["--run", str(output / "res.top10"), "--depth", "5"]),
    ):
        folder = str(output / "export" / kind)
        assert export_model.main([kind, "--output_dir", str(output), "--to", folder]) == 0
        capsys.readouterr()
        assert evaluate(["--data_dir", str(data), "--model", folder, *more]) == 0
        theirs = json.loads(capsys.readouterr().out.splitlines()[-1])
        ours = our_figures(data, output / run, topk)
        if kind == "dual":  # their search has more passages
            del theirs["recall@50"], ours[2]
        assert list(theirs.values()) == pytest.approx(ours, abs=1e-4)
