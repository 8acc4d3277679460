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


def distillation_loss(
    kind: str, scores: Tensor, lists: Tensor, teacher: Tensor, temperature: float
) -> Tensor:
    """Return how far each query's scores of its own passages are from a re-ranker's, a mean over queries.

    scores (B, P), as the contrastive loss has them; lists (B, 1 + N) int64 the columns of a query's positive
    and own negatives, -1 for none; teacher (B, 1 + N) the re-ranker's logits, NaN for none. Queries with
    fewer than two known passages count 0.

    kl: KL divergence of the softmax of the scores from that of logits / temperature (Hinton et al. 2015; for
    retrieval Ren et al. 2021, RocketQAv2). margin_mse: squared difference of the two margins between positive
    and negative, a mean over negatives (Hofstaetter et al. 2020, arXiv 2010.02666).
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
    """Return the mean of both Kullback-Leibler divergences between two relevance probabilities of each pair.

    one, other (B,): the logits of two passes with other dropout (R-Drop, Liang et al. 2021, arXiv
    2106.14448).
    """
    p, q = torch.sigmoid(one), torch.sigmoid(other)
    log = torch.nn.functional.logsigmoid
    there = p * (log(one) - log(other)) + (1 - p) * (log(-one) - log(-other))
    back = q * (log(other) - log(one)) + (1 - q) * (log(-other) - log(-one))
    return ((there + back) / 2).mean()


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
