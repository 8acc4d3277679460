"""--plan: its output and arithmetic, and that it changes no file."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_world import lines, make_world, options, train_options, write

from torch_src import cross_infer, cross_train, dual_infer, dual_train, inference_plan
from torch_src.runtime import planning
from torch_src.runtime.errors import is_out_of_memory
from torch_src.runtime.planning import Plan, checkpoint_gb, evenly_spaced, fitting_fraction
from torch_src.runtime.program import exit_status
from torch_src.training import stage as training_stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize(("program", "counted"), [
    (dual_train, "6 updates"), (dual_infer, "encode 60 passages"), (cross_train, "updates"),
    (cross_infer, "score 300 pairs"),
])  # fmt: skip
def test_before_anything_is_trained(world, tmp_path, capsys, program, counted):
    model = ["--pretrained_model_path", str(world / "model")]
    if program is dual_train:
        words = train_options(world, tmp_path / "out")
    else:
        words = [*options(world, tmp_path / "out"), *model]
    assert program.main([*words, "--plan"]) == 0
    out = capsys.readouterr().out
    assert counted in out and "it fits" in out and "total time" in out
    assert re.search(r"memory +\d\.\d\d GB of", out) and re.search(r"disk +0\.\d\d GB of", out)
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {
        path.name for path in (tmp_path / "out/cache").glob("*")
    }


@pytest.mark.slow
def test_a_plan_does_not_change_what_is_up_to_date(world, tmp_path, capsys):
    words = train_options(world, tmp_path / "out")
    assert dual_train.main(words) == 0
    assert dual_train.main([*words, "--plan"]) == 0
    capsys.readouterr()
    assert dual_train.main(words) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("sampled", [None, 16])
def test_a_plan_encodes_only_texts_without_a_vector(world, tmp_path, capsys, monkeypatch, sampled):
    if sampled:
        monkeypatch.setattr(inference_plan, "SAMPLED_HASHES", sampled)
        monkeypatch.setattr(inference_plan, "HASHES_PER_READ", 1)
    model = ["--pretrained_model_path", str(world / "model"), "--dual_params", "none"]
    words = [*options(world, tmp_path / "out"), *model, "--dev_q", "none"]
    assert dual_infer.main(words) == 0
    changed = tmp_path / "data/passage-collection"
    changed.mkdir(parents=True)
    rows = [
        line for part in ("part-00", "part-01") for line in lines(world / f"data/passage-collection/{part}")
    ]
    write(changed / "part-00", [*rows[40:], *(row.replace("\t\t", "\t\t新") for row in rows[:20])])
    (tmp_path / "data/dev").symlink_to(world / "data/dev")
    words += ["--data_dir", str(tmp_path / "data"), "--passage_ids", "none", "--plan"]
    capsys.readouterr()
    for more, expected in (
        ([], "encode about 20 of 40 passages (" if sampled else "encode 20 of 40 passages ("),
        (["--force"], "encode 40 passages ("),
        (["--p_max_seq_len", "20"], "encode 40 passages ("),
        (["--para_emb", str(tmp_path / "out/para_emb")], "encode 40 passages ("),
    ):
        assert dual_infer.main([*words, *more]) == 0
        assert expected in capsys.readouterr().out
    assert not (tmp_path / "out/para_emb/previous").exists()


def test_a_plan_includes_the_index(world, tmp_path, capsys):
    words = [*options(world, tmp_path / "out"), "--pretrained_model_path", str(world / "model"), "--plan"]
    assert dual_infer.main([*words, "--index", "HNSW32"]) == 0
    assert "fill HNSW32" in capsys.readouterr().out


def test_an_index_that_does_not_fit_is_reported_but_no_error(world, tmp_path, capsys, monkeypatch):
    words = [*options(world, tmp_path / "out"), "--pretrained_model_path", str(world / "model")]
    monkeypatch.setattr(inference_plan, "estimate", lambda factory, width, rows: (10**15, 60.0))
    assert dual_infer.main([*words, "--plan", "--index", "HNSW32"]) == 0
    assert "IT DOES NOT FIT (memory, disk): use a smaller --index" in capsys.readouterr().out


def test_a_plan_that_does_not_fit_gives_advice(monkeypatch, tmp_path):
    plan = Plan("do_dual_train.py", [("a", 60.0), ("b", 30.0)], ram_gb=8, disk_gb=1, advice="try less")
    monkeypatch.setattr(planning, "free_memory", lambda: 4e9)
    monkeypatch.setattr(planning, "_own_memory", lambda: 1e9)
    monkeypatch.setattr(planning, "free_disk", lambda folder: 2e9)
    lines = plan.lines(str(tmp_path), CPU)
    assert lines[-1] == "  IT DOES NOT FIT (memory): try less"
    assert "memory           8.00 GB of 5.0 GB free" in lines[-3] and plan.seconds == 90
    plan.ram_gb = 5
    assert plan.lines(str(tmp_path), CPU)[-1] == "  it fits"


@pytest.mark.parametrize(("device", "in_host_memory"), [("cpu", True), ("cuda", False)])
def test_the_advice_for_a_search_names_the_knobs_of_its_device(monkeypatch, device, in_host_memory):
    monkeypatch.setattr(inference_plan, "_plan_encoding", lambda *given: (1.0, 0.5))
    monkeypatch.setattr(inference_plan, "_stores_on_disk", lambda *given: [])
    monkeypatch.setattr(inference_plan, "memory_gb", lambda device: (1.0, 0.25))
    retriever = SimpleNamespace(
        hp=SimpleNamespace(index="", passage_windows=1),
        width=8,
        collection=range(9),
        device=torch.device(device),
    )
    advice = inference_plan.plan_retrieval(retriever, 0, 10, 10).advice
    assert "--bs" in advice and ("--search_memory_gb" in advice) == in_host_memory


def test_arithmetic():
    assert evenly_spaced(5) == [0, 1, 2, 3, 4] and evenly_spaced(100, 3) == [0, 49, 99]
    assert np.isclose(checkpoint_gb(4_000_000, 4_000_000, averaged=False), 0.004 * 10)
    assert np.isclose(checkpoint_gb(4_000_000, 4_000_000, averaged=True), 0.004 * 13)
    assert np.isclose(checkpoint_gb(4_000_000, 1000, averaged=False), 0.004 + 3 * 3e-6)
    # the whole takes 6 GB above 2, 0.9 x 5 GB leave 2.5
    assert np.isclose(fitting_fraction(2.0, 8.0, 5.0), 2.5 / 6)
    assert fitting_fraction(2.0, 8.0, 1.0) == 0 and fitting_fraction(2.0, 8.0, 99.0) == 1


@pytest.mark.slow
def test_a_plan_of_training_tries_smaller_chunks_when_out_of_memory(world, tmp_path, capsys, monkeypatch):
    probe, tried = training_stage.Trainer.probe, []

    def out_of_memory_at_first(trainer, updates):
        tried.append(trainer.task.chunking.texts)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return probe(trainer, updates)

    monkeypatch.setattr(training_stage.Trainer, "probe", out_of_memory_at_first)
    words = [*train_options(world, tmp_path / "out"), "--batch_size", "8", "--hard_negatives", "1", "--plan"]
    assert dual_train.main(words) == 0
    assert tried == [0, 12, 6]  # 8 queries, 16 passages: half of 24, and half again
    out = capsys.readouterr().out
    assert "with --grad_cache_chunk 6 --tokens_per_batch 512)" in out
    assert (
        "IT DOES NOT FIT (these settings)" in out
        and "--grad_cache_chunk 6 --tokens_per_batch 512 fits" in out
    )

    def broken(trainer, updates):
        raise RuntimeError("this card is broken")

    monkeypatch.setattr(training_stage.Trainer, "probe", broken)
    with pytest.raises(RuntimeError, match="this card is broken"):
        dual_train.main(words)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(capsys, error, memory):
    assert is_out_of_memory(error) == memory

    def program():
        raise error

    if memory:
        assert exit_status(program) == 2
        assert " ERROR out of memory (" in capsys.readouterr().err
    else:
        with pytest.raises(type(error)):
            exit_status(program)
