"""Pretrained models by folder or hub name: configuration, weights, and what can be wrong with them."""

import json
import os
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from torch_src.runtime.errors import DAMAGE, UserError
from torch_src.runtime.log import log
from torch_src.runtime.stamps import fingerprint_files, fingerprint_text

WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
SHARPER = 5.0  # at BERT's 0.02 attention starts flat: every token sees the mean of all
LOCAL_PREFIXES = (
    "torch_pretrained_models",
    ".",
    "/",
    "~",
)  # a path, not a hub name, even when it is not there
DROPOUT_NAMES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "dropout",
    "embd_pdrop",
)
NO_ARCHITECTURE = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "id2label", "label2id",
    "problem_type", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "bos_token_id",
    "eos_token_id", "sep_token_id", "cls_token_id",
)  # fmt: skip
LOAD_FAULTS = (*DAMAGE, OSError, SafetensorError)


def load_config(path: str, dropout: float | None = None):
    """Return the model's configuration; UserError when the folder or hub name has none.

    `dropout` replaces every dropout probability of it. With 0 attention runs as one fused kernel, also on a
    CPU.
    """
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path}: no config.json in it; download it again: sh script/download.sh model NAME")
    if not os.path.isdir(path) and (path.count("/") > 1 or path.startswith(LOCAL_PREFIXES)):
        raise UserError(
            f"{path}: no such folder (pretrained_model_path); "
            "`sh script/download.sh model` fetches the default one"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOAD_FAULTS as error:
        raise UserError(f"{path}: no model configuration could be read ({_first_line(error)})") from error
    for name in DROPOUT_NAMES if dropout is not None else ():
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def load_pretrained(auto_class, path: str, config, seed: int, **options) -> tuple[PreTrainedModel, list[str]]:
    """Return (the model in fp32, names of the weights its file lacks); `config` is its load_config.

    A folder whose config.json says `"random_init": true` has no weights: they are drawn from `seed`, none is
    missing. UserError for a missing or half-downloaded folder.
    """
    if getattr(config, "random_init", False):
        log(f"{path}: no pretrained weights there; they are drawn at random from seed {seed}")
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32, **options)
        attend_to_equal_tokens(model)
        return model, []
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in WEIGHT_FILES):
        raise UserError(
            f"{path}: no weights in it (model.safetensors or pytorch_model.bin); is the download complete?"
        )
    # Its own report and its bar would tear up the log; the caller looks at what is missing.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)  # what the file does not have is drawn at random
    try:
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except LOAD_FAULTS as error:
        raise UserError(
            f"{path}: the weights cannot be read, is the download complete? ({_first_line(error)})"
        ) from error
    other_shape = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    return model, sorted({*info["missing_keys"], *other_shape})


@torch.no_grad()
def attend_to_equal_tokens(model: PreTrainedModel) -> None:
    """Set every attention's key weights equal to its query weights, SHARPER times as large as drawn.

    Attention then starts at equal tokens. Pretrained models have learned that; a small one that starts at
    random would need hours for it, and a cross-encoder without it learns only which passages are often right.
    """
    for module in model.modules():
        if hasattr(module, "query") and hasattr(module, "key"):
            module.query.weight.mul_(SHARPER)
            module.key.weight.copy_(module.query.weight)


def model_fingerprint(path: str) -> str:
    """Return a fingerprint of a model folder's configuration and weights; of a hub name, the name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    weights = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")]
    return fingerprint_files([folder / "config.json", *sorted(weights)])


def architecture(config) -> str:
    """Return a fingerprint of what the configuration says of the computation: not of its path, its file's
    version or dropout.
    """
    said = {k: v for k, v in config.to_dict().items() if k not in (*NO_ARCHITECTURE, *DROPOUT_NAMES)}
    return fingerprint_text(json.dumps(said, sort_keys=True, default=str))


def check_fits(config, vocabulary: int, lengths: dict[str, int], path: str) -> None:
    """UserError when the tokenizer has ids the model does not know, or a length beyond the model's
    positions.
    """
    if vocabulary > config.vocab_size:
        raise UserError(
            f"the tokenizer knows {vocabulary:,} tokens, but the model {path} only {config.vocab_size:,}; "
            "is vocab_path that model's vocabulary?"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and "roberta" in config.model_type:
        positions -= 2  # its positions start behind the padding index
    for name, length in lengths.items():
        if positions and length > positions:
            raise UserError(f"--{name} {length}: the model {path} has only {positions} positions")


def read_weights(path: str, made_by: str) -> dict:
    """Return the state dict of a file; UserError when it is missing, torn or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (trained weights); run {made_by} first") from None
    except LOAD_FAULTS as error:
        raise UserError(f"{path}: cannot be read as weights ({_first_line(error)})") from error
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise UserError(
            f"{path}: weights of another model, or of other settings (a {kind}, not a state dict)"
        )
    return state


def load_weights(path: str, model: nn.Module, made_by: str) -> None:
    """Load a plain state dict into `model`; UserError when it is missing, torn, or of another model."""
    state = read_weights(path, made_by)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        detail = [line.strip() for line in str(error).split("\n")[1:2]] or [_first_line(error)]
        raise UserError(
            f"{path}: weights of another model, or of other settings ({detail[0][:200]})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
