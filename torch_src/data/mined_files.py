"""Files line by line with dual.train.tsv: its sidecar dual.train.ids.tsv, and the scores of re-rankers."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torch_src.data.lines import FilePath, FormatError, finite_number, read_lines, shown, split_columns
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import CHECKSUM, checksum_files, is_intact, read_stamp, stamp_path

SIDECAR = "dual.train.ids.tsv"
COLUMNS = [
    f"{side}_{name}" for side in ("positive", "negative") for name in ("row", "pid", "rank", "score", "logit")
]
LOGITS = ["positive_logit", "negative_logit"]  # the columns of a file of script/score_training_set.py
TRAIN_ROWS = "train_rows"  # in the stamp of such a file: the checksum of the training file


class MinedIds(NamedTuple):
    """Ids and scores of one mined passage; None: an empty column."""

    row: int | None
    pid: str | None
    rank: int | None
    score: float | None  # the retriever's
    logit: float | None  # the re-ranker's


def format_mined_ids(positive: MinedIds, negative: MinedIds) -> str:
    """Return one line of the sidecar; 9 significant digits restore every float32 exactly."""
    values = (*positive, *negative)
    columns = (f"{value:.9g}" if isinstance(value, float) else value for value in values)
    return "\t".join("" if column is None else str(column) for column in columns) + "\n"


def teacher_files(train_set: FilePath, paths: Sequence[FilePath]) -> list[Path]:
    """Return the files with teachers' scores: those named, or the sidecar; UserError for a missing one."""
    found = [Path(path) for path in paths] or [Path(train_set).with_name(SIDECAR)]
    for path in found:
        if not path.exists():
            fix = "mine with --cross_params, or pass the files of script/score_training_set.py as --teacher"
            raise UserError(f"{path}: no such file (a teacher's scores); {fix}")
    return found


def format_logits(positive: float, negative: float) -> str:
    """Return one line of a file with the columns LOGITS; 9 digits restore every float32 exactly."""
    return f"{positive:.9g}\t{negative:.9g}\n"


def read_teachers(train_set: FilePath, paths: Sequence[FilePath], rows: int) -> np.ndarray:
    """Return the mean of the teachers' logits (rows, 2) float32 of each row's positive and negative.

    NaN where a teacher does not know the passage: the logits of a listwise re-ranker have a constant per
    query, which cancels only if all passages of the query have the same teachers. No paths: the sidecar.
    """
    files = teacher_files(train_set, paths)
    teachers = [read_teacher(train_set, path) for path in files]
    for path, teacher in zip(files, teachers, strict=True):
        if len(teacher) != rows:
            found = f"{len(teacher):,} rows of a teacher's scores (expected {rows:,}, those of {train_set})"
            raise UserError(f"{path}: {found}; score this training file")
    mean = np.mean(teachers, axis=0)
    if not _known(mean).any():
        raise UserError(f"{', '.join(map(str, files))}: no row that all of these teachers know")
    return mean


def read_teacher(train_set: FilePath, path: FilePath) -> np.ndarray:
    """Return a re-ranker's logits (rows, 2) float32 of each row's positive and negative, NaN where unknown.

    The file has a header with the columns LOGITS, and any others. UserError without a row with both logits,
    or when stamps show that the file does not match the training file.
    """
    lines = read_lines(path)
    _, first = next(lines, (1, ""))
    header = first.split("\t")
    if not set(LOGITS) <= set(header):
        raise FormatError(path, 1, f"{shown(first)} (expected a header with {' and '.join(LOGITS)})")
    _require_match(train_set, path)
    at, logits = [header.index(name) for name in LOGITS], array("f")
    for line, text in lines:
        columns = split_columns(text, len(header), path, line, ", ".join(header))
        for name, column in zip(LOGITS, (columns[index] for index in at), strict=True):
            logit = finite_number(column or "0")
            if logit is None:
                raise FormatError(path, line, f"{name} {shown(column)} (expected a number, or nothing)")
            logits.append(logit if column else np.nan)
    teacher = np.array(logits, dtype=np.float32).reshape(-1, 2)
    if not _known(teacher).any():
        fix = "mine with --cross_params, or score the rows with script/score_training_set.py"
        raise UserError(f"{path}: no row with a teacher's scores of both passages; {fix}")
    return teacher


def _known(teacher: np.ndarray) -> np.ndarray:
    """Return (rows,) bool: whether both logits are known."""
    return np.isfinite(teacher).all(axis=1)


def _require_match(train_set: FilePath, path: FilePath) -> None:
    """UserError when the stamp of a teacher's file shows that its lines are of another training file."""
    scored = (read_stamp(path) or {}).get(TRAIN_ROWS)
    if scored is None:
        _require_same_mining(train_set, path)
    elif not is_intact(path):
        raise UserError(f"{path}: changed since it was written; score {train_set} again")
    elif scored != checksum_files([train_set]):
        raise UserError(f"{path}: the scores of another training file than {train_set}; score this one")


def _require_same_mining(train_set: FilePath, path: FilePath) -> None:
    """UserError when stamps show that a file was changed or that the files are from different mining runs."""
    stamped = [file for file in (train_set, path) if stamp_path(file).exists()]
    changed = [file for file in stamped if not is_intact(file)]
    stamps = [{**(read_stamp(file) or {}), CHECKSUM: ""} for file in stamped]
    if changed or len(stamped) == 1 or any(stamp != stamps[0] for stamp in stamps):
        what = "changed since it was mined" if changed else f"from another mining run than {train_set}"
        paths = " and ".join(str(stamp_path(file)) for file in stamped)
        raise UserError(
            f"{[*changed, path][0]}: {what}, so the teacher's scores may not match the rows; mine again, "
            f"or score the rows with script/score_training_set.py, or delete {paths} if the lines do match"
        )
