"""The inputs of a program: the first one that is missing is reported before anything slow starts."""

import os
from pathlib import Path

from torch_src.common_hparams import DataFolder
from torch_src.hparams import NONE
from torch_src.models.hub import is_hub_name
from torch_src.runtime.errors import UserError

DOWNLOAD = "get it with `sh script/download.sh`, or pass the folder around passage-collection as --data_dir"


def check_inputs(hp: DataFolder, model: str | None, **data: str) -> None:
    """UserError for the first missing input: those that options name first, then data, then the model.

    `model`: folder or hub name, None for a trained one; `data`: property of a path -> what it is.
    """
    plain = type(hp).defaults(hp.debug)
    missing: list[tuple[bool, str]] = []  # whether an option names it, the message
    for name, what in data.items():
        path = getattr(hp, name)
        if path == NONE or os.path.exists(path):
            continue
        no_folder = not os.path.isdir(hp.data_dir) and Path(hp.data_dir) in Path(path).parents
        message = f"{hp.data_dir}: no such folder" if no_folder else f"{path}: no such file or folder"
        missing.append((path != getattr(plain, name), f"{message} ({what}); {DOWNLOAD}"))
    if model and not os.path.isdir(model) and not is_hub_name(model):
        given = model != getattr(plain, "pretrained_model_path", None)
        message = "no such folder (pretrained_model_path); run sh script/download.sh model"
        missing.append((given, f"{model}: {message}"))
    for _, message in sorted(missing, key=lambda pair: not pair[0]):
        raise UserError(message)
