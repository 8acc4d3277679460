"""The cross-encoder: any AutoModelForSequenceClassification with one logit, its head computed in fp32."""

import inspect
import re

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from torch_src.models.backbones import load_pretrained, read_weights
from torch_src.runtime.devices import at_least_float32
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log

IN_A_LAYER = re.compile(
    r"\blayers?\.\d+\."
)  # the stacked layers of the encoder; every other Linear is the head's


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32 also under autocast.

    A logit that went through bf16 has 8 significant bits: most of 50 candidates would be tied.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(at_least_float32(hidden), self.weight, self.bias)


class CrossEncoder(nn.Module):
    """One relevance logit for each (query, passage) pair."""

    def __init__(self, model: PreTrainedModel, drawn: list[str] | None = None):
        super().__init__()
        self.model = model
        self.drawn = [f"model.{name}" for name in drawn or ()]  # parameters that were drawn at random
        for name, module in model.named_modules():
            if type(module) is nn.Linear and not IN_A_LAYER.search(f"{name}."):
                module.__class__ = Float32Linear  # same weights under the same name
        self.takes_types = "token_type_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return logits (B,) fp32 of pairs (B, L)."""
        types = {"token_type_ids": token_type_ids} if self.takes_types else {}
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits[:, 0]
        return at_least_float32(logits)

    @property
    def word_embeddings(self) -> nn.Parameter:
        """The table that FGM perturbs."""
        return self.model.get_input_embeddings().weight


def build_cross_encoder(config) -> CrossEncoder:
    """Return the cross-encoder of `config` with random weights, to load trained ones into."""
    config.num_labels = 1
    return CrossEncoder(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))


def load_cross_encoder(path: str, config, seed: int, trained: bool) -> CrossEncoder:
    """Return the cross-encoder on the pretrained weights of a folder or hub name.

    A head that is not there is drawn from `seed`; with `trained` it must be there. UserError as in
    load_pretrained, and when weights of the encoder itself are missing.
    """
    config.num_labels = 1
    model, missing = load_pretrained(AutoModelForSequenceClassification, path, config, seed)
    body = [name for name in missing if IN_A_LAYER.search(name) or "embedding" in name]
    if body:
        raise UserError(
            f"{path}: {len(body)} weights of the encoder are not in its file, the first: {body[0]}"
        )
    if missing and trained:
        raise UserError(
            f"{path}: has no trained head of one logit ({missing[0]}), its scores would be random; "
            "train one with do_cross_train.py, or name a re-ranker"
        )
    if missing:
        log(f"{path}: no head for one logit there; {', '.join(missing)} drawn at random from seed {seed}")
    return CrossEncoder(model, missing)


def start_from_retriever(encoder: CrossEncoder, path: str) -> None:
    """Load the passage tower of a trained retriever (dual_params.bin) into the encoder below the head."""
    tower = "passage_encoder."
    state = read_weights(path, "do_dual_train.py")
    body = {name.removeprefix(tower): value for name, value in state.items() if name.startswith(tower)}
    wanted = {name for name in encoder.model.base_model.state_dict() if not name.startswith("pooler.")}
    if wanted - set(body):
        missing = min(wanted - set(body))
        raise UserError(f"{path}: has no {tower}{missing}; is it a retriever of the same kind of model?")
    try:
        encoder.model.base_model.load_state_dict(body, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights are of another size than the model's") from error
    log(f"{path}: the encoder starts from its passage tower")
