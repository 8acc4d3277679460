"""Settings of published encoders, as their model cards state them: known_encoders.json, one row a family."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from torch_src.models.hub import local_folder
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.log import log, warn

TABLE = Path(__file__).with_name("known_encoders.json")
SETTINGS = ("pooling", "normalize", "query_prefix", "passage_prefix", "max_seq_len")


@cache
def known_encoder(path: str) -> dict[str, Any]:
    """Return the settings of a published encoder, its `family`, and `base`; empty for other models.

    A model is known by the name of its folder or hub model. With another name, such as a fine-tuned model's,
    it is taken for the one that its config.json names (`_name_or_path`); `base` is that name, else empty.
    """
    with open(TABLE, encoding="utf-8") as file:
        rows = json.load(file)
    for name, base in ((path, ""), *((base, base) for base in _base(path))):
        for row in rows:
            if re.fullmatch(row["names"], Path(name).name.lower()):
                return {key: row[key] for key in SETTINGS} | {"family": row["family"], "base": base}
    return {}


def _base(path: str) -> list[str]:
    """Return the name in a model's config.json, if any."""
    try:
        name = read_json(Path(local_folder(path)) / "config.json").get("_name_or_path")
    except (UserError, OSError):
        return []  # reported where the model is loaded
    return [name] if isinstance(name, str) else []


@cache
def log_known(path: str, family: str, base: str, used: tuple[tuple[str, Any], ...]) -> None:
    """Log once which settings of a model come from the table; a warning if they are a guess."""
    settings = "  ".join(f"{name} {value!r}" for name, value in used)
    unstated = f"{path}: not stated in its files, so"
    if base:
        warn(
            f"{unstated} guessed from {base}, which its config.json names: {settings}; "
            'if it was trained otherwise, pass the options (--query_prefix "" for no prefix)'
        )
    else:
        log(f"{unstated} as published for {family}: {settings} (options override it)")
