"""Options of the programs: ranges of numbers, and a parser whose errors are one line."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from torch_src.runtime import log
from torch_src.runtime.errors import UserError

ABOVE_0 = (1e-12,)  # a range
SEEDS = (0, 2**32 - 1)
WHOLE = re.compile(r"[+-]?[0-9]{1,18}")  # more digits than an int64 has are out of every range


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """UserError unless low <= value <= high and value is finite."""
    if not in_range(value, low, high):
        raise UserError(f"--{name} {value}: must be {limit_text(low, high)}")


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
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not in_range(value, low, high):
            raise argparse.ArgumentTypeError(f"{text!r} (expected a number, {limit_text(low, high)})")
        return value

    return parse


positive_int = integer(1)
seed = integer(*SEEDS)


class OptionParser(argparse.ArgumentParser):
    """The parser of the argparse programs: the module's text as --help, an error of one line, status 2."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        log.error(f"{message}; --help lists the options")
        sys.exit(2)
