"""LoRA: low-rank updates of a frozen encoder's linear layers (Hu et al. 2021, arXiv 2106.09685), by peft.

A linear layer computes W x + 2 B A x, with `rank` rows in A and columns in B. The factor 2 is fixed (peft's
lora_alpha is 2 x rank), and the adapters have no dropout of their own. B starts at zero, so the model starts
as it was. What follows the encoder (pooling layer, head, the layers after the pooling) is trained in full.
The saved weights are W + 2 B A, those of a model without adapters.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from torch_src.runtime.devices import at_least_float32
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library

ALL = "all"  # linear layers of the encoder's layers
ALPHA = 2  # scale of an update, B A
# Names of peft: of an adapter, of the layer below it, of its weights.
ADAPTER, BASE, ADAPTER_WEIGHTS = "default", ".base_layer", re.compile(r"\.lora_[AB]\.")
HEAD = re.compile(r"(pooler|sentence_layers)\b")  # parts of an encoder that are trained in full
ORIGINAL = "original"  # attribute of a 16-bit layer: its weight in fp32, where 16 bits have rounded it
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Model = TypeVar("Model", bound=nn.Module)


def import_peft() -> Any:
    """Return the module peft; UserError when it is not installed."""
    return import_library("peft", "requirements-lora.txt")


def check_targets(build: Callable[[], PreTrainedModel], targets: str) -> None:
    """UserError for layers that cannot get adapters in the model that `build` makes; no weights are made."""
    with torch.device("meta"):
        _targets(build().base_model, targets)


def add_adapters(
    model: PreTrainedModel,
    rank: int,
    targets: str,
    seed: int,
    precision: str,
    random_parameters: Collection[str] = (),
) -> None:
    """Freeze the encoder of a model and add adapters to its linear layers, in place.

    targets: all, or names of linear layers; UserError for one that there is not. precision: of the training;
    in 16 bits the frozen weights are kept in that type, to which each forward pass would cast them.
    random_parameters: names of those without pretrained weights, which are trained in full.
    """
    peft, encoder = import_peft(), model.base_model
    names = _targets(encoder, targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA * rank,
        target_modules="|".join(map(re.escape, names)),  # a regular expression for whole names
        fan_in_fan_out=any(isinstance(encoder.get_submodule(name), Conv1D) for name in names),
    )
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(config, encoder, ADAPTER)
    for name, parameter in encoder.named_parameters():
        if HEAD.match(name):
            parameter.requires_grad_(True)
    for name in random_parameters:
        model.get_parameter(name).requires_grad_(True)
    for layer in adapted_layers(model).values():
        layer.cast_input_dtype_enabled = False  # autocast does it
    if precision in DTYPES:
        _keep_in_16_bits(encoder, DTYPES[precision])


def _targets(encoder: nn.Module, targets: str) -> list[str]:
    """Return the names of the linear layers that get adapters."""
    linear = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not HEAD.match(name)
    ]
    if targets == ALL:
        stacks = tuple(
            f"{name}." for name, stack in encoder.named_modules() if isinstance(stack, nn.ModuleList)
        )
        by_target = {ALL: [name for name in linear if name.startswith(stacks)]}
    else:
        wanted = [target.strip() for target in targets.split(",")]
        by_target = {target: [n for n in linear if f".{n}".endswith(f".{target}")] for target in wanted}
    for target, found in by_target.items():
        if not found:
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "none"
            raise UserError(
                f"--lora_targets {target}: the encoder has no such linear layer (there are: {there}); "
                "name some of them, separated by commas, or all"
            )
    names = sorted({name for found in by_target.values() for name in found})
    uses = Counter(id(p) for _, p in encoder.named_parameters(remove_duplicate=False))
    for name in names:
        if uses[id(encoder.get_parameter(f"{name}.weight"))] > 1:
            raise UserError(
                f"--lora_rank: {name} shares its weights with another layer, so an adapter cannot be merged; "
                "name other layers (--lora_targets), or train without --lora_rank"
            )
    return names


def _keep_in_16_bits(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Convert the frozen weights of linear layers, and keep the fp32 weights that this rounds on the host.

    autocast keeps its copies of trained weights only: each chunk would cast the others anew, and a graph that
    is kept for the backward pass would hold copies of its own.
    """
    for module in encoder.modules():
        weight: Any = getattr(module, "weight", None)
        if type(module) in (nn.Linear, Conv1D) and not weight.requires_grad:
            full, weight.data = weight.data, weight.data.to(dtype)
            if not weight.data.to(full.dtype).equal(full):
                setattr(module, ORIGINAL, full)


def _full_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as it was before _keep_in_16_bits, on its device."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return at_least_float32(getattr(module, ORIGINAL, weight).to(weight.device))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return {name: peft's layer} of the layers with an adapter, a shared one under each of its names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if hasattr(module, "lora_A")}


def copy_with_adapters(model: Model) -> Model:
    """Return a copy with trained weights of its own. What is frozen is shared: the same tensors."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            shared[id(module)] = module
    shared |= {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model without adapters: they are merged into it. The model is unchanged."""
    layers = adapted_layers(model)
    if not layers:
        return model.state_dict()
    modules, state = dict(model.named_modules(remove_duplicate=False)), {}
    for name, value in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        is_weight = part == "weight" and isinstance(modules[owner], nn.Linear | Conv1D)
        if (layer := layers.get(owner.removesuffix(BASE))) is not None:
            state[f"{owner.removesuffix(BASE)}.{part}"] = _merged_weight(layer) if is_weight else value
        elif not ADAPTER_WEIGHTS.search(name):
            state[name] = _full_weight(modules[owner]).cpu() if is_weight else value
    return state


def _merged_weight(layer: Any) -> Tensor:
    """Return W + 2 B A, on the host: a GPU may have no room for a second copy of the weights."""
    return (_full_weight(layer.get_base_layer()) + layer.get_delta_weight(ADAPTER)).cpu()


def load_merged(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights without adapters into a model, which loses its own."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for module in model.modules() if layers else ():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight.data = at_least_float32(module.weight.data)
    model.load_state_dict(state)


def merged_bytes(model: nn.Module) -> int:
    """Return the size of the merged weights in fp32; a tensor that two towers share is stored once."""
    merged = {id(layer): layer.get_base_layer().weight for layer in adapted_layers(model).values()}
    bases = {id(weight) for weight in merged.values()}
    others = [p for n, p in model.named_parameters() if not ADAPTER_WEIGHTS.search(n) and id(p) not in bases]
    return 4 * sum(p.numel() for p in (*merged.values(), *others))


def describe_adapters(model: nn.Module, rank: int) -> str:
    """Return what is trained as one line for the log."""
    layers = adapted_layers(model)
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    count = len({id(layer) for layer in layers.values()})
    trained, total = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or everything)
        for everything in (False, True)
    )
    share = f"{trained:,} of {total:,} weights are trained"
    return f"LoRA of rank {rank} in {count} linear layers ({kinds}): {share}"
