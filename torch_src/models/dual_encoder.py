"""The dual encoder: two towers, any transformers.AutoModel encoder, each pooled to one vector per text."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from torch_src.models.backbones import load_pretrained
from torch_src.runtime.devices import at_least_float32
from torch_src.runtime.errors import UserError


class DualEncoder(nn.Module):
    """A query tower and a passage tower (one shared tower with `share_encoder`), pooling and normalization.

    Input: token ids (B, L) int64 and their mask (B, L) int64. Output: vectors (B, H) float32.
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
        """Return the vectors (B, H) float32 of one side's texts."""
        return embed(self.tower(side), input_ids, attention_mask, self.pooling, self.normalize)


def embed(
    tower: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, pooling: str, normalize: bool
) -> Tensor:
    """Return the vectors (B, H) float32 of token ids (B, L) int64 under their mask (B, L) int64."""
    output = tower(input_ids=input_ids, attention_mask=attention_mask)
    if pooling == "pooler":
        vectors = at_least_float32(output.pooler_output)
    else:
        vectors = pool(output[0], attention_mask, pooling)
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def shorten(vectors: Tensor, dims: int, normalize: bool) -> Tensor:
    """Return the first `dims` dimensions, re-normalized with `normalize` (Kusupati et al. 2022)."""
    if dims == vectors.shape[-1]:
        return vectors
    vectors = vectors[..., :dims]
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return (B, H) float32 of the last layer (B, L, H): its first token (cls) or the mean of real tokens."""
    if pooling == "cls":
        return at_least_float32(hidden[:, 0])
    assert pooling == "mean", pooling
    hidden = at_least_float32(hidden)
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def build_backbone(config: PretrainedConfig, pooling: str) -> PreTrainedModel:
    """Return the encoder of `config` with random weights; with a pooling layer only for `pooling=pooler`."""
    return AutoModel.from_config(config, dtype=torch.float32, **_pooler_option(config, pooling))


def load_backbone(path: str, config: PretrainedConfig, pooling: str, seed: int) -> PreTrainedModel:
    """Return the pretrained encoder in float32; UserError when weights that `pooling` needs are missing."""
    model, missing = load_pretrained(AutoModel, path, config, seed, **_pooler_option(config, pooling))
    pooler = [name for name in missing if name.startswith("pooler.")]
    if pooler and pooling == "pooler":
        raise UserError(
            f"--pooling pooler: {path} has no trained pooling layer ({pooler[0]}); use cls or mean"
        )
    body = [name for name in missing if name not in pooler]
    if body:
        raise UserError(f"{path}: {len(body)} weights are missing, e.g. {body[0]}")
    return model


def _pooler_option(config: PretrainedConfig, pooling: str) -> dict[str, bool]:
    # Only BERT-like classes have the option; the others have no pooling layer.
    kind: Any = MODEL_MAPPING.get(type(config), None)
    if kind is None or "add_pooling_layer" not in inspect.signature(kind).parameters:
        if pooling == "pooler":
            raise UserError(
                f"--pooling pooler: a {config.model_type} model has no pooling layer; use cls or mean"
            )
        return {}
    return {"add_pooling_layer": pooling == "pooler"}
