"""NAME_hparams.json: all training settings, and the fields that belong to NAME_params.bin."""

from pathlib import Path
from typing import Any

from torch_src.runtime.files import write_json
from torch_src.runtime.stamps import checksum_json

MODEL_FIELDS = ("fixed_by_weights", "tokenizer", "model_files", "weights")  # used by inference


def write_trained_settings(path: str | Path, settings: dict[str, Any], model: dict[str, Any]) -> None:
    """Write all settings and the MODEL_FIELDS of `model`, with a checksum over these fields."""
    write_json(path, {**settings, **model, "checksum": checksum_json(model)})


def model_fields_intact(trained: dict[str, Any]) -> bool:
    """Return whether the MODEL_FIELDS are unedited; other fields may be edited."""
    return trained.get("checksum") == checksum_json({name: trained.get(name) for name in MODEL_FIELDS})
