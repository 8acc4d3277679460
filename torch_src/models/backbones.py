"""Pretrained models by folder or hub name: configuration, weights, and checks of both."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from torch_src.models.hub import is_hub_name, local_folder
from torch_src.models.known_encoders import SETTINGS, known_encoder, log_known
from torch_src.models.model_folder import (
    ModelFolder,
    is_decoder,
    read_model_folder,
    read_reranker_folder,
)
from torch_src.models.pair_template import add_template, template_of
from torch_src.models.tokenization import LENGTHS, TextRules, load_tokenizer, token_counts
from torch_src.runtime import tensor_files
from torch_src.runtime.commands import download
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import read_json
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import checksum_files, checksum_text
from torch_src.runtime.tensor_files import load_tensors

WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "dropout",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "dropout_rate",
    "embedding_dropout",
    "mlp_dropout",
)
MIN_LENGTH = 3  # [CLS], a token, [SEP]
# models whose positions start after the padding token's id
POSITIONS_AFTER_PADDING = {
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet", "longformer",
    "data2vec-text", "ibert", "xmod", "luke", "esm",
}  # fmt: skip
ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}  # of encoder-decoders
# configuration fields that do not affect the vectors or logits
OTHER_FIELDS = set(
    "_name_or_path transformers_version dtype torch_dtype architectures id2label label2id problem_type "
    "use_cache output_attentions output_hidden_states return_dict bos_token_id eos_token_id sep_token_id "
    "cls_token_id".split()
)
# What transformers raises for damaged or wrong files, measured (it is not documented).
CONFIG_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError)
WEIGHT_ERRORS = (*tensor_files.LOAD_ERRORS, SafetensorError)


def load_config(path: str, dropout: float | None = None, kind: str = "dual") -> PretrainedConfig:
    """Return the configuration of a retriever (`kind` dual) or re-ranker (cross) by folder or hub name.

    What its folder says and no knob covers is added to it, and so saved with trained weights.
    `dropout` replaces all its dropout probabilities. With 0, attention runs as one fused kernel, on CPUs too.
    UserError when there is no configuration, or for a part or kind of model that is not supported.
    """
    _check_folder(path)
    folder = read_model_folder(path) if kind == "dual" else read_reranker_folder(path)
    config = read_config(folder.tower("passage"), path)
    if kind == "cross":
        if config.model_type in ENCODERS:
            raise UserError(f"{path}: a {config.model_type} model is not supported as a re-ranker")
        _complete_reranker(config, folder)
    if folder.separate and architecture(config) != architecture(read_config(folder.tower("query"), path)):
        raise UserError(f"{path}: two towers of different configurations are not supported")
    width = getattr(config, "hidden_size", None)
    for layer in folder.layers:
        if layer.get("inputs", layer.get("size", width)) != width:
            raise UserError(f"{path}: a {layer['type']} layer does not fit vectors of {width} dimensions")
        width = layer.get("outputs", width)
    if folder.layers or not folder.include_prompt:
        config.sentence_settings = {"layers": list(folder.layers), "include_prompt": folder.include_prompt}
    for name in DROPOUT_FIELDS if dropout is not None else ():
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def _complete_reranker(config: PretrainedConfig, folder: ModelFolder) -> None:
    """Add the template of the pairs, and the pad token, which decoders need to find the last token."""

    def load() -> PreTrainedTokenizerBase:
        return load_tokenizer(folder.path, kind="cross")

    add_template(config, folder, load)
    if config.pad_token_id is None and is_decoder(config):
        config.pad_token_id = load().pad_token_id


def reranker_settings(path: str, longest: int | None = None) -> dict[str, Any]:
    """Return the knobs of a re-ranker that its folder or hub name sets: max_seq_len, at most `longest`."""
    if not os.path.isdir(path) and not is_hub_name(path):
        return {}  # load_config reports it
    folder = read_reranker_folder(path)
    if folder.unused_prompts:
        names = ", ".join(folder.unused_prompts)
        warn(f"{path}: its prompts {names} are not the default one and are not used")
    if not folder.has_modules or not folder.max_seq_len:
        return {}
    config, tokenizer = load_config(path, kind="cross"), load_tokenizer(path, kind="cross")
    template = template_of(config)
    own = min(limit for limit in (folder.max_seq_len, positions(config)) if limit)
    own -= TextRules(0, pair=template).max_tokens(tokenizer) if template else 0
    return {"max_seq_len": min(own, longest) if longest else own}


def _check_folder(path: str) -> None:
    if not os.path.isdir(path) and not is_hub_name(path):
        raise UserError(f"{path}: no such folder (pretrained_model_path); run {download('model')}")


def read_config(tower: str, path: str) -> PretrainedConfig:
    """Return the configuration of a transformer's folder; `path`: its model, for errors."""
    file = Path(tower) / "config.json"
    if (adapter := file.with_name("adapter_config.json")).exists():
        base = read_json(adapter).get("base_model_name_or_path", "its base model")
        raise UserError(
            f"{path}: an adapter (adapter_config.json) of {base}; merge it into that model "
            "(merge_and_unload of peft) and save the result"
        )
    if not file.exists():
        raise UserError(f"{path}: contains no config.json; get it with `{download('model', 'NAME')}`")
    try:
        config = AutoConfig.from_pretrained(tower, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise UserError(f"{path}: the model configuration cannot be read ({first_line(error)})") from error
    own_code = {name: code for name, code in (read_json(file).get("auto_map") or {}).items() if code}
    if own_code:
        name, code = next(iter(own_code.items()))
        raise UserError(
            f"{file}: auto_map says that the model needs its own code ({name}: {code}), which is not run; "
            f"the {config.model_type} model of transformers may give other results; use another model"
        )
    if not hasattr(config, "vocab_size"):
        raise UserError(
            f"{path}: a {config.model_type} model is not supported (expected an encoder of texts)"
        )
    if config.is_encoder_decoder and config.model_type not in ENCODERS:
        raise UserError(f"{path}: a {config.model_type} model is not supported (an encoder and a decoder)")
    return config


def folder_settings(path: str, longest: dict[str, int] | None = None) -> dict[str, Any]:
    """Return the knobs of a retriever that its folder or hub name sets.

    What the folder does not state is filled in for the published encoders of known_encoders.json. Other
    folders without modules.json set none, except that a decoder is pooled at its last token, which has seen
    the whole text. Lengths are at most what the model has positions for. `longest`: lengths above which the
    folder's general limit is not used.
    """
    if not os.path.isdir(path) and not is_hub_name(path):
        return {}  # load_config reports it
    folder = read_model_folder(path)
    config = load_config(path) if (Path(folder.tower("passage")) / "config.json").exists() else None
    if folder.unused_prompts:
        names = ", ".join(folder.unused_prompts)
        warn(f"{path}: its prompts {names} are not used; pass --query_prefix and --passage_prefix")
    known = known_encoder(path)
    used = {name: known[name] for name in SETTINGS if known and getattr(folder, name) is None}
    if used:
        log_known(path, known["family"], known["base"], tuple(used.items()))
        folder = replace(folder, **used)
    elif not folder.has_modules:
        return {"pooling": "lasttoken"} if config and is_decoder(config) else {}
    knobs = folder.knobs()
    if folder.separate:
        knobs["share_encoder"] = False
    limits = [limit for limit in (config and positions(config),) if limit]
    for side, name in LENGTHS.items():
        if length := getattr(folder, name) or folder.max_seq_len:
            prompt = _prefix_tokens(path, getattr(folder, f"{side}_prefix"))
            knobs[name] = min([length, *limits]) - prompt
            if knobs[name] < MIN_LENGTH:
                raise UserError(f"{path}: its prompt of {prompt} tokens leaves none of {length} to a text")
            if longest and not getattr(folder, name):
                knobs[name] = min(knobs[name], longest[name])
    return knobs


def _prefix_tokens(path: str, prefix: str | None) -> int:
    """Return the number of tokens of a prefix, which the folder's lengths include and the knobs do not."""
    return token_counts(load_tokenizer(path), [prefix], add_special_tokens=False)[0] if prefix else 0


def load_pretrained(
    auto_class: Any, path: str, config: PretrainedConfig, seed: int, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Return (the model in float32, names of the weights missing in its file); `config` is from load_config.

    Missing weights are initialized from `seed`. UserError for a missing or incomplete folder.
    """
    path = local_folder(path)
    if not any(os.path.exists(os.path.join(path, name)) for name in WEIGHT_FILES):
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


def model_checksum(path: str) -> str:
    """Return a checksum of the configuration and weights of a model folder, or of a hub name's snapshot.

    For a hub name without a snapshot, which cannot be loaded, the name.
    """
    try:
        folder = local_folder(path)
    except UserError:
        return path
    if not os.path.isdir(folder):
        return path
    try:
        files = read_model_folder(path).files()
    except UserError:  # not of a retriever
        files = read_reranker_folder(path).files()
    return checksum_files(files)


def architecture(config: PretrainedConfig) -> str:
    """Return a checksum of the fields of a configuration that affect the output (without dropout)."""
    ignored = {*OTHER_FIELDS, *DROPOUT_FIELDS}
    fields = {name: value for name, value in config.to_dict().items() if name not in ignored}
    return checksum_text(json.dumps(fields, sort_keys=True, default=str))


def probe_ids(config: PretrainedConfig) -> torch.Tensor:
    """Return token ids (1, 4) int64 for a trial, none of them padding."""
    size, padding = config.vocab_size, config.pad_token_id
    return torch.tensor([[token for token in range(3, 8) if token != padding][:4]]) % size


def positions(config: PretrainedConfig) -> int | None:
    """Return the number of tokens that the model has positions for; None without a limit."""
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int) or count <= 0:
        return None
    if config.model_type not in POSITIONS_AFTER_PADDING:
        return count
    padding = 1 if config.model_type == "mpnet" else config.pad_token_id or 0
    return count - padding - 1


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
    limit = positions(config)
    for knob, rule in rules.items():
        prefix = rule.max_tokens(tokenizer) - rule.max_seq_len
        if limit and rule.max_seq_len + prefix > limit:
            more = f" and {prefix} of the prefix" if prefix else ""
            raise UserError(
                f"--{knob} {rule.max_seq_len}: {rule.max_seq_len} tokens{more} exceed the {limit} "
                f"positions of {path}; lower it to {limit - prefix} or less"
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
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (RuntimeError, AttributeError, TypeError) as error:
        detail = [line.strip() for line in str(error).split("\n")[1:2]] or [first_line(error)]
        raise UserError(f"{path}: weights of another model or settings ({detail[0][:200]})") from error
