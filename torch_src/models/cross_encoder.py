"""The cross-encoder: a sequence classifier with one logit, its head computed in float32.

Classifiers with two labels and causal language models that answer yes or no are converted to one logit.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from torch_src.models.backbones import (
    architecture,
    load_config,
    load_pretrained,
    load_weights,
    probe_ids,
    read_config,
    read_weights,
)
from torch_src.models.model_folder import ModelFolder, read_reranker_folder
from torch_src.models.pair_template import is_causal, template_of
from torch_src.models.tokenization import load_tokenizer, tokenizer_checksum
from torch_src.runtime.devices import at_least_float32
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import read_json, require
from torch_src.runtime.log import log, warn

# names of the labels of a classifier with two, where they are not LABEL_0 (irrelevant) and LABEL_1
RELEVANT, IRRELEVANT = {"relevant", "positive", "yes", "true"}, {"irrelevant", "negative", "no", "false"}
ENCODER_LAYER = re.compile(r"\blayers?\.\d+\.")  # linear layers outside of these belong to the head
SAME_MODEL = "pass the --pretrained_model_path and --vocab_path that it was trained with"  # a fix


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
        parameters, kinds = (
            inspect.signature(model.forward).parameters,
            getattr(model.config, "type_vocab_size", 2),
        )
        self.takes_types = "token_type_ids" in parameters and kinds != 1  # the only one is the default
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

    Two labels, and the answers yes and no of a causal language model, become one logit: their difference
    (log-odds). A missing head is initialized from `seed`; UserError with `trained`, or if encoder weights are
    missing.
    """
    folder = read_reranker_folder(path)
    own = read_config(folder.tower("passage"), path)
    if is_causal(folder, load_config(path, kind="cross")):
        return CrossEncoder(_from_causal(folder, config, seed))
    kind = (AutoModelForSequenceClassification, folder.tower("passage"))
    if own.num_labels == 2 and (own.architectures or [""])[0].endswith("ForSequenceClassification"):
        config.num_labels = 2
        model, missing = load_pretrained(*kind, config, seed)
        config.num_labels = 1
        if not missing:
            _check_padding(model, path)
            return CrossEncoder(_log_odds(model, own, path))
    config.num_labels = 1
    model, missing = load_pretrained(*kind, config, seed)
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
    _check_padding(model, path)
    return CrossEncoder(model, missing)


@torch.no_grad()
def _check_padding(model: PreTrainedModel, path: str) -> None:
    """Warn where the logit of a text depends on the padding after it."""
    was_training, config = model.training, model.config
    ids = probe_ids(config)
    padded = nn.functional.pad(ids, (0, 1), value=config.pad_token_id or 0)
    model.eval()
    one = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    other = model(input_ids=padded, attention_mask=nn.functional.pad(torch.ones_like(ids), (0, 1))).logits
    model.train(was_training)
    if (one - other).abs().max() > 1e-3 * (1 + one.abs().max()):
        warn(f"{path}: padding changes the scores of a {config.model_type} model; use another model")


@torch.no_grad()
def _log_odds(model: PreTrainedModel, config: PretrainedConfig, path: str) -> PreTrainedModel:
    """Replace the last layer of a classifier with two labels by one for the difference of their logits."""
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 2 and not ENCODER_LAYER.search(f"{name}.")
    ]
    if len(heads) != 1:
        raise UserError(f"{path}: the layer of its two labels is not known, so it is not supported")
    head = model.get_submodule(heads[0])
    assert isinstance(head, nn.Linear)
    names = [str(config.id2label.get(at, "")).lower() for at in range(2)]
    relevant = 0 if names[0] in RELEVANT or names[1] in IRRELEVANT else 1
    log(f"{path}: two labels; the score is the logit of label {relevant} minus that of label {1 - relevant}")
    parent, _, child = heads[0].rpartition(".")
    setattr(model.get_submodule(parent), child, _difference(head, relevant, 1 - relevant))
    model.num_labels = model.config.num_labels = 1
    return model


def _difference(head: nn.Linear, plus: int, minus: int | None) -> nn.Linear:
    """Return a layer with one output: one output of `head` minus another, if given."""
    one = nn.Linear(head.in_features, 1, bias=head.bias is not None)
    for name in ("weight", "bias") if head.bias is not None else ("weight",):
        values = getattr(head, name).detach()
        kept = values[plus : plus + 1].clone()
        getattr(one, name).data = kept if minus is None else kept - values[minus : minus + 1]
    return one


@torch.no_grad()
def _from_causal(folder: ModelFolder, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Return a causal language model as a classifier with one logit: that of yes minus that of no."""
    path = folder.path
    causal, missing = load_pretrained(AutoModelForCausalLM, folder.tower("passage"), config, seed)
    if missing:
        raise UserError(f"{path}: {len(missing)} weights are missing, e.g. {missing[0]}")
    tokenizer = load_tokenizer(path, kind="cross")
    yes, no = folder.answers or (_answer(tokenizer, "yes", path), _answer(tokenizer, "no", path))
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Linear) or max(yes, no or 0) >= head.out_features:
        raise UserError(f"{path}: the answers {yes} and {no} are not in the model's vocabulary")
    config.num_labels = 1
    unsupported = f"{path}: a causal {config.model_type} model is not supported as a re-ranker"
    ids = probe_ids(config)
    mask = torch.ones_like(ids)
    answers = causal.eval()(input_ids=ids, attention_mask=mask).logits[0, -1]
    expected = answers[yes] - (0 if no is None else answers[no])
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        setattr(model, model.base_model_prefix, causal.base_model)
        model.score = _difference(head, yes, no)
        found = model.eval()(input_ids=ids, attention_mask=mask).logits[0, 0]
    except (ValueError, AttributeError, TypeError, LookupError, RuntimeError) as error:
        raise UserError(f"{unsupported} ({first_line(error)[:150]})") from error
    if (found - expected).abs() > 1e-3 * (1 + expected.abs()):
        raise UserError(f"{unsupported}: its logits are not a linear function of the last state")
    config.architectures = [type(model).__name__]
    log(
        f"{path}: the score is the logit of token {yes}"
        + ("" if no is None else f" minus that of token {no}")
    )
    return model


def _answer(tokenizer: PreTrainedTokenizerBase, text: str, path: str) -> int:
    """Return the token of an answer, the first one of several."""
    found = tokenizer.convert_tokens_to_ids(text)
    if isinstance(found, int) and found != tokenizer.unk_token_id:
        return found
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"{path}: a causal language model whose tokenizer has no token {text}")
    return int(ids[0])


def describe_reranker(settings: Mapping[str, Any], config: PretrainedConfig) -> str:
    """Return the settings in effect as one line for the log."""
    template = template_of(config)
    parts = [f"query and passage at most {settings['max_seq_len']} tokens"]
    if template:
        parts.append(f"template {template.before!r} query {template.between!r} passage {template.after!r}")
    return "; ".join(parts)


def start_from_retriever(
    encoder: CrossEncoder, path: str, model_path: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Load the passage tower of a trained retriever (dual_params.bin) into the encoder below the head.

    UserError when the retriever has other shapes or another vocabulary than the encoder of `model_path`.
    """
    folder = Path(path).with_name("dual_model")
    if folder.exists() and load_tokenizer(str(folder)).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{path}: trained with another vocabulary than that of {model_path}; {SAME_MODEL}")
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


def start_from_reranker(
    encoder: CrossEncoder, path: str, model_path: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Load a trained re-ranker (cross_params.bin), head included, into the encoder of `model_path`.

    UserError when the re-ranker has another architecture or tokenizer.
    """
    settings = Path(path).with_name("cross_hparams.json")
    trained = read_json(require(settings, f"settings of {Path(path).name}", "train the re-ranker again"))
    folder = Path(path).with_name("cross_model")
    if trained.get("tokenizer") != tokenizer_checksum(tokenizer):
        raise UserError(f"{path}: trained with another tokenizer than that of {model_path}; {SAME_MODEL}")
    if folder.exists() and architecture(load_config(str(folder), kind="cross")) != architecture(
        load_config(model_path, kind="cross")
    ):
        raise UserError(f"{path}: trained with another configuration than that of {model_path}; {SAME_MODEL}")
    load_weights(path, encoder.model, "do_cross_train.py")
    encoder.random_parameters = []
    log(f"{path}: encoder and head initialized from it")
