"""Read UTF-8 files line by line, and parse columns, numbers and JSON.

Only `\\n` ends a line and nothing is stripped: texts contain characters at which str.splitlines() splits
(\\x0b, \\x0c, \\x1c-\\x1e, \\x85, U+2028) and quotes that csv would remove.
"""

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from torch_src.data.encodings import GZIPPED, known_encoding, not_utf8
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import warn

FilePath = str | Path
First = TypeVar("First")
Second = TypeVar("Second")
BYTE_ORDER_MARK = "starts with a byte order mark; remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' FILE"
LONGEST_LINE = 1 << 24  # bytes; a longer line is refused to limit memory
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class FormatError(UserError):
    """A malformed line: `path:line: what is wrong (what was expected)`."""

    def __init__(self, path: FilePath, line: int, message: str):
        super().__init__(f"{path}:{line}: {message}")
        self.line, self.message = line, message


class EncodingError(FormatError):
    """A line that is not UTF-8; `encoding` is what it seems to be, empty when unknown."""

    def __init__(self, path: FilePath, line: int, raw: bytes, where: str):
        super().__init__(path, line, not_utf8(raw, path, where))
        self.encoding = known_encoding(raw)


def shown(text: str) -> str:
    """Return at most 60 characters of the text, quoted for an error message; a final CR is named."""
    quoted = repr(text if len(text) <= 60 else text[:57] + "...")
    if text.endswith("\r"):
        quoted += " with a Windows line end (`sed -i 's/\\r$//'` removes it)"
    return quoted


def open_file(path: FilePath) -> BinaryIO:
    """Return the open binary file, unpacked if it is gzipped; UserError when it is missing or a folder."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder (expected a file)") from None
    if file.peek(2)[:2] != GZIPPED:
        return file
    file.close()
    return cast(BinaryIO, gzip.open(path, "rb"))


def is_gzipped(path: FilePath) -> bool:
    """Return whether a file is gzipped, by its first bytes."""
    with open(path, "rb") as file:
        return file.read(len(GZIPPED)) == GZIPPED


@contextmanager
def archive_errors(path: FilePath) -> Iterator[None]:
    """Turn the errors of a damaged gzip archive into a UserError."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated archive ({error})") from None


def raw_lines(file: BinaryIO, path: FilePath) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of a binary file; FormatError for a line above LONGEST_LINE."""
    number = 0
    with archive_errors(path):
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise FormatError(path, number, f"a line of more than {LONGEST_LINE >> 20} MiB")
            yield number, raw


def decode(raw: bytes, path: FilePath, line: int) -> str:
    """Return the line's text without its final newline; EncodingError when it is not UTF-8."""
    try:
        text = raw.removesuffix(b"\n").decode("utf-8")
    except UnicodeDecodeError as error:
        where = f" (byte {error.start + 1} of the line)"
        raise EncodingError(path, line, raw, where) from None
    if line == 1 and text.startswith("\ufeff"):
        raise FormatError(path, line, BYTE_ORDER_MARK)
    return text


def read_lines(path: FilePath) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of a UTF-8 file."""
    with open_file(path) as file:
        for number, raw in raw_lines(file, path):
            yield number, decode(raw, path, number)


def read_together(
    first: Iterator[First], first_path: FilePath, second: Iterator[Second], second_path: FilePath
) -> Iterator[tuple[int, First, Second]]:
    """Yield (line, row of the first file, row of the second); FormatError where one of them ends early."""
    for line, (one, other) in enumerate(zip_longest(first, second), start=1):
        if one is None or other is None:
            short, long = (first_path, second_path) if one is None else (second_path, first_path)
            what = "is empty" if line == 1 else "the file ends here"
            raise FormatError(short, line, f"{what}, but {long} has {'' if line == 1 else 'more '}lines")
        yield line, one, other


def warn_if_cut(path: FilePath) -> None:
    """Warn when the last line has no newline: a truncated number or id still looks valid."""
    with open_file(path) as file, archive_errors(path):
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read() not in (b"", b"\n"):
            warn(f"{path}: the last line has no newline; is the file truncated?")


def split_columns(text: str, count: int, path: FilePath, line: int, names: str) -> list[str]:
    """Return the TAB-separated columns; FormatError unless there are exactly `count`."""
    columns = text.split("\t")
    if len(columns) != count:
        raise FormatError(path, line, f"{len(columns)} TAB-separated columns (expected {count}: {names})")
    return columns


def whole_number(text: str, digits: int = 18) -> int | None:
    """Return the integer >= 0 written in at most `digits` ASCII digits (18 fit in an int64), or None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def finite_number(text: str) -> float | None:
    """Return the number, or None; float() alone accepts nan, inf, 1_000 and surrounding spaces."""
    number = float(text) if NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def parse_json(text: str, path: FilePath, line: int, pairs_hook: Callable | None = None) -> Any:
    """Return the JSON value of a text that starts at `line`.

    FormatError when it is malformed, nested too deeply, or has a lone surrogate (not encodable).
    """
    if text.startswith("\ufeff"):
        raise FormatError(path, line, BYTE_ORDER_MARK)
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
        if "\\ud" in text or "\\uD" in text:  # UTF-8 holds a surrogate only as an escape
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UserError:
        raise  # from the hook
    except json.JSONDecodeError as error:
        if not text.strip():
            raise FormatError(path, line, "not JSON (an empty line)") from None
        if text.strip() in ("{", "["):
            what = "not JSON: continues in the next line (expected one object per line)"
            raise FormatError(path, line, what) from None
        raise FormatError(path, line + error.lineno - 1, f"not JSON ({error.msg})") from None
    except UnicodeEncodeError:
        raise FormatError(path, line, "an escape for a lone surrogate") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(path, line, f"JSON that cannot be read ({error})") from None
