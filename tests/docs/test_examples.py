"""The notebooks of examples/, executed with short trainings in a copy of the repository."""

import json
import shutil

import pytest
from doc_commands import ROOT

NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))
SHORT = "--max_steps 2 --batch_size 8"


def test_notebooks_are_stored_without_outputs():
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / "examples" / name).read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells), name


@pytest.mark.tools
@pytest.mark.slow
def test_the_notebook_from_passages_to_a_comparison(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("torch_src", "metric", "script"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("do_*.py"):
        shutil.copy(path, tmp_path)
    notebook = nbformat.read(ROOT / "examples/passages_to_search.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("--eval_every -1", f"--eval_every -1 {SHORT}")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("after_training - before_training" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
