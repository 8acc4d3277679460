"""The text around query and passage of a re-ranker: prompts, chat templates, that of Qwen3-Reranker."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from torch_src.models.model_folder import ModelFolder, is_decoder
from torch_src.runtime.errors import UserError, first_line

QUERY, PASSAGE = "\ue000", "\ue001"  # stand for the texts while a template is read
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
STRUCTURED = (
    "content[0]",
    ".type",
    "'type'",
    '"type"',
    "message.content[",
)  # in templates of lists of contents


@dataclass(frozen=True)
class PairTemplate:
    """An input is before, query, between, passage, after."""

    before: str = ""
    between: str = ""
    after: str = ""
    special_tokens: bool = True  # whether the tokenizer adds its own


# as in the model card of Qwen3-Reranker
QWEN3 = PairTemplate(
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    f"<Instruct>: {INSTRUCTION}\n<Query>: ",
    "\n<Document>: ",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    special_tokens=False,
)


def is_causal(folder: ModelFolder, config: PretrainedConfig) -> bool:
    """Return whether the re-ranker is a causal language model that answers yes or no."""
    return folder.answers is not None or (_has_causal_head(config) and template_of(config) is not None)


def _has_causal_head(config: PretrainedConfig) -> bool:
    return (config.architectures or [""])[0].endswith("ForCausalLM")


def template_of(config: PretrainedConfig) -> PairTemplate | None:
    """Return the template of a re-ranker's configuration; None without one."""
    settings = getattr(config, "pair_settings", None)
    return PairTemplate(**settings) if settings else None


def add_template(
    config: PretrainedConfig, folder: ModelFolder, load: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Add the template that a folder says, or that its kind of model was trained with, to the configuration.

    load: returns the tokenizer. Any other causal language model gets a new head with one logit.
    """
    found = None
    if folder.chat is not None:
        found = _chat_template(folder, load())
    elif is_decoder(config) and not folder.has_modules:
        tokenizer = load()
        if "document" in str(tokenizer.chat_template or ""):
            found = _chat_template(folder, tokenizer)
        elif _has_causal_head(config) and config.model_type.startswith("qwen"):
            found = QWEN3
    elif folder.default_prompt:
        found = PairTemplate(before=folder.default_prompt)
    if found:
        config.pair_settings = asdict(found)


def _chat_template(folder: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> PairTemplate:
    """Return what the tokenizer's chat template puts around query and document."""
    given = folder.chat or {}
    text = str(tokenizer.chat_template or "")
    structured = given.get("format") == "structured" or (
        given.get("format", "auto") == "auto" and any(mark in text for mark in STRUCTURED)
    )

    def message(role: str, content: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": content}] if structured else content}

    system = [message("system", folder.default_prompt)] if folder.default_prompt else []
    messages = [*system, message("query", QUERY), message("document", PASSAGE)]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, **given.get("arguments", {})))
    except Exception as error:  # a template raises errors of its own
        raise UserError(f"{folder.path}: the chat template cannot be used ({first_line(error)})") from error
    before, _, rest = rendered.partition(QUERY)
    between, _, after = rest.partition(PASSAGE)
    once = rendered == before + QUERY + between + PASSAGE + after
    if not once or any(mark in text for mark in (QUERY, PASSAGE) for text in (before, between, after)):
        raise UserError(f"{folder.path}: the chat template does not contain query and document once")
    return PairTemplate(before, between, after, special_tokens=False)


def chat_template(template: PairTemplate) -> str:
    """Return the template as a tokenizer's chat template, for messages of the roles query and document."""
    before, between, after = map(json.dumps, (template.before, template.between, template.after))
    query = "{{ " + before + " }}{{ message['content'] }}{{ " + between + " }}"
    document = "{{ message['content'] }}{{ " + after + " }}"
    return (
        "{% for message in messages %}{% if message['role'] == 'query' %}" + query
        + "{% elif message['role'] == 'document' %}" + document + "{% endif %}{% endfor %}"
    )  # fmt: skip
