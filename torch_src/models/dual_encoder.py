"""The dual encoder: two towers, any transformers.AutoModel encoder, each pooled to one vector per text."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from torch_src.models.backbones import ENCODERS, WEIGHT_ERRORS, load_pretrained, probe_ids
from torch_src.models.lora import copy_with_adapters, merged_state
from torch_src.models.model_folder import is_decoder, read_model_folder
from torch_src.models.tokenization import LENGTHS
from torch_src.runtime.devices import at_least_float32
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.log import warn
from torch_src.runtime.tensor_files import load_tensors

PADDING_TOLERANCE = 1e-3  # relative change of a text's states by a token of padding
QUERY, PASSAGE = "query_encoder.", "passage_encoder."  # prefixes of the towers' weights
LAYERS = "sentence_layers"  # attribute of a tower: the layers after its pooling
LAYER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class DualEncoder(nn.Module):
    """A query tower and a passage tower (one shared tower with `share_encoder`), pooling and normalization.

    Input: token ids (B, L) int64 and their mask (B, L) int64. Output: vectors (B, H) float32.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        share_encoder: bool,
        pooling: str,
        normalize: bool,
        query_backbone: PreTrainedModel | None = None,
    ):
        """Start both towers from `backbone`; the query tower from `query_backbone`, if given."""
        super().__init__()
        if query_backbone is not None and share_encoder:
            raise UserError("--share_encoder: the model has two different towers; pass --no_share_encoder")
        self.query_encoder = query_backbone or backbone
        own = share_encoder or query_backbone is not None
        self.passage_encoder = backbone if own else copy_with_adapters(backbone)
        self.pooling, self.normalize = pooling, normalize

    def tower(self, side: str) -> PreTrainedModel:
        """Return the tower of `side`, query or passage."""
        return self.query_encoder if side == "query" else self.passage_encoder

    def forward(self, side: str, input_ids: Tensor, attention_mask: Tensor, skipped: int = 0) -> Tensor:
        """Return the vectors (B, H) float32 of one side's texts; `skipped`: as in embed."""
        return embed(self.tower(side), input_ids, attention_mask, self.pooling, self.normalize, skipped)

    def stored_state(self) -> dict[str, Tensor]:
        """Return the state dict with each weight once: a shared tower's under the query's names.

        Adapters are merged.
        """
        if self.query_encoder is self.passage_encoder:
            return {QUERY + name: value for name, value in merged_state(self.query_encoder).items()}
        return merged_state(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], *given: Any, **options: Any) -> Any:
        """Load the weights; a shared tower's under either name, UserError where two copies differ."""
        state = dict(state_dict)
        if self.query_encoder is self.passage_encoder:
            for name, value in state_dict.items():
                for one, other in ((QUERY, PASSAGE), (PASSAGE, QUERY)):
                    if name.startswith(one):
                        twin = state.setdefault(other + name.removeprefix(one), value)
                        if not _same_tensor(value, twin):
                            raise UserError(
                                f"{name} has two different copies, but queries and passages share one "
                                "encoder; train again"
                            )
        return super().load_state_dict(state, *given, **options)


def _same_tensor(one: Any, other: Any) -> bool:
    return one is other or isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def embed(
    tower: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    pooling: str,
    normalize: bool,
    skipped: int = 0,
) -> Tensor:
    """Return the vectors (B, H) float32 of token ids (B, L) int64 under their mask (B, L) int64.

    The first `skipped` tokens are not pooled.
    """
    output = tower(input_ids=input_ids, attention_mask=attention_mask)
    if pooling == "pooler":
        vectors = at_least_float32(output.pooler_output)
    else:
        vectors = pool(output[0], attention_mask, pooling, skipped)
    layers = getattr(tower, LAYERS, None)
    if layers is not None:
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = layers(vectors)
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def shorten(vectors: Tensor, dims: int, normalize: bool) -> Tensor:
    """Return the first `dims` dimensions, re-normalized with `normalize` (Kusupati et al. 2022)."""
    if dims == vectors.shape[-1]:
        return vectors
    vectors = vectors[..., :dims]
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str, skipped: int = 0) -> Tensor:
    """Return (B, H) float32 of the last layer (B, L, H): one token's state, or the states' mean or maximum.

    weightedmean weights a token by its position, from 1 (Muennighoff 2022, arXiv 2202.08904). The first
    `skipped` tokens are omitted. Padding is on the right.
    """
    if pooling == "cls" and not skipped:
        return at_least_float32(hidden[:, 0])
    mask = attention_mask
    if skipped:
        mask = mask.clone()
        mask[:, :skipped] = 0
    if pooling in ("cls", "lasttoken"):
        at = mask.argmax(1) if pooling == "cls" else attention_mask.sum(1) - 1
        return at_least_float32(hidden[torch.arange(len(hidden), device=hidden.device), at])
    hidden = at_least_float32(hidden)
    if pooling == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "weightedmean":
        weights = weights * torch.arange(1, hidden.shape[1] + 1, device=hidden.device).unsqueeze(-1)
    total = weights.sum(1)
    if skipped:
        total = total.clamp(min=1e-9)  # a text may have no other tokens
    if pooling == "mean_sqrt_len_tokens":
        total = total.sqrt()
    else:
        assert pooling in ("mean", "weightedmean"), pooling
    return (hidden * weights).sum(1) / total


class Dense(nn.Module):
    """A linear layer and an activation after the pooling."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: str):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = getattr(nn, activation)()

    def forward(self, vectors: Tensor) -> Tensor:
        return self.activation(self.linear(vectors))


class Norm(nn.Module):
    """A layer normalization after the pooling."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.norm(vectors)


class Normalize(nn.Module):
    """Scales vectors to length 1 between two layers."""

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


LAYER_CLASSES = {"Dense": Dense, "LayerNorm": Norm, "Normalize": Normalize, "Dropout": nn.Dropout}


def sentence_layers(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the settings of the layers after the pooling."""
    return list(getattr(config, "sentence_settings", {}).get("layers", ()))


def vector_width(config: PretrainedConfig) -> int:
    """Return the number of dimensions of a vector."""
    outputs = [layer["outputs"] for layer in sentence_layers(config) if layer["type"] == "Dense"]
    return outputs[-1] if outputs else config.hidden_size


def describe_retriever(settings: Mapping[str, Any], config: PretrainedConfig) -> str:
    """Return the settings in effect as one line for the log."""
    similarity = "cosine (vectors of length 1)" if settings["normalize"] else "inner product"
    layers = [
        "{type} {inputs} to {outputs} {activation}".format(**layer)
        if layer["type"] == "Dense"
        else layer["type"]
        for layer in sentence_layers(config)
    ]
    sides = [
        f"{side} at most {settings[knob]} tokens, prefix {settings[f'{side}_prefix']!r}"
        for side, knob in LENGTHS.items()
    ]
    skipped = [] if pools_prompt(config) else ["prefixes are not pooled"]
    return "; ".join([f"pooling {settings['pooling']}", *layers, similarity, *sides, *skipped])


def pools_prompt(config: PretrainedConfig) -> bool:
    """Return whether the tokens of a prefix are pooled."""
    return bool(getattr(config, "sentence_settings", {}).get("include_prompt", True))


def _add_layers(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Add the layers after the pooling to the tower, where the configuration has any."""
    layers = [dict(layer) for layer in sentence_layers(config)]
    if layers:
        built = [LAYER_CLASSES[layer.pop("type")](**layer) for layer in layers]
        setattr(model, LAYERS, nn.Sequential(*built).train(model.training))


def _load_layers(model: PreTrainedModel, folders: tuple[str, ...]) -> None:
    """Load the weights of the layers after the pooling; UserError when they are missing or do not fit."""
    for layer, folder in zip(getattr(model, LAYERS, ()), folders, strict=True):
        if layer.state_dict():
            path = next((p for p in (Path(folder) / name for name in LAYER_WEIGHTS) if p.exists()), None)
            if path is None:
                raise UserError(f"{folder}: contains no weights (expected model.safetensors)")
            try:
                layer.load_state_dict(
                    load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
                )
            except (*WEIGHT_ERRORS, AttributeError) as error:
                raise UserError(f"{path}: the weights cannot be read ({first_line(error)})") from error
            layer.float()


def build_backbone(config: PretrainedConfig, pooling: str) -> PreTrainedModel:
    """Return the encoder of `config` with random weights; with a pooling layer only for `pooling=pooler`."""
    if config.model_type in ENCODERS:
        model: PreTrainedModel = encoder_class(config)._from_config(config, dtype=torch.float32)
    else:
        model = AutoModel.from_config(config, dtype=torch.float32, **_pooler_option(config, pooling))
    _add_layers(model, config)
    return model


def load_backbone(
    path: str, config: PretrainedConfig, pooling: str, seed: int, side: str = "passage"
) -> PreTrainedModel:
    """Return the pretrained encoder in float32; UserError when weights that `pooling` needs are missing."""
    folder = read_model_folder(path)
    options = _pooler_option(config, pooling)
    model, missing = load_pretrained(encoder_class(config), folder.tower(side), config, seed, **options)
    pooler = [name for name in missing if name.startswith("pooler.")]
    if pooler and pooling == "pooler":
        raise UserError(
            f"--pooling pooler: {path} has no trained pooling layer ({pooler[0]}); use cls or mean"
        )
    body = [name for name in missing if name not in pooler]
    if body:
        raise UserError(f"{path}: {len(body)} weights are missing, e.g. {body[0]}")
    _check_states(model, config, pooling, path)
    if folder.has_modules:
        _add_layers(model, config)
        _load_layers(model, folder.layer_folders[side == "passage"])
    return model


def load_query_backbone(
    path: str, config: PretrainedConfig, pooling: str, seed: int
) -> PreTrainedModel | None:
    """Return the query tower of a folder with two towers; None for a folder with one."""
    return load_backbone(path, config, pooling, seed, "query") if read_model_folder(path).separate else None


def encoder_class(config: PretrainedConfig) -> Any:
    """Return the class of the encoder: of an encoder-decoder the encoder alone."""
    return getattr(transformers, ENCODERS[config.model_type]) if config.model_type in ENCODERS else AutoModel


@torch.no_grad()
def _check_states(model: PreTrainedModel, config: PretrainedConfig, pooling: str, path: str) -> None:
    """UserError unless the model returns a state of each token that `pooling` can use.

    The second of two texts has another last token: the first state of a decoder does not change.
    """
    was_training = model.training
    first, second, third, other = probe_ids(config)[0].tolist()
    ids = torch.tensor([[first, second, third], [first, second, other]])
    padded = nn.functional.pad(ids, (0, 1), value=config.pad_token_id or 0)
    try:
        model.eval()
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        mask = nn.functional.pad(torch.ones_like(ids), (0, 1))
        again = model(input_ids=padded, attention_mask=mask)[0]
        shape = tuple(states.shape)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: a {config.model_type} model is not supported ({reason})") from error
    finally:
        model.train(was_training)
    if shape != (2, 3, config.hidden_size):
        raise UserError(
            f"{path}: a {config.model_type} model is not supported (it returns no state of each token)"
        )
    if (states - again[:, :3]).norm() > PADDING_TOLERANCE * states.norm():
        warn(
            f"{path}: padding changes the vectors of a {config.model_type} model: they depend on the other "
            "texts of a batch"
        )
    if pooling == "cls" and is_decoder(config) and states[0, 0].equal(states[1, 0]):
        raise UserError(
            f"--pooling cls: {path} is a decoder: its first token sees no other; use lasttoken or mean"
        )


def _pooler_option(config: PretrainedConfig, pooling: str) -> dict[str, bool]:
    # Only BERT-like classes have the option; the others have no pooling layer.
    kind: Any = MODEL_MAPPING.get(type(config), None)
    kind = kind[0] if isinstance(kind, tuple) else kind
    if kind is None or "add_pooling_layer" not in inspect.signature(kind).parameters:
        if pooling == "pooler":
            raise UserError(
                f"--pooling pooler: a {config.model_type} model has no pooling layer; use cls or mean"
            )
        return {}
    return {"add_pooling_layer": pooling == "pooler"}
