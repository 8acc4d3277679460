"""Streaming reader of one flat JSON object of strings: passage2id.map.json has 8.1 M pairs."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

from torch_src.data.encodings import not_utf8
from torch_src.data.lines import BYTE_ORDER_MARK, FilePath, FormatError, archive_errors, open_file, shown

CHUNK = 1 << 17  # bytes read at a time
LONGEST_PAIR = 1 << 20  # characters; a longer pair is refused
BLANKS = " \t\r\n"
B, STRING = r"[ \t\r\n]*", r'"([^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*)"'
PAIR = re.compile(f"{B}{STRING}{B}:{B}{STRING}{B}[,}}]")
ANY_PAIR = f"{B}{STRING}{B}:{B}{STRING}{B}".replace('"(', '"(?:')  # without groups
PAIRS = re.compile(f"(?:{ANY_PAIR},)*{ANY_PAIR}([,}}])")
START, END = re.compile(f"{B}{{"), re.compile(f"{B}}}")


@dataclass(frozen=True)
class PairChunk:
    """Consecutive (key, value) pairs of the object."""

    pairs: list[tuple[str, str]]
    text: str  # contains them, from `start` on
    start: int
    first_line: int  # line number of the start of `text`

    def line_of(self, index: int) -> int:
        """Return the line number of pair `index`, to name it in an error."""
        match = next(islice(PAIR.finditer(self.text, self.start), index, None))
        return self.first_line + self.text.count("\n", 0, match.start(1))


def read_json_pairs(path: FilePath, chunk: int = CHUNK) -> Iterator[PairChunk]:
    """Yield the pairs of the object in file order, reading `chunk` bytes at a time.

    FormatError unless the file is exactly one object of strings with valid escapes.
    """
    with open_file(path) as file:
        source = _Source(file, path, chunk)
        if (match := source.match(START)) is None:
            raise source.error()
        source.at, mark, first = match.end(), ",", True
        while mark == ",":
            if match := source.match(PAIRS):
                yield source.pairs(match.end())
                source.at, mark, first = match.end(), match[1], False
            elif first and (match := END.match(source.text, source.at)):
                source.at, mark = match.end(), "}"
            else:
                raise source.error()
        while not source.text[source.at :].strip(BLANKS):
            source.at = len(source.text)
            if not source.read_more():
                return
        raise source.error()


class _Source:
    """The text of the file around the current position `at`."""

    def __init__(self, file: BinaryIO, path: FilePath, chunk: int):
        self.file, self.path, self.chunk = file, path, chunk
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.first_line, self.ended = "", 0, 1, False

    def read_more(self) -> bool:
        """Drop the text before `at`, append the next chunk; return False at the end of the file."""
        self.first_line = self.line_at(self.at)
        rest = self.text[self.at :]
        with archive_errors(self.path):
            raw = self.file.read(max(self.chunk, len(rest)))
        try:
            self.text, self.at = rest + self.decoder.decode(raw, final=not raw), 0
        except UnicodeDecodeError as error:
            lines = rest.count("\n") + error.object[: error.start].count(b"\n")
            raise FormatError(self.path, self.first_line + lines, not_utf8(raw, self.path)) from None
        self.ended = not raw
        return not self.ended

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Return the match at the current position, reading more as needed; None when there is none."""
        while (match := pattern.match(self.text, self.at)) is None:
            if len(self.text) - self.at > LONGEST_PAIR or not self.read_more():
                return None
        return match

    def pairs(self, end: int) -> PairChunk:
        """Return the pairs from the current position to `end`."""
        chunk = PairChunk(PAIR.findall(self.text, self.at, end), self.text, self.at, self.first_line)
        if self.text.find("\\", self.at, end) >= 0:
            for index, (key, value) in enumerate(chunk.pairs):
                try:
                    chunk.pairs[index] = (_unescape(key), _unescape(value))
                except ValueError:
                    message = f"invalid escape in the pair {shown(key)}: {shown(value)}"
                    raise FormatError(self.path, chunk.line_of(index), message) from None
        return chunk

    def line_at(self, position: int) -> int:
        return self.first_line + self.text.count("\n", 0, position)

    def error(self) -> FormatError:
        rest = self.text[self.at :].lstrip(BLANKS)
        line = self.line_at(len(self.text) - len(rest))
        found = f"{shown(rest[:60])} found" if rest else "the file ends here"
        if rest.startswith("\ufeff"):
            return FormatError(self.path, line, BYTE_ORDER_MARK)
        cut = self.ended and not rest.rstrip(BLANKS).endswith(("}", "]"))
        hint = "; is the file truncated?" if cut else ""
        return FormatError(self.path, line, f"not one JSON object of strings: {found}{hint}")


def _unescape(text: str) -> str:
    """Return a JSON string's content; ValueError for an invalid escape or a lone surrogate."""
    if "\\" in text:
        text = json.loads(f'"{text}"')
        text.encode()
    return text
