"""Training curves from TensorBoard's event files, and the lengths of texts in tokens, for the report."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from torch_src.data.collection import PassageCollection
from torch_src.hparams import from_saved
from torch_src.models.tokenization import TextRules, load_tokenizer, tokenize
from torch_src.models.windows import QUARTER, with_windows
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.tensor_files import DamagedFile, load_tensors
from torch_src.saved_settings import read_saved

TAGS = {"train/loss": "loss", "dev/MRR@10": "MRR@10", "train/lr": "lr"}  # tag -> name in the history
DISTINCTIVE = ("train/loss", "dev/MRR@10")  # two training runs may share their learning rates, but not these
MODEL_SETTINGS = {"query_prefix": str, "passage_prefix": str, "remove_spaces": bool, "q_max_seq_len": int,
                  "p_max_seq_len": int}  # fmt: skip
MAX_TOKENS = 8192  # longer texts count as this long

Points = dict[str, dict[int, float]]  # tag -> step -> value
History = list[dict[str, Any]]


@dataclass(frozen=True)
class Curves:
    """The curves of a training run."""

    points: Points
    best_step: int  # the step of the saved weights; 0: unknown
    missing: str = ""  # which values are missing, and why; empty: none


def read_curves(folder: Path, model: str) -> tuple[Curves | None, str]:
    """Return (the curves of dual or cross, "") or (None, the reason why there are none).

    A folder may also hold the curves of earlier training runs. A file belongs to the model when its values
    equal those of the history in MODEL_checkpoint.pt. Without a checkpoint, a single event file is used.
    """
    board = folder / "tensorboard" / model
    files, unreadable = read_board(board)
    if not files:
        return None, unreadable or f"no event files with curves in {board}"
    checkpoint = folder / f"{model}_checkpoint.pt"
    progress = read_progress(checkpoint)
    if progress is None:
        if len(files) > 1:
            return None, f"{board}: without {checkpoint.name} it is unknown which event files belong to it"
        return Curves(files[0], 0, unreadable), ""
    history = progress["history"]
    own = [points for points in files if belongs(points, history)]
    also = unreadable and f"; {unreadable}"
    if not own:
        return None, f"no event file in {board} belongs to {checkpoint}{also}"
    points = merged(own)
    missing = missing_values(points, history)
    return Curves(points, progress.get("best_step", 0), missing and missing + also), ""


def read_board(board: Path) -> tuple[list[Points], str]:
    """Return (the curves of each readable event file, the errors of the others)."""
    files, unreadable = [], []
    for path in sorted(board.glob("events.out.tfevents.*"), key=numbers_in_name):
        try:
            points, reason = read_events(path), "no readable values (damaged or truncated)"
        except OSError as error:
            points, reason = {}, error.strerror or str(error)
        if points:
            files.append(points)
        else:
            unreadable.append(f"{path}: {reason}")
    return files, "; ".join(unreadable)


def numbers_in_name(path: Path) -> list[int]:
    """Return second, process and count of an event file; as text, 10 would sort before 9."""
    return [int(number) for number in re.findall(r"\d+", path.name)]


def read_events(path: Path) -> Points:
    """Return the curves of an event file up to its first damaged byte; OSError if it cannot be opened."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: no limit
    events.Reload()
    tags = [tag for tag in TAGS if tag in events.Tags()["scalars"]]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def read_progress(path: Path) -> dict[str, Any] | None:
    """Return the progress in a checkpoint; None without a readable one."""
    try:  # mmap: the weights, which may be gigabytes, are not read
        progress = load_tensors(path, mmap=True)["progress"]
    except (DamagedFile, OSError, LookupError, TypeError):
        return None
    return progress if isinstance(progress, dict) and isinstance(progress.get("history"), list) else None


def belongs(points: Points, history: History) -> bool:
    """Return whether most of the values that an event file shares with the history are equal."""
    known = {(entry["step"], name): entry[name] for entry in history for name in TAGS.values()
             if name in entry}  # fmt: skip
    equal = [math.isclose(value, known[step, TAGS[tag]], rel_tol=1e-4, abs_tol=1e-4)
             for tag in DISTINCTIVE for step, value in points.get(tag, {}).items()
             if (step, TAGS[tag]) in known]  # fmt: skip
    return sum(equal) > len(equal) / 2


def missing_values(points: Points, history: History) -> str:
    """Return which values of the history the curves lack; empty if none.

    The reader of event files stops silently at the first damaged byte.
    """
    parts = []
    for tag, name in TAGS.items():
        known = {entry["step"] for entry in history if name in entry}
        missing = known - points.get(tag, {}).keys()
        if missing:
            last = max(points.get(tag, {}), default=0)
            parts.append(
                f"{tag} lacks {len(missing)} of {len(known)} values, ends at step {last} of {max(known)}"
            )
    return f"{', '.join(parts)}; an event file is damaged or truncated" if parts else ""


def merged(files: list[Points]) -> Points:
    """Return the curves of a run that was resumed, from its files in order of time: the later value wins."""
    points: Points = {}
    for file in files:
        for tag, values in file.items():
            points.setdefault(tag, {}).update(values)
    return {tag: dict(sorted(values.items())) for tag, values in points.items()}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample of texts, with special tokens and without the prefix."""

    tokens: np.ndarray  # (sampled,) int64
    of: int  # texts that the sample was drawn from
    limit: int  # tokens after which the model truncates

    @property
    def truncated(self) -> float:
        """The share of texts that the model truncates."""
        return float((self.tokens > self.limit).mean())


def read_model_settings(path: Path) -> dict[str, Any]:
    """Return the settings saved with a retriever's weights; UserError if one is missing or malformed."""
    settings = read_json(path).get("fixed_by_weights")
    if not isinstance(settings, dict) or any(
        type(settings.get(name)) is not kind for name, kind in MODEL_SETTINGS.items()
    ):
        raise UserError(f"{path}: not written by do_dual_train.py")
    return settings


def retriever_files(folder: Path) -> tuple[Path, Path]:
    """Return (saved settings, model folder) of a retriever that was trained or used in `folder`."""
    settings, model = folder / "dual_hparams.json", folder / "dual_model"
    if settings.exists() and model.exists():
        return settings, model
    settings = folder / "dual_infer_hparams.json"
    if settings.exists():
        saved = str(read_json(settings).get("pretrained_model_path"))
        model = Path(from_saved("pretrained_model_path", saved))
        if model.is_dir():  # not a hub name: a report asks no network
            return settings, model
    raise UserError(f"{folder} has neither a trained retriever nor the settings of one in a local folder")


def _tokens_in_windows(folder: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> int:
    """Return the tokens of a passage that the retriever of `folder` read, in one window or in several."""
    saved = read_saved(str(folder), "dual_infer_hparams.json")
    windows, stride = saved.get("passage_windows", 1), saved.get("window_stride", QUARTER)
    rules = with_windows(TextRules(length), tokenizer, windows, stride, "p_max_seq_len")
    step = length - tokenizer.num_special_tokens_to_add(pair=False) - rules.stride
    return length + (windows - 1) * step


def measure_lengths(
    folder: Path, queries: list[str], collection: PassageCollection, samples: int, seed: int
) -> tuple[dict[str, Lengths], str]:
    """Return ({queries, passages: Lengths}, "") with the retriever's tokenizer, or ({}, the reason)."""
    try:
        settings_path, model = retriever_files(folder)
        settings, tokenizer = read_model_settings(settings_path), load_tokenizer(str(model))
    except UserError as error:
        return {}, str(error)
    measured, generator = {}, np.random.default_rng(seed)
    texts: list[str] | PassageCollection
    for name, side, texts in (("queries", "query", queries), ("passages", "passage", collection)):
        count = min(samples, len(texts))
        rows = np.sort(generator.choice(len(texts), count, replace=False, shuffle=False)).tolist()
        rules = TextRules(MAX_TOKENS, "", settings["remove_spaces"])
        ids, _ = tokenize(tokenizer, [texts[row] for row in rows], rules)
        tokens = np.array([len(text) for text in ids])
        limit = settings[f"{side[0]}_max_seq_len"]
        if side == "passage":
            limit = _tokens_in_windows(folder, tokenizer, limit)
        measured[name] = Lengths(tokens, len(texts), limit)
    return measured, ""
