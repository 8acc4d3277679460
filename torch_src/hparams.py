"""Settings: parse the command line into a frozen dataclass, print it, save it.

Each program has one dataclass in its own *_hparams module; the trailing comment of a field is its help text.
"""

import dataclasses
import math
import sys
from pathlib import Path

import tyro

from torch_src.models.model_folder import own_settings
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import write_json
from torch_src.runtime.log import log

SAMPLE_DIR = "script/sample_data"
TINY_MODEL = f"{SAMPLE_DIR}/tiny_bert"  # no weights there: they are drawn from the seed
POOLINGS = ("cls", "mean", "pooler")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def parse(settings: type, argv: list[str], debug_defaults: dict):
    """Return `settings` filled from `argv`; with `--debug` the defaults are `debug_defaults`, an option still
    wins.

    An unknown, misspelt or wrongly typed option prints what was expected and exits with status 2 (tyro).
    """
    defaults = settings()
    if is_debug(settings, argv):
        defaults = dataclasses.replace(defaults, **debug_defaults)
    parsed = _cli(settings, argv, defaults)
    own = _of_the_model(parsed)
    if own:  # between the defaults in the file and the options
        parsed = _cli(settings, argv, dataclasses.replace(defaults, **own))
    parsed.check()
    return parsed


def _cli(settings: type, argv: list[str], defaults):
    return tyro.cli(
        settings,
        args=_spell_out(settings, argv),
        default=defaults,
        use_underscores=True,
        description=(settings.__doc__ or "").strip(),
        prog=Path(sys.argv[0]).name,
    )


def _of_the_model(hp) -> dict:
    """Return the pooling, normalisation and prefixes that the pretrained model's own folder asks for."""
    if not isinstance(getattr(type(hp), "pooling", None), str):
        return {}  # a program without these knobs, or one that takes them from the trained weights
    return own_settings(hp.pretrained_model_path)


def _spell_out(settings: type, argv: list[str]) -> list[str]:
    """Return argv with `--flag` and `--no_flag` of a `bool | None` knob as `--flag True` and `--flag False`.

    tyro knows flags for plain booleans only, and a user should not have to know which of the two a knob is.
    """
    optional = {field.name for field in dataclasses.fields(settings) if field.type == bool | None}
    words = []
    for at, word in enumerate(argv):
        name = word.removeprefix("--").replace("-", "_")
        plain = word.startswith("--") and argv[at + 1 : at + 2] not in (["True"], ["False"], ["None"])
        if plain and name in optional:
            words += [f"--{name}", "True"]
        elif plain and name.removeprefix("no_") in optional:
            words += [f"--{name.removeprefix('no_')}", "False"]
        else:
            words.append(word)
    return words


def is_debug(settings: type, argv: list[str]) -> bool:
    """Return whether --debug is on: asked of the command line alone, before the defaults are known."""
    asked = [word.replace("-", "_") for word in argv if word in ("--debug", "--no_debug", "--no-debug")]
    return asked[-1] == "__debug" if asked else settings().debug


def describe(hp) -> list[str]:
    """Return one line a setting; a star marks what differs from the default in the file."""
    defaults = type(hp)()
    lines = []
    for field in dataclasses.fields(hp):
        value, default = getattr(hp, field.name), getattr(defaults, field.name)
        mark = "*" if value != default else " "
        lines.append(
            f"{mark} {field.name} = {value!r}" + (f"   (default {default!r})" if mark == "*" else "")
        )
    return lines


def announce(title: str, hp) -> None:
    """Print the program's name and its settings."""
    log(f"{title}   settings (* differs from the default):")
    for line in describe(hp):
        log(f"  {line}")
    if hp.debug:
        log(
            f"--debug: the sample collection and a small model with random weights; "
            f"results go to {hp.output_dir}"
        )


def save(hp, path, **more) -> None:
    """Write all settings (and `more`) as JSON beside the result they made."""
    write_json(path, {**dataclasses.asdict(hp), **more})


def check_choice(name: str, value, allowed) -> None:
    """UserError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"--{name} {value}: expected one of {', '.join(map(str, allowed))}")


def check_range(name: str, value, low, high=float("inf")) -> None:
    """UserError unless low <= value <= high."""
    if not low <= value <= high or math.isinf(value):
        limit = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise UserError(f"--{name} {value}: must be {limit}")


def dimensions(name: str, text: str, hidden: int) -> list[int]:
    """Return the numbers of `64,128`; UserError unless they rise and stay below the model's width."""
    try:
        found = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0]
    if found and not 0 < found[0] <= found[-1] < hidden or found != sorted(set(found)):
        raise UserError(f"--{name} {text}: expected rising numbers below the model's {hidden}, e.g. 64,128")
    return found


def check_training(hp) -> None:
    """UserError for a value out of range among the knobs that both training programs have."""
    check_choice("precision", hp.precision, PRECISIONS)
    for name in ("epoch", "batch_size", "accumulation_steps", "tokens_per_batch", "log_every"):
        check_range(name, getattr(hp, name), 1)
    for name in ("max_steps", "early_stop", "threads", "seed", "weight_decay"):
        check_range(name, getattr(hp, name), 0)
    for name in ("grad_cache_chunk", "save_every_minutes"):
        check_range(name, getattr(hp, name), 0)
    for name in ("lr", "max_grad_norm"):
        check_range(name, getattr(hp, name), 1e-12)
    if hp.early_stop and hp.eval_every < 0:
        raise UserError("--early_stop needs evaluations on dev; --eval_every -1 turns them off")
    check_range("warmup_proportion", hp.warmup_proportion, 0, 1)
    if hp.dropout is not None:
        check_range("dropout", hp.dropout, 0, 0.9)
    check_range("eval_every", hp.eval_every, -1)
    check_range("ema_decay", hp.ema_decay, 0, 0.999999)


def under(folder: str, path: str, default: str) -> str:
    """Return `path` when it was given, else `default` inside `folder`."""
    return path or str(Path(folder) / default)


class OfficialLayout:
    """Paths of a data folder of the official layout: a knob that is empty follows `data_dir`."""

    @property
    def dev_set_path(self) -> str:
        return under(self.data_dir, self.dev_set, "dev/dev.json")

    @property
    def dev_q_path(self) -> str:
        return under(self.data_dir, self.dev_q, "dev/dev.q.format")

    @property
    def dev_q2qid_path(self) -> str:
        return under(str(Path(self.dev_q_path).parent), self.dev_q2qid, "q2qid.dev.json")

    @property
    def dev_candidates_path(self) -> str:
        return under(self.data_dir, self.dev_candidates, "auxiliary/dev.retrieval.top50.res.tsv")

    @property
    def passage_dir_path(self) -> str:
        return under(self.data_dir, self.passage_dir, "passage-collection")

    @property
    def passage_ids_path(self) -> str:
        return under(self.passage_dir_path, self.passage_ids, "passage2id.map.json")
