"""Learning-rate schedule, parameter groups of the optimizer, averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def lr_factor(step: int, total_steps: int, warmup_proportion: float) -> float:
    """Return the factor on the peak learning rate of update `step` (from 0): linear rise, then fall to 0."""
    warmup = int(total_steps * warmup_proportion)
    if step < warmup:
        return (step + 1) / warmup
    return (total_steps - step) / max(1, total_steps - warmup)


def parameter_groups(
    model: nn.Module, weight_decay: float, peak_lr: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay on matrices, none on vectors (biases, norms); tied weights once.

    Parameters named in `peak_lr` go into groups of their own with that `peak_lr`.
    """
    peak_lr = peak_lr or {}
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {(None, True): [], (None, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((peak_lr.get(name), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if is_matrix else 0.0}
        | ({} if lr is None else {"peak_lr": lr})
        for (lr, is_matrix), parameters in groups.items()
    ]


class Ema:
    """Exponential moving average of the trained weights: shadow = decay * shadow + (1 - decay) * live.

    Updated after each update of the live weights (Polyak and Juditsky 1992). Evaluation and saving use the
    shadow, through `applied`; training continues with the live weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averaged weights."""
        for name, parameter in self.trained.items():
            self.shadow[name].lerp_(parameter, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the shadow weights within the block."""
        live = {name: p.data for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            parameter.data = self.shadow[name]
        try:
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.data = live[name]

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Copy the shadow of a checkpoint."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
