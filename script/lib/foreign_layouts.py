"""Which layout a file or folder has, and which columns of a table are id, title and text."""

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

from script.lib.foreign_datasets import PASSAGE, TEXTS, TITLES, data_files, find_corpus
from script.lib.foreign_files import (
    Source,
    column_values,
    is_json,
    looks_like_header,
    plain_column,
    plain_name,
    uncounted,
)
from script.lib.foreign_judgments import qrels_files
from script.lib.foreign_rows import ROWS
from script.lib.trec_files import is_own_run
from torch_src.data.kinds import RUN
from torch_src.data.lines import FormatError, shown
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log

OFFICIAL, PASSAGES, TEXT = "official", "passages", "text"
PLAIN = (".txt", ".md", ".text")
SAMPLE = 200  # rows or lines that decide
SHORT_NAME = 20  # characters: a longer cell is not the name of a column
# a line of part-0X or cross.train.tsv, of dual.train.tsv, of dev.q.format
OFFICIAL_ROW = re.compile(
    r"[^\t]+\t(null|-)?\t[^\t]+\t[01]|[^\t]+\t(null|-)?\t[^\t]+\t(null|-)?\t[^\t]+\t[0-9.]+|[^\t]+\t-\t-\t0"
)
# further names of columns in a user's own tables; questions with answers are passages, too
GUESSED = replace(
    PASSAGE,
    names={
        "id": (*PASSAGE.names["id"], "no", "num", "序号", "条目编号", "ID号"),
        "title": (*TITLES, "name", "subject", "headline", "question", "名称", "题目", "主题", "问题", "提问"),
        "text": (*TEXTS, "answer", "article", "段落", "文章", "摘要", "描述", "答案", "答复", "回答"),
    },
    required=("text",),
)  # fmt: skip


def recognize(path: Path, source: Source) -> tuple[str, Path]:
    """Return (official, passages, text, or a kind of convert_dataset.py; the file or folder to convert).

    UserError for an unknown layout.
    """
    source = uncounted(source)
    if path.is_dir():
        return _folder(path, source)
    if plain_name(path).endswith(PLAIN) and not _is_table(path, source):
        return TEXT, path
    if is_json(path):
        _, entry = next(source.entries(path), (0, {}))
        rows = any(name in entry for name in ROWS)
        return ("flagembedding" if rows else PASSAGES), path
    first = next(source.lines(path), (0, ""))[1]
    if OFFICIAL_ROW.fullmatch(first):
        raise UserError(f"{path}: rows of the official layout; name the folder around passage-collection")
    if is_own_run(path):
        raise UserError(f"{path}: {RUN} (expected passages)")
    return PASSAGES, path


def _folder(path: Path, source: Source) -> tuple[str, Path]:
    if (path / "passage-collection").is_dir():
        return OFFICIAL, path
    if (path / "passage2id.map.json").exists():
        return OFFICIAL, path.parent
    files = [file for found in data_files(path).values() for file in found]
    rows = [file for file in files if is_json(file) and _has_rows(file, source)]
    if (corpus := find_corpus(path)) is not None:
        if rows:
            return "hub", path
        splits = qrels_files(path)
        graded = any(file.name.startswith("qrels.retrieval") for file in splits.values())
        return ("t2ranking" if graded else "beir") if splits else PASSAGES, path if splits else corpus
    if rows:
        return "flagembedding", path
    files += [file for file in sorted(path.iterdir()) if plain_name(file).endswith(".md")]
    if len(files) == 1:
        return recognize(files[0], source)
    if files and all(plain_name(file).endswith(PLAIN) for file in files):
        return TEXT, path
    found = ", ".join(file.name for file in files[:5]) or "no data files"
    expected = "passage-collection/, a corpus, rows in train.jsonl, or only .txt files"
    raise UserError(f"{path}: no known layout (found {found}; expected {expected}); name one file")


def plain_files(path: Path) -> list[Path]:
    """Return the text files of a folder, or the file itself."""
    if path.is_file():
        return [path]
    return [file for file in sorted(path.iterdir()) if plain_name(file).endswith(PLAIN)]


def _has_rows(path: Path, source: Source) -> bool:
    _, entry = next(source.entries(path), (0, {}))
    return any(name in entry for name in ROWS)


def _is_table(path: Path, source: Source) -> bool:
    """Return whether all lines have the same number of TABs, at least one."""
    lines = [text for _, text in islice(source.lines(path), SAMPLE) if text.strip()]
    return bool(lines) and len({text.count("\t") for text in lines}) == 1 and "\t" in lines[0]


def guess_columns(path: Path, source: Source) -> Source:
    """Return the source with the columns of a table of passages, and log them.

    By the names of its header; where they are unknown, the text is the column with the longest cells, and an
    id the first one if its cells are short and distinct.
    """
    if is_json(path) or source.columns or source.names:
        return source
    rows = [row for _, row in islice(uncounted(source).rows(path, GUESSED), SAMPLE)]
    if not rows:
        return source  # blank lines only
    head, body = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
    values = column_values(head, GUESSED)
    if "text" not in values and not _is_header(head, body):
        return _guess_order(path, source, rows)
    names = {value: head[at] for value in PASSAGE.names if (at := _place(value, head)) is not None}
    if "id" in names and not _distinct(body, head.index(names["id"])):
        del names["id"]  # of a document with several passages, for example
    if "text" not in names:
        unknown = [at for at, value in enumerate(values) if not value]
        if not unknown:
            raise FormatError(path, 1, f"header {shown(' | '.join(head))}: no column of text; pass --columns")
        names["text"] = head[max(unknown, key=lambda at: _mean_length(body, at))]
    chosen = ",".join(f"{value}={names[value]}" for value in ("id", "title", "text") if value in names)
    log(f"{path}: columns read as {chosen} (to choose others: --columns text=NAME,title=NAME,id=NAME)")
    return replace(source, names=names)


def _place(value: str, head: list[str]) -> int | None:
    """Return the column of a value, by the most usual of its names; None without one."""
    plain = [plain_column(name) for name in head]
    return next(
        (plain.index(name) for name in map(plain_column, GUESSED.names[value]) if name in plain), None
    )


def _distinct(rows: list[list[str]], at: int) -> bool:
    """Return whether the cells of a column are distinct and not empty."""
    cells = [row[at].strip() for row in rows]
    return all(cells) and len(set(cells)) == len(cells)


def _is_header(head: list[str], body: list[list[str]]) -> bool:
    """Return whether the first row names columns: short distinct cells, none a number, above longer texts."""
    if looks_like_header(head, GUESSED):
        return True
    short = all(0 < len(name.strip()) <= SHORT_NAME and not name.strip().isdigit() for name in head)
    longer = any(_mean_length(body, at) > 4 * len(name) for at, name in enumerate(head))
    return short and len(set(head)) == len(head) > 1 and longer


def _guess_order(path: Path, source: Source, rows: list[list[str]]) -> Source:
    """Return the source with the order of a table without header."""
    width = len(rows[0])
    same = [row for row in rows if len(row) == width]
    text = max(range(width), key=lambda at: _mean_length(same, at))
    has_id = text > 0 and _distinct(same, 0) and max(len(row[0]) for row in same) <= 2 * SHORT_NAME
    order = ["id" if has_id and at == 0 else "text" if at == text else "" for at in range(width)]
    if order.count("") == 1:
        order[order.index("")] = "title"
    chosen = ",".join(name or "-" for name in order)
    what = f"no header line, columns read as {chosen}: {shown(' | '.join(rows[0]))}"
    log(f"{path}: {what} (to choose others: --columns {chosen} in another order)")
    return replace(source, columns=tuple(order))


def _mean_length(rows: list[list[str]], at: int) -> float:
    return sum(len(row[at]) for row in rows) / max(1, len(rows))
