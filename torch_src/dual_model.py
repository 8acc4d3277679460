"""The dual encoder: two towers of any transformers.AutoModel encoder, pooled to one vector a text."""

import copy
import inspect
import os
import pickle
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel

from torch_src.errors import UserError
from torch_src.helpers import say
from torch_src.stamps import fingerprint_files

WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
DROPOUT_NAMES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "dropout",
    "embd_pdrop",
)
LOAD_FAULTS = (OSError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError)


class DualEncoder(nn.Module):
    """Two towers (one and the same when `share_encoder`), pooled and optionally normalised to vectors (B, H)
    fp32.
    """

    def __init__(self, backbone: PreTrainedModel, share_encoder: bool, pooling: str, normalize: bool):
        super().__init__()
        self.query_encoder = backbone
        self.passage_encoder = backbone if share_encoder else copy.deepcopy(backbone)
        self.pooling, self.normalize = pooling, normalize

    def tower(self, side: str) -> PreTrainedModel:
        """Return the tower of `side`, query or passage."""
        return self.query_encoder if side == "query" else self.passage_encoder

    def forward(self, side: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the vectors (B, H) fp32 of token ids (B, L) under their mask (B, L)."""
        return embed(self.tower(side), input_ids, attention_mask, self.pooling, self.normalize)


def embed(
    tower: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, pooling: str, normalize: bool
) -> Tensor:
    """Return one tower's vectors (B, H) fp32."""
    output = tower(input_ids=input_ids, attention_mask=attention_mask)
    vectors = (
        output.pooler_output.float() if pooling == "pooler" else pool(output[0], attention_mask, pooling)
    )
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return (B, H) fp32 from the last layer (B, L, H): the first token (cls), or the mean over
    real tokens.
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    assert pooling == "mean", pooling
    weights = attention_mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


def load_config(path: str, dropout: float | None = None):
    """Return the model's configuration; UserError when the folder or hub name has none.

    `dropout` replaces every dropout probability of it. With 0 attention runs as one fused kernel, also on a
    CPU.
    """
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path}: no config.json in it; download it again: sh script/download.sh model NAME")
    if not os.path.isdir(path) and (
        path.count("/") != 1 or path.startswith(("torch_pretrained_models", ".", "/"))
    ):
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


def build_backbone(config, pooling: str) -> PreTrainedModel:
    """Return the encoder of `config` with random weights; a pooling layer only for `pooling=pooler`."""
    return AutoModel.from_config(config, dtype=torch.float32, **_pooler_option(config, pooling))


def load_backbone(path: str, config, pooling: str, seed: int) -> PreTrainedModel:
    """Return the pretrained encoder of a folder or hub name, fp32; `config` is its load_config.

    A folder whose config.json says `"random_init": true` has no weights: they are drawn from `seed`.
    UserError for a missing or half-downloaded folder, and for weights that lack a part which `pooling` needs.
    """
    if getattr(config, "random_init", False):
        say(f"{path}: no pretrained weights there; they are drawn at random from seed {seed}")
        torch.manual_seed(seed)
        return build_backbone(config, pooling)
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in WEIGHT_FILES):
        raise UserError(
            f"{path}: no weights in it (model.safetensors or pytorch_model.bin); is the download complete?"
        )
    # Its own report of missing weights and its bar would tear up the log; what matters is checked below.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = AutoModel.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            **_pooler_option(config, pooling),
        )  # fmt: skip
    except LOAD_FAULTS as error:
        raise UserError(
            f"{path}: the weights cannot be read, is the download complete? ({_first_line(error)})"
        ) from error
    _refuse_missing(path, sorted(info["missing_keys"]), pooling)
    return model


def _refuse_missing(path: str, missing: list[str], pooling: str) -> None:
    pooler = [name for name in missing if name.startswith("pooler.")]
    if pooler and pooling == "pooler":
        raise UserError(
            f"--pooling pooler: {path} has no trained pooling layer ({pooler[0]}); use cls or mean"
        )
    missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} weights of the model are not in its file, the first: {missing[0]}"
        )


def _pooler_option(config, pooling: str) -> dict:
    # Only BERT-like classes know the option; the others have no pooling layer to leave out.
    kind = MODEL_MAPPING.get(type(config), None)
    if kind is None or "add_pooling_layer" not in inspect.signature(kind.__init__).parameters:
        if pooling == "pooler":
            raise UserError(
                f"--pooling pooler: a {config.model_type} model has no pooling layer; use cls or mean"
            )
        return {}
    return {"add_pooling_layer": pooling == "pooler"}


def model_fingerprint(path: str) -> str:
    """Return a fingerprint of a model folder's configuration and weights; of a hub name, the name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    weights = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")]
    return fingerprint_files([folder / "config.json", *sorted(weights)])


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


def load_weights(path: str, model: DualEncoder) -> None:
    """Load dual_params.bin, a plain state dict; UserError when it is missing, torn, or of another model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (trained weights); run do_dual_train.py first") from None
    except LOAD_FAULTS as error:
        raise UserError(f"{path}: cannot be read as weights ({_first_line(error)})") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        detail = [line.strip() for line in str(error).split("\n")[1:2]] or [_first_line(error)]
        raise UserError(
            f"{path}: weights of another model, or of other settings ({detail[0][:200]})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
