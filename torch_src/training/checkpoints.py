"""Checkpoints of a training run: the last two, each whole or not there."""

from pathlib import Path

import torch
import xxhash

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import log, warn
from torch_src.runtime.tensor_files import DamagedFile, load_tensors


def previous(path) -> Path:
    """Return where the checkpoint before the last one is."""
    return Path(path).with_suffix(".previous.pt")


def save_tensors(path, state: dict, **options) -> None:
    """Write nested dictionaries of tensors and plain values, atomically; UserError when that fails."""
    try:
        with atomic_write(path, "wb", **options) as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch reports a full disk so
        raise UserError(
            f"{path}: could not be written ({str(error).strip().split(chr(10))[0][:100]}); is the disk full? "
            "What was there before is whole; the same command carries on"
        ) from error


def save_checkpoint(path, state: dict) -> None:
    """Write the checkpoint; the one that was there becomes the previous. A full disk leaves both whole."""
    save_tensors(path, {**state, "xxh3": checksum(state)}, keep_old=previous(path))


def checksum(state) -> str:
    """Return 16 hex digits over all that is in nested dictionaries and lists of tensors and plain values."""
    digest = xxhash.xxh3_64()

    def add(value) -> None:
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
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()


def load_checkpoint(path) -> dict | None:
    """Return the last checkpoint, or the one before where that is damaged; None when there is none."""
    damaged = []
    for candidate in (Path(path), previous(path)):
        if not candidate.exists():
            continue
        try:
            state = load_tensors(candidate)
            if not isinstance(state, dict) or state.pop("xxh3", None) != checksum(state):
                raise DamagedFile(f"{candidate}: checksum mismatch")
        except DamagedFile as damage:
            warn(str(damage))
            damaged.append(candidate)
            continue
        if damaged:
            log(f"{candidate}: taking up the checkpoint before it")
        return state
    if damaged:
        raise UserError(f"{damaged[0]}: damaged; delete it to start from the beginning")
    return None


def delete_checkpoints(path) -> None:
    """Remove both."""
    for each in (Path(path), previous(path)):
        each.unlink(missing_ok=True)
