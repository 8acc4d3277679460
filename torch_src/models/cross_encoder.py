"""The cross-encoder: any AutoModelForSequenceClassification with one logit, its head computed in float32."""

import inspect
import re

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from torch_src.models.backbones import load_pretrained, read_weights
from torch_src.runtime.devices import at_least_float32
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log

ENCODER_LAYER = re.compile(r"\blayers?\.\d+\.")  # linear layers outside of these belong to the head


class Float32Linear(nn.Linear):
    """A linear layer with the parameters of another one that computes in float32 even under autocast.

    bf16 logits have 8 significant bits, so most of 50 candidates would be tied.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate new weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(at_least_float32(hidden), self.weight, self.bias)


class CrossEncoder(nn.Module):
    """One relevance logit for each (query, passage) pair.

    Input: token ids, mask and segment ids (0 query, 1 passage), each (B, L) int64. Output: (B,) float32.
    """

    def __init__(self, model: PreTrainedModel, random_parameters: list[str] | None = None):
        """`random_parameters`: names of the parameters without pretrained weights."""
        super().__init__()
        self.model = model
        self.random_parameters = [f"model.{name}" for name in random_parameters or ()]
        self.takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and not ENCODER_LAYER.search(f"{name}."):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, Float32Linear(module))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return the logits (B,) float32 of pairs (B, L)."""
        types = {"token_type_ids": token_type_ids} if self.takes_types else {}
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits[:, 0]
        return at_least_float32(logits)

    @property
    def word_embeddings(self) -> nn.Parameter:
        """The word embeddings (V, H), which FGM perturbs."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, nn.Parameter)
        return weight


def build_cross_encoder(config: PretrainedConfig) -> CrossEncoder:
    """Return the cross-encoder of `config` with random weights."""
    config.num_labels = 1
    return CrossEncoder(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))


def load_cross_encoder(path: str, config: PretrainedConfig, seed: int, trained: bool) -> CrossEncoder:
    """Return the cross-encoder with the pretrained weights of a folder or hub name.

    A missing head is initialized from `seed`; UserError with `trained`, or if encoder weights are missing.
    """
    config.num_labels = 1
    model, missing = load_pretrained(AutoModelForSequenceClassification, path, config, seed)
    body = [name for name in missing if ENCODER_LAYER.search(name) or "embedding" in name]
    if body:
        raise UserError(f"{path}: {len(body)} encoder weights are missing, e.g. {body[0]}")
    if missing and trained:
        raise UserError(
            f"{path}: has no trained head with one logit ({missing[0]}), so its scores would be random; "
            "train one with do_cross_train.py, or use a re-ranker model"
        )
    if missing:
        log(f"{path}: no head with one logit; {', '.join(missing)} initialized randomly with seed {seed}")
    return CrossEncoder(model, missing)


def start_from_retriever(encoder: CrossEncoder, path: str) -> None:
    """Load the passage tower of a trained retriever (dual_params.bin) into the encoder below the head."""
    state = read_weights(path, "do_dual_train.py")
    prefix = "passage_encoder."
    shared = "query_encoder."  # of a shared encoder, which is stored once
    names = [name for name in state if name.startswith((prefix, shared))]
    if names and not any(name.startswith(prefix) for name in names):
        prefix = shared
    tower = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    needed = {name for name in encoder.model.base_model.state_dict() if not name.startswith("pooler.")}
    if missing := needed - set(tower):
        raise UserError(
            f"{path}: has no {prefix}{min(missing)}; use a retriever trained from the same kind of model"
        )
    try:
        encoder.model.base_model.load_state_dict(tower, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path}: the shapes of its weights differ from this model's") from error
    log(f"{path}: encoder initialized from its passage tower")
