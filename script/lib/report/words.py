"""Texts of the report in two languages. The page contains both, and its style sheet shows one of them."""

import html
from dataclasses import dataclass


@dataclass(frozen=True)
class Both:
    """A text in English and in Chinese."""

    en: str
    zh: str

    def __add__(self, other: "Both") -> "Both":
        return Both(self.en + other.en, self.zh + other.zh)


class Html(str):
    """A text that is HTML already."""


def same(word: object) -> Both:
    """Return a text that is alike in both languages: a name, a number, a message of a program."""
    return Both(str(word), str(word))


def escaped(value: object) -> str:
    """Return a value as HTML text; an unpaired surrogate becomes ?."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def text(value: object) -> str:
    """Return a value as HTML: Both as two spans, of which one is visible."""
    if isinstance(value, Html):
        return value
    if not isinstance(value, Both) or value.en == value.zh:
        return escaped(value.en if isinstance(value, Both) else value)
    return f'<span class="en">{escaped(value.en)}</span><span class="zh">{escaped(value.zh)}</span>'
