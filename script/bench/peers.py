"""sentence-transformers' own objects on a plain model folder, as the benchmarks use them."""

import time

import torch


def bi_encoder(path: str, length: int):
    """Return a SentenceTransformer with mean pooling and normalisation, at `length` tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    # fp32 asked for: weights saved as fp16 would be computed in fp16, which no CPU does fast.
    transformer = Transformer(path, max_seq_length=length, model_kwargs={"dtype": torch.float32})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


def set_dropout(model, share: float) -> None:
    """Set every dropout of a model."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = share


def trainer_arguments(kind, output: str, given, lr: float, **more):
    """Return training arguments of class `kind`: `given.batch` rows a step in the order of the data, one
    pass, lr falling linearly to 0, every step logged, nothing saved.
    """
    from torch.utils.data import BatchSampler, SequentialSampler

    def in_order(data, batch_size: int, **_) -> BatchSampler:
        return BatchSampler(SequentialSampler(data), batch_size, True)

    return kind(
        output, per_device_train_batch_size=given.batch, num_train_epochs=1, learning_rate=lr,
        logging_steps=1, report_to=[], save_strategy="no", lr_scheduler_type="linear", use_cpu=True,
        disable_tqdm=True, warmup_steps=0, seed=given.seed, batch_sampler=in_order, **more,
    )  # fmt: skip


def clock(times: list[float], losses: list[float]):
    """Return a callback that notes when each step ended, and its loss."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    return Clock()
