"""Results in the leaderboard's format, dual_res.json and cross_res.json: {qid: [pid, ...]}, best first."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch_src.data.encodings import not_utf8
from torch_src.data.lines import FilePath, FormatError, archive_errors, open_file, parse_json, shown
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import warn
from torch_src.runtime.outputs import RESULT, Output, check_outputs, never
from torch_src.runtime.stamps import CHECKSUM, checksum_files, read_stamp, write_stamp

RESULT_STAGES = ("cross_infer", "convert_recall_res_to_json", "convert_rerank_res_to_json", "from_trec")


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
        raise FormatError(path, raw.count(b"\n", 0, error.start) + 1, not_utf8(raw, path)) from None

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


def check_result_path(option: FilePath | None, default: FilePath, inputs: Iterable[FilePath]) -> str:
    """Return the path of a result to write, `option` or else `default`.

    UserError when it is an input or a foreign file.
    """
    own = never if option else RESULT  # without a stamp
    check_outputs([Output(option or default, own, RESULT_STAGES)], inputs)
    return str(option or default)


def searched_collection(run: FilePath) -> str | None:
    """Return the checksum of the collection of a run's rows; None when no intact stamp names it."""
    stamp = read_stamp(run) or {}
    collection = stamp.get("collection")
    if not isinstance(collection, str):
        return None
    if stamp.get(CHECKSUM) != checksum_files([run]):
        warn(f"{run}: changed since {stamp.get('stage')} wrote it; its collection is not checked")
        return None
    return collection


def check_collection(run: FilePath, collection: str, where: FilePath) -> None:
    """UserError when a run's stamp names another collection than the one in the folder `where`."""
    searched = searched_collection(run)
    if searched not in (None, collection):
        raise UserError(
            f"{run}: its rows are of another collection ({searched}) than {where} ({collection}); "
            "use the collection that was searched, or search this one"
        )


def common_collection(runs: Sequence[FilePath]) -> str | None:
    """Return the collection of the runs; None when no stamp names it. UserError when two differ."""
    known = [(run, found) for run in runs if (found := searched_collection(run))]
    for run, found in known[1:]:
        if found != known[0][1]:
            raise UserError(
                f"{run}: its rows are of another collection ({found}) than those of {known[0][0]} "
                f"({known[0][1]}); combine runs of one collection"
            )
    return known[0][1] if known else None


def check_same_candidates(scores: FilePath, id_map: FilePath) -> None:
    """UserError when the stamps of scores and of their id map name other candidates or passages."""
    first, second = (read_stamp(path) or {} for path in (scores, id_map))
    for field in ("candidates", "passages", "qids"):
        if field in first and field in second and first[field] != second[field]:
            raise UserError(
                f"{id_map}: not the id map of {scores} ({field}: {first[field]} -> {second[field]}); "
                "use the two files of one run of do_cross_infer.py"
            )
