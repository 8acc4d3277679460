"""The terms of a text, for BM25 and for the words marked in the report and on the search page."""

import re

# Latin words and numbers, and runs of Chinese characters.
PIECES = re.compile(r"[a-z0-9]+|[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")


def terms(text: str) -> list[str]:
    """Return the terms of a text in order, with repeats.

    A term is a Latin word, a number, a pair of adjacent Chinese characters, or a single Chinese character
    between other text.
    """
    found = []
    for piece in PIECES.findall(text.lower()):
        if piece[0].isascii() or len(piece) == 1:
            found.append(piece)
        else:
            found += [piece[at : at + 2] for at in range(len(piece) - 1)]
    return found
