"""The chunks of a batch: the rule by numbers, the measured activations, their reuse by a resumed run."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from toy_world import make_world
from training.test_grad_cache import gradients, load, stage
from transformers import BertConfig, BertModel

from torch_src.runtime.errors import UserError
from torch_src.training import memory
from torch_src.training import stage as stages
from torch_src.training.memory import MemoryNeed, choose_chunk, measure_memory, probe_inputs, state_bytes
from torch_src.training.stage import checkpoint_activations

CPU = torch.device("cpu")
probe = stages.Trainer.probe
AUTO = dict(grad_cache_chunk=-1, tokens_per_batch=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), train_queries=24)


@pytest.mark.parametrize(
    ("texts", "tokens", "fitting", "on_gpu", "expected"),
    [
        (-1, 0, 40_000, True, (1536, 32768)),  # a power of two that fits
        (-1, 0, 32_768, True, (1536, 32768)),
        (-1, 0, 32_767, True, (1536, 16384)),
        (-1, 0, 300_000, True, (1536, 65536)),  # more tokens in a chunk are not faster
        (-1, 0, 409_600, True, (0, 65536)),  # all of the batch fits
        (-1, 0, 0, True, (1536, 512)),
        (-1, 0, 40_000, False, (1536, 2048)),  # a CPU's caches
        (-1, 0, 700, False, (1536, 512)),
        (-1, 0, 409_600, False, (0, 2048)),
        (0, 0, 40_000, True, (0, 32768)),  # what the user gave stays
        (64, 0, 40_000, True, (64, 32768)),
        (-1, 1000, 40_000, True, (1536, 1000)),
        (64, 1000, 0, True, (64, 1000)),
    ],
)
def test_the_rule(texts, tokens, fitting, on_gpu, expected):
    assert choose_chunk(texts, tokens, fitting, 1536, 409_600, on_gpu) == expected


def test_what_fits():
    need = MemoryNeed(free_bytes=1000, state_bytes=300, bytes_per_token=2.0)
    assert need.fitting_tokens == 300 and need.total_bytes(100) == 500  # 0.9 x 1,000 - 300 leave 600
    assert MemoryNeed(free_bytes=100, state_bytes=300, bytes_per_token=2.0).fitting_tokens == 0


def test_state_of_a_run():
    model = torch.nn.Sequential(torch.nn.Linear(10, 100, bias=False), torch.nn.Linear(100, 1, bias=False))
    assert state_bytes(model, "fp32", False) == 4 * (3 * 1100 + 1000)
    assert state_bytes(model, "bf16", True) == 4 * (3 * 1100 + 1000) + 2 * 1100 + 4 * 1100
    model[0].weight.requires_grad_(False)
    assert state_bytes(model, "fp32", False) == 4 * (3 * 100 + 100)
    assert state_bytes(model, "bf16", True) == 4 * (3 * 100 + 100) + 2 * 100 + 4 * 100


def test_the_measured_activations_are_those_counted_by_hand():
    """A linear layer saves its input, a product both factors; the weight is not counted."""
    layer = torch.nn.Linear(8, 8, bias=False)

    def probe(texts):
        x = torch.ones(texts, 5, 8)
        y = layer(x)
        return (y * y.exp()).sum(), texts * 5

    need = measure_memory(layer, probe, CPU, "fp32", averaged=False)
    # per token three rows of 8 numbers: x, y and exp(y)
    assert need.bytes_per_token == pytest.approx(memory.BACKWARD_FACTOR * 3 * 8 * 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_grow_with_the_tokens_only(precision):
    """The measured slope is that of larger batches, and gradient checkpointing does not hide it."""
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, attn_implementation="sdpa")  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)

    def probe(texts, tokens=24):
        inputs = probe_inputs(texts, tokens, CPU)
        return model(*inputs)[0], inputs[0].numel()

    need = measure_memory(model, probe, CPU, precision, averaged=False)
    with memory.autocast(CPU, precision):
        large, small = (memory._saved_bytes(model.train(), probe, texts)[0] for texts in (24, 8))
    assert memory.BACKWARD_FACTOR * (large - small) / (16 * 24) == pytest.approx(
        need.bytes_per_token, rel=0.02
    )
    checkpoint_activations(model)
    assert (
        measure_memory(model, probe, CPU, precision, averaged=False).bytes_per_token == need.bytes_per_token
    )
    assert all(layer.gradient_checkpointing for layer in model.encoder.layer)


@pytest.mark.parametrize("kind", ["dual", "cross"])
def test_a_batch_that_fits_is_kept_and_another_is_chunked(world, capsys, monkeypatch, kind):
    made = stage(world, kind, batch_size=6, dropout=0.1, **AUTO)
    made.load()
    assert (made.task.chunking.texts, made.task.chunking.tokens) == (0, 2048)
    assert "all activations of a batch are kept" in capsys.readouterr().out
    made.task.model.double()
    kept = gradients(made.task)
    monkeypatch.setattr(memory, "free_memory", lambda: 10**6)
    made.load()
    chunk = made.task.chunking
    assert chunk.texts == made.task.texts_per_batch and chunk.tokens == 512
    assert "GradCache: chunks of at most" in capsys.readouterr().out
    made.task.chunking = dataclasses.replace(chunk, tokens=2048)
    made.task.model.double()
    assert gradients(made.task).equal(kept)  # the same chunks draw the same dropout


def test_no_line_where_the_user_named_the_chunks(world, capsys):
    made = stage(world, "dual", batch_size=6, grad_cache_chunk=3, tokens_per_batch=99)
    made.load()
    assert (made.task.chunking.texts, made.task.chunking.tokens) == (3, 99)
    assert "GradCache" not in capsys.readouterr().out


def test_the_most_tokens_of_a_batch(world):
    dual = load(world, "dual", batch_size=6, hard_negatives=2, q_max_seq_len=16, query_prefix="问：")
    around = dual.setup.tokenizer.tokenize("问：")
    assert dual.max_batch_tokens == 6 * (16 + len(around)) + 18 * 48 and dual.texts_per_batch == 24
    pairs = dict(batch_size=6, loss="pointwise")
    assert load(world, "cross", **pairs).max_batch_tokens == 6 * 64
    assert load(world, "cross", r_drop_alpha=1.0, **pairs).max_batch_tokens == 2 * 6 * 64
    task = load(world, "cross", loss="listwise", groups_per_step=3, group_size=4)
    outputs, tokens = task.probe(2)
    assert task.max_batch_tokens == 12 * 64 and outputs.shape == (2,) and tokens == 2 * 64


def run_until(trainer, until: int) -> None:
    """Run the trainer; at update `until` save a checkpoint and end the run."""
    update = trainer.update

    def counted(step, batches):
        if step == until:
            trainer._save_checkpoint()
            raise KeyboardInterrupt
        return update(step, batches)

    trainer.update = counted
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run()


def run_and_resume(world, folder, capsys, monkeypatch, device) -> list[torch.Tensor]:
    """Return weights after a whole run, after a killed and resumed one, and with more memory all along.

    More memory is free when the run resumes.
    """

    def run(name, until, free):
        monkeypatch.setattr(memory, "_free_bytes", lambda _: free)
        knobs = dict(batch_size=6, dropout=0.3, max_steps=4, device=device, **AUTO)
        made = stage(world, "dual", double=False, **knobs)
        made.load()
        trainer = made.trainer(folder / name, {})
        run_until(trainer, until)
        weights = [p.detach().cpu().flatten() for p in trainer.task.model.parameters()]
        return torch.cat(weights), trainer.task.chunking

    little, much = 10**6, 10**12
    whole, chunks = run("whole", 9, little)
    assert run("killed", 2, little)[1] == chunks and (chunks.texts, chunks.tokens) == (18, 512)
    capsys.readouterr()
    resumed, again = run("killed", 9, much)
    assert again == chunks
    assert f"the chunks of the checkpoint: {chunks}" in capsys.readouterr().out
    return [whole, resumed, run("other", 9, much)[0]]


def test_a_resumed_run_keeps_its_chunks(world, tmp_path, capsys, monkeypatch):
    """Free memory differs when the run resumes: the chunks, and so the dropout, are those of before."""
    whole, resumed, other = run_and_resume(world, tmp_path, capsys, monkeypatch, "cpu")
    assert resumed.equal(whole) and not other.equal(whole)


@pytest.mark.parametrize(
    ("kind", "free", "units"), [("dual", 10**6, 3), ("dual", 10**12, 6), ("cross", 10**6, 3)]
)
def test_a_plan_on_a_cpu_probes_a_fraction_of_a_batch_in_chunks(world, monkeypatch, kind, free, units):
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    monkeypatch.setattr(stages, "PROBED_UNITS", 3)
    pairs = {"loss": "pointwise"} if kind == "cross" else {}
    made = stage(world, kind, double=False, batch_size=6, epoch=1, **pairs, **AUTO)
    forward, sizes = made.task.forward, []
    made.task.forward = lambda batch: (sizes.append(len(batch.source.queries)), forward(batch))[1]

    def two_seconds(trainer, updates):
        probe(trainer, 1)  # one real update, whose time is not used
        return [2.0] * updates

    monkeypatch.setattr(stages.Trainer, "probe", two_seconds)
    plan = made.plan()
    assert sizes == [units]
    updates = made.trainer(world / "unused", {}).schedule.total_steps
    assert plan.seconds == pytest.approx(2.0 * updates * 6 / units)


def test_out_of_memory_names_the_knobs(world, tmp_path, monkeypatch):
    made = stage(world, "dual", batch_size=6, grad_cache_chunk=4, max_steps=3)
    trainer = made.trainer(tmp_path, {})
    real, calls = made.task.forward, []

    def forward(batch):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return real(batch)

    monkeypatch.setattr(made.task, "forward", forward)
    with pytest.raises(
        UserError, match="^out of memory at step 2 .*4 texts.*--grad_cache_chunk 2 --tokens_per"
    ):
        trainer.run()
    monkeypatch.setattr(made.task, "forward", lambda batch: np.zeros(3)[5])
    with pytest.raises(IndexError):
        made.trainer(tmp_path, {}).run()


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "put_ does not have a deterministic implementation, but",
            UserError,
            r"--deterministic: put_ has no .*",
        ),
        ("another error", RuntimeError, "another error"),
    ],
)
def test_a_refused_operation_is_named_in_one_line(world, tmp_path, monkeypatch, text, kind, message):
    def refuse():
        raise RuntimeError(text)

    made = stage(world, "dual", output_dir=str(tmp_path), batch_size=6)
    monkeypatch.setattr(made, "_train", refuse)
    with pytest.raises(kind, match=f"^{message}$"):
        made.run()
