"""Files of other tools as records: JSON lines, a JSON array, TSV or CSV; gzipped or not.

What the readers of the official files refuse is accepted here and counted or logged: a byte order mark,
`\\r\\n`, blank lines, CSV quotes, further columns, GB18030 and UTF-16.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch_src.data.encodings import UTF16, is_gb18030
from torch_src.data.formats import EMPTY_TITLES
from torch_src.data.lines import (
    LONGEST_LINE,
    FormatError,
    archive_errors,
    decode,
    open_file,
    parse_json,
    raw_lines,
    shown,
)
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log

BOM = b"\xef\xbb\xbf"
READ_SIZE = 1 << 16  # characters of a JSON array read at a time
QUOTED, DOUBLED = re.compile(r'"([^"]|"")*"'), '""'
NO_TITLES = (*EMPTY_TITLES, "None", "nan", "NaN")  # of tables written by pandas
PANDAS = "write it as JSON lines, with pandas: to_json(path, orient='records', lines=True)"
OFFICE = "save it as CSV or as text"
UNREADABLE = {
    b"PAR1": ("a Parquet file", PANDAS),
    b"ARRO": ("an Arrow file", PANDAS),
    b"PK\x03\x04": ("an Excel or Word file, or a zip archive", f"{OFFICE}; unpack an archive"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", OFFICE),
    b"%PDF": ("a PDF file", "save it as text"),
}


class Counts:
    """What a conversion drops, merges or changes: how often, and where first."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, path: Path, line: int, count: int = 1) -> None:
        if count:
            known, first = self.found.get(what, (0, f"{path}:{line}"))
            self.found[what] = known + count, first

    def log(self) -> None:
        for what, (count, first) in self.found.items():
            log(f"{count:,} {what} (first: {first})")


@dataclass(frozen=True)
class Fields:
    """The values of one kind of record, and how files name them."""

    names: dict[str, tuple[str, ...]]  # value -> names of its column or JSON field, the most usual first
    required: tuple[str, ...]
    orders: dict[int, tuple[str, ...]]  # number of columns -> their values in a table without header
    blanks: bool = False  # blanks separate columns where there is no TAB
    header: bool = False  # whether a table surely has a header


@dataclass
class Source:
    """How files are read: the options of a conversion, and its counts."""

    columns: tuple[str, ...] = ()  # of a passage table without header; empty: the usual ones
    usual: tuple[str, ...] = ()  # three columns, if the usual ones are not id, title, text
    names: dict[str, str] = field(default_factory=dict)  # value -> column or field of a passage, by option
    quotes: str = ""  # csv, none, or empty: decided by the file
    encoding: str = ""  # empty: decided by the file
    counts: Counts = field(default_factory=Counts)
    opened: set[Path] = field(default_factory=set)

    def open(self, path: Path) -> BinaryIO:
        """Return the open file as UTF-8, whatever its encoding; UserError for a file that is not text."""
        with open_file(path) as file, archive_errors(path):
            head = file.read(READ_SIZE)
        _require_text(head, path)
        encoding = self.encoding or encoding_of(head, path)
        if encoding != "utf-8" and path not in self.opened:
            log(f"{path}: read as {encoding.upper()} (--encoding names another)")
        self.opened.add(path)
        file = open_file(path)
        if encoding == "utf-8":
            return file
        return cast(BinaryIO, io.BufferedReader(_AsUtf8(file, encoding, path)))

    def lines(self, path: Path) -> Iterator[tuple[int, str]]:
        """Yield (line, text without byte order mark and line end)."""
        with self.open(path) as file:
            for line, raw in raw_lines(file, path):
                if line == 1:
                    raw = raw.removeprefix(BOM)
                if not raw.endswith(b"\n") and not is_json(path):
                    self.counts.add("tables end without a line break: is the last line complete?", path, line)
                text = decode(raw, path, line)
                if text.endswith("\r"):
                    text = text[:-1]
                    if not is_csv(path):  # whose lines end so by its standard
                        self.counts.add(r"lines ended in \r\n: read as \n", path, line)
                yield line, text

    def entries(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line, object) of JSON lines or of one JSON array."""
        with self.open(path) as file, archive_errors(path):
            head = file.read(READ_SIZE)
        is_array = head.removeprefix(BOM).lstrip()[:1] == b"["
        found = _array(self.open(path), path) if is_array else self._json_lines(path)
        for line, value in found:
            if not isinstance(value, dict):
                raise FormatError(path, line, f"expected a JSON object, found {type(value).__name__}")
            yield line, value

    def _json_lines(self, path: Path) -> Iterator[tuple[int, Any]]:
        for line, text in self.lines(path):
            if text.strip():
                yield line, parse_json(text, path, line, unique_fields)
            else:
                self.counts.add("blank lines: skipped", path, line)

    def records(
        self, path: Path, fields: Fields, columns: tuple[str, ...] = ()
    ) -> Iterator[tuple[int, dict]]:
        """Yield (line, {value: content}) of JSON or of a table; `columns`: order without a header."""
        if is_json(path):
            return self._json_records(path, fields)
        return self._table_records(path, fields, columns)

    def _json_records(self, path: Path, fields: Fields) -> Iterator[tuple[int, dict]]:
        known, unread = {name for names in fields.names.values() for name in names}, set[str]()
        for line, entry in self.entries(path):
            unread |= entry.keys() - known
            record = {
                value: first_of(entry, names)
                for value, names in fields.names.items()
                if not entry.keys().isdisjoint(names)
            }
            for value in fields.required:
                if value not in record:
                    names, present = ", ".join(fields.names[value][:6]), shown(", ".join(entry))
                    what = f"expected one of the fields {names}, found {present}"
                    raise FormatError(path, line, f"{what}; --columns {value}=FIELD names another")
            yield line, record
        if unread:
            log(f"{path}: fields not read: {', '.join(sorted(unread))}")

    def _table_records(
        self, path: Path, fields: Fields, columns: tuple[str, ...]
    ) -> Iterator[tuple[int, dict]]:
        order, longer_titles, rows = columns, 0, 0
        guessed = False
        for number, (line, row) in enumerate(self.rows(path, fields)):
            if not number and (fields.header or looks_like_header(row, fields)):
                order = header_order(row, fields, path, line)
                if columns and columns != order:
                    raise FormatError(path, line, f"header {shown(' | '.join(row))} contradicts --columns")
                continue
            if not order:
                order = self._usual_order(row, fields, path, line)
                guessed = order == ("id", "title", "text")
            if len(row) != len(order):
                names = ", ".join(name or "-" for name in order)
                raise FormatError(path, line, f"{len(row)} columns (expected {len(order)}: {names})")
            record = dict(zip(order, row, strict=True))
            record.pop("", None)
            rows += 1
            longer_titles += guessed and len(record["title"]) > len(record["text"])
            yield line, record
        if longer_titles * 2 > rows:
            what = f"the second of three columns is the longer one in {longer_titles:,} of {rows:,} rows"
            fix = "pass --columns id,text,title, or to keep the order --columns id,title,text"
            raise UserError(f"{path}: {what} (expected id, title, text without a header); {fix}")

    def _usual_order(self, row: list[str], fields: Fields, path: Path, line: int) -> tuple[str, ...]:
        order = self.usual if len(self.usual) == len(row) else fields.orders.get(len(row))
        if order is None:
            known = " or ".join(", ".join(name or "-" for name in names) for names in fields.orders.values())
            raise FormatError(path, line, f"{len(row)} columns without a known header (expected {known})")
        names = ", ".join(name or "-" for name in order)
        log(f"{path}: no header line, columns read as {names}: {shown(' | '.join(row))}")
        return order

    def rows(self, path: Path, fields: Fields) -> Iterator[tuple[int, list[str]]]:
        """Yield (line, columns) of a table, without blank lines and CSV quotes."""
        comma = is_csv(path)
        lines = self.lines(path)
        first = next(lines, None)
        if first is None:
            raise UserError(f"{path}: is empty")
        quoted = self.quotes == "csv" or (not self.quotes and (comma or _uses_quotes(first[1])))
        chained = chain([first], lines)
        if quoted or comma:
            yield from self._csv_rows(path, chained, "," if comma else "\t", quoted)
            return
        for line, text in chained:
            if not text.strip():
                self.counts.add("blank lines: skipped", path, line)
                continue
            row = text.split("\t") if "\t" in text or not fields.blanks else text.split()
            if not self.quotes and '"' in text:
                self._check_quotes(row, path, line)
            yield line, row

    def _csv_rows(
        self, path: Path, lines: Iterator[tuple[int, str]], delimiter: str, quoted: bool
    ) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows of a CSV dialect; a quoted field may go over several lines."""
        begin = last = 0
        taken: list[str] = []

        def source() -> Iterator[str]:
            nonlocal last
            for line, text in lines:
                last = line
                taken.append(text)
                yield text + "\n"

        rows = source()
        reader = csv.reader(rows, delimiter=delimiter, strict=True)
        if not quoted:
            reader = csv.reader(rows, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        limit = csv.field_size_limit(LONGEST_LINE)
        try:
            for row in reader:
                begin, raw = last - len(taken) + 1, "\n".join(taken)
                taken.clear()
                if not raw.strip():
                    self.counts.add("blank lines: skipped", path, begin)
                    continue
                if quoted and '"' in raw and not is_csv(path):
                    self.counts.add("rows had CSV quotes: removed (--quotes none keeps them)", path, begin)
                yield begin, row
        except csv.Error as error:
            line = last - len(taken) + 1
            fix = "is a quotation mark part of a text? pass --quotes none"
            raise FormatError(path, line, f"not CSV ({error}); {fix}") from None
        finally:
            csv.field_size_limit(limit)

    def _check_quotes(self, row: list[str], path: Path, line: int) -> None:
        for column in row:
            if len(column) > 1 and column[0] == '"' == column[-1] and QUOTED.fullmatch(column):
                if DOUBLED in column[1:-1]:
                    message = f"{shown(column)} looks like a field in CSV quotes; pass --quotes csv to remove"
                    raise FormatError(path, line, f"{message} them, or --quotes none to keep them")
                self.counts.add("texts in quotation marks: kept (--quotes csv removes them)", path, line)


def uncounted(source: Source) -> Source:
    """Return a source for looking into files, which are counted when they are read."""
    return replace(source, counts=Counts())


def plain_name(path: Path) -> str:
    """Return the lower-case name without .gz."""
    return path.name.lower().removesuffix(".gz")


def is_csv(path: Path) -> bool:
    """Return whether the name is one of CSV, where quotes and `\\r\\n` are nothing to report."""
    return plain_name(path).endswith(".csv")


def is_json(path: Path) -> bool:
    """Return whether the file holds JSON, by its name, or else by its first character."""
    name = plain_name(path)
    if name.endswith((".json", ".jsonl")):
        return True
    if name.endswith((".tsv", ".csv", ".txt")):
        return False
    with open_file(path) as file, archive_errors(path):
        return file.read(READ_SIZE).removeprefix(BOM).lstrip()[:1] in (b"{", b"[")


def _require_text(head: bytes, path: Path) -> None:
    for magic, (what, fix) in UNREADABLE.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {what} (expected JSON lines, TSV or CSV); {fix}")


def encoding_of(head: bytes, path: Path) -> str:
    """Return the encoding of a file by its first bytes: utf-8, gb18030 or utf-16; FormatError for others.

    Almost any bytes decode as GB18030, so it is accepted only where the result reads like Chinese.
    """
    if head.startswith(UTF16):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return "utf-8"
    except UnicodeDecodeError as error:
        line = head.count(b"\n", 0, error.start) + 1
    if is_gb18030(head):
        return "gb18030"
    fix = "pass --encoding NAME (such as big5), or convert the file to UTF-8"
    raise FormatError(path, line, f"neither UTF-8 nor Chinese text in GB18030; {fix}")


class _AsUtf8(io.RawIOBase):
    """A text file of another encoding, read as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str, path: Path):
        self.file, self.encoding, self.path = file, encoding, path
        self.decoder, self.ready, self.line = codecs.getincrementaldecoder(encoding)(), b"", 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            raw = self.file.read(READ_SIZE)
            try:
                text = self.decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line = self.line + error.object[: error.start].count(b"\n")
                fix = "pass --encoding NAME, or convert the file to UTF-8"
                raise FormatError(self.path, line, f"not {self.encoding.upper()}; {fix}") from None
            if not raw and not text:
                return 0
            self.line += text.count("\n")
            self.ready = text.encode()
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def _array(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, element) of one JSON array, read a chunk at a time."""
    decoder, text_of = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    with file, archive_errors(path):
        text, line, begun = "", 1, False
        while True:
            raw = file.read(max(READ_SIZE, len(text)))
            try:
                text += text_of.decode(raw, final=not raw)
            except UnicodeDecodeError:
                raise FormatError(path, line, "not UTF-8") from None
            while True:
                rest = text.lstrip("\ufeff \t\r\n")
                line, text = line + text[: len(text) - len(rest)].count("\n"), rest
                mark = text[:1]
                if begun and mark == "]" and not text[1:].strip() and not raw:
                    return
                if mark and mark == ("," if begun else "["):
                    begun, text = True, text[1:]
                    continue
                try:
                    value, end = decoder.raw_decode(text)
                    if not text[end:].strip() and raw:
                        break  # a number may go on
                except json.JSONDecodeError as error:
                    if raw and len(text) <= LONGEST_LINE:
                        break
                    raise FormatError(path, line + error.lineno - 1, f"not JSON ({error.msg})") from None
                except (ValueError, RecursionError) as error:
                    raise FormatError(path, line, f"JSON that cannot be read ({error})") from None
                yield line, parse_json(text[:end], path, line, unique_fields)
                line, text = line + text.count("\n", 0, end), text[end:]


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; ValueError for a duplicate field, of which json alone keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate field {next(name for name in names if names.count(name) > 1)!r}")
    return found


def first_of(entry: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first value of these names that is not null or NaN; None without one."""
    for name in names:
        value = entry.get(name)
        if value is not None and value == value:
            return value
    return None


def column_values(row: list[str], fields: Fields) -> tuple[str, ...]:
    """Return the value that each column name means; empty for an unknown name."""
    value_of = {plain_column(name): value for value, names in fields.names.items() for name in names}
    return tuple(value_of.get(plain_column(name), "") for name in row)


def plain_column(name: str) -> str:
    """Return a column name in lower case, without quotes, with one kind of separator."""
    return name.strip().strip('"').lower().replace(" ", "_").replace("-", "_")


def looks_like_header(row: list[str], fields: Fields) -> bool:
    """Return whether the first row names columns: the first of them, or two."""
    values = column_values(row, fields)
    return bool(values[0]) or len(set(values) - {""}) > 1


def header_order(row: list[str], fields: Fields, path: Path, line: int) -> tuple[str, ...]:
    """Return the values of the columns of a header line, empty for columns that are not read."""
    order = column_values(row, fields)
    names = [value for value in order if value]
    if len(names) > len(set(names)) or not set(names) >= set(fields.required):
        expected = "; ".join(f"{value}: {'/'.join(fields.names[value])}" for value in fields.required)
        raise FormatError(path, line, f"header {shown(' | '.join(row))} (expected one each of {expected})")
    unread = [name for name, value in zip(row, order, strict=True) if not value and name != "-"]
    if unread:
        log(f"{path}: columns not read: {', '.join(unread)}")
    return order


def id_of(value: Any, path: Path, line: int, counts: Counts, what: str = "id") -> str:
    """Return an id as text; FormatError unless it is a string or an integer without TAB or line end."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        counts.add("ids were numbers such as 7.0: read as 7", path, line)
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise FormatError(path, line, f"the {what} is {shown(repr(value))} (expected a string or an integer)")
    text = str(value)
    if not text.strip() or {"\t", "\n", "\r", "\0"} & set(text):
        raise FormatError(path, line, f"the {what} {text!r} is empty, or has a TAB, line end or NUL")
    return text


def text_of(value: Any, path: Path, line: int, what: str) -> str:
    """Return a text; null is an empty one, and FormatError for anything but a string or a number."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FormatError(path, line, f"the {what} is {shown(repr(value))} (expected a string)")
    return str(value)


def _uses_quotes(first: str) -> bool:
    """Return whether the first line shows CSV quotes: quoted names, or the header of DPR, which uses them."""
    names = first.split("\t")
    return names == ["id", "text", "title"] or (len(names) > 1 and all(map(QUOTED.fullmatch, names)))
