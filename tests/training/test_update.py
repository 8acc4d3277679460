"""What one update asks of the device: values that the host waits for, casts of the weights."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_world import make_world
from training.test_grad_cache import stage

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__")  # a GPU would be waited for
CASES = {
    "dual": dict(batch_size=6, grad_cache_chunk=2),
    "dual-kept": dict(batch_size=6, matryoshka_dims="4,16", tokens_per_batch=100, accumulation_steps=2),
    "cross-listwise": dict(loss="listwise", groups_per_step=2, group_size=3, grad_cache_chunk=2),
    "cross-fgm": dict(loss="pointwise", batch_size=6, grad_cache_chunk=2, fgm_epsilon=0.1),
    "cross-r-drop": dict(loss="pointwise", batch_size=6, r_drop_alpha=1.0),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), train_queries=24)


class Casts(TorchDispatchMode):
    """Counts the casts of each parameter to 16 bits."""

    def __init__(self, model):
        super().__init__()
        self.names, self.seen = {id(p): name for name, p in model.named_parameters()}, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self.names:
            self.seen[self.names[id(args[0])]] += 1
        return func(*args, **(kwargs or {}))


def reads_of_an_update(monkeypatch, made, folder) -> Counter:
    """Return how often an update reads values of tensors, without optimizer and attention masks.

    The fused optimizer of a GPU reads none. transformers reads each padded attention mask, to omit it when
    all texts of a chunk are equally long: one more wait per forward pass.
    """
    trainer, seen = made.trainer(folder, {}), Counter()
    batches = [made.task.make_batch((0, at)) for at in range(trainer.options.accumulation_steps)]
    trainer.optimizer.step = lambda: None
    monkeypatch.setattr(
        "transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_, **__: False, raising=False
    )
    for name in READS:
        real = getattr(torch.Tensor, name)

        def counted(tensor, *args, real=real, name=name, **options):
            seen[name] += 1
            return real(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    trainer.update(0, batches)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("case", list(CASES))
def test_an_update_waits_once_besides_attention_masks(world, tmp_path, monkeypatch, case):
    made = stage(world, case.split("-")[0], dropout=0.1, **CASES[case])
    assert reads_of_an_update(monkeypatch, made, tmp_path) == {"tolist": 1}


@pytest.mark.parametrize(("cached", "passes"), [(True, 2), (False, 1)])
def test_each_weight_is_cast_once_per_pass(world, cached, passes):
    """GradCache passes twice: without a graph, then with one; both over several chunks."""
    knobs = dict(precision="bf16", batch_size=6, dropout=0.1, tokens_per_batch=100)
    made = stage(world, "dual", double=False, grad_cache_chunk=1000 * cached, **knobs)
    with Casts(made.task.model) as casts:
        out = made.task.forward(made.task.make_batch((0, 0)))
        out.loss.backward()
        for chunked in out.deferred:
            chunked.backward()
    assert len(out.deferred[1].spans) > 2  # the passages
    weights = [name for name in casts.names.values() if "layer.0" in name and "dense.weight" in name]
    assert len(weights) == 6 and all(casts.seen[name] == passes for name in weights)
    assert all(p.grad.dtype == torch.float32 for p in made.task.model.parameters() if p.grad is not None)
    assert set(casts.seen.values()) == {passes}
