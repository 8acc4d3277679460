"""Arrays derived from an input file, kept beside the results: line offsets, passage ids.

An entry is used while its source is the same file of the same size, not written to since (nor copied over
with its old time), and while its own bytes are what was saved.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from torch_src.runtime.errors import DAMAGE
from torch_src.runtime.files import atomic_write, read_json, write_json
from torch_src.runtime.log import log


def cached_array(
    source: Path, cache_dir, kind: str, make: Callable[[], tuple[np.ndarray, str]]
) -> tuple[np.ndarray, str]:
    """Return (array, fingerprint of the source) as `make` gives them, from `cache_dir` when they are there.

    `kind` names what the array is; without a `cache_dir` it is made every time.
    """
    if cache_dir is None:
        return make()
    state = os.stat(source)
    identity = {
        "path": str(source.resolve()), "size": state.st_size, "mtime_ns": state.st_mtime_ns,
        "ctime_ns": state.st_ctime_ns, "inode": state.st_ino,
    }  # fmt: skip
    place = hashlib.blake2b(identity["path"].encode(), digest_size=6).hexdigest()
    stem = Path(cache_dir) / f"{source.name}-{place}.{kind}"
    saved, note = Path(f"{stem}.npy"), Path(f"{stem}.json")
    if saved.exists() and note.exists():
        try:
            known = read_json(note)
            if {key: known.get(key) for key in identity} == identity:
                return _load(saved, known), known["fingerprint"]
        except (*DAMAGE, MemoryError):
            log(f"{saved}: damaged, made again")
    array, fingerprint = make()
    note.unlink(missing_ok=True)  # first: an array with the note of another one would be found damaged
    with atomic_write(saved, "wb") as file:
        np.save(file, array, allow_pickle=False)
    write_json(note, {**identity, "array": _digest(array), "fingerprint": fingerprint})
    return array, fingerprint


def _load(saved: Path, known: dict) -> np.ndarray:
    array = np.load(saved, allow_pickle=False)
    if not isinstance(known["fingerprint"], str) or known["array"] != _digest(array):
        raise ValueError("not the array that was saved")
    return array


def _digest(array: np.ndarray) -> str:
    shape = f"{array.dtype.str} {array.shape} "
    return shape + xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).view(np.uint8))
