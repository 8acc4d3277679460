"""What a model folder says of its own use: pooling, normalisation, prefixes, as sentence-transformers writes
them.
"""

from pathlib import Path

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, read_json_list

DOWNLOADS = "torch_pretrained_models"  # where script/download.sh puts models
OLD_POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
QUERY_PROMPTS, PASSAGE_PROMPTS = ("query",), ("document", "passage", "corpus")


def own_settings(path: str) -> dict:
    """Return the settings (pooling, normalize, query_prefix, passage_prefix) that the folder or hub name
    fixes.

    Empty where there is no modules.json. UserError for a pooling that is none of ours, or a module beside
    pooling and normalisation: its vectors would be others.
    """
    listed = find(path, "modules.json")
    if listed is None:
        return {}
    kinds = {}
    for module in read_json_list(listed):
        kinds[str(module.get("type", "")).rsplit(".", 1)[-1]] = str(module.get("path", ""))
    others = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if others:
        raise UserError(f"{listed}: a module {min(others)}, which cannot be loaded here")
    settings = {"normalize": "Normalize" in kinds}
    pooling = find(path, f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else None
    if pooling is not None:
        settings["pooling"] = pooling_of(read_json(pooling), pooling)
    prompts = find(path, "config_sentence_transformers.json")
    given = (read_json(prompts).get("prompts") or {}) if prompts else {}
    for knob, names in (("query_prefix", QUERY_PROMPTS), ("passage_prefix", PASSAGE_PROMPTS)):
        found = [given[name] for name in names if isinstance(given.get(name), str)]
        if found:
            settings[knob] = found[0]
    return settings


def pooling_of(config: dict, path) -> str:
    """Return cls or mean of a pooling module's configuration, of either way to write it."""
    modes = [name for old, name in OLD_POOLINGS.items() if config.get(old)]
    others = [k for k, on in config.items() if k.startswith("pooling_mode_") and on and k not in OLD_POOLINGS]
    if "pooling_mode" in config:
        modes, others = [config["pooling_mode"]], []
    if len(modes) != 1 or others or modes[0] not in ("cls", "mean"):
        raise UserError(f"{path}: a pooling that is neither cls nor mean, which cannot be loaded here")
    return modes[0]


def find(path: str, name: str) -> Path | None:
    """Return where a file of the model lies, fetched from the hub for a hub name; None without it."""
    if Path(path).is_dir():
        here = Path(path) / name
        return here if here.exists() else None
    first = Path(path).parts[:1]
    if (
        path.count("/") > 1
        or path.startswith((".", "/", "~"))
        or first == (DOWNLOADS,)
        or Path(*first).exists()
    ):
        return None  # a path, not a hub name: who loads the model says that it is not there
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # no such file there, or no network: who loads the weights says so
