"""Models by hub name: the snapshot that a name stands for, as a local folder."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.log import warn

DOWNLOADS = "torch_pretrained_models"  # where script/download.sh puts models
# files that a model may lack: whether it does is not known unless the hub was asked
OPTIONAL = ("modules.json", "config_sentence_transformers.json")
SMALL = (".json", ".txt", ".model", ".jinja")  # settings and tokenizer
MODULE = re.compile(r"([\w-]+_)?\d+_\w+/")  # folder of a module, also inside a Router's


def is_hub_name(path: str) -> bool:
    """Return whether `path` is a name on the hub (owner/name), not a local path, present or missing."""
    first = Path(path).parts[:1]
    looks_local = path.count("/") > 1 or path.startswith((".", "/", "~")) or first == (DOWNLOADS,)
    return not looks_local and not Path(*first).exists()


def local_folder(path: str) -> str:
    """Return `path`, or the folder of the newest snapshot of a hub name, downloaded unless it is cached.

    Without a connection the cached snapshot is used. UserError when there is none.
    """
    if not is_hub_name(path):
        return path
    from huggingface_hub import constants

    return _cached(path, "HF_HUB_OFFLINE") if constants.HF_HUB_OFFLINE else _download(path)


@cache  # one snapshot for all files of a run
def _download(path: str) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        names = [file.rfilename for file in HfApi().model_info(path).siblings or ()]
        folder = snapshot_download(path, allow_patterns=needed_files(names))
        for name in set(OPTIONAL) - set(names):
            _remember_absence(path, name)
        return folder
    except (HFValidationError, RepositoryNotFoundError) as error:
        reason = first_line(error)[:150]
        raise UserError(f"{path}: no such folder, and no such model on the hub ({reason})") from None
    except Exception as error:  # the errors of a failed request are those of several libraries
        return _cached(path, f"{type(error).__name__}: {first_line(error)[:150]}")


def _cached(path: str, reason: str) -> str:
    """Return the cached snapshot of a hub name; `reason`: why the hub was not asked, or did not answer."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, local_files_only=True)
    except Exception:  # as above
        raise UserError(f"{path}: not in the cache, and the hub cannot be reached ({reason})") from None


def needed_files(names: list[str]) -> list[str]:
    """Return the files of a model that are used: one format of the weights, settings, tokenizer.

    Of the sub-folders only modules of sentence-transformers (1_Pooling): others hold other formats.
    """
    own = [name for name in names if "/" not in name or MODULE.match(name)]
    safe = [name for name in own if name.endswith(".safetensors")]
    weights = []
    for name in filter(is_weights, own):
        folder = name.rpartition("/")[0]
        if name in safe or not any(other.rpartition("/")[0] == folder for other in safe):
            weights.append(name)
    return weights + [name for name in own if name.endswith(SMALL)]


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or re.search(r"(^|/)pytorch_model[^/]*\.bin$", name) is not None


def _remember_absence(path: str, name: str) -> None:
    """Note in the cache that the model lacks a file, as the hub's library does when it is asked for it."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    if try_to_load_from_cache(path, name) is None:
        try:
            hf_hub_download(path, name)
        except EntryNotFoundError:
            pass


def known_file(path: str, name: str, required: bool = True) -> Path | None:
    """Return a file of a model's folder, None when the model has no such file.

    UserError when that is not known: the name of a hub model whose cached snapshot may be incomplete. Without
    `required` a warning.
    """
    file = Path(local_folder(path)) / name
    if file.exists():
        return file
    if is_hub_name(path) and _absence_unknown(path, name):
        message = (
            f"{path}: {name} is not in the cache and the hub cannot be reached, so it is not known how the "
            f"model is to be used; connect once, or pass the folder of a complete download ({file.parent})"
        )
        if required:
            raise UserError(message)
        warn_once(message)
    return None


@cache
def warn_once(message: str) -> None:
    """Warn; nothing when it was done before."""
    warn(message)


def _absence_unknown(path: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found: Any = try_to_load_from_cache(path, name)
    return found is None
