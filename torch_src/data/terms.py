"""The terms of a text, for BM25 and for the words marked in the report and on the search page.

Every script counts: letters, digits and their accents, after NFKC (full-width forms, half-width kana) and
lower-casing.
"""

import unicodedata
from collections.abc import Iterator

import regex

# Scripts without spaces between words, and Korean, whose particles are written on to the word.
UNSPACED = (
    "".join(
        rf"\p{{Script={name}}}"
        for name in ("Han", "Hiragana", "Katakana", "Hangul", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar")
    )
    + "\u30fc"
)  # the long-vowel mark of kana
# Runs of such characters, and words and numbers of all other scripts. JavaScript reads this pattern, too.
PIECES = regex.compile(rf"[{UNSPACED}]+|(?:(?![{UNSPACED}])[\p{{L}}\p{{N}}\p{{M}}])+")
IS_UNSPACED = regex.compile(rf"[{UNSPACED}]")
CHARACTERS = regex.compile(r".[\p{M}\uff9e\uff9f]*", regex.DOTALL)  # with the marks that NFKC may join to it


def normalized(text: str) -> str:
    """Return the text in NFKC and lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def terms(text: str) -> list[str]:
    """Return the terms of a text in order, with repeats.

    A term is a word, a number, a pair of adjacent characters of a script without spaces, or a single such
    character between other text.
    """
    return terms_and_characters(text)[0]


def terms_and_characters(text: str) -> tuple[list[str], list[str]]:
    """Return the terms, and each character of the scripts without spaces.

    The latter are what a query of one character is compared with.
    """
    found: list[str] = []
    characters: list[str] = []
    for piece in PIECES.findall(normalized(text)):
        if not IS_UNSPACED.match(piece):
            found.append(piece)
            continue
        characters += piece
        found += map(str.__add__, piece, piece[1:]) if len(piece) > 1 else piece
    return found, characters


def is_single(term: str) -> bool:
    """Return whether a term is one character of a script without spaces."""
    return len(term) == 1 and IS_UNSPACED.match(term) is not None


def places(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, term) of each term, and of each single character, by their place in the text."""
    parts, origin = [], []
    for match in CHARACTERS.finditer(text):
        part = normalized(match[0])
        parts.append(part)
        origin += [match.span()] * len(part)
    for piece in PIECES.finditer("".join(parts)):
        first, last = piece.span()
        if not IS_UNSPACED.match(piece[0]):
            yield origin[first][0], origin[last - 1][1], piece[0]
            continue
        for at in range(first, last):
            for end in range(at + 1, min(at + 2, last) + 1):
                yield origin[at][0], origin[end - 1][1], piece[0][at - first : end - first]
