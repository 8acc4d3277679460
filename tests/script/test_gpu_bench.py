"""script/bench/gpu.py: the whole program at toy sizes, and its parts against hand-worked values."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from doc_commands import ROOT
from retrieval.test_faiss_gpu import fake_gpus

from script.bench import gpu_search
from script.bench.gpu_models import forward_flops
from script.bench.gpu_runs import OURS, PART, PEER, TINY, Bench, Outcome, Section, run_sections
from script.bench.gpu_search import agreement, blockwise_topk, unit_vectors
from script.bench.synthetic import PASSAGE_CHARACTERS, QUERY_CHARACTERS, texts_like


def test_a_section_that_fails_does_not_end_the_others(capsys):
    def fails(bench: Bench) -> None:
        bench.record("before", PART, {"seconds": 1.0})
        raise ValueError("a reason\nand more")

    def dies(bench: Bench) -> None:
        os._exit(3)

    def hangs(bench: Bench) -> None:
        bench.record("before", PART, {"seconds": 2.0})
        time.sleep(60)

    def good(bench: Bench) -> None:
        bench.attempt("broken", 0.0, lambda: math.sqrt(-1))
        bench.attempt("long", 1e6, lambda: bench.record("long", OURS, {"seconds": 1.0}))
        bench.record("one", OURS, {"seconds": 3.0, "count": 6, "unit": "texts"})
        bench.record("other", PEER, {"seconds": 4.0, "count": 4, "unit": "texts"})

    sections = {work.__name__: Section(work, 20, 0) for work in (fails, dies, hangs, good)}
    sections["hangs"].weight = 1  # about 0.4 s
    sections["late"] = Section(good, 1, 3600)
    run_sections(sections, TINY, "cpu", time.monotonic() + 6, [])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = {line["section"]: line for line in lines}
    assert found["fails"]["error"] == "ValueError: a reason" and "before" in found["fails"]["rows"]
    assert found["dies"]["error"].endswith("status 3")
    assert found["hangs"]["error"].startswith("stopped") and found["hangs"]["rows"]["before"]["seconds"] == 2
    assert not found["good"]["error"] and found["good"]["ratios"] == {"good": 0.5}
    assert set(found["good"]["skipped"]) == {"broken", "long"}
    assert set(found["late"]["skipped"]) == {"late"} and not found["late"]["rows"]


def test_ratio_is_the_best_of_ours_over_the_best_peer_for_each_work():
    outcome = Outcome("search")
    rows = [(OURS, "a", 2.0), (OURS, "a", 3.0), (PEER, "a", 4.0), (PEER, "b", 1.0), (PART, "b", 9.0)]
    for number, (side, work, seconds) in enumerate(rows):
        outcome.add({"name": str(number), "figures": {"side": side, "work": work, "seconds": seconds}})
    assert outcome.ratios() == {"a": 0.5}


@pytest.mark.parametrize("characters", [PASSAGE_CHARACTERS, QUERY_CHARACTERS])
def test_texts_have_the_lengths_of_dureader(characters):
    texts = texts_like(characters, 4000, 0)
    lengths = np.array([len(text) for text in texts])
    assert len(set(texts)) == 4000 and lengths.min() > 1
    assert lengths.mean() == pytest.approx(characters[0], rel=0.05)
    assert not any("\t" in text or "\n" in text or text != text.strip() for text in texts)


def test_operations_of_a_forward_pass():
    class Hidden2Layers3:
        sizes = type("Sizes", (), {"hidden": 2, "layers": 3})

    # per layer: 12 x 2 x 2 weights for each of 5 tokens, and two products of 5 x 5 x 2, each counted twice
    assert forward_flops(Hidden2Layers3, [5]) == 3 * (2 * 48 * 5 + 2 * 2 * 5 * 5 * 2)
    assert forward_flops(Hidden2Layers3, [5, 5]) == 2 * forward_flops(Hidden2Layers3, [5])


def test_blockwise_products_find_the_best_rows(monkeypatch):
    monkeypatch.setattr("script.bench.gpu_search.GENERATED_ROWS", 64)
    vectors, queries = (unit_vectors(n, 16, torch.device("cpu"), n) for n in (200, 7))
    found, _ = blockwise_topk(vectors, queries, 5, at_once=3)
    scores = queries.double() @ vectors.double().T
    assert agreement(found, torch.topk(scores, 5, dim=1).indices.numpy()) > 0.9
    assert agreement(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]])) == 0.75


def test_inverted_lists_are_built_by_the_code_of_the_program(monkeypatch, tmp_path):
    class Recorded(Bench):
        def send(self, message):
            rows.update({message["name"]: message["figures"]} if "figures" in message else {})

    rows, gpus = {}, fake_gpus()
    gpus.chunk_rows = gpu_search.FILL_ROWS
    monkeypatch.setattr(gpu_search, "index_gpus", lambda devices: gpus)
    monkeypatch.setattr("script.bench.gpu_runs.set_threads", lambda threads: threads)
    gpu_search.inverted_file(Recorded("ivf", "cpu", TINY, tmp_path, time.monotonic() + 60, False, None))
    assert len(rows) == 6 and len(gpus.faiss.devices) == 2  # k-means, the index
    assert all(rows[f"{place}: IVF4,SQfp16, 4 probes"]["recall"] > 0.95 for place in ("GPU", "CPU"))
    assert rows["GPU: IVF4,SQfp16, filling"]["count"] == TINY.index_rows


@pytest.mark.tools
@pytest.mark.slow
def test_all_sections_at_toy_sizes():
    command = [sys.executable, "script/bench/gpu.py", "--tiny", "--device", "cpu", "--profile", "encode"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"bench"')]
    found = {line["section"]: line for line in lines}
    assert list(found) == ["ceilings", "train", "encode", "rerank", "search", "ivf"]
    assert all(line["card"] == "CPU" and not line["error"] for line in lines)
    assert all(found[name]["ratios"] for name in ("train", "encode", "rerank", "search"))
    # the faiss of the tests has no GPU
    assert set(found["search"]["skipped"]) == {"faiss GpuIndexFlatIP, fp16"}
    assert set(found["ivf"]["skipped"]) == {"GPU"}
    losses = [row["first_loss"] for row in found["train"]["rows"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    row = found["encode"]["rows"]["sentence-transformers, batches of 8"]
    assert row["cosine_with_ours"] > 0.999
    assert found["rerank"]["rows"]["CrossEncoder, batches of 8"]["largest_difference"] < 0.01
    recalls = [row["recall_against_ours"] for row in found["search"]["rows"].values()]
    assert len(recalls) == 5 and min(recalls) > 0.9
    assert found["ivf"]["rows"]["CPU: IVF4,SQfp16, 4 probes"]["recall"] > 0.95
    assert "operation, by its own CPU time" in done.stdout and "aten::" in done.stdout
