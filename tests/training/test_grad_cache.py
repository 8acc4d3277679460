"""Cached gradients against those of one graph, for every combination of the options that meet in them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from token_lists import table_of
from toy_world import lines, make_world, write

from torch_src.cross_hparams import CrossHparams
from torch_src.cross_train import training_stage as cross_stage
from torch_src.data.mined_files import COLUMNS
from torch_src.dual_hparams import DualHparams
from torch_src.dual_train import describe_teacher
from torch_src.dual_train import training_stage as dual_stage
from torch_src.models.losses import contrastive_loss, contrastive_scores, listwise_loss, pointwise_loss
from torch_src.models.tokenization import TokenTable
from torch_src.runtime.errors import UserError
from torch_src.training.grad_cache import Chunking, DeviceTokens, seed_of

COMMON = dict(eval_every=-1, precision="fp32", device="cpu", tokens_per_batch=10**6, log_every=100)
LENGTHS = {"dual": dict(p_max_seq_len=48), "cross": dict(max_seq_len=64)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), train_queries=24)


def stage(world, kind, double=True, **knobs):
    """Return the training stage of this world with its task loaded, in fp64 when asked."""
    build, settings = {"dual": (dual_stage, DualHparams), "cross": (cross_stage, CrossHparams)}[kind]
    where = dict(data_dir=str(world / "data"), output_dir=str(world / "out"))
    given = {**COMMON, **LENGTHS[kind], **where, **knobs}
    made = build(settings(pretrained_model_path=str(world / "model"), **given))
    made.task.load()
    if double:
        made.task.model.double()
    made.task.model.train()
    return made


def load(world, kind, double=True, **knobs):
    """Return the loaded task of this world."""
    return stage(world, kind, double, **knobs).task


def backward(task, batch, scale=1.0) -> None:
    """Add the gradient of a batch as the trainer does."""
    out = task.forward(batch)
    (out.loss * scale).backward()
    for chunked in out.deferred:
        chunked.backward()


def gradients(task, batches=1) -> torch.Tensor:
    """Return the gradient accumulated over this many batches."""
    task.model.zero_grad(set_to_none=True)
    for at in range(batches):
        backward(task, task.make_batch((0, at)), 1 / batches)
    return flat(task.model)


def flat(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_graph(task, batches=1) -> torch.Tensor:
    """Return the gradient of the plain dual loss, all texts of a side in one forward pass."""
    task.model.zero_grad(set_to_none=True)
    for at in range(batches):
        batch = task.make_batch((0, at))
        queries, passages = (
            task.model(side, *on_host(ids, task))
            for side, ids in (("query", batch.queries), ("passage", batch.passages))
        )
        scores = contrastive_scores(queries, passages, task.hp.temperature)
        loss, _ = contrastive_loss(
            scores, *map(torch.from_numpy, (batch.source.targets, batch.source.masked))
        )
        (loss / batches).backward()
    return flat(task.model)


def on_host(table, task) -> torch.Tensor:
    """Return the padded inputs of all texts of a table, each (N, L)."""
    return torch.from_numpy(table.padded(np.arange(len(table)), task.setup.tokenizer.pad_token_id))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# Every pair of values of two options occurs.
DUAL = [
    dict(share_encoder=True, normalize=True, temperature=0.05, pooling="mean"),
    dict(share_encoder=False, normalize=True, temperature=0.05, pooling="cls"),
    dict(share_encoder=True, normalize=False, temperature=1.0, pooling="cls"),
    dict(share_encoder=False, normalize=False, temperature=3.0, pooling="mean"),
]


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("knobs", DUAL, ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_dual_gradients_are_those_of_one_graph(world, knobs, batches):
    task = load(world, "dual", batch_size=6, dropout=0.0, **knobs)
    expected = one_graph(task, batches)
    for chunk in (0, 1, 4, 100):
        task.chunking = dataclasses.replace(task.chunking, texts=chunk)
        assert apart(gradients(task, batches), expected) < 1e-9


@pytest.mark.parametrize("share", [True, False])
def test_in_fp32(world, share):
    # Normalized: raw products of a random model are about 30 each and differ by 1e-3, so fp32 leaves three
    # digits of their gradient, cached or not.
    knobs = dict(normalize=True, temperature=0.05, pooling="mean", share_encoder=share)
    task = load(world, "dual", False, batch_size=8, dropout=0.0, grad_cache_chunk=3, **knobs)
    assert apart(gradients(task), one_graph(task)) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("knobs", DUAL, ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_with_dropout_and_mixed_precision_the_same_chunks_give_the_same(world, knobs, precision):
    """tokens_per_batch makes the same chunks without the cache, and keeps all of their graphs."""
    kept, cached = (
        load(
            world, "dual", precision == "fp32", batch_size=8, dropout=0.3, precision=precision,
            tokens_per_batch=70, grad_cache_chunk=chunk, **knobs,
        )
        for chunk in (0, 1000)
    )  # fmt: skip
    chunks = [
        len(task.embed("passage", b := task.make_batch((0, 0)), b.passages).spans) for task in (kept, cached)
    ]
    assert chunks[0] == chunks[1] > 2
    assert apart(gradients(cached), gradients(kept)) < (1e-9 if precision == "fp32" else 1e-5)
    # the same dropout each time: a function of seed, step and place
    assert gradients(cached).equal(gradients(cached))


def test_dropout_differs_between_steps_sides_and_chunks(world):
    task = load(world, "dual", batch_size=4, dropout=0.5, grad_cache_chunk=2)
    batch, other = task.make_batch((0, 0)), task.make_batch((0, 1))
    first = batch.passages.ids[: batch.passages.lengths[0]]
    same_ids = TokenTable(np.tile(first, 4), np.full(4, len(first)))
    outputs = [task.embed(side, b, same_ids).outputs for side in ("query", "passage") for b in (batch, other)]
    rows = torch.cat(outputs).detach()
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.parametrize("loss", ["pointwise", "listwise"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_cross_gradients_are_those_of_one_graph(world, loss, epsilon):
    knobs = dict(loss=loss, batch_size=6, groups_per_step=3, group_size=3, dropout=0.0, fgm_epsilon=epsilon)
    for chunk in (0, 2):
        task = load(world, "cross", grad_cache_chunk=chunk, **knobs)
        batch, table = task.make_batch((0, 0)), task.model.word_embeddings

        def plain(task=task, batch=batch):
            logits = task.model(*on_host(batch.pairs, task))
            if task.listwise:
                return listwise_loss(logits, 3)[0]
            return pointwise_loss(logits, torch.from_numpy(batch.labels))[0]

        found, before = gradients(task), table.detach().clone()
        if epsilon:
            g = torch.autograd.grad(plain(), table)[0]
            table.data.add_(epsilon * g / g.norm())
        task.model.zero_grad(set_to_none=True)
        plain().backward()
        assert apart(found, flat(task.model)) < 1e-9
        assert not epsilon or not table.equal(before)
        table.data.copy_(before)
        gradients(task)
        assert table.equal(before)  # restored


def test_fgm_keeps_the_accumulated_gradient_of_the_embeddings(world):
    knobs = dict(batch_size=4, dropout=0.0, fgm_epsilon=0.1)
    task = load(world, "cross", **knobs)
    parts = []
    for at in range(2):
        task.model.zero_grad(set_to_none=True)
        backward(task, task.make_batch((0, at)), 1 / 2)
        parts.append(flat(task.model))
    assert apart(gradients(task, 2), parts[0] + parts[1]) < 1e-9


def test_the_word_embeddings_are_restored_after_an_error_in_fgm(world, monkeypatch):
    knobs = dict(loss="pointwise", batch_size=4, dropout=0.0, fgm_epsilon=0.5, grad_cache_chunk=2)
    task = load(world, "cross", **knobs)
    before, real, calls = task.model.word_embeddings.detach().clone(), task.model.forward, []

    def failing(*tensors):
        calls.append(task.model.word_embeddings.equal(before))
        if len(calls) == 8:  # 2 chunks, forward and backward: unperturbed, then perturbed
            raise MemoryError
        return real(*tensors)

    monkeypatch.setattr(task.model, "forward", failing)
    with pytest.raises(MemoryError):
        backward(task, task.make_batch((0, 0)))
    assert calls == [True] * 4 + [False] * 4 and task.model.word_embeddings.equal(before)


def test_gradient_checkpointing_changes_no_gradient(world):
    cross = dict(batch_size=6, loss="pointwise")
    for kind, knobs in (
        ("dual", dict(batch_size=6)),
        ("cross", cross),
        ("cross", {**cross, "fgm_epsilon": 1.0}),
    ):
        plain, twice = (
            gradients(load(world, kind, dropout=0.2, gradient_checkpointing=on, **knobs))
            for on in (False, True)
        )
        assert apart(twice, plain) < 1e-9


def test_memory_follows_the_chunk(world):
    """The numbers that autograd keeps for a backward pass, with and without the cache."""
    kept = {}
    for chunk in (0, 2):
        for batch in (4, 16):
            task, count = load(world, "dual", batch_size=batch, dropout=0.0, grad_cache_chunk=chunk), [0, 0]

            def pack(tensor, count=count):
                count[0] += tensor.numel()
                count[1] = max(count)
                return (tensor, count)

            def unpack(packed):
                tensor, counter = packed
                counter[0] -= tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                gradients(task)
            kept[chunk, batch] = count[1]
    assert kept[0, 16] > 3 * kept[0, 4]
    assert kept[2, 16] < 1.5 * kept[2, 4] and kept[2, 16] < kept[0, 16] / 4


def test_ema_with_cached_gradients_follows_its_formula(world):
    knobs = dict(batch_size=8, dropout=0.1, grad_cache_chunk=3, ema_decay=0.9, max_steps=3)
    made = stage(world, "dual", **knobs)
    task, trainer = made.task, made.trainer(world / "ema", {})
    live = [[p.detach().clone() for p in task.model.parameters()]]
    update = trainer.ema.update

    def recorded():
        live.append([p.detach().clone() for p in task.model.parameters()])
        update()

    trainer.ema.update = recorded
    trainer.run()
    assert len(live) == 4
    shadow = live[0]
    for step in live[1:]:
        shadow = [0.9 * old + 0.1 * new for old, new in zip(shadow, step, strict=True)]
    for found, expected in zip(trainer.ema.shadow.values(), shadow, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    saved = torch.load(world / "out/dual_params.bin", weights_only=True)
    for name, value in trainer.ema.shadow.items():
        assert saved[name].equal(value)  # the shadow is saved, training continues with the live weights
    now = list(task.model.parameters())
    assert all(p.equal(last) for p, last in zip(now, live[-1], strict=True))


def test_seeds_are_apart():
    seeds = {seed_of(*numbers) for numbers in itertools.product(range(5), repeat=4)}
    assert len(seeds) == 625 and all(0 <= seed < 2**63 for seed in seeds)


def test_outputs_are_in_the_order_of_the_texts():
    chunking = Chunking(2, 100, 0, torch.device("cpu"), "fp32")
    texts = table_of([[7], [5, 5, 5], [6, 6], [8, 8, 8, 8]])
    forward = chunking.run(lambda ids, mask: (ids * mask).amax(1).float(), texts, 9, (0,))
    assert forward.outputs.tolist() == [7, 5, 6, 8] and len(forward.spans) == 2


def test_chunks_are_padded_as_on_the_host():
    table, order = table_of([[7], [5, 4, 3], [6, 2]], [[0], [0, 1, 1], [0, 1]]), np.array([1, 2, 0])
    tokens = DeviceTokens(table, order, 9, torch.device("cpu"))
    assert [t.tolist() for t in tokens.padded(1, 3)] == [[[6, 2], [7, 9]], [[1, 1], [1, 0]], [[0, 1], [0, 0]]]
    for first, last in ((0, 2), (2, 3), (0, 3)):
        found = torch.stack(tokens.padded(first, last))
        assert found.equal(torch.from_numpy(table.padded(order[first:last], 9)))


@pytest.mark.parametrize("share", [True, False])
def test_matryoshka_is_the_mean_over_its_dimensions(world, share):
    knobs = dict(batch_size=8, dropout=0.0, normalize=True, temperature=0.1, share_encoder=share)
    task = load(world, "dual", matryoshka_dims="4,16", grad_cache_chunk=3, **knobs)
    found = gradients(task)
    task.model.zero_grad(set_to_none=True)
    batch = task.make_batch((0, 0))
    queries, passages = (
        task.model(side, *on_host(ids, task))
        for side, ids in (("query", batch.queries), ("passage", batch.passages))
    )
    masks = [torch.from_numpy(array) for array in (batch.source.targets, batch.source.masked)]
    losses = []
    for dims in (4, 16, 32):
        q, p = (torch.nn.functional.normalize(v[:, :dims], dim=1) for v in (queries, passages))
        losses.append(contrastive_loss(q @ p.T / 0.1, *masks)[0])
    (sum(losses) / 3).backward()
    assert apart(found, flat(task.model)) < 1e-9
    for wrong in ("16,4", "4,32", "0", "a", "4,4"):
        with pytest.raises(UserError, match="matryoshka_dims"):
            load(world, "dual", matryoshka_dims=wrong, **knobs)


def test_r_drop_with_cached_gradients(world):
    """Without dropout both passes agree and R-Drop adds nothing; with dropout it changes the gradient."""
    knobs = dict(batch_size=6, loss="pointwise", grad_cache_chunk=2)
    plain, same = (load(world, "cross", dropout=0.0, r_drop_alpha=alpha, **knobs) for alpha in (0.0, 5.0))
    assert apart(gradients(same), gradients(plain)) < 1e-9
    with_dropout = [load(world, "cross", dropout=0.5, r_drop_alpha=alpha, **knobs) for alpha in (1e-12, 50.0)]
    assert apart(gradients(with_dropout[1]), gradients(with_dropout[0])) > 1e-2
    kept, cached = (
        load(
            world, "cross", dropout=0.5, r_drop_alpha=50.0, tokens_per_batch=150,
            **{**knobs, "grad_cache_chunk": chunk},
        )
        for chunk in (0, 1000)
    )  # fmt: skip
    assert len(kept.logits(kept.make_batch((0, 0)), 0).spans) > 2
    assert apart(gradients(cached), gradients(kept)) < 1e-9


def with_teacher(world, folder) -> dict:
    """Write the world's training rows with a teacher's scores beside them; return the knob."""
    rows = lines(world / "data/train/dual.train.tsv")
    write(folder / "dual.train.tsv", rows)
    fields = [["", "", "", "", f"{len(row) % 5}", "", "", "", "", f"{len(row) % 3 - 2}"] for row in rows]
    write(folder / "dual.train.ids.tsv", ["\t".join(COLUMNS), *("\t".join(field) for field in fields)])
    return dict(train_set=str(folder / "dual.train.tsv"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "share", "more"),
    [
        ("kl", True, {}),
        ("margin_mse", False, {}),
        ("kl", False, {"matryoshka_dims": "4,16"}),
        ("margin_mse", True, {"gradient_checkpointing": True}),
    ],
)
def test_distillation_with_cached_gradients(world, tmp_path, kind, share, more):
    knobs = dict(
        batch_size=6, dropout=0.2, normalize=True, temperature=0.05, pooling="mean", hard_negatives=2,
        share_encoder=share, tokens_per_batch=100, distill_loss=kind, distill_weight=3.0,
    )  # fmt: skip
    kept, cached = (
        load(world, "dual", **knobs, **more, **with_teacher(world, tmp_path), grad_cache_chunk=chunk)
        for chunk in (0, 1000)
    )
    assert apart(gradients(cached, 2), gradients(kept, 2)) < 1e-9
    without = load(world, "dual", **{**knobs, "distill_loss": "none"}, **more)
    assert apart(gradients(without, 2), gradients(kept, 2)) > 1e-2


TEACHERS = (lambda text: len(text) % 11 / 2, lambda text: float(text.count("，") - text.count("的")))


def softmax(values: list[float]) -> np.ndarray:
    powers = np.exp(np.array(values) - max(values))
    return powers / powers.sum()


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_a_querys_scores_meet_those_of_its_teachers(world, tmp_path, kind):
    """The loss of two epochs, 4 negatives a query, against teachers that are functions of the text."""
    rows = [line.split("\t") for line in lines(world / "data/train/dual.train.tsv")]
    for name, logit in zip("ab", TEACHERS, strict=True):
        scored = [f"{logit(row[2])}\t{logit(row[4])}" for row in rows]
        write(tmp_path / name, ["positive_logit\tnegative_logit", *scored])
    task = load(
        world, "dual", batch_size=6, hard_negatives=4, distill_loss=kind, distill_temperature=2.0,
        contrastive_weight=0.0, normalize=True, temperature=0.02, dropout=0.0, pooling="mean",
        share_encoder=True, teacher=(str(tmp_path / "a"), str(tmp_path / "b")),
    )  # fmt: skip
    seen = set()
    for epoch in (0, 1):
        batch, losses = task.make_batch((epoch, 0)), []
        queries = task.embed("query", batch, batch.queries).outputs.detach().numpy()
        passages = task.embed("passage", batch, batch.passages).outputs.detach().numpy()
        for at, query in enumerate(batch.source.queries):
            columns = [column for column in batch.source.lists[at].tolist() if column >= 0]
            texts = [batch.source.passages[column] for column in columns]
            own = [row for row in rows if row[0] == query]
            assert texts[0] in {row[2] for row in own} and set(texts[1:]) <= {row[4] for row in own}
            assert len(texts) == 1 + min(4, len({row[4] for row in own}))
            student = passages[columns] @ queries[at] / 0.02
            teacher = [sum(logit(text) for logit in TEACHERS) / 2 / 2.0 for text in texts]
            if kind == "kl":
                p, q = softmax(teacher), softmax(student)
                losses.append((p * np.log(p / q)).sum())
            else:
                gaps = (student[0] - student[1:]) - (teacher[0] - np.array(teacher[1:]))
                losses.append((gaps**2).mean())
            seen |= set(texts)
        assert task.forward(batch).loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(seen) > 40


def test_the_log_shows_how_far_apart_a_teacher_ranks():
    teacher = np.array([[3, 1], [2, np.nan], [0, 1], [4, 0]], dtype=np.float32)
    found = describe_teacher(teacher)
    assert "3 of 4 rows" in found and "67%, by 2.0 (median" in found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_distillation_alone_fits_the_teacher(world, tmp_path, kind):
    """Without the contrastive loss the student learns the teacher's scores of its own passages."""
    knobs = dict(
        batch_size=6, dropout=0.0, normalize=True, temperature=0.05, pooling="mean", hard_negatives=2
    )
    more = dict(distill_loss=kind, contrastive_weight=0.0, lr=2e-3, **with_teacher(world, tmp_path))
    made = stage(world, "dual", epoch=30, max_steps=40, log_every=1, **knobs, **more)
    progress = made.trainer(tmp_path, {}).run()
    losses = [entry["loss"] for entry in progress.history]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_training_file_without_a_teacher_is_named(world):
    with pytest.raises(UserError, match="dual.train.ids.tsv: no such file"):
        load(world, "dual", batch_size=8, distill_loss="kl")
