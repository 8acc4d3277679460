"""The dual encoder: two towers of any transformers.AutoModel encoder, pooled to one vector a text."""

import copy
import inspect

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel

from torch_src.models.backbones import load_pretrained
from torch_src.runtime.devices import at_least_float32
from torch_src.runtime.errors import UserError


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
        at_least_float32(output.pooler_output)
        if pooling == "pooler"
        else pool(output[0], attention_mask, pooling)
    )
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def shorten(vectors: Tensor, dims: int, normalize: bool) -> Tensor:
    """Return the first `dims` dimensions, of length 1 again where vectors are (Kusupati et al. 2022)."""
    if dims == vectors.shape[-1]:
        return vectors
    vectors = vectors[..., :dims]
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return (B, H) fp32 from the last layer (B, L, H): the first token (cls), or the mean over
    real tokens.
    """
    if pooling == "cls":
        return at_least_float32(hidden[:, 0])
    assert pooling == "mean", pooling
    hidden = at_least_float32(hidden)
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def build_backbone(config, pooling: str) -> PreTrainedModel:
    """Return the encoder of `config` with random weights; a pooling layer only for `pooling=pooler`."""
    return AutoModel.from_config(config, dtype=torch.float32, **_pooler_option(config, pooling))


def load_backbone(path: str, config, pooling: str, seed: int) -> PreTrainedModel:
    """Return the pretrained encoder of a folder or hub name, fp32; `config` is its load_config.

    UserError as in load_pretrained, and for weights that lack a part of the encoder which `pooling` needs.
    """
    model, missing = load_pretrained(AutoModel, path, config, seed, **_pooler_option(config, pooling))
    _refuse_missing(path, missing, pooling)
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
