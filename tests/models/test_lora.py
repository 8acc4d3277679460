"""LoRA of an encoder: what is trained, what towers share, merging, and models with unusual linear layers."""

import pytest
import torch
import transformers
from torch import nn

from torch_src.models import lora
from torch_src.models.dual_encoder import DualEncoder, embed, sentence_layers
from torch_src.models.lora import (
    ALL,
    adapted_layers,
    add_adapters,
    check_targets,
    copy_with_adapters,
    load_merged,
    merged_bytes,
    merged_state,
)
from torch_src.runtime.errors import UserError

IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 3, 0, 0], [2, 30, 31, 3, 0]])
MASK = (IDS != 0).long()


def randomize(model, seed=0):
    """Give the adapters random weights: B is zero at the start."""
    torch.manual_seed(seed)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B[lora.ADAPTER].weight, std=0.3)
    return model


def adapted(model, rank=4, targets="all", precision="fp32", seed=0):
    add_adapters(model, rank, targets, seed, precision)
    return model


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_start_at_zero_and_only_they_are_trained(tiny_bert):
    model, plain = adapted(tiny_bert(1)), tiny_bert(1)
    assert type(model) is type(plain)
    layers = adapted_layers(model)
    kinds = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    kinds += ["intermediate.dense", "output.dense"]
    assert set(layers) == {f"encoder.layer.{at}.{kind}" for at in range(2) for kind in kinds}
    assert trained(model) == {f"{name}.lora_{part}.{lora.ADAPTER}.weight" for name in layers for part in "AB"}
    with torch.inference_mode():
        assert embed(model, IDS, MASK, "mean", False).equal(embed(plain, IDS, MASK, "mean", False))
    again = adapted(tiny_bert(1))
    assert all(p.equal(q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_full_rank_adapters_reach_every_change_of_the_linear_layers(tiny_bert):
    """An adapter of full rank with the difference of two models' weights turns one into the other."""
    start, goal = tiny_bert(1).double(), tiny_bert(1).double()
    names = [name for name, module in start.named_modules() if isinstance(module, nn.Linear)]
    torch.manual_seed(3)
    for name in names:  # as a full fine-tuning might move them
        goal.get_submodule(name).weight.data += 0.1 * torch.randn_like(goal.get_submodule(name).weight)
    changes = [goal.get_submodule(name).weight - start.get_submodule(name).weight for name in names]
    model = adapted(start, rank=32)
    for name, change in zip(names, changes, strict=True):
        layer = adapted_layers(model)[name]
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        layer.lora_A[lora.ADAPTER].weight.data = v
        layer.lora_B[lora.ADAPTER].weight.data = u * s / 2
    with torch.inference_mode():
        found, expected = (embed(each, IDS, MASK, "cls", False) for each in (model, goal))
        before = embed(tiny_bert(1).double(), IDS, MASK, "cls", False)
    assert (found - expected).abs().max() < 1e-9 < 0.1 < (before - expected).abs().max()


@pytest.mark.parametrize("targets", ["all", "query, value"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_weights_are_those_of_a_plain_model(tiny_bert, targets, precision):
    model, plain = randomize(adapted(tiny_bert(1), 4, targets, precision)), tiny_bert(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = merged_state(model)
    names = list(plain.state_dict())
    assert list(state) == names
    for name, value in plain.state_dict().items():
        assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape)
        layer = adapted_layers(model).get(name.removesuffix(".weight"))
        change = 2 * layer.lora_B[lora.ADAPTER].weight @ layer.lora_A[lora.ADAPTER].weight if layer else 0
        assert torch.allclose(state[name], value + change, atol=1e-6), name  # not rounded to 16 bits
    assert len(adapted_layers(model)) == (12 if targets == "all" else 4)
    plain.load_state_dict(state)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert merged_bytes(model) == sum(
        value.numel() * 4 for value in state.values() if value.is_floating_point()
    )
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found, expected = (embed(each, IDS, MASK, "mean", True) for each in (model, plain))
    assert (found - expected).abs().max() < (1e-5 if precision == "fp32" else 0.03)
    load_merged(model, state)
    assert list(model.state_dict()) == names and all(v.equal(state[n]) for n, v in model.state_dict().items())


def test_frozen_weights_in_16_bits_compute_what_autocast_does(tiny_bert):
    model, low = randomize(adapted(tiny_bert(1))), randomize(adapted(tiny_bert(1), precision="bf16"))
    dense = "encoder.layer.0.output.dense.base_layer"
    assert low.get_submodule(dense).weight.dtype == torch.bfloat16
    assert low.get_parameter(f"{dense}.bias").dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(low, IDS, MASK, "mean", False).equal(embed(model, IDS, MASK, "mean", False))


def test_separate_towers_share_the_frozen_weights(tiny_bert):
    backbone = adapted(tiny_bert(1))
    model = DualEncoder(backbone, False, "cls", False).eval()
    query, passage = (dict(model.tower(side).named_parameters()) for side in ("query", "passage"))
    for name, p in query.items():
        assert (passage[name].data_ptr() == p.data_ptr()) == (not p.requires_grad), name
    expected = [model(side, IDS, MASK) for side in ("query", "passage")]
    assert expected[0].equal(expected[1])
    randomize(model.tower("query"))
    assert model("passage", IDS, MASK).equal(expected[1]) and not model("query", IDS, MASK).equal(expected[0])
    state = model.stored_state()
    plain = DualEncoder(tiny_bert(2), False, "cls", False).eval()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    for side in ("query", "passage"):
        assert torch.allclose(plain(side, IDS, MASK), model(side, IDS, MASK), atol=1e-4)
    linear = sum(4 * p.numel() for name, p in query.items() if name.endswith("base_layer.weight"))
    once = sum(4 * p.numel() for name, p in query.items() if ".lora_" not in name)
    assert merged_bytes(model) == once + linear


def test_a_shared_tower_and_two_towers_of_a_folder(tiny_bert):
    shared = DualEncoder(randomize(adapted(tiny_bert(1))), True, "cls", False)
    assert list(shared.stored_state()) == list(DualEncoder(tiny_bert(1), True, "cls", False).stored_state())
    apart = DualEncoder(adapted(tiny_bert(1)), False, "cls", False, adapted(tiny_bert(2)))
    assert len(adapted_layers(apart)) == 24 and list(apart.stored_state()) == list(
        DualEncoder(tiny_bert(1), False, "cls", False, tiny_bert(2)).stored_state()
    )


def test_a_plain_tower_is_copied_whole(tiny_bert):
    model = tiny_bert()
    ids = {id(module) for module in copy_with_adapters(model).modules()}
    assert not ids & {id(module) for module in model.modules()}


def test_what_follows_the_encoder_is_trained_in_full(tiny_bert):
    model = tiny_bert(1, add_pooling_layer=True)
    model.sentence_layers = nn.Sequential(nn.Linear(32, 8))
    parts = {name for name in trained(adapted(model)) if ".lora_" not in name}
    assert parts == {
        "pooler.dense.weight", "pooler.dense.bias", "sentence_layers.0.weight", "sentence_layers.0.bias"
    }  # fmt: skip
    assert sentence_layers(model.config) == []


@pytest.mark.parametrize(
    "targets", ["nothing", "query,", "query,pooler", "", "attention", "ery", "LayerNorm"]
)
def test_names_without_a_linear_layer_are_refused(tiny_bert, targets):
    model = tiny_bert(1, add_pooling_layer=True)
    with pytest.raises(UserError, match=r"^--lora_targets .*\(there are: query, key, value, dense\)"):
        add_adapters(model, 4, targets, 0, "fp32")
    assert not adapted_layers(model) and len(trained(model)) == len(list(model.parameters()))


def test_weights_with_two_names_are_refused(tiny_bert):
    model = tiny_bert()
    model.encoder.layer[1].intermediate.dense.weight = model.encoder.layer[0].intermediate.dense.weight
    with pytest.raises(
        UserError, match="^--lora_rank: encoder.layer.0.intermediate.dense shares its weights"
    ):
        adapted(model)
    assert len(adapted_layers(adapted(model, targets="query"))) == 2


def small(kind, **more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = getattr(transformers, f"{kind}Config")(vocab_size=99, **{**sizes, **more})
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config, dtype=torch.float32).eval()


FAMILIES = {
    "Qwen3": (dict(num_key_value_heads=1, head_dim=16), 14),  # q, k, v, o, gate, up, down
    "GPT2": (dict(n_embd=32, n_layer=2, n_head=2, n_inner=48), 8),  # Conv1D: transposed, q, k and v as one
    "Albert": (dict(embedding_size=16), 6),  # one layer, used twice
    "ModernBert": (dict(global_attn_every_n_layers=2, pad_token_id=0), 8),  # q, k and v as one
    "DistilBert": (dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48, sinusoidal_pos_embds=True), 12),
    "T5": (dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2), 12),
    "DebertaV2": (dict(relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True), 12),
    "Electra": (dict(embedding_size=16), 12),
}


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_families_train_each_adapter_and_merge(kind):
    sizes, count = FAMILIES[kind]
    plain = small(kind, **sizes) if kind != "T5" else small(kind, **sizes).encoder
    check_targets(lambda: type(plain)(plain.config), ALL)
    model = randomize(adapted(copy_of(plain)))
    assert len(adapted_layers(model)) == count
    twin = copy_with_adapters(model)
    states = model(input_ids=IDS, attention_mask=MASK)[0]
    (states * MASK.unsqueeze(-1)).pow(2).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (p.requires_grad and not name.startswith("pooler.")), name
        assert p.grad is None or p.grad.abs().max() > 0, name
    with torch.no_grad():
        assert twin(input_ids=IDS, attention_mask=MASK)[0].equal(states)
        before = plain(input_ids=IDS, attention_mask=MASK)[0]
        plain.load_state_dict(merged_state(twin))
        merged = plain(input_ids=IDS, attention_mask=MASK)[0]
    assert torch.allclose(merged, states, atol=2e-4) and not torch.allclose(merged, before, atol=1e-2)


def copy_of(model):
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin
