"""passage2id.map.json: {"0": pid, "1": pid, ...} of 8.1 M entries, read as a stream."""

import re
from pathlib import Path

import numpy as np

from torch_src.data.array_cache import cached_array
from torch_src.data.json_pairs import PairChunk, read_json_pairs
from torch_src.data.lines import FilePath, FormatError, shown, whole_number
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import require

LONGEST_PID = 1000  # characters: all pids are stored at the width of the longest
FORBIDDEN = re.compile(r"[\t\n\0]")  # TAB and line end would break a column; numpy drops NULs


def read_passage_ids(path: FilePath, cache_dir: FilePath | None = None) -> np.ndarray:
    """Return the pids as bytes, (N,) of dtype S: entry i is the pid of global row i. Memory: N x longest pid.

    Cached in `cache_dir`. UserError unless the keys are exactly 0..N-1.
    """
    source = Path(require(path, "row -> pid (JSON)"))
    return cached_array(source, cache_dir, "ids", lambda: (_parse_passage_ids(path), ""))[0]


def _parse_passage_ids(path: FilePath) -> np.ndarray:
    rows: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    pids: list[np.ndarray] = [np.zeros(0, dtype="S1")]
    for chunk in read_json_pairs(path):
        rows.append(_rows(path, chunk))
        for at, (_, pid) in enumerate(chunk.pairs):
            if len(pid) > LONGEST_PID or FORBIDDEN.search(pid):
                expected = f"expected at most {LONGEST_PID} characters, no TAB, line end or NUL"
                raise FormatError(path, chunk.line_of(at), f"pid {shown(pid)} ({expected})")
        pids.append(np.array([pid.encode() for _, pid in chunk.pairs]))
    return _in_row_order(np.concatenate(rows), pids, path)


def _rows(path: FilePath, chunk: PairChunk) -> np.ndarray:
    """Return the keys of a chunk as rows (n,) int64; FormatError for a key that is not a row number."""
    rows = [whole_number(key) for key, _ in chunk.pairs]
    for at, ((key, _), row) in enumerate(zip(chunk.pairs, rows, strict=True)):
        if row is None or (key[0] == "0" and len(key) > 1):
            raise FormatError(path, chunk.line_of(at), f"the key {shown(key)} is not a row number")
    return np.array(rows, dtype=np.int64)


def _in_row_order(rows: np.ndarray, pids: list[np.ndarray], path: FilePath) -> np.ndarray:
    count = len(rows)
    ordered = np.zeros(count, dtype=f"S{max(chunk.dtype.itemsize for chunk in pids)}")
    counts = np.bincount(rows[rows < count], minlength=count)
    if not (counts == 1).all():
        repeated, missing = np.flatnonzero(counts > 1), np.flatnonzero(counts == 0)
        what = f"row {repeated[0]} is a duplicate" if len(repeated) else f"row {missing[0]} is missing"
        raise UserError(f"{path}: {what} (expected the rows 0..{count - 1}, each once)")
    start = 0
    for chunk in pids:
        ordered[rows[start : start + len(chunk)]] = chunk
        start += len(chunk)
    return ordered


def check_length(path: FilePath, ids: int, passages: int) -> None:
    """UserError unless the map has exactly one id per passage."""
    if ids != passages:
        raise UserError(f"{path}: {ids:,} ids, but the collection has {passages:,} passages")


def rows_of(path: FilePath, pids: np.ndarray) -> np.ndarray:
    """Return the rows (N,) int64 of pids (N,) bytes, -1 for pids that are not in the map."""
    found = dict.fromkeys(pids.tolist(), -1)
    for chunk in read_json_pairs(path):
        for row, (_, pid) in zip(_rows(path, chunk).tolist(), chunk.pairs, strict=True):
            if (name := pid.encode()) in found:
                found[name] = row
    return np.array([found[pid] for pid in pids.tolist()], dtype=np.int64)


def pids_of(path: FilePath, rows: np.ndarray) -> list[str | None]:
    """Return the pid of each of the ascending distinct `rows`, None for rows not in the map."""
    pids: list[str | None] = [None] * len(rows)
    padded = np.append(rows, -1)
    for chunk in read_json_pairs(path):
        keys = _rows(path, chunk)
        slots = np.searchsorted(rows, keys)
        for at in np.flatnonzero(padded[slots] == keys).tolist():
            if pids[slots[at]] is not None:
                raise FormatError(path, chunk.line_of(at), f"row {keys[at]} is a duplicate")
            pids[slots[at]] = chunk.pairs[at][1]
    return pids
