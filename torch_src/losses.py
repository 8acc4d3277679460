"""Losses over a batch's score matrix, in fp32."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values as fp32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def contrastive_scores(queries: Tensor, passages: Tensor, temperature: float) -> Tensor:
    """Return the scores (B, P): inner products of (B, H) and (P, H), fp32 or better, over the temperature."""
    with torch.autocast(queries.device.type, enabled=False):
        return at_least_float32(queries) @ at_least_float32(passages).T / temperature


def contrastive_loss(scores: Tensor, targets: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean cross-entropy, share of queries whose positive scores highest).

    scores (B, P); targets (B,) the column of each query's positive; masked (B, P) bool, True where a passage
    must not count as a negative of that query (another positive of it, or a text that stands there twice).
    This is InfoNCE with in-batch negatives (van den Oord et al. 2018; Karpukhin et al. 2020, section 3.2).
    """
    scores = scores.masked_fill(masked, float("-inf"))
    loss = torch.nn.functional.cross_entropy(scores, targets)
    return loss, (scores.argmax(dim=1) == targets).double().mean()


def pointwise_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean binary cross-entropy, share of pairs on the right side of 0): logits and labels (B,)."""
    logits = at_least_float32(logits)
    labels = labels.to(logits.dtype)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return loss, ((logits > 0) == (labels > 0.5)).double().mean()


def listwise_loss(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return (mean cross-entropy of each group's first, share of groups where it scores highest).

    logits (G * group_size,), group after group, the positive first: the localised contrastive loss of
    Gao et al. 2021 (arXiv 2101.08751).
    """
    groups = at_least_float32(logits).view(-1, group_size)
    targets = torch.zeros(len(groups), dtype=torch.long, device=logits.device)
    return torch.nn.functional.cross_entropy(groups, targets), (groups.argmax(1) == 0).double().mean()
