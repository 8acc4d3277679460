"""An exponential moving average of the weights, beside the live ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """shadow = decay * shadow + (1 - decay) * live after each update (Polyak and Juditsky 1992).

    Training goes on with the live weights; evaluation and saving use the shadow, through `applied`.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the live weights."""
        for name, parameter in self.model.named_parameters():
            self.shadow[name].lerp_(parameter, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the shadow's weights within the block, and its own again after it."""
        live = {name: p.data for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            parameter.data = self.shadow[name]
        try:
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = live[name]

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return self.shadow

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up a checkpoint's shadow."""
        for name, value in state.items():
            self.shadow[name].copy_(value)
