"""Arrays derived from an input file, cached beside the results: line offsets, passage ids."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from torch_src.runtime.files import atomic_write
from torch_src.runtime.stamps import checksum_files, checksum_text, read_checked_json, write_checked_json


def cached_array(
    source: Path, cache_dir: str | Path | None, kind: str, make: Callable[[], tuple[np.ndarray, str]]
) -> tuple[np.ndarray, str]:
    """Return (array, checksum of the source) from make(), or from a valid copy in `cache_dir`.

    The copy (a file *.`kind`.npy) is valid while the source's size, times and inode and its checksum agree.
    """
    if cache_dir is None:
        return make()
    state = os.stat(source)
    path = str(source.resolve())
    times = {"mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}
    stamp = {"path": path, "size": state.st_size, **times, "inode": state.st_ino}
    stem = Path(cache_dir) / f"{source.name}-{checksum_text(path)}.{kind}"
    cached, stamp_path = Path(f"{stem}.npy"), Path(f"{stem}.json")
    known = read_checked_json(stamp_path) or {}
    if stamp.items() <= known.items() and cached.exists() and checksum_files([cached]) == known["array"]:
        return np.load(cached, allow_pickle=False), known["source"]
    array, checksum = make()
    stamp_path.unlink(missing_ok=True)  # first, so that a stamp never describes another array
    with atomic_write(cached, "wb") as file:
        np.save(file, array, allow_pickle=False)
    write_checked_json(stamp_path, {**stamp, "array": checksum_files([cached]), "source": checksum})
    return array, checksum
