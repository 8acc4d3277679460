"""The sidecar of mined training rows: dual.train.ids.tsv, line by line with dual.train.tsv."""

from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torch_src.data.lines import FilePath, FormatError, finite_number, read_lines, split_columns
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import CHECKSUM, is_intact, read_stamp, stamp_path

SIDECAR = "dual.train.ids.tsv"
COLUMNS = [
    f"{side}_{name}" for side in ("positive", "negative") for name in ("row", "pid", "rank", "score", "logit")
]
LOGITS = COLUMNS.index("positive_logit"), COLUMNS.index("negative_logit")


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


def sidecar_path(train_set: FilePath) -> Path:
    """Return the path of the ids and scores of a training file's rows."""
    return Path(train_set).with_name(SIDECAR)


def read_teacher(train_set: FilePath) -> np.ndarray:
    """Return the re-ranker's logits (rows, 2) float32 of each row's positive and negative, NaN where unknown.

    UserError without a sidecar or a row with both logits, or when stamps show that the files do not match.
    """
    path, logits = sidecar_path(train_set), array("f")
    if not path.exists():
        message = "no such file (a teacher's scores); mine with --cross_params, and train on the mined files"
        raise UserError(f"{path}: {message}")
    _require_same_mining(train_set, path)
    names = ", ".join(COLUMNS)
    for line, text in read_lines(path):
        columns = split_columns(text, len(COLUMNS), path, line, names)
        if line == 1:
            if columns != COLUMNS:
                raise FormatError(path, line, f"wrong header (expected {names})")
            continue
        for index in LOGITS:
            logit = finite_number(columns[index] or "0")
            if logit is None:
                raise FormatError(path, line, f"{COLUMNS[index]} is not a number")
            logits.append(logit if columns[index] else np.nan)
    teacher = np.array(logits, dtype=np.float32).reshape(-1, 2)
    if not np.isfinite(teacher).all(axis=1).any():
        raise UserError(f"{path}: no row with a teacher's scores; mine with --cross_params")
    return teacher


def _require_same_mining(*files: FilePath) -> None:
    """UserError when stamps show that a file was changed or that the files are from different mining runs."""
    stamped = [file for file in files if stamp_path(file).exists()]
    changed = [file for file in stamped if not is_intact(file)]
    stamps = [{**(read_stamp(file) or {}), CHECKSUM: ""} for file in stamped]
    if changed or len(stamped) == 1 or any(stamp != stamps[0] for stamp in stamps):
        what = "changed since it was mined" if changed else "from another mining run than the file beside it"
        paths = " and ".join(str(stamp_path(file)) for file in stamped)
        raise UserError(
            f"{[*changed, files[0]][0]}: {what}, so the teacher's scores may not match the rows; "
            f"mine again, or delete {paths} if the lines do match"
        )
