"""Objects of sentence-transformers for a plain model folder, as the benchmarks use them."""

import argparse
import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from torch_src.runtime.devices import choose_precision


def bi_encoder(
    path: str, length: int, device: str = "cpu", dtype: torch.dtype = torch.float32, pooling: str = "mean"
) -> Any:
    """Return a SentenceTransformer at `length` tokens: mean pooling and normalization, or cls without."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = Transformer(path, max_seq_length=length, model_kwargs=_model_options(dtype))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)]
    return SentenceTransformer(modules=modules + [Normalize()] * (pooling == "mean"), device=device)


def cross_encoder(path: str, length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return a CrossEncoder whose predict() returns logits."""
    from sentence_transformers import CrossEncoder

    options: dict[str, Any] = {"activation_fn": torch.nn.Identity(), "model_kwargs": _model_options(dtype)}
    return CrossEncoder(path, max_length=length, device=device, **options)


def _model_options(dtype: torch.dtype) -> dict[str, Any]:
    # explicitly: a model saved in fp16 would compute in fp16, which is slow on CPUs
    return {"dtype": dtype, "attn_implementation": "sdpa"}


def peer_autocast(precision: str) -> tuple[AbstractContextManager, str]:
    """Return (autocast context on the CPU, bf16 or fp32) for the precision that ours would choose."""
    low = choose_precision(precision, torch.device("cpu")) == "bf16"
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=low), "bf16" if low else "fp32"


def set_dropout(model: torch.nn.Module, share: float) -> None:
    """Set the rate of every dropout layer of a model."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        if hasattr(module, "dropout_prob"):  # of a fused attention
            setattr(module, "dropout_prob", share)  # noqa: B010 (mypy: attributes of a module are tensors)


def trainer_arguments(kind: Any, output: str, args: argparse.Namespace, lr: float, **more: Any) -> Any:
    """Return training arguments of class `kind`: one pass in the order of the data, linear decay to 0.

    Every step is logged, nothing is saved.
    """
    from torch.utils.data import BatchSampler, SequentialSampler

    def in_order(data: Any, batch_size: int, **_: Any) -> BatchSampler:
        return BatchSampler(SequentialSampler(data), batch_size, True)

    return kind(
        output, per_device_train_batch_size=args.batch, num_train_epochs=1, learning_rate=lr,
        logging_steps=1, report_to=[], save_strategy="no", lr_scheduler_type="linear", use_cpu=True,
        disable_tqdm=True, warmup_steps=0, seed=args.seed, batch_sampler=in_order, **more,
    )  # fmt: skip


def step_recorder(times: list[float], losses: list[float]) -> Any:
    """Return a trainer callback that appends the end time and the loss of each step."""
    from transformers import TrainerCallback

    class StepRecorder(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    return StepRecorder()
