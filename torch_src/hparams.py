"""Settings: parse the command line into a frozen dataclass, print --help, check, print and save the values.

Each program has one dataclass in its own *_hparams module; knobs that several programs share are inherited
from common_hparams. The comment after a knob is its --help text, the comment above a block its group.
"""

import contextlib
import dataclasses
import inspect
import io
import re
import shutil
import subprocess
import sys
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch_src.models.hub import is_hub_name
from torch_src.runtime.commands import DATASET
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import ROOT, from_root, to_root, write_json
from torch_src.runtime.log import error, log
from torch_src.runtime.options import check_range, check_utf8, limit_text

NONE = "none"  # value that turns a path or model option off
# Default paths are relative to the repository, those of options to the current directory.
DATA_DIR, OUTPUT = DATASET, "output"
SAMPLE_DIR = "script/sample_data"
TINY_ENCODER = f"{SAMPLE_DIR}/tiny_encoder"  # a retriever and a re-ranker in one file
POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "pooler")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")

PATHS = (
    "output_dir", "data_dir", "passage_dir", "passage_ids", "train_set", "dev_set", "dev_q", "dev_q2qid",
    "dev_candidates", "pretrained_model_path", "vocab_path", "dual_params", "para_emb", "cross_params",
    "retrieval_result", "mined_dir",
)  # fmt: skip
GROUPS = ("main options", "data paths", "model", "optimization", "evaluation", "search", "run", "advanced")
HELP_COLUMN = 32  # where the comments start

Settings = TypeVar("Settings", bound="Hparams")
Ranges = dict[str, tuple[float, ...]]


def under(folder: str, path: str, default: str) -> str:
    """Return `path`, or `default` inside `folder` when it is empty."""
    return path or str(Path(folder) / default)


@dataclass(frozen=True)
class Hparams:
    """Base class of all settings."""

    # main options
    output_dir: str = OUTPUT  # folder of the results
    debug: bool = False  # small run on a CPU without a download: sample data, small encoder

    # Subclasses extend these four with attributes of the same name.
    DEBUG: ClassVar[dict[str, Any]] = {"output_dir": "output/debug"}  # defaults with --debug; options win
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    RANGES: ClassVar[Ranges] = {}  # knob -> (lowest,) or (lowest, highest)
    INPUTS: ClassVar[dict[str, str]] = {}  # property or knob that names an input -> what it is

    @classmethod
    def defaults(cls: type[Settings], debug: bool) -> Settings:
        """Return the settings of a command without options; their paths lead to the repository."""
        hp = dataclasses.replace(cls(), debug=debug, **(inherited(cls, "DEBUG") if debug else {}))
        paths: dict[str, Any] = {name: from_root(path) for name, path in local_paths(hp).items()}
        return dataclasses.replace(hp, **paths)

    @classmethod
    def recipe_values(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the recipe that the options name; empty without recipes."""
        return {}

    @classmethod
    def more_help(cls) -> list[str]:
        """Return lines for the end of --help."""
        return []

    @property
    def saved_to(self) -> str:
        """Return the JSON file that stores the settings beside the result; empty: none."""
        return ""

    @property
    def inputs(self) -> list[str]:
        """Return the paths that the program reads, which no output may replace."""
        paths = [getattr(self, name) for name in inherited(type(self), "INPUTS")]
        return [path for path in paths if path and path != NONE]

    def to_save(self) -> dict[str, Any]:
        """Return all settings, their paths as seen from the repository, whatever the current directory."""
        paths = {name: to_root(path) for name, path in local_paths(self).items()}
        return {**dataclasses.asdict(self), **paths}

    def check(self) -> None:
        """UserError for a value that is not allowed; None (unset) always is."""
        for name, allowed in inherited(type(self), "CHOICES").items():
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), allowed)
        for name, limits in inherited(type(self), "RANGES").items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), *limits)


def local_paths(hp: Hparams) -> dict[str, str]:
    """Return {knob: path} of the settings that name a file or folder."""
    paths = {name: getattr(hp, name, None) or NONE for name in PATHS}
    if is_hub_name(paths["pretrained_model_path"]):
        del paths["pretrained_model_path"]
    return {name: path for name, path in paths.items() if path != NONE}


def from_saved(knob: str, path: str) -> str:
    """Return a path of to_save() as seen from the current directory; `none` and a hub name as they are."""
    is_model = knob == "pretrained_model_path" and not (ROOT / path).exists()
    return path if path == NONE or (is_model and is_hub_name(path)) else from_root(path)


def inherited(settings: type, attribute: str) -> dict[str, Any]:
    """Return a class's dict merged with those of its base classes."""
    merged: dict[str, Any] = {}
    for cls in reversed(settings.__mro__):
        merged |= vars(cls).get(attribute, {})
    return merged


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """UserError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"--{name} {value}: expected one of {', '.join(allowed)}")


def parse(
    settings: type[Settings], argv: list[str], model_settings: Mapping[str, Any] | None = None
) -> Settings:
    """Return the checked settings: defaults, --debug, recipe, `model_settings`, options: the later win.

    A malformed option prints what was expected and exits with status 2; --help exits with 0.
    """
    if {"--help", "-h"} & set(argv):
        print(help_text(settings))
        sys.exit(0)
    options = parse_options(settings, argv)
    defaults = settings.defaults(options.get("debug", settings.debug))
    recipe = settings.recipe_values(options)
    hp = dataclasses.replace(defaults, **{**recipe, **(model_settings or {}), **options})
    hp.check()
    return hp


def parse_options(settings: type[Hparams], argv: list[str]) -> dict[str, Any]:
    """Return {knob: value} of the options in `argv` alone."""
    import tyro

    check_utf8(argv)
    kinds = {field.name: field.type for field in dataclasses.fields(settings)}
    flags = {name for name, kind in kinds.items() if kind in (bool, bool | None)}
    kinds |= dict.fromkeys(flags, bool)  # tyro has flags for plain booleans only
    plain = tyro.conf.arg(help_behavior_hint="")  # in errors; the defaults are not known here
    knobs = {name: typing.Annotated[kind, plain] for name, kind in kinds.items()}
    options = typing.cast(Any, typing.TypedDict)("options", knobs, total=False)
    words = as_flags(argv, flags)
    with contextlib.redirect_stderr(io.StringIO()) as box:  # tyro frames its errors
        try:
            return dict(tyro.cli(options, args=words, use_underscores=True, prog=Path(sys.argv[0]).name))
        except SystemExit:
            message = tyro_message(box.getvalue())
    error(f"{message}; --help lists the options")
    sys.exit(2)


def tyro_message(box: str) -> str:
    """Return a framed error of tyro as one line, without its title and its hints to --help."""
    plain = box.translate({ord(sign): " " for sign in "│╭╮╰╯"}).replace("─", "-").partition("\n")[2]
    sections = [" ".join(section.split()) for section in re.split(r"(?m)^ *-{5,} *$", plain)]
    hints = ("Argument helptext", "For full helptext")
    return "; ".join(part for part in sections if part and not part.startswith(hints)) or "invalid option"


def as_flags(argv: list[str], flags: set[str]) -> list[str]:
    """Return argv with `--flag True` and `--flag=False` as `--flag` and `--no_flag`, the forms of tyro."""
    words: list[str] = []
    for word in argv:
        if word in ("True", "False") and words and knob_name(words[-1]) in flags:
            word = f"{words.pop()}={word}"
        option, _, value = word.partition("=")
        if value in ("True", "False") and (name := knob_name(option)) in flags:
            word = f"--{name}" if value == "True" else f"--no_{name}"
        words.append(word)
    return words


def knob_name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def help_text(settings: type[Hparams]) -> str:
    """Return the --help text: the knobs in groups, each with type or choices, comment, default and range."""
    lines = [f"usage: {Path(sys.argv[0]).name} [--name value ...]", "", settings.__doc__ or ""]
    comments = knob_comments(settings)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    defaults = settings.defaults(settings.debug)
    for group in GROUPS:
        names = [name for name, (found, _) in comments.items() if found == group]
        lines += ["", f"{group}:"] if names else []
        for name in names:
            lines += knob_help(settings, fields[name], getattr(defaults, name), comments[name][1])
    lines += settings.more_help()
    return "\n".join(lines)


def knob_help(
    settings: type[Hparams], field: "dataclasses.Field[Any]", default: object, comment: str
) -> list[str]:
    """Return the lines of one knob."""
    name = field.name
    choices, limits = inherited(settings, "CHOICES").get(name), inherited(settings, "RANGES").get(name)
    if field.type in (bool, bool | None):
        option = f"  --{name}, --no_{name}"
    else:
        kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]
        word = f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()
        several = f" [{word} ...]" if typing.get_origin(field.type) is tuple else ""
        option = f"  --{name} {word}{several}"
    facts = [] if default in (None, "", ()) else [f"default {default}"]
    facts += [limit_text(*limits)] if limits and len(limits) == 2 else []
    width = max(60, shutil.get_terminal_size((110, 0)).columns) - HELP_COLUMN
    text = f"{comment} ({'; '.join(facts)})" if facts else comment
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    if len(option) > HELP_COLUMN - 2:
        lines.insert(0, "")
    return [option.ljust(HELP_COLUMN) + lines[0], *(" " * HELP_COLUMN + line for line in lines[1:])]


def knob_comments(settings: type[Hparams]) -> dict[str, tuple[str, str]]:
    """Return {knob: (group, comment)} from the source of the class, then of its base classes."""
    found: dict[str, tuple[str, str]] = {}
    for cls in settings.__mro__[:-1]:
        group = ""
        for line in inspect.getsource(cls).splitlines():
            if heading := re.fullmatch(r"    # ([a-z ]+)(:.*)?", line):
                group = heading[1]
            elif (knob := re.fullmatch(r"    (\w+): .+?  # (.+)", line)) and knob[1].islower():
                found.setdefault(knob[1], (group, knob[2]))
    return found


def announce(title: str, hp: Hparams) -> None:
    """Log the title and the settings that differ from those of a command without options."""
    debug = " with the settings of --debug" if hp.debug else ""
    saved = f"; all settings: {hp.saved_to}" if hp.saved_to else ""
    log(f"{title}{debug}{saved}")
    if changed := describe(hp):
        log(f"  instead of the defaults: {', '.join(changed)}")


def describe(hp: Hparams) -> list[str]:
    """Return `name value (default)` of each setting that differs from that of a command without options."""
    plain = hp.defaults(hp.debug)
    names = [field.name for field in dataclasses.fields(hp)]
    pairs = [(name, getattr(hp, name), getattr(plain, name)) for name in names]
    return [
        f"{name} {option_text(value)} ({option_text(default)})"
        for name, value, default in pairs
        if value != default
    ]


def option_text(value: object) -> str:
    """Return a value as on the command line, quoted when it has spaces or is empty."""
    if isinstance(value, tuple):
        return " ".join(map(option_text, value)) or "''"
    text = "unset" if value is None else str(value)
    return text if text and text == "".join(text.split()) else repr(text)


def save(hp: Hparams, path: str | Path, **more: object) -> None:
    """Write all settings (and `more`) as JSON beside the result."""
    write_json(path, {**hp.to_save(), **more, "commit": commit()})


def commit() -> str:
    """Return git's name of this checkout's commit, with -dirty for local changes; empty without git."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--dirty", "--tags"]
    if not (ROOT / ".git").exists():  # a repository around an unpacked archive would be another one
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def dimensions(name: str, text: str, hidden: int) -> list[int]:
    """Return the numbers of `64,128`; UserError unless increasing and below the hidden size."""
    try:
        found = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0]
    if found and not 0 < found[0] <= found[-1] < hidden or found != sorted(set(found)):
        raise UserError(f"--{name} {text}: expected increasing numbers below {hidden}, e.g. 64,128")
    return found
