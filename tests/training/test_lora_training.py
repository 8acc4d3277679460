"""Training with LoRA: frozen weights stay; chunks, FGM, checkpoints, stamps and 16 bits work with them."""

import shutil

import pytest
import torch
from toy_world import ROOT, make_world
from training.test_grad_cache import apart, backward, flat, gradients, load, on_host, stage
from training.test_memory import run_until
from training.test_update import Casts
from transformers import AutoConfig, AutoModel, Qwen3Config, Qwen3Model

from torch_src.models.dual_encoder import DualEncoder
from torch_src.models.lora import ADAPTER, adapted_layers
from torch_src.models.losses import pointwise_loss
from torch_src.runtime import libraries
from torch_src.runtime.errors import UserError
from torch_src.training.checkpoints import load_checkpoint

LORA = dict(lora_rank=4, dropout=0.1)
KINDS = {
    "dual": dict(batch_size=6, lr=1e-2, **LORA),
    "cross": dict(loss="listwise", groups_per_step=2, group_size=3, lr=1e-2, **LORA),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), train_queries=24)


def frozen(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_changes_adapters_and_head_alone(world, tmp_path, kind):
    made = stage(world, kind, double=False, max_steps=2, output_dir=str(tmp_path), **KINDS[kind])
    model, before = made.task.model, frozen(made.task.model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    made.trainer(tmp_path, {}).run()
    assert {name.rpartition(".lora_")[2].partition(".")[0] for name in start} >= {"A", "B"}
    heads = {name for name in start if ".lora_" not in name}
    pooler = "model.bert.pooler.dense"
    parts = (pooler, "model.classifier") if kind == "cross" else ()
    assert heads == {f"{part}.{name}" for part in parts for name in ("weight", "bias")}
    for name, p in model.named_parameters():
        assert p.equal({**before, **start}[name]) == (name in before), name
    # saved: the weights of a plain model, which computes the same
    saved = torch.load(tmp_path / f"{kind}_params.bin", weights_only=True)
    plain = stage(world, kind, double=False, **{**KINDS[kind], "lora_rank": 0}).task.model
    part = plain if kind == "dual" else plain.model
    assert {n: v.shape for n, v in saved.items()} == {n: v.shape for n, v in part.state_dict().items()}
    part.load_state_dict(saved)
    batch = made.task.make_batch((0, 0))
    inputs = on_host(batch.passages if kind == "dual" else batch.pairs, made.task)
    with torch.inference_mode():
        found, expected = (
            each.eval()(*(("passage", *inputs) if kind == "dual" else inputs)) for each in (plain, model)
        )
    assert torch.allclose(found, expected, atol=1e-4)
    # the checkpoint: what was trained
    names = set(load_checkpoint(tmp_path / f"{kind}_checkpoint.pt")["model"])
    assert names >= set(start) and not names & set(before)


def random_adapters(task):
    """Give the adapters weights that are not zero, so that gradients reach both of their matrices."""
    torch.manual_seed(0)
    for layer in adapted_layers(task.model).values():
        layer.lora_B[ADAPTER].weight.data.normal_(std=0.1)
    return task


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dual", {}),
        ("dual", {"share_encoder": True, "gradient_checkpointing": True}),
        ("cross", {"loss": "pointwise", "batch_size": 6, "r_drop_alpha": 2.0}),
    ],
)
def test_cached_gradients_are_those_of_one_graph(world, kind, more):
    kept, cached = (
        random_adapters(
            load(world, kind, **{**KINDS[kind], **more}, tokens_per_batch=100, grad_cache_chunk=n)
        )
        for n in (0, 1000)
    )
    found = gradients(cached)
    assert apart(found, gradients(kept)) < 1e-9
    assert len(found) == sum(p.numel() for p in cached.model.parameters() if p.requires_grad)
    if more.pop("gradient_checkpointing", False):
        plain = random_adapters(load(world, kind, **KINDS[kind], **more, tokens_per_batch=100))
        assert apart(found, gradients(plain)) < 1e-9


@pytest.mark.parametrize("chunk", [0, 2])
def test_fgm_moves_the_frozen_word_embeddings(world, chunk):
    knobs = dict(loss="pointwise", batch_size=6, dropout=0.0, lora_rank=4)
    task = random_adapters(load(world, "cross", fgm_epsilon=0.5, grad_cache_chunk=chunk, **knobs))
    batch, table = task.make_batch((0, 0)), task.model.word_embeddings
    before, found = table.detach().clone(), gradients(task)
    assert table.equal(before) and table.grad is None and not table.requires_grad

    def plain():
        return pointwise_loss(task.model(*on_host(batch.pairs, task)), torch.from_numpy(batch.labels))[0]

    table.requires_grad_()
    g = torch.autograd.grad(plain(), table)[0]
    table.requires_grad_(False).add_(0.5 * g / g.norm())
    task.model.zero_grad(set_to_none=True)
    plain().backward()
    assert apart(found, flat(task.model)) < 1e-9
    without = random_adapters(load(world, "cross", **knobs))
    assert apart(found, gradients(without)) > 1e-3


@pytest.mark.parametrize(("kind", "more"), [
    ("dual", {"ema_decay": 0.5}), pytest.param("cross", {"head_lr": 1e-3}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_resumed_run_ends_in_the_same_bytes(world, tmp_path, kind, more):
    def run(name, until=9):
        where = dict(output_dir=str(tmp_path / name), max_steps=4, grad_cache_chunk=2)
        made = stage(world, kind, double=False, **where, **KINDS[kind], **more)
        run_until(made.trainer(tmp_path / name, {}), until)
        return tmp_path / name / f"{kind}_params.bin"

    whole = run("whole").read_bytes()
    assert not run("killed", 2).exists()
    assert run("killed").read_bytes() == whole


def test_frozen_weights_are_in_16_bits_and_never_cast(world):
    knobs = dict(precision="bf16", batch_size=6, dropout=0.1, tokens_per_batch=100, lora_rank=4)
    made = stage(world, "dual", double=False, **knobs)
    linear = [n for n, p in made.task.model.named_parameters() if p.dtype == torch.bfloat16]
    assert len(linear) == 6 and all(name.endswith("base_layer.weight") for name in linear)
    with Casts(made.task.model) as casts:
        backward(made.task, made.task.make_batch((0, 0)))
    assert all(casts.seen[name] == ("lora" in name) for name in casts.names.values() if "weight" in name)
    grads = [p.grad for p in made.task.model.parameters() if p.grad is not None]
    assert len(grads) == 24 and {grad.dtype for grad in grads} == {torch.float32}


def test_a_run_without_lora_keeps_its_stamp(world):
    plain, with_lora, other = (
        stage(world, "dual", batch_size=6, **knobs).setup.stamp()
        for knobs in ({}, {"lora_rank": 4}, {"lora_rank": 4, "lora_targets": "query"})
    )
    assert {*with_lora} - {*plain} == {"lora_rank", "lora_targets"}
    assert with_lora["lora_targets"] != other["lora_targets"]


@pytest.mark.slow
def test_finished_runs_are_up_to_date_and_repaired(world, tmp_path, capsys):
    """The scores of training negatives are those of the merged weights."""
    knobs = dict(KINDS["cross"], eval_every=0, epoch=1, output_dir=str(tmp_path), dev_queries=3, dev_depth=3)
    run = world / "run"
    if not run.exists():
        query = (world / "data/dev/dev.q.format").read_text(encoding="utf-8").partition("\t")[0]
        run.write_text("".join(f"{query}\t{row}\t{row + 1}\t{-row}\n" for row in range(3)), encoding="utf-8")

    def train():
        made = stage(world, "cross", double=False, dev_candidates=str(run), **knobs)
        made.run()
        return capsys.readouterr().out, {
            name: v.clone() for name, v in made.task.model.model.state_dict().items()
        }

    out, state = train()
    assert "LoRA of rank 4 in 6 linear layers (query, key, value, dense)" in out
    saved = torch.load(tmp_path / "cross_params.bin", weights_only=True)
    assert list(saved) == list(state) and all(value.equal(state[name]) for name, value in saved.items())
    scores = next(tmp_path.glob("*negative*"))
    before = scores.read_bytes()
    scores.unlink()
    assert "rewritten" in train()[0] and scores.read_bytes() == before
    assert "rewritten" not in (again := train()[0]) and "up to date" in again


def test_a_missing_library_is_named_before_anything_is_loaded(world, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(libraries, "import_module", missing)
    with pytest.raises(UserError, match="^peft is not installed; run .*requirements-lora.txt"):
        stage(world, "dual", lora_rank=4)
    load(world, "dual", batch_size=6)


@pytest.mark.parametrize("kind", ["dual", "cross"])
def test_layers_that_there_are_not_are_named_before_the_data_are_read(world, kind):
    with pytest.raises(UserError, match=r"^--lora_targets q_proj: .*there are: query, key, value, dense"):
        stage(world, kind, train_set="missing.tsv", lora_rank=4, lora_targets="q_proj")


@pytest.fixture(scope="module")
def qwen(world, tmp_path_factory):
    """The same world with a tiny decoder, as Qwen3-Embedding is one."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "data").symlink_to(world / "data")
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    vocabulary = AutoConfig.from_pretrained(world / "model").vocab_size
    config = Qwen3Config(vocab_size=vocabulary, intermediate_size=48, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    Qwen3Model(config).to(torch.bfloat16).save_pretrained(folder / "model")
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(ROOT / "tests/tiny_bert" / name, folder / "model")
    return folder


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_decoder_pooled_at_its_last_token_learns(qwen, tmp_path, precision):
    knobs = dict(pooling="lasttoken", normalize=True, temperature=0.05, share_encoder=True, lora_rank=8)
    more = dict(batch_size=8, lr=1e-2, max_steps=8, log_every=1, grad_cache_chunk=4, epoch=9)
    made = stage(qwen, "dual", False, precision=precision, output_dir=str(tmp_path), **knobs, **more)
    losses = [entry["loss"] for entry in made.trainer(tmp_path, {}).run().history]
    assert losses[-1] < 0.8 * losses[0]
    assert len(adapted_layers(made.task.model.tower("query"))) == 14
    config = AutoConfig.from_pretrained(qwen / "model")
    plain = DualEncoder(AutoModel.from_config(config, dtype=torch.float32), True, "lasttoken", True)
    plain.load_state_dict(torch.load(tmp_path / "dual_params.bin", weights_only=True))
    batch = made.task.make_batch((0, 0))
    inputs = on_host(batch.queries, made.task)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        vectors = [model.eval()("query", *inputs) for model in (plain, made.task.model)]
    assert (vectors[0] * vectors[1]).sum(1).min() > (0.99999 if precision == "fp32" else 0.995)
