"""The commands of docs/quickstart.md, docs/tools.md and the README, run in a copy of the repository.

In the copy, the tiny world takes the place of the sample collection, the data set and the model folder, and a
training makes two updates. Commands that need a GPU, a network, real data or more passages are only parsed
(test_docs.py).
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doc_commands import PYTHONS, ROOT, commands, program_of
from preloaded import Preloaded
from toy_world import lines, make_world, write

# Commands of another environment or size, and a server that does not end.
SKIPPED = (
    "-m",
    "--index IVF",
    "script/bench/",
    "tests/faults/",
    "--plan",
    "milvus",
    "script/demo.py",
    "script/serve.py",
)
PAGES = ("docs/quickstart.md", "docs/tools.md", "README.md")
STAND_ALONE = ("metric/", "handle.py")  # start fast without the server
SHORT = [
    "--epoch",
    "1",
    "--max_steps",
    "2",
    "--batch_size",
    "8",
    "--log_every",
    "1",
]  # override earlier values


def copy_of_the_repository(folder: Path) -> Path:
    """Return a copy with the tiny world at the paths that the README's commands use."""
    for name in ("torch_src", "metric", "script"):
        skipped = shutil.ignore_patterns("sample_data", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    (folder / "tests").mkdir()
    for path in (*ROOT.glob("do_*.py"), ROOT / "tests/preloaded.py"):
        shutil.copy(path, folder / path.relative_to(ROOT))
    world = make_world(folder / "world")
    for name in ("script/sample_data", "dureader-retrieval-baseline-dataset"):
        shutil.copytree(world / "data", folder / name)
    for name in ("script/sample_data/tiny_encoder", "torch_pretrained_models/ernie-gram-zh", "hub"):
        shutil.copytree(world / "model", folder / name)
    own_files(folder)
    return folder


def own_files(folder: Path) -> None:
    """Write a user's files: passages, queries and the questions of a competition."""
    data = folder / "dureader-retrieval-baseline-dataset"
    ids = json.loads((data / "passage-collection/passage2id.map.json").read_text(encoding="utf-8"))
    parts = [row for part in ("part-00", "part-01") for row in lines(data / "passage-collection" / part)]
    passages = [{"id": ids[str(at)], "text": row.split("\t")[2]} for at, row in enumerate(parts)]
    dev = [json.loads(line) for line in lines(data / "dev/dev.json")]
    queries = [
        {
            "id": entry["question_id"], "text": entry["question"], "split": "dev",
            "positives": [answer["paragraph_id"] for answer in entry["answer_paragraphs"]],
        }
        for entry in dev
    ]  # fmt: skip
    questions = [{name: entry[name] for name in ("question_id", "question")} for entry in dev]
    for name, rows in (("passages.jsonl", passages), ("queries.jsonl", queries), ("test1.json", questions)):
        write(folder / name, [json.dumps(row, ensure_ascii=False) for row in rows])


class Shell:
    """Runs commands in order, as a user would paste them."""

    def __init__(self, programs: Preloaded, root: Path):
        self.programs, self.root, self.here, self.ran = programs, root, root, []

    def run(self, words: list[str]) -> None:
        """Run one command, which must succeed, or skip it."""
        program, *rest = program_of(words)
        if program == "cd":
            self.here = (self.here / rest[0]).resolve()
        elif program == "cp":
            shutil.copy(self.here / rest[0], self.here / rest[1])
        elif program in PYTHONS and not any(needs in " ".join(rest) for needs in SKIPPED):
            self._python(rest[0], self._local(rest[1:]), words)

    def _local(self, options: list[str]) -> list[str]:
        """Return the options with a local folder in place of a hub name."""
        names = [at + 1 for at, word in enumerate(options) if word == "--pretrained_model_path"]
        return ["hub" if at in names else word for at, word in enumerate(options)]

    def _python(self, script: str, options: list[str], words: list[str]) -> None:
        begun = time.monotonic()
        if script in ("do_dual_train.py", "do_cross_train.py"):
            options = [*options, *SHORT]
        if script == "script/mine_negatives.py":
            options = [*options, "--max_score", "1"]  # after two updates every score is 0.5
        if script.startswith(STAND_ALONE):
            command = [sys.executable, script, *options]
            done = subprocess.run(command, cwd=self.here, capture_output=True, text=True)
            status, output = done.returncode, done.stderr
        else:
            running = self.programs.run(script, options, self.root / "log")
            status, output = running.returncode, running.output()
        assert status == 0, f"{' '.join(words)}\n{output}"
        self.ran.append(script)
        print(f"{time.monotonic() - begun:6.1f}s  {' '.join(words)}")  # shown by pytest -s


@pytest.mark.tools
@pytest.mark.slow
def test_the_documents_commands_run(tmp_path):
    root = copy_of_the_repository(tmp_path / "copy")
    with Preloaded(root) as programs:
        shell = Shell(programs, root)
        for page in PAGES:
            shutil.rmtree(root / "my_data", ignore_errors=True)  # each page converts the same passages
            for words in commands((ROOT / page).read_text(encoding="utf-8")):
                shell.run(words)
    every = {f"do_{name}.py" for name in ("dual_train", "dual_infer", "cross_train", "cross_infer")}
    every |= {f"script/{name}.py" for name in ("mine_negatives", "fuse_curve", "convert_dataset", "bm25")}
    assert every <= set(shell.ran) and len(shell.ran) > 30
    for name in ("cross_res.json", "test1/cross_res.json", "round2/dual_params.bin", "hybrid/res.top50"):
        assert (root / "output" / name).exists(), name
