"""Settings of published encoders, as their model cards state them: known_encoders.json, one row a family."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from torch_src.models.hub import local_folder
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.log import log

TABLE = Path(__file__).with_name("known_encoders.json")
SETTINGS = ("pooling", "normalize", "query_prefix", "passage_prefix", "max_seq_len")


@cache
def known_encoder(path: str) -> dict[str, Any]:
    """Return the settings of a published encoder by the name of its folder or hub model; empty for others.

    A folder with another name is recognized by `_name_or_path` in its config.json.
    """
    with open(TABLE, encoding="utf-8") as file:
        rows = json.load(file)
    for name in _names(path):
        for row in rows:
            if re.fullmatch(row["names"], name.lower()):
                return {key: row[key] for key in SETTINGS} | {"family": row["family"]}
    return {}


def _names(path: str) -> list[str]:
    """Return the last part of a model's path, and of the name in its config.json."""
    names = [Path(path).name]
    try:
        names.append(Path(str(read_json(Path(local_folder(path)) / "config.json").get("_name_or_path"))).name)
    except (UserError, OSError):
        pass  # reported where the model is loaded
    return names


@cache
def log_known(path: str, family: str, used: tuple[tuple[str, Any], ...]) -> None:
    """Log once which settings of a model come from the table."""
    settings = "  ".join(f"{name} {value!r}" for name, value in used)
    log(f"{path}: not stated in its files, so as published for {family}: {settings} (options override it)")
