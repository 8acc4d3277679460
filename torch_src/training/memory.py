"""How a batch is split into forward passes that fit into memory: one rule for training and for its plan."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_src.runtime.devices import USABLE_FRACTION, autocast, available_gpu_memory, free_memory

CPU_TOKENS = 2048  # in a forward pass: its activations should fit into the caches of a CPU
# On a GPU more tokens keep it busier, up to a point. Below MIN_TOKENS a GPU is mostly idle.
MIN_TOKENS, MAX_TOKENS = 512, 65536
# A backward pass also needs gradients of activations, of about one layer at a time. BERT-base
# in bf16 on an H200, chunks of 16,384 tokens: 0.47 MB a token at the peak, of which 0.46 MB saved by count.
BACKWARD_FACTOR = 1.15


@dataclass(frozen=True)
class MemoryNeed:
    """Free memory and what training needs of it, in bytes."""

    free_bytes: int
    state_bytes: int  # gradients, moments and copies of the weights
    bytes_per_token: float  # of the activations of a padded token

    @property
    def fitting_tokens(self) -> int:
        """The padded tokens whose activations fit at once."""
        usable = USABLE_FRACTION * self.free_bytes
        return max(0, int((usable - self.state_bytes) / self.bytes_per_token))

    def total_bytes(self, tokens: int) -> float:
        """Return the bytes of a run that keeps the activations of this many tokens."""
        return self.state_bytes + self.bytes_per_token * tokens


def choose_chunk(
    texts: int, tokens: int, fitting: int, batch_texts: int, batch_tokens: int, on_gpu: bool
) -> tuple[int, int]:
    """Return (texts, tokens) of a chunk; texts 0: no GradCache, the graphs of the whole batch are kept.

    texts, tokens: as the user gave them; -1 and 0 mean automatic. `fitting`: tokens that fit into memory.
    batch_texts, batch_tokens: of the largest batch. A chunk is a power of two of tokens.
    """
    if not tokens:
        limit = MAX_TOKENS if on_gpu else CPU_TOKENS
        tokens = min(limit, max(MIN_TOKENS, 1 << max(1, fitting).bit_length() - 1))
    if texts < 0:
        texts = 0 if batch_tokens <= fitting else batch_texts
    return texts, tokens


def measure_memory(
    model: nn.Module,
    probe: Callable[[int], tuple[Tensor, int]],
    device: torch.device,
    precision: str,
    averaged: bool,
) -> MemoryNeed:
    """Return what training needs beside the loaded model.

    probe(n): a forward pass of n texts, (outputs, tokens). `averaged`: the run keeps an exponential moving
    average of the weights.
    """
    was_training = model.training
    model.train()
    with autocast(device, precision), _without_checkpointing(model):
        (one, one_tokens), (two, two_tokens) = (_saved_bytes(model, probe, texts) for texts in (1, 2))
    model.train(was_training)
    # the difference: copies of the weights in 16 bits are saved once for any number of texts
    bytes_per_token = BACKWARD_FACTOR * (two - one) / (two_tokens - one_tokens)
    return MemoryNeed(_free_bytes(device), state_bytes(model, precision, averaged), bytes_per_token)


def probe_inputs(texts: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the inputs of a probe: token ids and a mask with padding, both (texts, tokens) int64."""
    mask = torch.ones(texts, tokens, dtype=torch.int64, device=device)
    mask[:, -1] = 0  # attention to padded texts may need more memory
    return torch.zeros_like(mask), mask


def state_bytes(model: nn.Module, precision: str, averaged: bool) -> int:
    """Return the bytes that training adds to the weights: gradients, AdamW's two moments, copies.

    Frozen weights add nothing: with LoRA and 16 bits they are loaded as such.
    """
    trained = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    low = sum(trained) // 2 if precision != "fp32" else 0
    # the gradient of a weight is complete before it is added to that of the other chunks
    return 3 * sum(trained) + averaged * sum(trained) + low + max(trained, default=0)


def _free_bytes(device: torch.device) -> int:
    """Return the bytes that this process may still allocate."""
    if device.type == "cuda":
        return available_gpu_memory(device)
    return free_memory() // int(os.getenv("LOCAL_WORLD_SIZE", "1"))


def _saved_bytes(model: nn.Module, probe: Callable[[int], tuple[Tensor, int]], texts: int) -> tuple[int, int]:
    """Return (bytes that a forward pass saves for its backward pass, weights excluded; its padded tokens)."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, tokens = probe(texts)
    return sum(storage.nbytes() for storage in saved.values()), tokens


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Save all activations in this block: with --gradient_checkpointing they are an upper bound."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        setattr(module, "gradient_checkpointing", False)  # noqa: B010 (mypy knows no such attribute)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, "gradient_checkpointing", True)  # noqa: B010
