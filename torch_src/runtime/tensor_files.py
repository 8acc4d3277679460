"""Reading files that torch.save wrote."""

import pickle
import struct
from pathlib import Path
from typing import Any

import torch

from torch_src.runtime.errors import UserError, first_line

# What torch.load(weights_only=True) raises for flipped and missing bytes, measured (it is not documented).
# struct.error and EOFError come from the format of torch before 1.6, which has no zip archive.
LOAD_ERRORS = (
    RuntimeError,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    OSError,
    EOFError,
    struct.error,
    TypeError,
    AssertionError,
)


class DamagedFile(UserError):
    """A file that torch cannot read."""


def load_tensors(path: str | Path, **options: Any) -> Any:
    """Return the nested tensors and plain values in a file, on the CPU.

    Raises DamagedFile, or FileNotFoundError or PermissionError. torch compares no checksum of the data: a
    damaged number is not noticed here.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (FileNotFoundError, PermissionError):
        raise
    except LOAD_ERRORS as error:
        raise DamagedFile(f"{path}: damaged, or no file of tensors ({first_line(error)[:100]})") from error
