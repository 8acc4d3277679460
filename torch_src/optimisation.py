"""Learning-rate schedule and the optimiser's parameter groups."""

from torch import nn


def lr_factor(step: int, total_steps: int, warmup_proportion: float) -> float:
    """Return the factor on the peak learning rate of update `step` (from 0): a linear rise, then a linear
    fall to 0.
    """
    warmup = int(total_steps * warmup_proportion)
    if step < warmup:
        return (step + 1) / warmup
    return (total_steps - step) / max(1, total_steps - warmup)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's groups: weight decay on matrices, none on biases and norms (vectors). Tied weights stand
    once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
