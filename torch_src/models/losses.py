"""Losses over the scores of a batch, computed in fp32."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid

from torch_src.runtime.devices import at_least_float32


def contrastive_scores(queries: Tensor, passages: Tensor, temperature: float) -> Tensor:
    """Return the scores (B, P): inner products of (B, H) and (P, H) over the temperature, fp32 or better."""
    with torch.autocast(queries.device.type, enabled=False):
        return at_least_float32(queries) @ at_least_float32(passages).T / temperature


def contrastive_loss(scores: Tensor, targets: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean cross-entropy, share of queries whose positive scores highest).

    scores (B, P); targets (B,) int64, the column of each query's positive; masked (B, P) bool, True where a
    passage must not count as a negative of that query (another positive of it, or a duplicate text).
    This is InfoNCE with in-batch negatives (van den Oord et al. 2018; Karpukhin et al. 2020, section 3.2).
    """
    scores = scores.masked_fill(masked, float("-inf"))
    return cross_entropy(scores, targets), (scores.argmax(dim=1) == targets).double().mean()


def distillation_loss(
    kind: str, scores: Tensor, lists: Tensor, teacher: Tensor, temperature: float
) -> Tensor:
    """Return the distance between scores of a query's own passages and a re-ranker's, mean over queries.

    scores (B, P), as in the contrastive loss; lists (B, 1 + N) int64, the columns of a query's positive and
    own negatives, -1 for none; teacher (B, 1 + N), the re-ranker's logits, NaN where unknown. A query with
    fewer than two known passages contributes 0.

    kl: KL divergence of softmax(scores) from softmax(logits / temperature) (Hinton et al. 2015; for retrieval
    Ren et al. 2021, RocketQAv2). margin_mse: squared difference between the two margins of positive and
    negative, mean over negatives (Hofstaetter et al. 2020, arXiv 2010.02666).
    """
    known = (lists >= 0) & ~teacher.isnan()
    student = scores.gather(1, lists.clamp_min(0))
    teacher = teacher.to(scores.dtype)
    if kind == "margin_mse":
        pairs = known[:, :1] & known[:, 1:]
        gap = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:]) / temperature
        terms = torch.where(pairs, gap, 0.0).square().sum(1) / pairs.sum(1).clamp_min(1)
        return terms.mean()
    assert kind == "kl", kind
    hidden = float("-inf")
    wanted = torch.softmax((teacher / temperature).masked_fill(~known, hidden), 1).nan_to_num(0.0)
    logs = torch.log_softmax(student.masked_fill(~known, hidden), 1)
    terms = torch.where(known & (wanted > 0), wanted * (wanted.clamp_min(1e-30).log() - logs), 0.0).sum(1)
    return torch.where(known.sum(1) > 1, terms, 0.0).mean()


def r_drop_loss(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean of both KL divergences between two relevance probabilities of each pair.

    one, other (B,): logits of two passes with different dropout (R-Drop, Liang et al. 2021,
    arXiv 2106.14448).
    """
    p, q = torch.sigmoid(one), torch.sigmoid(other)
    forward = p * (logsigmoid(one) - logsigmoid(other)) + (1 - p) * (logsigmoid(-one) - logsigmoid(-other))
    reverse = q * (logsigmoid(other) - logsigmoid(one)) + (1 - q) * (logsigmoid(-other) - logsigmoid(-one))
    return ((forward + reverse) / 2).mean()


def pointwise_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean binary cross-entropy, share of logits with the right sign) of logits and labels (B,)."""
    logits = at_least_float32(logits)
    labels = labels.to(logits.dtype)
    accuracy = ((logits > 0) == (labels > 0.5)).double().mean()
    return binary_cross_entropy_with_logits(logits, labels), accuracy


def listwise_loss(logits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return (mean cross-entropy of each group's first pair, share of groups in which it scores highest).

    logits (G * group_size,), group after group, the positive first: the localized contrastive loss of
    Gao et al. 2021 (arXiv 2101.08751).
    """
    groups = at_least_float32(logits).view(-1, group_size)
    targets = torch.zeros(len(groups), dtype=torch.long, device=logits.device)
    return cross_entropy(groups, targets), (groups.argmax(1) == 0).double().mean()
