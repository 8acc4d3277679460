"""The contrastive loss and its accuracy against a slow double loop in Python floats."""

import math

import pytest
import torch

from torch_src.models.losses import contrastive_loss, contrastive_scores, distillation_loss, r_drop_loss


def slow_loss(queries, passages, targets, masked, temperature):
    """Return (loss, accuracy) by Python floats, one query and one passage at a time."""
    total, right = 0.0, 0
    for at, (query, target) in enumerate(zip(queries.tolist(), targets.tolist(), strict=True)):
        exponents, best = [], None
        for column, passage in enumerate(passages.tolist()):
            if masked[at][column]:
                continue
            score = sum(a * b for a, b in zip(query, passage, strict=True)) / temperature
            exponents.append(score)
            if best is None or score > best[0]:
                best = (score, column)
            if column == target:
                own = score
        highest = max(exponents)
        total += highest + math.log(math.fsum(math.exp(score - highest) for score in exponents)) - own
        right += best[1] == target
    return total / len(queries), right / len(queries)


def case(seed, queries=5, passages=11, hidden=7, mask_share=0.3):
    """Return random vectors, targets and a mask that excludes no target."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, hidden, generator=draw)
    p = torch.randn(passages, hidden, generator=draw)
    targets = torch.randint(passages, (queries,), generator=draw)
    masked = torch.rand(queries, passages, generator=draw) < mask_share
    masked[torch.arange(queries), targets] = False
    return q, p, targets, masked


@pytest.mark.parametrize("temperature", [1.0, 0.05, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_double_loop(seed, temperature):
    q, p, targets, masked = case(seed)
    loss, accuracy = contrastive_loss(contrastive_scores(q, p, temperature), targets, masked)
    expected, right = slow_loss(q, p, targets, masked, temperature)
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    assert accuracy.item() == pytest.approx(right, abs=1e-6)
    assert loss.dtype == torch.float32


def test_hand_worked():
    scores = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    loss, accuracy = contrastive_loss(scores, torch.tensor([0, 1]), torch.zeros(2, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(
        (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2, rel=1e-6
    )
    assert accuracy.item() == 0.5


def test_duplicate_columns_each_count_unless_masked():
    q, p, targets, _ = case(7, queries=3, passages=4)
    doubled = torch.cat([p, p[targets]])  # columns 4, 5, 6 repeat the positives of queries 0, 1, 2
    free = torch.zeros(3, 7, dtype=torch.bool)
    own = free.clone()
    own[torch.arange(3), torch.arange(4, 7)] = True  # each query's own positive a second time
    both = free.clone()
    both[:, 4:] = True
    losses = {}
    for name, masked in (("free", free), ("own", own), ("both", both)):
        loss, _ = contrastive_loss(contrastive_scores(q, doubled, 1.0), targets, masked)
        assert loss.item() == pytest.approx(slow_loss(q, doubled, targets, masked, 1.0)[0], rel=2e-5)
        losses[name] = loss.item()
    single, _ = contrastive_loss(contrastive_scores(q, p, 1.0), targets, free[:, :4])
    assert losses["both"] == pytest.approx(single.item(), rel=1e-6)
    assert losses["free"] > losses["own"] > losses["both"]


def test_gradients_are_the_softmax_and_zero_where_masked():
    q, p, targets, masked = case(3)
    assert masked.any()
    scores = contrastive_scores(q, p, 0.5).requires_grad_()
    loss, _ = contrastive_loss(scores, targets, masked)
    loss.backward()
    assert (scores.grad[masked] == 0).all()
    for at in range(len(q)):
        kept = [column for column in range(len(p)) if not masked[at, column]]
        total = math.fsum(math.exp(scores[at, column].item()) for column in kept)
        for column in kept:
            share = math.exp(scores[at, column].item()) / total - (column == targets[at].item())
            assert scores.grad[at, column].item() == pytest.approx(share / len(q), rel=1e-4, abs=1e-8)


def test_a_masked_passage_has_no_gradient_and_no_effect_on_accuracy():
    q, p, targets, masked = case(5, queries=2, passages=3, mask_share=0.0)
    targets = torch.tensor([0, 1])
    masked[:, 2] = True
    p[2] = 100 * (q[0] + q[1])  # would score highest of all
    p.requires_grad_()
    loss, accuracy = contrastive_loss(contrastive_scores(q, p, 1.0), targets, masked)
    loss.backward()
    assert (p.grad[2] == 0).all() and torch.isfinite(p.grad).all() and p.grad[:2].abs().sum() > 0
    assert (loss.item(), accuracy.item()) == (
        pytest.approx(slow_loss(q, p, targets, masked, 1.0)[0], rel=2e-5),
        slow_loss(q, p, targets, masked, 1.0)[1],
    )


def test_all_others_masked_is_loss_zero_without_nan():
    scores = torch.tensor([[5.0, 9.0, 1.0]], requires_grad=True)
    loss, accuracy = contrastive_loss(scores, torch.tensor([2]), torch.tensor([[True, True, False]]))
    loss.backward()
    assert loss.item() == 0.0 and accuracy.item() == 1.0 and (scores.grad == 0).all()


def test_a_masked_entry_does_not_count_even_if_others_are_very_low():
    scores = torch.tensor([[-3e5, 0.0, -3e5]])
    loss, accuracy = contrastive_loss(scores, torch.tensor([0]), torch.tensor([[False, True, False]]))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6) and accuracy.item() == 1.0


def test_large_scores_do_not_overflow():
    scores = torch.tensor([[2000.0, 0.0], [0.0, 3000.0]])
    loss, accuracy = contrastive_loss(scores, torch.tensor([1, 1]), torch.zeros(2, 2, dtype=torch.bool))
    assert loss.item() == 1000.0 and accuracy.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_fp32_also_under_autocast_and_of_half_vectors(dtype):
    q, p, _, _ = case(9, hidden=64)
    q, p = q.to(dtype), p.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = contrastive_scores(q, p, 0.5)
    assert scores.dtype == torch.float32 and scores.shape == (5, 11)
    exact = q.double() @ p.double().T / 0.5
    # bf16 products would be off by 1e-2 or more
    assert (scores.double() - exact).abs().max() < 1e-4


def distilled_slowly(kind, scores, lists, teacher, temperature):
    """Return the distillation loss by loops over Python floats."""
    total = 0.0
    for at, row in enumerate(lists):
        known = [
            (scores[at][c], t) for c, t in zip(row, teacher[at], strict=True) if c >= 0 and not math.isnan(t)
        ]
        if kind == "kl" and len(known) > 1:
            p, q = (
                softmax([pair[side] / temp for pair in known]) for side, temp in ((1, temperature), (0, 1))
            )
            total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        if kind == "margin_mse" and not math.isnan(teacher[at][0]):
            gaps = [
                (scores[at][row[0]] - scores[at][c] - (teacher[at][0] - t) / temperature) ** 2
                for c, t in zip(row[1:], teacher[at][1:], strict=True)
                if c >= 0 and not math.isnan(t)
            ]
            total += sum(gaps) / max(1, len(gaps))
    return total / len(lists)


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@pytest.mark.parametrize("seed", range(4))
def test_distillation_against_loops(kind, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(6, 9, generator=draw, dtype=torch.float64)
    lists = torch.stack([torch.randperm(9, generator=draw)[:4] for _ in range(6)])
    teacher = 5 * torch.randn(6, 4, generator=draw)
    lists[0, 3] = lists[1, 1] = -1  # fewer negatives
    teacher[2, 2] = teacher[3, 0] = float("nan")  # not known
    teacher[4, 1:] = float("nan")  # nothing to compare with
    found = distillation_loss(kind, scores, lists, teacher, 2.0)
    expected = distilled_slowly(kind, scores.tolist(), lists.tolist(), teacher.tolist(), 2.0)
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_distillation_is_zero_where_student_and_teacher_agree(kind):
    teacher = torch.tensor([[3.0, 1.0, -2.0], [0.5, 0.0, float("nan")]])
    scores = torch.tensor([[3.0, 1.0, -2.0, 9.0], [1.5, 1.0, 7.0, 7.0]], requires_grad=True)
    loss = distillation_loss(kind, scores, torch.tensor([[0, 1, 2], [0, 1, 2]]), teacher, 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and scores.grad.abs().max() < 1e-6
    assert scores.grad[0, 3] == 0  # only a query's own passages are compared


def test_r_drop_by_hand():
    one, other = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    there = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    back = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert r_drop_loss(one, other).item() == pytest.approx((there + back) / 2 / 2, rel=1e-5)
    assert r_drop_loss(one, one).item() == 0
