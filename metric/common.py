"""What the programs in metric/ share: reading inputs, writing a result whole or not at all, naming a mistake.

Standard library alone. The programs import it as a sibling (`python metric/x.py` puts metric/ on the path)
or, when they are imported from the repository root themselves, as `metric.common`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys

CHUNK_BYTES = 1 << 20  # bytes of a JSON map read at a time
LONGEST_LINE = 1 << 24  # bytes; a longer one is no line of these files, and would be held in memory whole
PAIR_LIMIT = 1 << 20  # bytes; more than this without one whole pair is no map of short strings
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

BLANK = rb"[ \t\r\n]*"
STRING = rb'"([^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*)"'
NEXT_PAIR = re.compile(BLANK + b"," + BLANK + STRING + BLANK + b":" + BLANK + STRING)
FIRST_PAIR = re.compile(BLANK + rb"\{" + BLANK + STRING + BLANK + b":" + BLANK + STRING)
END = re.compile(BLANK + rb"\}" + BLANK)
EMPTY_OBJECT = re.compile(BLANK + rb"\{" + BLANK + rb"\}" + BLANK)


class InputError(ValueError):
    """A mistake in what the user gave. Its message is one line: `file:line: expected this, found that`."""


def warn(message):
    """Print one warning line on stderr, so that stdout stays a result that other programs can read."""
    print(f"warning: {message}", file=sys.stderr)


def shown(text):
    """The text as an error message quotes it: on one line, control characters visible, not too long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def exit_status(program, *arguments):
    """0 after `program(*arguments)`, or 2 after one line on stderr where an input or a path is wrong."""
    try:
        program(*arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def text_lines(path):
    """Yield (number from 1, text) for each line of a UTF-8 file, less its final newline, otherwise untouched.

    Only `\\n` ends a line: texts hold \\x0b, \\x0c, \\x85 and U+2028, at which str.splitlines would cut.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise InputError(f"{path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: expected UTF-8, found {error.object[error.start :][:4]!r} "
                    f"at byte {error.start} of the line"
                ) from None
            yield number, text[:-1] if text.endswith("\n") else text


def warn_if_cut(path):
    """Warn where the last line has no newline: a number or an id cut there would still look like one."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read() not in (b"", b"\n"):
            warn(f"{path}: the last line has no line end; is the file cut short?")


def finite_number(text):
    """The number that `text` spells, or None. float() alone would take nan, inf, 1_000 and blanks."""
    number = float(text) if NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def whole_number(text, digits=18):
    """The integer >= 0 that `text` spells in at most `digits` ASCII digits (18 fit in an int64), or None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def json_pairs(path, chunk_bytes=CHUNK_BYTES):
    """Yield (line, key token, value token) of a JSON object of strings, holding one chunk at a time.

    Loaded whole, the 8.1 M rows of a passage map make over a gigabyte of Python objects. Tokens are the raw
    bytes between the quotes; `json_text` decodes those that matter.
    """
    rest, offset, line, pattern = b"", 0, 1, FIRST_PAIR
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(chunk_bytes), b""):
            buffer, at = rest + chunk, 0
            pair = pattern.match(buffer)
            while pair:
                line += buffer.count(b"\n", at, pair.start(1))
                yield line, pair[1], pair[2]
                line += buffer.count(b"\n", pair.start(1), pair.end())
                at, pattern = pair.end(), NEXT_PAIR
                pair = pattern.match(buffer, at)
            rest, offset = buffer[at:], offset + at
            if len(rest) > PAIR_LIMIT:
                break
    ending = EMPTY_OBJECT if pattern is FIRST_PAIR else END
    if not ending.fullmatch(rest):
        raise not_a_pair(path, line, offset, rest)


def not_a_pair(path, line, offset, rest):
    """The error for a JSON object that goes wrong at `rest`, which begins `offset` bytes into the file."""
    blank = len(rest) - len(rest.lstrip(b" \t\r\n"))
    found = repr(rest[blank : blank + 40]) if rest[blank:] else "the end of the file (is it cut short?)"
    line += rest[:blank].count(b"\n")
    return InputError(
        f"{path}:{line}: expected one JSON object of string keys and string values, "
        f"found {found} at byte {offset + blank}"
    )


def json_text(path, line, token):
    """The string that a token of `json_pairs` stands for."""
    try:
        text = token.decode("utf-8")
        return json.loads(f'"{text}"') if "\\" in text else text
    except ValueError:
        raise InputError(f"{path}:{line}: expected a JSON string in UTF-8, found {token[:60]!r}") from None


def check_output(output, inputs):
    """Refuse an output that is an input: a path left out of the command shifts those after it."""
    for path in inputs:
        if os.path.realpath(output) == os.path.realpath(path):
            raise InputError(f"{output}: expected an output path of its own, found one of the inputs")


def put_in_place(temporary, path):
    """Give a file that is whole its name; a power cut right after does not take it away again."""
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_lists(path, lists):
    """Write (qid, [pid, ...]) pairs as one JSON object, a query a line; a half file never takes the name."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write("{")
            for number, (qid, pids) in enumerate(lists):
                file.write(f"{',' if number else ''}\n{json.dumps(qid)}: {json.dumps(pids)}")
            file.write("\n}\n")
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def digest(path):
    """The sha256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            found.update(chunk)
    return found.hexdigest()


def write_stamp(output, program, inputs, **settings):
    """Write OUTPUT.stamp.json: what made the result, of which files (from its folder on), its own digest."""
    folder = os.path.dirname(os.path.realpath(output))
    made_of = {os.path.relpath(os.path.realpath(path), folder): digest(path) for path in inputs}
    stamp = {"stage": program, **settings, "inputs": made_of, "sha256": digest(output)}
    temporary = f"{output}.stamp.json.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(stamp, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    put_in_place(temporary, f"{output}.stamp.json")


def warn_if_stale(result):
    """Warn where a result is not what its stamp was written for, or a file it was made of has changed since.

    A result without a stamp of ours is taken as it is.
    """
    try:
        with open(f"{result}.stamp.json", encoding="utf-8") as file:
            stamp = json.load(file)
        made_of = stamp["inputs"].items()
        own = stamp["sha256"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return
    if own != digest(result):
        warn(f"{result}: changed since {stamp.get('stage')} wrote it")
    for name, known in made_of:
        path = os.path.join(os.path.dirname(os.path.realpath(result)), name)
        if os.path.isfile(path) and digest(path) != known:
            warn(f"{result}: {path} has changed since this was made of it; convert it again")
