"""The sidecar of mined training rows: dual.train.ids.tsv, line by line with dual.train.tsv."""

from array import array
from pathlib import Path

import numpy as np

from torch_src.data.lines import FormatError, read_lines, split_columns
from torch_src.runtime.errors import UserError
from torch_src.runtime.stamps import CONTENT, is_sealed, read_stamp, stamp_path

SIDECAR = "dual.train.ids.tsv"
COLUMNS = [
    f"{side}_{name}" for side in ("positive", "negative") for name in ("row", "pid", "rank", "score", "logit")
]


def sidecar_path(train_set: str) -> Path:
    """Return where the ids and scores of a training file's rows are."""
    return Path(train_set).with_name(SIDECAR)


def read_teacher(train_set: str) -> np.ndarray:
    """Return the re-ranker's logits (rows, 2) float32 of each row's positive and negative, NaN where unknown.

    UserError when there is no sidecar, no score in it, or when one of the two files, by the stamps that
    mining gave them, was changed or is of another mining: line by line they would not belong together.
    """
    path, logits = sidecar_path(train_set), array("f")
    if not path.exists():
        raise UserError(
            f"{path}: no such file (a teacher's scores); mine with --cross_params, and train on what is mined"
        )
    _check_same_mining(train_set, path)
    for line, text in read_lines(path):
        columns = split_columns(text, len(COLUMNS), path, line, ", ".join(COLUMNS))
        if line == 1:
            if columns != COLUMNS:
                raise FormatError(path, line, f"expected the header {', '.join(COLUMNS)}")
            continue
        try:
            logits.extend(float(columns[at] or "nan") for at in (4, 9))
        except ValueError:
            raise FormatError(path, line, "a logit is not a number") from None
    teacher = np.array(logits, dtype=np.float32).reshape(-1, 2)
    if not np.isfinite(teacher).all(axis=1).any():
        raise UserError(f"{path}: no row with a teacher's scores; mine with --cross_params")
    return teacher


def _check_same_mining(*files) -> None:
    """UserError unless the stamps of the files, where they have one, still hold and are of one mining."""
    stamped = [file for file in files if stamp_path(file).exists()]
    broken = [file for file in stamped if not is_sealed(file)]
    stamps = [{**(read_stamp(file) or {}), CONTENT: ""} for file in stamped]
    apart = len(stamped) == 1 or any(stamp != stamps[0] for stamp in stamps)
    if broken or apart:
        what = "changed since it was mined" if broken else "of another mining than the file beside it"
        raise UserError(
            f"{[*broken, files[0]][0]}: {what}, so the teacher's scores may stand beside other rows; "
            "mine again, or, where the lines do belong together, delete "
            + " and ".join(str(stamp_path(file)) for file in stamped)
        )
