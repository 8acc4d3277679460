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


def parameter_groups(
    model: nn.Module, weight_decay: float, own_lr: dict[str, float] | None = None
) -> list[dict]:
    """Return AdamW's groups: weight decay on matrices, none on biases and norms (vectors). Tied weights stand
    once. Parameters named in `own_lr` stand in groups with a `peak_lr` of their own.
    """
    own_lr = own_lr or {}
    kinds: dict[tuple, list] = {(None, True): [], (None, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault((own_lr.get(name), parameter.ndim > 1), []).append(parameter)
    groups = []
    for (lr, is_matrix), parameters in kinds.items():
        group = {"params": parameters, "weight_decay": weight_decay if is_matrix else 0.0}
        groups.append(group if lr is None else {**group, "peak_lr": lr})
    return groups
