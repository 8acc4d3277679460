"""passage2id.map.json: {"0": pid, "1": pid, ...} of 8.1 M entries, streamed, never loaded whole."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from torch_src.data.array_cache import cached_array
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import require

CHUNK = 1 << 20  # characters read at a time
LONGEST_PID = 1000  # characters: pids are kept side by side, each as wide as the longest
LONGEST_PAIR = 1 << 22  # characters in which at least one row -> pid must stand
CUT = re.compile(r"[\t\n\0]")  # a pid with one could not stand in a column; numpy drops NULs
PLAIN = re.compile(r'"([^"\\]*)"\s*:\s*"([^"\\]*)"\s*,')  # no escapes, and not the last one
PLAIN_RUN = re.compile(r'(?:\s*"[^"\\]*"\s*:\s*"[^"\\]*"\s*,)+')
PAIR = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*:\s*"((?:[^"\\]|\\.)*)"\s*([,}])')


def iter_json_pairs(path, chunk: int = CHUNK) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of one flat JSON object of strings, reading `chunk` characters at a time."""
    for pairs in iter_json_lists(path, chunk):
        yield from pairs


def iter_json_lists(path, chunk: int) -> Iterator[list[tuple[str, str]]]:
    """Yield the (key, value) pairs of one flat JSON object of strings in lists, a chunk at a time."""
    try:
        file = open(path, encoding="utf-8", newline="")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    with file:
        text, at, ended = "", 1, False
        while not text and (piece := _read_more(file, "", chunk, path)):
            text = piece.lstrip()
        if not text.startswith("{"):
            raise UserError(f'{path}: expected one JSON object {{"0": pid, "1": pid, ...}}')
        while not ended:
            if plain := PLAIN_RUN.match(
                text, at
            ):  # nearly all of a real file: ten times as fast as one by one
                yield PLAIN.findall(text, at, plain.end())
                at = plain.end()
            match = PAIR.match(text, at)
            if match is None:
                rest = text[at:]
                if len(rest) > LONGEST_PAIR:
                    raise UserError(
                        f"{path}: malformed near {rest[:40]!r} (no row -> pid in {len(rest):,} characters)"
                    )
                text, at = _read_more(file, rest, max(chunk, len(rest)), path), 0
                if len(text) == len(rest):
                    if rest.strip() == "}":
                        return
                    raise UserError(f"{path}: broken off or malformed near {rest[:40]!r}")
                continue
            key, value, mark = match.groups()
            yield [(unescape(key, path), unescape(value, path))]
            at, ended = match.end(), mark == "}"
        _nothing_more(file, text[at:], chunk, path)


def _nothing_more(file, rest: str, chunk: int, path) -> None:
    while rest or (rest := _read_more(file, "", chunk, path)):
        if rest.strip():
            raise UserError(f"{path}: text after the closing brace, near {rest.strip()[:40]!r}")
        rest = ""


def unescape(text: str, path) -> str:
    """Return a JSON string's content; UserError for a meaningless escape or half a surrogate pair."""
    if "\\" not in text:
        return text
    try:
        value = json.loads(f'"{text}"')
        value.encode()
    except ValueError:
        raise UserError(f"{path}: a malformed escape in {text[:40]!r}") from None
    return value


def _read_more(file, rest: str, size: int, path) -> str:
    try:
        return rest + file.read(size)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None


def read_passage_ids(path, cache_dir=None) -> np.ndarray:
    """Return pids as bytes, (N,) of dtype S: entry i is the pid of global row i. Memory: N x the longest pid.

    Kept in `cache_dir` for the next time. UserError unless the keys are exactly 0..N-1.
    """
    source = Path(require(path, "row -> pid (JSON)"))
    return cached_array(source, cache_dir, "ids", lambda: (_parse_passage_ids(path), ""))[0]


def _parse_passage_ids(path) -> np.ndarray:
    rows, pids = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype="S1")]
    for pairs in iter_json_lists(path, CHUNK):
        for key, pid in pairs:
            row_number(key, path)
            if len(pid) > LONGEST_PID:
                raise UserError(
                    f"{path}: a pid of {len(pid):,} characters; at most {LONGEST_PID} can be held"
                )
            if CUT.search(pid):
                raise UserError(f"{path}: the pid {pid[:40]!r} has a TAB, a line end or a NUL in it")
        rows.append(np.array([int(key) for key, _ in pairs]))
        pids.append(np.array([pid.encode() for _, pid in pairs]))
    return _in_row_order(np.concatenate(rows), pids, path)


def row_number(key: str, path) -> int:
    """Return the row that a key of the map names; UserError when it names none."""
    if not key.isascii() or not key.isdecimal() or len(key) > 18:
        raise UserError(f"{path}: the key {key[:20]!r} is not a row number")
    return int(key)


def _in_row_order(rows: np.ndarray, pids: list[np.ndarray], path) -> np.ndarray:
    count = len(rows)
    ordered = np.zeros(count, dtype=f"S{max(chunk.dtype.itemsize for chunk in pids)}")
    there = np.bincount(rows[rows < count], minlength=count)
    if not (there == 1).all():
        twice, missing = np.flatnonzero(there > 1), np.flatnonzero(there == 0)
        what = f"row {twice[0]} stands there twice" if len(twice) else f"row {missing[0]} is missing"
        raise UserError(f"{path}: row numbers are not exactly 0..{count - 1}: {what}")
    at = 0
    for chunk in pids:
        ordered[rows[at : at + len(chunk)]] = chunk
        at += len(chunk)
    return ordered


def check_length(path, ids: int, passages: int) -> None:
    """UserError unless the map is as long as the collection: else every pid after the gap is wrong."""
    if ids != passages:
        raise UserError(f"{path}: {ids:,} ids, but the collection has {passages:,} passages")


def rows_of(path, pids: np.ndarray) -> np.ndarray:
    """Return the rows (N,) int64 of pids (N,) bytes, -1 where the map has none; streamed."""
    rows = dict.fromkeys(pids.tolist(), -1)
    for key, pid in iter_json_pairs(path):
        if (name := pid.encode()) in rows:
            rows[name] = row_number(key, path)
    return np.array([rows[pid] for pid in pids.tolist()], dtype=np.int64)
