"""Pooling, normalization and prefixes of a model, from the files that sentence-transformers writes."""

from pathlib import Path
from typing import Any

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, read_json_list

DOWNLOADS = "torch_pretrained_models"  # where script/download.sh puts models
POOLING_FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}  # the older format
QUERY_PROMPTS, PASSAGE_PROMPTS = ("query",), ("document", "passage", "corpus")


def is_hub_name(path: str) -> bool:
    """Return whether `path` is a name on the hub (owner/name), not a local path, present or missing."""
    first = Path(path).parts[:1]
    looks_local = path.count("/") > 1 or path.startswith((".", "/", "~")) or first == (DOWNLOADS,)
    return not looks_local and not Path(*first).exists()


def own_settings(path: str) -> dict[str, Any]:
    """Return the settings (pooling, normalize, query_prefix, passage_prefix) of a folder or hub name.

    Empty without modules.json. UserError for a pooling or module that is not supported.
    """
    listed = find_file(path, "modules.json")
    if listed is None:
        return {}
    kinds = {}
    for module in read_json_list(listed):
        kinds[str(module.get("type", "")).rsplit(".", 1)[-1]] = str(module.get("path", ""))
    unsupported = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unsupported:
        raise UserError(f"{listed}: the module {min(unsupported)} is not supported; use another model")
    settings: dict[str, Any] = {"normalize": "Normalize" in kinds}
    pooling = find_file(path, f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else None
    if pooling is not None:
        settings["pooling"] = _pooling(read_json(pooling), pooling)
    prompts_path = find_file(path, "config_sentence_transformers.json")
    prompts = (read_json(prompts_path).get("prompts") or {}) if prompts_path else {}
    for knob, names in (("query_prefix", QUERY_PROMPTS), ("passage_prefix", PASSAGE_PROMPTS)):
        found = [prompts[name] for name in names if isinstance(prompts.get(name), str)]
        if found:
            settings[knob] = found[0]
    return settings


def _pooling(config: dict[str, Any], path: Path) -> str:
    """Return cls or mean from a pooling module's configuration, in its newer or older format."""
    if "pooling_mode" in config:
        modes = [config["pooling_mode"]]
    else:
        modes = [POOLING_FLAGS.get(k, k) for k, on in config.items() if k.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in ("cls", "mean"):
        raise UserError(f"{path}: pooling {', '.join(map(str, modes))} is not supported (cls or mean)")
    return modes[0]


def find_file(path: str, name: str) -> Path | None:
    """Return the path of a model's file, downloaded for a hub name; None when the model has no such file."""
    if not is_hub_name(path):
        local = Path(path) / name
        return local if local.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # no such file, or no network: loading the weights reports the error
