"""Results in the leaderboard's format, dual_res.json and cross_res.json: {qid: [pid, ...]}, best first."""

import json
import os
from collections.abc import Iterable
from typing import Any

from torch_src.data.lines import FilePath, FormatError, archive_errors, open_file, parse_json, shown
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import CHECKSUM, checksum_files, read_stamp, write_stamp


def write_result(path: FilePath, lists: Iterable[tuple[str, list[str]]]) -> None:
    """Write (qid, [pid, ...]) pairs as one JSON object, one query per line."""
    with atomic_write(path) as file:
        file.write("{")
        for number, (qid, pids) in enumerate(lists):
            file.write(f"{',' if number else ''}\n{json.dumps(qid)}: {json.dumps(pids)}")
        file.write("\n}\n")


def load_result(path: FilePath) -> dict[str, list[str]]:
    """Return {qid: pids, best first} of a result file."""
    with open_file(path) as file, archive_errors(path):
        raw = file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(path, raw.count(b"\n", 0, error.start) + 1, "not UTF-8") from None

    def line_of(position: int) -> int:
        return text.count("\n", 0, max(0, position)) + 1

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:  # json alone keeps the last of two equal keys
                raise FormatError(path, line_of(text.rfind(json.dumps(key))), f"duplicate qid {shown(key)}")
            found[key] = value
        return found

    result = parse_json(text, path, 1, unique)
    if not isinstance(result, dict):
        raise UserError(f"{path}: a JSON {type(result).__name__} (expected {{qid: [pid, ...]}})")
    for qid, pids in result.items():
        if not isinstance(pids, list) or not all(isinstance(pid, str) for pid in pids):
            message = f"{shown(repr(pids))} for the qid {shown(qid)} (expected a list of pid strings)"
            raise FormatError(path, line_of(text.find(json.dumps(qid))), message)
    return result


def stamp_result(path: FilePath, stage: str, inputs: Iterable[FilePath], **settings: object) -> None:
    """Write the stamp of a result: stage, settings, and the checksum of each input by its relative path."""
    folder = os.path.dirname(os.path.realpath(path))
    checksums = {os.path.relpath(os.path.realpath(name), folder): checksum_files([name]) for name in inputs}
    write_stamp(path, {"stage": stage, **settings, "inputs": checksums})


def warn_if_stale(path: FilePath) -> None:
    """Warn when a result or one of its inputs has changed since its stamp was written."""
    stamp = read_stamp(path)
    if stamp is None or not isinstance(inputs := stamp.get("inputs", {}), dict):
        return
    if stamp.get(CHECKSUM) != checksum_files([path]):
        warn(f"{path}: changed since {stamp.get('stage')} wrote it")
    for name, checksum in inputs.items():
        source = os.path.join(os.path.dirname(os.path.realpath(path)), name)
        if os.path.isfile(source) and checksum_files([source]) != checksum:
            warn(f"{path}: {source} has changed since this result was made; convert it again")


def require_own_path(output: FilePath, inputs: Iterable[FilePath]) -> None:
    """UserError when the output is also an input, for example because an argument was omitted."""
    if os.path.realpath(output) in map(os.path.realpath, inputs):
        raise UserError(f"{output}: the output is one of the inputs; name another output")
