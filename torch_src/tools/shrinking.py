"""Make a small encoder from a large one: fewer layers, fewer neurons in each, a smaller vocabulary.

It is a starting point for distillation. Sun et al. 2019 (arXiv 1908.09355) keep every n-th layer; here the
neurons with the largest outputs are chosen as well.
"""

import json
import re
import tempfile
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from torch_src.data.lines import read_lines
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library

LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
UP, DOWN = "intermediate.dense", "output.dense"  # the two matrices of a layer's feed-forward network
WORDS = "embeddings.word_embeddings.weight"
SPACE = "▁"  # of sentencepiece
DISTILL_REQUIREMENTS = "requirements-distill.txt"
JsonDict = dict[str, Any]


def shrink_tokenizer(
    teacher: PreTrainedTokenizerFast,
    texts: Iterable[str],
    size: int,
    prefixes: Sequence[str] = (),
    folds: str = "",
    segments: bool = True,
) -> tuple[PreTrainedTokenizerFast, list[list[int]]]:
    """Return a tokenizer of the teacher's `size` most used tokens, and the teacher's tokens of each of them.

    Single characters that occur in the texts are kept before longer tokens. Texts become lower case. Each
    prefix becomes a token of its own (Unigram). `folds`: a file `character TAB replacement ...`, such as
    OpenCC's TSCharacters.txt. `segments`: the passage of a pair gets the segment id 1.
    """
    whole = json.loads(teacher.backend_tokenizer.to_str())
    kind, special = whole["model"]["type"], set(teacher.all_special_ids)
    prefixes = [prefix for prefix in prefixes if prefix.strip() and kind == "Unigram"]
    if kind not in ("Unigram", "WordPiece"):
        raise UserError(
            f"--vocab_size: a {kind} vocabulary cannot be cut (expected Unigram, WordPiece); pass 0"
        )
    steps = [whole["normalizer"]] if whole["normalizer"] else []
    steps += [{"type": "Lowercase"}] + ([fold_step(folds)] if folds else [])
    whole["normalizer"] = {"type": "Sequence", "normalizers": steps}
    normalize = Tokenizer.from_str(json.dumps(whole)).normalizer.normalize_str
    names: Any = teacher.convert_ids_to_tokens(list(range(len(teacher))))
    sources = normalized_tokens(names, special, normalize)
    counts = count_tokens(teacher, texts, names, normalize)
    if (rest := size - len(special) - len(prefixes)) <= 0:
        raise UserError(f"--vocab_size {size}: too few beside the {size - rest} special tokens and prefixes")
    chosen = set(choose_tokens(counts, sources, rest))
    kept: dict[str, list[int]] = {names[at]: [at] for at in sorted(special)}
    kept |= {name: ids for name, ids in sources.items() if name in chosen}
    whole_prefixes: dict[str, list[int]] = {}
    for prefix in prefixes:
        name = SPACE + normalize(prefix).strip().replace(" ", SPACE)
        whole_prefixes[name] = teacher(prefix, add_special_tokens=False)["input_ids"]
    rebuild_vocabulary(whole, kept, list(whole_prefixes))
    kept |= whole_prefixes
    renumber_special_tokens(whole, list(kept), segments)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(whole)),
        model_max_length=min(teacher.model_max_length, 10**6), **teacher.special_tokens_map,
    )  # fmt: skip
    return fast, list(kept.values())


def fold_step(path: str) -> JsonDict:
    """Return the normalizer that replaces characters by the file's second column (its first alternative)."""
    spm = import_library("sentencepiece", DISTILL_REQUIREMENTS)
    proto = import_library("sentencepiece.sentencepiece_model_pb2", DISTILL_REQUIREMENTS, "protobuf")
    pairs = [re.split(r"[\t ]", text) for _, text in read_lines(path) if text and not text.startswith("#")]
    rules = [(old, new) for old, new, *_ in pairs if len(old) == 1 and old != new]
    if not rules:
        raise UserError(f"{path}: no line of the form `character TAB replacement`")
    code_points = [" ".join(f"{ord(sign):04X}" for sign in text) for rule in rules for text in rule]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rules.tsv"
        lines = (f"{old}\t{new}\n" for old, new in zip(code_points[::2], code_points[1::2], strict=True))
        table.write_text("".join(lines), encoding="utf-8")
        compiled = spm.SentencePieceNormalizer(rule_tsv=str(table)).serialized_model_proto()
    model = proto.ModelProto.FromString(compiled)
    charsmap = b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    return {"type": "Precompiled", "precompiled_charsmap": charsmap}


def normalized_tokens(
    names: Sequence[str], special: set[int], normalize: Callable[[str], str]
) -> dict[str, list[int]]:
    """Return {token after normalization: the teacher's ids that become it}, in the teacher's order."""
    sources: dict[str, list[int]] = defaultdict(list)
    for at, name in enumerate(names):
        if at not in special:
            sources[normalized(name, normalize)].append(at)
    sources.pop("", None)
    return sources


def normalized(name: str, normalize: Callable[[str], str]) -> str:
    """Return a token after normalization; its mark of a word's start or continuation stays."""
    mark = next((mark for mark in (SPACE, "##") if name.startswith(mark)), "")
    return mark + normalize(name.removeprefix(mark)).strip() if name != mark else name


def count_tokens(
    teacher: PreTrainedTokenizerFast,
    texts: Iterable[str],
    names: Sequence[str],
    normalize: Callable[[str], str],
) -> Counter[str]:
    """Return how often each normalized token occurs in the texts."""
    counts: Counter[int] = Counter()
    for encoding in teacher.backend_tokenizer.encode_batch([normalize(text) for text in texts]):
        counts.update(encoding.ids)
    by_name: Counter[str] = Counter()
    for at, count in counts.items():
        by_name[normalized(names[at], normalize)] += count
    return by_name


def choose_tokens(counts: Counter[str], sources: dict[str, list[int]], size: int) -> list[str]:
    """Return up to `size` tokens: single characters of the texts and ASCII first, then the most used."""

    def rank(name: str) -> tuple[bool, int]:
        text = name.lstrip(SPACE).removeprefix("##")
        single = len(text) <= 1 and (counts[name] > 0 or text.isascii())
        return not single, -counts[name]

    return sorted(sources, key=rank)[:size]


def rebuild_vocabulary(whole: JsonDict, kept: dict[str, list[int]], prefixes: list[str]) -> None:
    """Replace the vocabulary of a tokenizer.json.

    A Unigram token keeps the best score of its sources; 0, above all others, keeps a prefix in one token.
    """
    model = whole["model"]
    if model["type"] == "WordPiece":
        model["vocab"] = {name: at for at, name in enumerate(kept)}
        return
    scores = [score for _, score in model["vocab"]]
    unknown = model["vocab"][model["unk_id"]][0]
    model["vocab"] = [[name, max(scores[at] for at in ids)] for name, ids in kept.items()]
    model["vocab"] += [[name, 0.0] for name in prefixes if name not in kept]
    model["unk_id"] = list(kept).index(unknown)


def renumber_special_tokens(whole: JsonDict, names: list[str], segments: bool) -> None:
    """Give the special tokens their new ids, and pairs the form CLS query SEP passage SEP."""
    at = {name: number for number, name in enumerate(names)}
    whole["added_tokens"] = [
        {**token, "id": at[token["content"]]} for token in whole["added_tokens"] if token["content"] in at
    ]
    first, last = ends(whole["post_processor"])
    one, two = 0, int(segments)
    special = {name: {"id": name, "ids": [at[name]], "tokens": [name]} for name in (first, last)}
    query = [piece("SpecialToken", first, one), piece("Sequence", "A", one), piece("SpecialToken", last, one)]
    passage = [piece("Sequence", "B", two), piece("SpecialToken", last, two)]
    whole["post_processor"] = {
        "type": "TemplateProcessing", "single": query, "pair": query + passage, "special_tokens": special
    }  # fmt: skip


def piece(kind: str, name: str, segment: int) -> JsonDict:
    """Return a piece of a template in tokenizer.json: a special token or a text, with its segment id."""
    return {kind: {"id": name, "type_id": segment}}


def ends(processor: JsonDict) -> tuple[str, str]:
    """Return the special tokens before and after a text."""
    if processor["type"] == "TemplateProcessing":
        found = [step["SpecialToken"]["id"] for step in processor["single"] if "SpecialToken" in step]
        if len(found) == 2:
            return found[0], found[1]
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return processor["cls"][0], processor["sep"][0]
    raise UserError(f"--vocab_size: a tokenizer with {processor['type']} cannot be cut; pass 0")


@torch.no_grad()
def shrink_model(
    teacher: PreTrainedModel,
    layers: Sequence[int],
    neurons: int,
    embeddings: Sequence[Sequence[int]],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> PreTrainedModel:
    """Return a classifier with one logit over the teacher's `layers` (from 0), each with `neurons` neurons.

    The word embedding of a token is the mean of the teacher's `embeddings`. The neurons kept are those with
    the largest mean absolute activation on the batches (token ids, mask), times the norm of their output.
    """
    blocks = getattr(getattr(teacher, "encoder", None), "layer", None)
    if blocks is None or not hasattr(blocks[0], "intermediate"):
        raise UserError(
            f"a {teacher.config.model_type} model cannot be shrunk (expected a BERT-like encoder)"
        )
    config = smaller_config(teacher.config, layers, neurons, len(embeddings))
    state, source = {}, teacher.state_dict()
    strength = neuron_strength(teacher, blocks, layers, batches)
    for name, value in source.items():
        layer = LAYER.match(name)
        if name == WORDS:
            state[name] = torch.stack([value[list(ids)].mean(0) for ids in embeddings])
        elif layer is None:
            state[name] = value
        elif (at := int(layer[1])) in layers:
            keep = strength[at].topk(neurons).indices.sort().values
            short = name.removeprefix(layer[0])
            if short.startswith(UP):
                value = value[keep]
            elif short == f"{DOWN}.weight":
                value = value[:, keep]
            state[f"encoder.layer.{layers.index(at)}.{short}"] = value
    student: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    missing, unexpected = student.base_model.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("pooler.") for name in missing):
        raise UserError(f"a {config.model_type} model cannot be shrunk ({[*missing, *unexpected][0]})")
    return student


def smaller_config(
    config: PretrainedConfig, layers: Sequence[int], neurons: int, words: int
) -> PretrainedConfig:
    """Return the teacher's configuration with other sizes and one label."""
    count, width = getattr(config, "num_hidden_layers", 0), getattr(config, "intermediate_size", 0)
    if sorted(set(layers)) != list(layers) or layers[-1] >= count:
        raise UserError(f"--layers {','.join(map(str, layers))}: expected increasing numbers below {count}")
    if not 0 < neurons <= width:
        raise UserError(f"--neurons {neurons}: must be between 1 and {width}")
    sizes = {"num_hidden_layers": len(layers), "intermediate_size": neurons, "vocab_size": words}
    own = {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")}
    return type(config).from_dict({**own, **sizes, "architectures": None, "num_labels": 1})


def neuron_strength(
    teacher: PreTrainedModel, blocks: Any, layers: Sequence[int], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[int, Tensor]:
    """Return for each layer the sum of |activations| (neurons,) times the norm of the output weights."""
    sums = {at: torch.zeros(teacher.config.intermediate_size) for at in layers}
    with activations_added(blocks, sums):
        for input_ids, mask in batches:
            teacher(input_ids=input_ids, attention_mask=mask)
    return {at: total * blocks[at].output.dense.weight.norm(dim=0) for at, total in sums.items()}


@contextmanager
def activations_added(blocks: Any, sums: dict[int, Tensor]) -> Iterator[None]:
    """Add the |activation| of the blocks' neurons to `sums` within the `with` block."""

    def adder(total: Tensor) -> Callable[..., None]:
        def add(_module: Any, _inputs: Any, output: Tensor) -> None:
            total.add_(output.flatten(0, -2).abs().sum(0))

        return add

    hooks = [blocks[at].intermediate.register_forward_hook(adder(total)) for at, total in sums.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
