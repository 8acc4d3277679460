"""Training curves from tensorboard's event files, and the lengths of texts; for script/report.py."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torch_src.data.collection import PassageCollection
from torch_src.models.tokenization import TextRules, load_tokenizer, tokenize
from torch_src.runtime.errors import DAMAGE, UserError
from torch_src.runtime.files import read_json

TAGS = {"train/loss": "loss", "dev/MRR@10": "MRR@10", "train/lr": "lr"}  # tag -> name in the history
TELLING = ("train/loss", "dev/MRR@10")  # two trainings may share their learning rates, not these
FIXED = {"query_prefix": str, "passage_prefix": str, "remove_spaces": bool, "q_max_seq_len": int,
         "p_max_seq_len": int}  # fmt: skip
LONGEST = 8192  # tokens; a longer text counts as one of so many

Points = dict[str, dict[int, float]]  # tag -> step -> value


@dataclass(frozen=True)
class Curves:
    """What a training run plotted."""

    points: Points
    best_step: int  # whose weights were kept; 0: not known
    lacks: str = ""  # what may be missing of them, and why; empty: nothing


def read_curves(folder: Path, name: str) -> tuple[Curves | None, str]:
    """Return (the curves of dual or cross, "") or (None, why not).

    Both models plot into output_dir/tensorboard, as did earlier trainings there: a file belongs to the model
    when its values are those of the history in NAME_checkpoint.pt. Without that, a lone file beside a lone
    model is taken.
    """
    board = folder / "tensorboard"
    files, trouble = read_board(board)
    if not files:
        return None, trouble or f"no event files with curves in {board}"
    progress = read_progress(folder / f"{name}_checkpoint.pt")
    if progress is None:
        models = [one for one in ("dual", "cross") if (folder / f"{one}_params.bin").exists()]
        if len(files) > 1 or len(models) > 1:
            return None, f"event files in {board}, but no {name}_checkpoint.pt to tell which are its own"
        return Curves(files[0], 0, trouble), ""
    own = [points for points in files if belongs(points, progress["history"])]
    also = trouble and f"; {trouble}"
    if not own:
        return None, f"no event file in {board} is of the training in {folder / name}_checkpoint.pt{also}"
    points = joined(own)
    lacks = missing(points, progress["history"])
    return Curves(points, progress.get("best_step", 0), lacks and lacks + also), ""


def read_board(board: Path) -> tuple[list[Points], str]:
    """Return (the curves of each event file that has any, what is wrong with the others)."""
    files, trouble = [], []
    for path in sorted(board.glob("events.out.tfevents.*"), key=numbers_in_the_name):
        try:
            points, why = read_events(path), "no value can be read: damaged, or ended before the first"
        except OSError as error:
            points, why = {}, error.strerror or str(error)
        if points:
            files.append(points)
        else:
            trouble.append(f"{path}: {why}")
    return files, "; ".join(trouble)


def numbers_in_the_name(path: Path) -> list[int]:
    """Return second, process and count, which order event files by age; as text, 10 would stand before 9."""
    return [int(number) for number in re.findall(r"\d+", path.name)]


def read_events(path: Path) -> Points:
    """Return the curves of one event file, up to where it is torn or damaged; OSError when it cannot be
    opened.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    tags = [tag for tag in TAGS if tag in events.Tags()["scalars"]]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def read_progress(path: Path) -> dict | None:
    """Return the progress in a checkpoint, None when there is none that can be read.

    The weights are mapped, not read: they may be gigabytes.
    """
    try:
        progress = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]
        return progress if isinstance(progress.get("history"), list) else None
    except (*DAMAGE, OSError):
        return None


def belongs(points: Points, history: list[dict]) -> bool:
    """Return whether most of the values that the file shares with the history are the same."""
    known = {(entry["step"], name): entry[name] for entry in history for name in TAGS.values()
             if name in entry}  # fmt: skip
    same = [math.isclose(value, known[step, TAGS[tag]], rel_tol=1e-4, abs_tol=1e-4)
            for tag in TELLING for step, value in points.get(tag, {}).items()
            if (step, TAGS[tag]) in known]  # fmt: skip
    return sum(same) > len(same) / 2


def missing(points: Points, history: list[dict]) -> str:
    """Return which values of the checkpoint's history the curves do not have; empty when they have all.

    The reader of event files ends at the first damaged byte, and says nothing.
    """
    parts = []
    for tag, name in TAGS.items():
        known = {entry["step"] for entry in history if name in entry}
        gone = known - points.get(tag, {}).keys()
        if gone:
            last = max(points.get(tag, {}), default=0)
            values = f"{len(gone)} of {len(known)} values"
            parts.append(f"{tag} lacks {values}, ends at step {last} of {max(known)}")
    return f"{', '.join(parts)}; an event file is damaged or cut" if parts else ""


def joined(files: list[Points]) -> Points:
    """Return the curves of a training that was killed and carried on, in files by time: the later wins."""
    points: Points = {}
    for file in files:
        for tag, values in file.items():
            points.setdefault(tag, {}).update(values)
    return {tag: dict(sorted(values.items())) for tag, values in points.items()}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample of texts, prefix and special tokens included."""

    tokens: np.ndarray  # (sampled,) int64
    of: int  # texts that the sample was drawn from
    limit: int  # tokens after which the model cuts

    @property
    def cut(self) -> float:
        """The share of texts that are cut."""
        return float((self.tokens > self.limit).mean())


def read_fixed(record: Path) -> dict:
    """Return the settings that a retriever's weights fix; UserError when the record does not hold them."""
    fixed = read_json(record).get("fixed_by_weights")
    if not isinstance(fixed, dict) or any(type(fixed.get(name)) is not kind for name, kind in FIXED.items()):
        raise UserError(f"{record}: not as do_dual_train.py writes it")
    return fixed


def measure_lengths(
    folder: Path, queries: list[str], collection: PassageCollection, samples: int, seed: int
) -> tuple[dict[str, Lengths], str]:
    """Return ({queries, passages: Lengths}, "") by the retriever's own tokenizer, or ({}, why not)."""
    record, model = folder / "dual_hparams.json", folder / "dual_model"
    if not record.exists() or not model.exists():
        return {}, f"no dual_hparams.json and dual_model/ in {folder}, as of a retriever not trained here"
    try:
        fixed, tokenizer = read_fixed(record), load_tokenizer(str(model))
    except UserError as error:
        return {}, str(error)
    measured, draw = {}, np.random.default_rng(seed)
    for name, letter, texts in (("queries", "q", queries), ("passages", "p", collection)):
        count = min(samples, len(texts))
        rows = np.sort(draw.choice(len(texts), count, replace=False, shuffle=False)).tolist()
        prefix = "query_prefix" if letter == "q" else "passage_prefix"
        rules = TextRules(LONGEST, fixed[prefix], fixed["remove_spaces"])
        ids, _ = tokenize(tokenizer, [texts[row] for row in rows], rules)
        tokens = np.array([len(text) for text in ids])
        measured[name] = Lengths(tokens, len(texts), fixed[f"{letter}_max_seq_len"])
    return measured, ""
