"""Read files written by torch.save."""

import pickle
import struct
from pathlib import Path
from typing import Any

import torch

from torch_src.runtime.errors import UserError, first_line

# Raised by torch.load(weights_only=True) for flipped or missing bytes (found by experiment, not documented).
# struct.error and EOFError: the format before torch 1.6.
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

    Raises DamagedFile, FileNotFoundError or PermissionError. A changed number is not detected: torch does not
    verify checksums.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (FileNotFoundError, PermissionError):
        raise
    except LOAD_ERRORS as error:
        raise DamagedFile(f"{path}: damaged, or not a torch file ({first_line(error)[:100]})") from error
