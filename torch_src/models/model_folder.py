"""How a model folder says that its model is to be used: the files of sentence-transformers, read once.

Everything in these files is honored, or refused with the name of the part that is not supported.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from torch_src.models.hub import known_file, local_folder
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, read_json_list
from torch_src.runtime.log import log

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
ROUTES = {"query": ("query",), "passage": ("document", "passage", "corpus")}  # names of prompts and routes
LAYERS = ("Dense", "LayerNorm", "Normalize", "Dropout")  # after the pooling
# the older format: one flag for each mode
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TRANSFORMER_SETTINGS = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
# arguments for transformers that do not change the output
HARMLESS = {
    "trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "attn_implementation",
    "torch_dtype", "dtype", "use_cache", "padding_side", "use_fast", "model_max_length", "low_cpu_mem_usage",
}  # fmt: skip
ACTIVATIONS = ("Tanh", "Identity", "GELU", "ReLU", "SiLU", "Sigmoid", "ELU", "LeakyReLU", "Mish", "SELU")
NO_LIMIT = 1_000_000  # tokenizers without a length limit have a larger model_max_length

NOT_DECODERS = {"xlnet", "bert-generation"}  # attend to both sides, although they have a causal head

Modules = list[tuple[str, Path]]  # (kind, folder), in the order of the computation


@dataclass(frozen=True)
class ModelFolder:
    """What a folder says; None or empty: it does not say."""

    path: str  # as the user gave it
    has_modules: bool = False  # whether it has modules.json
    towers: tuple[str, str] = ("", "")  # folders of the query's and the passage's transformer
    separate: bool = False  # two different towers
    pooling: str | None = None
    include_prompt: bool = True  # whether the tokens of a prefix are pooled
    layers: tuple[dict[str, Any], ...] = ()  # after the pooling, without the last normalization
    layer_folders: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # of their weights, for each side
    normalize: bool | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None
    default_prompt: str = ""  # put before every query of a re-ranker
    max_seq_len: int | None = None
    q_max_seq_len: int | None = None
    p_max_seq_len: int | None = None
    unused_prompts: tuple[str, ...] = ()  # names that stand for neither queries nor passages
    lower_case: bool = False  # whether texts become lower case before the tokenizer
    answers: tuple[int, int | None] | None = None  # token ids of a re-ranker's yes and no
    chat: dict[str, Any] | None = None  # format and arguments of the chat template of a re-ranker's pairs

    def tower(self, side: str) -> str:
        """Return the folder of the transformer of `side`, query or passage."""
        return self.towers[side == "passage"]

    def knobs(self) -> dict[str, Any]:
        """Return the knobs of a retriever that it states, lengths excepted."""
        names = ("pooling", "normalize", "query_prefix", "passage_prefix")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def files(self) -> list[Path]:
        """Return configuration and weights, in a fixed order."""
        places = [Path(local_folder(self.path)), *map(Path, self.towers)]
        places += [Path(folder) for folders in self.layer_folders for folder in folders]
        found: list[Path] = []
        for place in filter(Path.is_dir, dict.fromkeys(places)):  # a Normalize may have no folder
            weights = (p for p in place.iterdir() if p.suffix in (".safetensors", ".bin"))
            found += [p for p in (place / "config.json", *sorted(weights)) if p.exists()]
        return found


def log_overrides(path: str, own: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Log the knobs that an option sets to another value than the model's folder."""
    for name, value in own.items():
        if used[name] != value:
            log(f"--{name} {used[name]!r} is used; {path} says {value!r}")


def read_model_folder(path: str) -> ModelFolder:
    """Return what the folder of a retriever says; UserError for a part that is not supported."""
    root = Path(local_folder(path))
    listed = known_file(path, MODULES)
    if listed is None:
        return ModelFolder(path, towers=(str(root), str(root)))
    sides = [_modules(listed, side) for side in ("query", "passage")]
    kinds = [[kind for kind, _ in modules] for modules in sides]
    for modules, order in zip(sides, kinds, strict=True):
        if order[:2] != ["Transformer", "Pooling"] or set(order[2:]) - set(LAYERS):
            wrong = next((k for k in order if k not in ("Transformer", "Pooling", *LAYERS)), None)
            what = f"the module {wrong} is not supported" if wrong else f"the order {', '.join(order)}"
            raise UserError(f"{listed}: {what} (expected Transformer, Pooling, then {', '.join(LAYERS)})")
        del modules[2 + len(_without_last_norm(order[2:])) :]
    (pooling, include_prompt), layers = _same(listed, [_read_side(modules) for modules in sides])
    normalize = _same(listed, [order[2:] != _without_last_norm(order[2:]) for order in kinds])
    towers = [modules[0][1] for modules in sides]
    stated = [_transformer_settings(tower, "feature-extraction") for tower in towers]
    general = read_json(root / SETTINGS) if known_file(path, SETTINGS) else {}
    prompts = _prompts(general, root / SETTINGS)
    known = {name for names in ROUTES.values() for name in names}
    unused = tuple(name for name, text in prompts.items() if text and name not in known)
    paths = [tuple(str(place) for _, place in modules) for modules in sides]
    separate = paths[0] != paths[1]
    return ModelFolder(
        path,
        has_modules=True,
        towers=(str(towers[0]), str(towers[1])),
        separate=separate,
        pooling=pooling,
        include_prompt=include_prompt,
        layers=layers,
        layer_folders=(paths[0][2:], paths[1][2:]),
        normalize=_normalize(general, normalize, root / SETTINGS),
        query_prefix=_prompt(prompts, "query"),
        passage_prefix=_prompt(prompts, "passage"),
        max_seq_len=None if separate else _length(stated[1], "max_seq_length", towers[1]),
        q_max_seq_len=_side_length(stated[0], "query_length", towers[0], separate),
        p_max_seq_len=_side_length(stated[1], "document_length", towers[1], separate),
        lower_case=bool(_same(listed, [bool(each.get("do_lower_case")) for each in stated])),
        unused_prompts=unused,
    )


def read_reranker_folder(path: str) -> ModelFolder:
    """Return what the folder of a re-ranker says; UserError for a part that is not supported.

    Of a retriever's folder, from which a re-ranker is trained, only the transformer is used.
    """
    root = Path(local_folder(path))
    listed = known_file(path, MODULES, required=False)
    if listed is None:
        return ModelFolder(path, towers=(str(root), str(root)))
    modules = _modules(listed, "passage")
    kinds = [kind for kind, _ in modules]
    tower = modules[0][1] if modules else root
    found = ModelFolder(path, True, (str(tower), str(tower)))
    if kinds[:2] == ["Transformer", "Pooling"]:
        return replace(found, has_modules=False)
    if kinds not in (["Transformer"], ["Transformer", "LogitScore"]):
        wrong = next((kind for kind in kinds if kind not in ("Transformer", "LogitScore")), "order")
        raise UserError(f"{listed}: the module {wrong} is not supported for a re-ranker")
    causal = len(modules) > 1
    stated = _transformer_settings(tower, "text-generation" if causal else "sequence-classification")
    general_path = root / SETTINGS
    general = read_json(general_path) if known_file(path, SETTINGS) else {}
    prompts, default = _prompts(general, general_path), general.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise UserError(f"{general_path}: default_prompt_name {default!r} is not one of its prompts")
    message = (stated.get("modality_config") or {}).get("message")
    arguments = (stated.get("processing_kwargs") or {}).get("chat_template", {})
    return replace(
        found,
        answers=_answers(modules[1][1] / "config.json") if causal else None,
        chat={"format": message.get("format", "auto"), "arguments": arguments}
        if message is not None
        else None,
        default_prompt=prompts[default] if default is not None else "",
        max_seq_len=_length(stated, "max_seq_length", tower),
        lower_case=bool(stated.get("do_lower_case")),
        unused_prompts=tuple(name for name, text in prompts.items() if text and name != default),
    )


def _answers(path: Path) -> tuple[int, int | None]:
    """Return the token ids of yes and no; None where the score is the logit of yes alone."""
    ids = read_json(path)
    if ids.get("module_input_name", "causal_logits") != "causal_logits":
        raise UserError(f"{path}: module_input_name {ids['module_input_name']} is not supported")
    false = ids.get("false_token_id")
    true = _number(ids, "true_token_id", path)
    return true, None if false is None else _number(ids, "false_token_id", path)


def _modules(listed: Path, side: str) -> Modules:
    """Return the modules that the texts of one side pass, with a Router replaced by that side's modules."""
    found: Modules = []
    for module in read_json_list(listed):
        place = _inside(listed.parent, str(module.get("path", "")), listed)
        found += _module(str(module.get("type", "")), place, side, listed)
    return found


def _module(kind: str, place: Path, side: str, listed: Path) -> Modules:
    package, _, name = kind.rpartition(".")
    root = package.split(".")[0]
    if root != "sentence_transformers" and (
        root.startswith("custom") or (listed.parent / f"{root}.py").exists()
    ):
        raise UserError(f"{listed}: the module {kind} needs its own code, which is not run")
    if name not in ("Router", "Asym"):
        return [(name, place)]
    path = next((place / n for n in ("router_config.json", "config.json") if (place / n).exists()), None)
    if path is None:
        raise UserError(f"{place / 'router_config.json'}: no such file, but {listed} names a {name}")
    config = read_json(path)
    if config.get("parameters", {}).get("route_mappings"):
        raise UserError(f"{path}: route_mappings of a {name} are not supported")
    routes = config.get("structure", {})
    route = next((route for route in ROUTES[side] if route in routes), None)
    if route is None:
        raise UserError(f"{path}: the {name} has no route {ROUTES[side][0]} ({', '.join(routes) or 'none'})")
    steps = [
        _module(str((config.get("types") or {}).get(step, "")), _inside(place, step, path), side, path)
        for step in routes[route]
    ]
    return [step for found in steps for step in found]


def _inside(folder: Path, name: str, named_by: Path) -> Path:
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"{named_by}: the path {name} leaves the model's folder")
    return folder / name


def _without_last_norm(kinds: list[str]) -> list[str]:
    """Return the kinds of layers up to the last one that is not a normalization."""
    return kinds[
        : len(kinds) - next((at for at, k in enumerate(reversed(kinds)) if k != "Normalize"), len(kinds))
    ]


def _read_side(modules: Modules) -> tuple[tuple[str, bool], tuple[dict[str, Any], ...]]:
    """Return ((pooling, include_prompt), layers) of the modules of one side."""
    path = modules[1][1] / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file, but {MODULES} names this pooling; download the model again")
    config = read_json(path)
    pooling = _pooling(config, path), bool(config.get("include_prompt", True))
    return pooling, tuple(_layer(kind, place) for kind, place in modules[2:])


def _pooling(config: dict[str, Any], path: Path) -> str:
    """Return the pooling of a pooling module's configuration, in its newer or older format."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        modes = mode if isinstance(mode, list) else [mode]
    else:
        modes = [POOLING_FLAGS.get(k, k) for k, on in config.items() if k.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in POOLING_FLAGS.values():
        known = ", ".join(POOLING_FLAGS.values())
        raise UserError(f"{path}: pooling {', '.join(map(str, modes))} is not supported (one of {known})")
    return str(modes[0])


def _layer(kind: str, place: Path) -> dict[str, Any]:
    """Return the settings of a layer after the pooling."""
    path = place / "config.json"
    config = read_json(path) if path.exists() else {}
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise UserError(f"{path}: {name} {config[name]} is not supported (expected sentence_embedding)")
    if kind == "Dropout":
        return {"type": kind, "p": float(config.get("dropout", 0.2))}
    if kind == "LayerNorm":
        return {"type": kind, "size": _number(config, "dimension", path)}
    if kind == "Normalize":
        return {"type": kind}
    if config.get("use_residual"):
        raise UserError(f"{path}: use_residual of a Dense layer is not supported")
    return {
        "type": kind,
        "inputs": _number(config, "in_features", path),
        "outputs": _number(config, "out_features", path),
        "bias": bool(config.get("bias", True)),
        "activation": _activation(
            config.get("activation_function", "torch.nn.modules.activation.Tanh"), path
        ),
    }


def _number(config: dict[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 0:
        raise UserError(f"{path}: {name} {value!r} (expected a number)")
    return value


def _activation(name: Any, path: Path) -> str:
    """Return the class of torch.nn without arguments; UserError for any other function."""
    package, _, kind = str(name).rpartition(".")
    if package not in ("torch.nn.modules.activation", "torch.nn.modules.linear") or kind not in ACTIVATIONS:
        raise UserError(f"{path}: activation_function {name} is not supported ({', '.join(ACTIVATIONS)})")
    return kind


def _transformer_settings(tower: Path, task: str) -> dict[str, Any]:
    """Return the settings of a Transformer module; UserError for those that are not supported."""
    found = next((tower / name for name in TRANSFORMER_SETTINGS if (tower / name).exists()), None)
    if found is None:
        return {}
    stated = read_json(found)
    if stated.get("transformer_task", task) != task:
        raise UserError(f"{found}: transformer_task {stated['transformer_task']} is not supported ({task})")
    if stated.get("query_expansion"):
        raise UserError(f"{found}: query_expansion is not supported")
    for name in set(stated.get("processing_kwargs") or ()) - {"chat_template"}:
        raise UserError(f"{found}: processing_kwargs {name} is not supported")
    for name in ("model", "tokenizer", "config", "processor"):
        for arguments in (stated.get(f"{name}_args"), stated.get(f"{name}_kwargs")):
            if odd := sorted(set(arguments or ()) - HARMLESS):
                raise UserError(f"{found}: {name}_args {', '.join(odd)}: not supported")
    is_retriever = task == "feature-extraction"
    inputs = stated.get("modality_config") or {"text": {}}
    if odd := sorted(set(inputs) - ({"text"} if is_retriever else {"text", "message"})):
        raise UserError(f"{found}: modality_config {', '.join(odd)} is not supported (expected text)")
    output = "last_hidden_state" if is_retriever else "logits"
    for how in inputs.values():
        given = how.get("method", "forward"), how.get("method_output_name", output)
        if given != ("forward", output):
            raise UserError(
                f"{found}: {' '.join(map(str, given))} is not supported (expected forward {output})"
            )
    return stated


def _side_length(stated: dict[str, Any], name: str, tower: Path, separate: bool) -> int | None:
    """Return the length of one side's texts, where the folder states it for this side."""
    if stated.get(name):
        return _number(stated, name, tower)
    return _length(stated, "max_seq_length", tower) if separate else None


def _length(stated: dict[str, Any], name: str, tower: Path) -> int | None:
    """Return the length in tokens that the folder states, else the tokenizer's; None without either."""
    if stated.get(name):
        return _number(stated, name, tower)
    path = tower / "tokenizer_config.json"
    length = read_json(path).get("model_max_length") if path.exists() else None
    return int(length) if isinstance(length, int | float) and 0 < length < NO_LIMIT else None


def _normalize(general: dict[str, Any], has_module: bool, path: Path) -> bool:
    """Return whether vectors have length 1: with it the inner product is the folder's similarity."""
    similarity = general.get("similarity_fn_name") or "cosine"  # sentence-transformers' default
    if similarity in ("cosine", "dot"):
        return has_module or similarity == "cosine"
    if similarity == "euclidean" and has_module:
        return True  # the same order as by inner product
    raise UserError(f"{path}: similarity_fn_name {similarity} is not supported (expected cosine or dot)")


def _prompts(general: dict[str, Any], path: Path) -> dict[str, str]:
    prompts = general.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UserError(f"{path}: prompts are not texts (expected name: text)")
    return {name: text or "" for name, text in prompts.items()}


def _prompt(prompts: dict[str, str], side: str) -> str | None:
    return next((prompts[name] for name in ROUTES[side] if name in prompts), None)


def _same(listed: Path, values: list[Any]) -> Any:
    if values[0] != values[1]:
        text = json.dumps(values[:2], default=str)
        raise UserError(f"{listed}: queries and passages with different settings are not supported ({text})")
    return values[0]


def is_decoder(config: PretrainedConfig) -> bool:
    """Return whether each token attends only to the tokens before it."""
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", None) is False:
        return False
    only_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    only_causal = only_causal and config.model_type not in {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *NOT_DECODERS}
    return not config.is_encoder_decoder and (only_causal or bool(getattr(config, "is_decoder", False)))
