"""Pretrained models by folder or hub name: configuration, weights, and checks of both."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from torch_src.models.model_folder import is_hub_name
from torch_src.models.tokenization import TextRules
from torch_src.runtime import tensor_files
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.log import log
from torch_src.runtime.stamps import checksum_files, checksum_text
from torch_src.runtime.tensor_files import load_tensors

WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
ATTENTION_GAIN = 5.0  # at BERT's initial deviation of 0.02 attention is nearly uniform
DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "dropout",
    "embd_pdrop",
)
# configuration fields that do not affect the vectors or logits
OTHER_FIELDS = set(
    "_name_or_path transformers_version dtype torch_dtype architectures id2label label2id problem_type "
    "use_cache output_attentions output_hidden_states return_dict bos_token_id eos_token_id sep_token_id "
    "cls_token_id".split()
)
# What transformers raises for damaged or wrong files, measured (it is not documented).
CONFIG_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError)
WEIGHT_ERRORS = (*tensor_files.LOAD_ERRORS, SafetensorError)


def load_config(path: str, dropout: float | None = None) -> PretrainedConfig:
    """Return the model's configuration; UserError when the folder or hub name has none.

    `dropout` replaces all its dropout probabilities. With 0, attention runs as one fused kernel, on CPUs too.
    """
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path}: contains no config.json; get it with `sh script/download.sh model NAME`")
    if not os.path.isdir(path) and not is_hub_name(path):
        raise UserError(f"{path}: no such folder (pretrained_model_path); run sh script/download.sh model")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise UserError(f"{path}: the model configuration cannot be read ({first_line(error)})") from error
    for name in DROPOUT_FIELDS if dropout is not None else ():
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def load_pretrained(
    auto_class: Any, path: str, config: PretrainedConfig, seed: int, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Return (the model in float32, names of the weights missing in its file); `config` is from load_config.

    With `"random_init": true` in config.json all weights are initialized from `seed` and none is missing.
    UserError for a missing or incomplete folder.
    """
    if getattr(config, "random_init", False):
        log(f"{path}: no pretrained weights; initialized randomly with seed {seed}")
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32, **options)
        attend_to_equal_tokens(model)
        return model, []
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in WEIGHT_FILES):
        raise UserError(f"{path}: contains no weights (expected model.safetensors); download it again")
    # transformers' reports and progress bars would clutter the log; the caller checks for missing weights
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)  # for missing weights
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
    except WEIGHT_ERRORS as error:
        raise UserError(
            f"{path}: the weights cannot be read ({first_line(error)}); download the model again"
        ) from error
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    return model, sorted({*info["missing_keys"], *mismatched})


@torch.no_grad()
def attend_to_equal_tokens(model: PreTrainedModel) -> None:
    """Scale every attention's query weights by ATTENTION_GAIN and copy them to its key weights.

    Tokens then attend to equal tokens, as in pretrained models. A small random model needs hours to learn it,
    and a cross-encoder without it only learns which passages are often relevant.
    """
    for module in model.modules():
        query, key = getattr(module, "query", None), getattr(module, "key", None)
        if isinstance(query, nn.Linear) and isinstance(key, nn.Linear):
            query.weight.mul_(ATTENTION_GAIN)
            key.weight.copy_(query.weight)


def model_checksum(path: str) -> str:
    """Return a checksum of a model folder's configuration and weights; for a hub name, the name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    weights = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")]
    return checksum_files([folder / "config.json", *sorted(weights)])


def architecture(config: PretrainedConfig) -> str:
    """Return a checksum of the fields of a configuration that affect the output (without dropout)."""
    ignored = {*OTHER_FIELDS, *DROPOUT_FIELDS}
    fields = {name: value for name, value in config.to_dict().items() if name not in ignored}
    return checksum_text(json.dumps(fields, sort_keys=True, default=str))


def check_fits(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, rules: Mapping[str, TextRules], path: str
) -> None:
    """UserError when the tokenizer has more tokens, or an input more positions, than the model.

    rules: how texts become token ids, by the knob that limits their length.
    """
    vocabulary = len(tokenizer)
    if vocabulary > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {vocabulary:,} tokens, but the model only {config.vocab_size:,}; "
            "check that vocab_path is that model's vocabulary"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and "roberta" in config.model_type:
        positions -= 2  # its positions start after the padding index
    for knob, rule in rules.items():
        prefix = rule.max_tokens(tokenizer) - rule.max_seq_len
        if positions and rule.max_seq_len + prefix > positions:
            more = f" and {prefix} of the prefix" if prefix else ""
            raise UserError(
                f"--{knob} {rule.max_seq_len}: {rule.max_seq_len} tokens{more} exceed the {positions} "
                f"positions of {path}; lower it to {positions - prefix} or less"
            )


def read_weights(path: str, made_by: str) -> dict[str, Any]:
    """Return the state dict of a file; UserError when it is missing, incomplete or not a state dict."""
    try:
        state = load_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (trained weights); run {made_by} first") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: weights of another model (a {type(state).__name__}, not a state dict)")
    return state


def load_weights(path: str, model: nn.Module, made_by: str) -> None:
    """Load a state dict into `model`; UserError when it is missing, incomplete, or of another model."""
    state = read_weights(path, made_by)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        detail = [line.strip() for line in str(error).split("\n")[1:2]] or [first_line(error)]
        raise UserError(f"{path}: weights of another model or settings ({detail[0][:200]})") from error
