"""The inputs of a program: the first one that is missing is reported before anything slow starts."""

import os
from collections.abc import Collection
from dataclasses import fields

from torch_src.common_hparams import DataFolder
from torch_src.hparams import NONE, inherited
from torch_src.models.hub import is_hub_name
from torch_src.runtime.commands import download, how_to_get
from torch_src.runtime.errors import UserError

LATER = (
    "dual_params",
    "cross_params",
    "retrieval_result",
)  # results that a plan and the search page can lack
FOLDERS = {
    "data_dir": "the folder around passage-collection",
    "pretrained_model_path": "a folder, or a hub name such as owner/name",
}


def check_inputs(hp: DataFolder, model: str | None, **data: str) -> None:
    """UserError for the first missing input: those that options name, then data, then the model.

    `model`: folder or hub name, None for a trained one; `data`: property of a path -> what it is.
    """
    check_named(hp, LATER if getattr(hp, "plan", False) else ())
    check_data(hp, **data)
    if model and not os.path.isdir(model) and not is_hub_name(model):
        raise UserError(f"{model}: no such folder (pretrained_model_path); run {download('model')}")


def check_data(hp: DataFolder, **data: str) -> None:
    """UserError for the first missing path; `data`: property of a path -> what it is."""
    for name, what in data.items():
        path = getattr(hp, name)
        if path == NONE or os.path.exists(path):
            continue
        is_folder, get = os.path.isdir(hp.data_dir), how_to_get(path)
        message = f"{path}: no such file or folder" if is_folder else f"{hp.data_dir}: no such folder"
        fix = f"; pass --{knob_of(hp, name)}, or the folder around passage-collection as --data_dir"
        if get:
            fix = f"{get}, or pass another data folder as --data_dir, or --debug for the sample"
        raise UserError(f"{message} ({what}){fix}")


def check_named(hp: DataFolder, besides: Collection[str] = ()) -> None:
    """UserError for a missing file or folder that an option names, except the options `besides`."""
    plain = type(hp).defaults(hp.debug)
    for name, what in {"data_dir": "data folder", **inherited(type(hp), "INPUTS")}.items():
        knob = knob_of(hp, name)
        path, default = getattr(hp, knob), getattr(plain, knob)
        if not path or path in (NONE, default) or knob in besides or os.path.exists(path):
            continue
        if expected := FOLDERS.get(knob):
            if not is_hub_name(path) or knob == "data_dir":
                raise UserError(f"--{knob} {path}: no such folder (expected {expected})")
        else:
            raise UserError(f"--{knob} {path}: no such file or folder ({what})")


def knob_of(hp: DataFolder, name: str) -> str:
    """Return the option of a path: `dev_q` of the property dev_q_path, pretrained_model_path as it is."""
    return name if name in {knob.name for knob in fields(hp)} else name.removesuffix("_path")
