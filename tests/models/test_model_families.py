"""Every family of docs/models.md through all programs, on tiny folders with real configuration classes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_world import lines, make_world, options

from script import export_model
from torch_src import cross_infer, cross_train, dual_infer, dual_train, hparams
from torch_src.inference import (
    Retriever,
    find_cross_model,
    load_cross_model,
    load_dual_model,
    pair_scorer,
)
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.retrieval.gpu_inference import encoder_in_bf16, scorer_in_bf16

ROOT = Path(__file__).resolve().parents[2]
BUILDER = ROOT.parent / "shared/tools/model_folders.py"
DOCUMENT = ROOT / "docs/models.md"
PARTS = ("zero-shot", "train", "infer", "cross", "export")
SHORT = ["--max_steps", "1", "--eval_every", "-1", "--lr", "1e-4"]

pytestmark = [pytest.mark.real, pytest.mark.tools, pytest.mark.slow]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders that can be built here; of some families the builder needs packages of its own."""
    if not BUILDER.exists():
        pytest.skip("no builder of model folders beside the checkout")
    place = tmp_path_factory.mktemp("folders")
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, BUILDER, place], cwd=ROOT, env=quiet, check=True, capture_output=True)
    return place


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), passages=24)


def rows() -> dict[str, list[str]]:
    """Return {folder: the cells of its row in docs/models.md}."""
    if not DOCUMENT.exists():
        return {}
    table = [line.strip("| ").split("|") for line in lines(DOCUMENT) if line.startswith("| `")]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row[2:]] for row in table if len(row) == 7}


class Refused(Exception):
    """A program ended with exit status 2."""


class Family:
    """One folder and the results of the programs on it."""

    def __init__(self, world, folder, capsys):
        self.world, self.folder, self.capsys = world, folder, capsys
        self.output = world / folder.name
        self.both = options(world, self.output)
        self.plain = not (folder / "modules.json").exists()
        self.start = ["--pretrained_model_path", str(folder)]
        self.pooling = ["--pooling", "mean", "--normalize"] if self.plain else []
        self.texts = [line.split("\t")[0] for line in lines(world / "data/dev/dev.q.format")]
        parts = sorted((world / "data/passage-collection").glob("part-*"))
        self.passages = [line.split("\t")[2] for part in parts for line in lines(part)]

    def run(self, program, words, **more):
        self.capsys.readouterr()
        status = program([*words], **more)
        error = self.capsys.readouterr().err.strip().split("\n")[-1]
        assert status in (0, 2), (self.folder.name, status, error)
        if status:
            raise Refused(error.partition("ERROR ")[2])

    def equal_to_sentence_transformers(self, path, limit=0.9999):
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
        queries = np.load(self.output / "query.emb.npy")
        passages = np.load(self.output / "para_emb/block-00000.npy").astype(np.float32)
        pairs = ((queries, model.encode_query(self.texts)), (passages, model.encode_document(self.passages)))
        for ours, theirs in pairs:
            ours, theirs = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (ours, theirs))
            assert (ours * theirs).sum(1).min() > limit, (self.folder.name, path)
        assert len(np.unique(passages.round(3), axis=0)) == len(passages)

    def zero_shot(self):
        zero = [*self.both, *self.start, *self.pooling, "--dual_params", "none"]
        lengths = ["--q_max_seq_len", "400", "--p_max_seq_len", "400"] if self.plain else []
        self.run(dual_infer.main, [*zero, *lengths], topk=5)
        if not (self.plain and "nopad" in self.folder.name):  # sentence-transformers needs a pad token
            self.equal_to_sentence_transformers(self.folder)

    def train(self):
        words = [*self.both, *self.start, *self.pooling, *SHORT, "--batch_size", "4", "--temperature", "0.05"]
        self.run(dual_train.main, [*words, "--p_max_seq_len", "80"])

    def infer(self):
        self.run(dual_infer.main, self.both, topk=5)

    def export(self):
        to = self.output / "st"
        self.run(export_model.main, ["dual", "--output_dir", str(self.output), "--to", str(to)])
        self.equal_to_sentence_transformers(to)

    def cross(self):
        words = [*self.both, *self.start, *SHORT, "--batch_size", "4", "--max_seq_len", "80"]
        self.run(cross_train.main, words)


class Reranker(Family):
    """The same for a re-ranker: `cross` is what it is for, so its zero-shot scores."""

    def candidates(self):
        retriever = ["--pretrained_model_path", str(self.world / "model"), "--dual_params", "none"]
        self.run(dual_infer.main, [*options(self.world, self.world / "run"), *retriever], topk=5)
        return ["--retrieval_result", str(self.world / "run/res.top5")]

    def scores(self):
        return np.array([float(line) for line in lines(self.output / "cross_scores.txt")])

    def equal_to_sentence_transformers(self, path, limit=1e-3):
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(str(path), device="cpu", activation_fn=torch.nn.Identity())
        run = [line.split("\t") for line in lines(self.world / "run/res.top5")]
        pairs = [(query, self.passages[int(row)]) for query, row, _, _ in run]
        theirs = model.predict(pairs, batch_size=1 if "nopad" in self.folder.name else 32)
        theirs = theirs[:, 1] - theirs[:, 0] if theirs.ndim > 1 else theirs
        assert np.abs(theirs - self.scores()).max() < limit, (self.folder.name, path)

    def zero_shot(self):
        words = [*self.both, *self.start, *self.candidates(), "--cross_params", "none"]
        self.run(cross_infer.main, words)
        if "ForCausalLM" not in (self.folder / "config.json").read_text():  # there it has no template
            self.equal_to_sentence_transformers(self.folder)

    def cross(self):
        pass

    def train(self):
        words = [*self.both, *self.start, *SHORT, "--batch_size", "4", "--max_seq_len", "300"]
        self.run(cross_train.main, words)

    def infer(self):
        self.run(cross_infer.main, [*self.both, *self.candidates()])

    def export(self):
        to = self.output / "ce"
        self.run(export_model.main, ["cross", "--output_dir", str(self.output), "--to", str(to)])
        self.equal_to_sentence_transformers(to)


@pytest.mark.parametrize("name", list(rows()))
def test_inference_with_weights_in_bf16(folders, world, name, tmp_path):
    """As on a GPU: the vectors or logits of the probes are those of autocast."""
    if not (folders / name).is_dir() or not rows()[name][0].startswith("works"):
        pytest.skip("not loaded without training")
    words = [*options(world, tmp_path), "--pretrained_model_path", str(folders / name)]
    if not name.startswith("r_"):
        job = Retriever(hparams.parse(InferenceDeHparams, [*words, "--dual_params", "none"]))
        encoder = job.encoder("passage", load_dual_model(job.source))
        assert encoder_in_bf16(replace(encoder, precision="bf16")).bf16_weights
        return
    source = find_cross_model(hparams.parse(InferenceCrossHparams, [*words, "--cross_params", "none"]))
    scorer = pair_scorer(source, load_cross_model(source), 32, torch.device("cpu"), "bf16")
    # of these the layer between embeddings and encoder computes in fp32, so autocast is used
    assert scorer_in_bf16(scorer).bf16_weights == (name not in ("r_albert", "r_electra"))


@pytest.mark.parametrize("name", list(rows()))
def test_the_row_of_a_family(folders, world, capsys, name):
    if not (folders / name).is_dir():
        pytest.skip("its folder needs a package that is not installed")
    family = (Reranker if name.startswith("r_") else Family)(world, folders / name, capsys)
    for part, cell in zip(PARTS, rows()[name], strict=True):
        if cell == "-" or cell.startswith("as `"):
            continue
        run = getattr(family, part.replace("-", "_"))
        if cell == "works":
            run()
        else:
            with pytest.raises(Refused, match=cell.removeprefix("refused: ")):
                run()
