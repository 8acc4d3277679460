"""Options of the programs: ranges of numbers, and a parser whose errors are one line."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch_src.runtime import log
from torch_src.runtime.errors import UserError

# Ranges, one per kind of option: (lowest,) or (lowest, highest).
ABOVE_0 = (1e-12,)
AT_MOST_ALL = (1,)  # a number of things, of which there may be fewer
COUNT, COUNT_OR_OFF = (1, 10**6), (0, 10**6)  # numbers that memory or time grows with
STEPS, STEPS_OR_OFF = (1, 10**8), (0, 10**8)  # updates, tokens
PAIR_LENGTH, LENGTH = (8, 10**6), (3, 10**6)  # tokens; the model's own limit is checked when it is loaded
WINDOWS, STRIDE = (1, 10**4), (-1, 10**6)  # of a passage; tokens, -1: a part of the length
SHARE = (0, 1)
FROM_0 = (0,)  # weights, rates that 0 turns off
SEEDS = (0, 2**32 - 1)
WHOLE = re.compile(r"[+-]?[0-9]{1,18}")  # more digits than an int64 has are out of every range


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """UserError unless low <= value <= high and value is finite."""
    if not in_range(value, low, high):
        limits = (low,) if value < low else (low, high)
        raise UserError(f"--{name} {value}: must be {limit_text(*limits)}")


def in_range(value: float, low: float, high: float = math.inf) -> bool:
    return low <= value <= high and not math.isinf(value)


def limit_text(low: float, high: float = math.inf) -> str:
    """Return `between 1 and 10`, `above 0` or `at least 1`."""
    if high < math.inf:
        return f"between {low} and {high}"
    return "above 0" if (low,) == ABOVE_0 else f"at least {low}"


def integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return a `type=` of argparse: an integer in this range."""

    def parse(text: str) -> int:
        value = int(text) if WHOLE.fullmatch(text) else None
        if value is None or not in_range(value, low, high):
            raise argparse.ArgumentTypeError(f"{text!r} (expected an integer, {limit_text(low, high)})")
        return value

    return parse


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return a `type=` of argparse: a finite number in this range."""

    def parse(text: str) -> float:
        try:  # float() alone reads 1_000 and full-width digits
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not in_range(value, low, high):
            raise argparse.ArgumentTypeError(f"{text!r} (expected a number, {limit_text(low, high)})")
        return value

    return parse


positive_int = integer(1)
seed = integer(*SEEDS)


def check_utf8(words: Iterable[str]) -> None:
    """UserError for a word that is not UTF-8: it could be neither printed nor written to a file."""
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            fix = "set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or rename the file"
            raise UserError(f"{ascii(word)}: an option that is not UTF-8; {fix}") from None


class OptionParser(argparse.ArgumentParser):
    """The parser of the argparse programs: the module's text as --help, an error of one line, status 2."""

    def __init__(self, description: str | None, prog: str | None = None):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=raw)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        log.escape_unprintable()  # before --help
        try:
            check_utf8(sys.argv[1:] if args is None else args)
        except UserError as error:
            self.error(str(error))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        log.error(f"{message}; --help lists the options")
        sys.exit(2)
