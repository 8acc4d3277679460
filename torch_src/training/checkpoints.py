"""Checkpoints of a training run: the last two, written atomically, with a checksum."""

from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import log, warn
from torch_src.runtime.tensor_files import DamagedFile, load_tensors


def previous(path: str | Path) -> Path:
    """Return the path of the checkpoint before the last one."""
    return Path(path).with_suffix(".previous.pt")


def save_tensors(path: str | Path, state: dict[str, Any], **options: Any) -> None:
    """Write nested dictionaries of tensors and plain values, atomically; UserError when the disk is full."""
    try:
        with atomic_write(path, "wb", **options) as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's form of a failed write
        raise UserError(
            f"{path}: could not be written ({first_line(error)[:100]}), the old file is unchanged; "
            "is the disk full? the same command resumes"
        ) from error


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write the checkpoint and keep the last one as the previous; after a failure both are unchanged."""
    save_tensors(path, {**state, "xxh3": checksum(state)}, keep_old=previous(path))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without frozen weights, which are those that the training started from."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what trained_state returned."""
    model.load_state_dict({**model.state_dict(), **state})


def checksum(state: Any) -> str:
    """Return 16 hex digits over nested dictionaries and lists of tensors and plain values."""
    digest = xxhash.xxh3_64()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                digest.update(f"{key!r}:".encode())
                add(inner)
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for inner in value:
                add(inner)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()


def load_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """Return the last checkpoint, or the previous one when the last is damaged; None when there is none."""
    damaged: list[Path] = []
    for candidate in (Path(path), previous(path)):
        if not candidate.exists():
            continue
        try:
            state = load_tensors(candidate)
            if not isinstance(state, dict) or state.pop("xxh3", None) != checksum(state):
                raise DamagedFile(f"{candidate}: checksum mismatch")
        except DamagedFile as error:
            warn(str(error))
            damaged.append(candidate)
            continue
        if damaged:
            log(f"{candidate}: using the previous checkpoint")
        return state
    if damaged:
        raise UserError(f"{damaged[0]}: damaged checkpoint; delete it to train from the start")
    return None


def delete_checkpoints(path: str | Path) -> None:
    """Delete both checkpoints."""
    for checkpoint in (Path(path), previous(path)):
        checkpoint.unlink(missing_ok=True)
