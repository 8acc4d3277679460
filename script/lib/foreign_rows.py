"""Files with one query and its passages per row.

FlagEmbedding, Tevatron and the hub mirrors, DPR, DuReader, sentence-transformers, and your own.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from script.lib.foreign_datasets import (
    DEV_SPLITS,
    PIDS,
    QIDS,
    QUERIES,
    TEXTS,
    TITLES,
    TRAIN,
    Conversion,
    choose_split,
    data_files,
    only,
    text_id,
)
from script.lib.foreign_files import first_of, id_of, is_json, text_of, uncounted
from script.lib.official_layout import Passage, Query, joined
from torch_src.data.formats import EMPTY_TITLES
from torch_src.data.lines import FormatError, finite_number, shown
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log

SPLIT_END = re.compile(rf"(?:^|.*[-_.])({'|'.join((TRAIN, *DEV_SPLITS))})")
# field of the positives -> fields of the negatives; the first with entries is used
ROWS = {
    "positive_passages": ("negative_passages",),  # Tevatron and the hub mirrors: {docid, title, text}
    "positive_document_ids": ("negative_document_ids",),  # Tevatron 2
    "positive_ctxs": ("hard_negative_ctxs", "negative_ctxs"),  # DPR: {passage_id, title, text}
    "answer_paragraphs": (),  # DuReader: {paragraph_id, paragraph_text}
    "pos": ("neg",),  # FlagEmbedding: texts
    "positives": ("negatives",),  # your own: ids; texts without a corpus
    "positive": ("negative",),  # sentence-transformers: a text
}
NO_ID = "without an id: a checksum of their text is the id"
SCORES = {"pos": "pos_scores", "neg": "neg_scores"}
ROW_FIELDS = {
    *QIDS,
    *QUERIES,
    *ROWS,
    *(name for names in ROWS.values() for name in names),
    *SCORES.values(),
    "split",
}


class Reference(NamedTuple):
    """A passage as a row names it: by id, by text, or both."""

    pid: str
    title: str
    text: str | None  # None: only an id
    logit: float | None  # the teacher's score


class Row(NamedTuple):
    """One query of a file of rows."""

    qid: str
    text: str
    split: str  # empty: that of the file
    positives: list[Reference]
    negatives: list[Reference]


def row_files(path: Path, conversion: Conversion) -> list[tuple[Path, str]]:
    """Return (file, train or dev) of a folder of rows, or of one file of rows."""
    if path.is_file():
        return [(path, "dev" if conversion.split else TRAIN)]
    exact, found = dict[str, list[Path]](), dict[str, list[Path]]()
    for stem, paths in data_files(path).items():
        match, rows = SPLIT_END.fullmatch(stem), [*filter(is_json, paths)]
        if match and rows:
            (exact if stem == match[1] else found).setdefault(match[1], []).extend(rows)
    found |= exact  # train.jsonl before other-train.jsonl
    splits = {name: only(paths, "name the file itself") for name, paths in found.items()}
    chosen = choose_split(splits, conversion, path)
    if not chosen:
        raise UserError(f"{path}: no file train or dev in this folder; name the file itself")
    return chosen


def row_passages(conversion: Conversion) -> Iterator[Passage]:
    """Yield each passage of the rows once; FormatError when one id has two texts.

    Counts nothing: the rows are read again for their queries.
    """
    seen: dict[str, tuple[int, Path, int]] = {}
    quiet = replace(conversion, source=uncounted(conversion.source))
    for path, line, row in read_rows(quiet, silent=True):
        for reference in (*row.positives, *row.negatives):
            pid, title, text, _ = reference
            if text is None:
                raise FormatError(path, line, f"passage {pid} has no text; name the corpus with --corpus")
            hashed = xxhash.xxh3_64_intdigest(f"{title}\n{text}".encode())
            key = pid or text_id(title, text)
            known = seen.get(key)
            if known is None:
                seen[key] = hashed, path, line
                yield Passage(key, title, text, path, line)
            elif known[0] != hashed:
                raise FormatError(path, line, f"passage {key} has another text than in {known[1]}:{known[2]}")


def read_rows(conversion: Conversion, silent: bool = False) -> Iterator[tuple[Path, int, Row]]:
    """Yield (file, line, row) of the files of rows, without the splits that are not converted."""
    for path, target in conversion.files:
        unread = set[str]()
        for line, entry in conversion.source.entries(path):
            unread |= entry.keys() - ROW_FIELDS
            row = parse_row(entry, path, line, conversion)
            split = conversion.target(row.split, path, line) if row.split else target
            if split:
                yield path, line, row._replace(split=split)
        if unread and not silent:
            log(f"{path}: fields not read: {', '.join(sorted(unread))}")


def parse_row(entry: dict[str, Any], path: Path, line: int, conversion: Conversion) -> Row:
    """Return a row of any known layout."""
    name = next((name for name in ROWS if name in entry), None)
    if name is None:
        found = shown(", ".join(entry))
        raise FormatError(path, line, f"expected one of the fields {', '.join(ROWS)}, found {found}")
    value = first_of(entry, QUERIES)
    if value is None:
        raise FormatError(path, line, f"expected one of the fields {', '.join(QUERIES)}")
    query = text_of(value, path, line, "query")
    used = [negative for negative in ROWS[name] if entry.get(negative)]
    for negative in used[1:]:
        conversion.count(f"rows with {negative} beside {used[0]}: not read", path, line)
    lists = [references(entry, name, path, line, conversion)]
    lists += [references(entry, negative, path, line, conversion) for negative in used[:1]]
    qid = first_of(entry, QIDS)
    counts = conversion.source.counts
    counts.add(f"queries {NO_ID}", path, line, qid is None)
    known = text_id("", query) if qid is None else id_of(qid, path, line, counts, "query id")
    split = entry.get("split") or ""
    if not isinstance(split, str):
        raise FormatError(path, line, f"split {shown(repr(split))} (expected train or dev)")
    return Row(known, query, split, lists[0], lists[1] if used else [])


def references(
    entry: dict[str, Any], name: str, path: Path, line: int, conversion: Conversion
) -> list[Reference]:
    """Return the passages in one field of a row: a list, or a single one."""
    value = entry[name]
    items = value if isinstance(value, list) else [] if value is None else [value]
    scores = entry.get(SCORES[name]) if name in SCORES else None
    if scores is None:
        scores = [None] * len(items)
    if not isinstance(scores, list) or len(scores) != len(items):
        raise FormatError(path, line, f"{SCORES[name]}: expected {len(items)} scores, one for each {name}")
    are_ids = name.endswith("_ids") or (name in ("positives", "negatives") and conversion.has_corpus)
    found = []
    for item, score in zip(items, scores, strict=True):
        if score is not None and finite_number(str(score)) is None:
            raise FormatError(path, line, f"{SCORES[name]} has {shown(repr(score))} (expected a number)")
        reference = reference_of(item, are_ids, path, line, conversion, name)
        if reference.pid or (reference.text or reference.title).strip():
            found.append(reference._replace(logit=None if score is None else float(score)))
        else:
            conversion.count("empty passages in rows: dropped", path, line)
    return found


def reference_of(
    item: Any, is_id: bool, path: Path, line: int, conversion: Conversion, name: str
) -> Reference:
    """Return a passage given as an id, a text, or an object with id, title and text."""
    counts = conversion.source.counts
    if isinstance(item, dict):
        pid = first_of(item, PIDS)
        title = text_of(first_of(item, TITLES), path, line, "title")
        has_text = not item.keys().isdisjoint(TEXTS)
        text = text_of(first_of(item, TEXTS), path, line, "text") if has_text else None
        known = "" if pid is None else id_of(pid, path, line, counts, "passage id")
        if not known and not has_text:
            raise FormatError(path, line, f"a passage in {name} has neither an id nor a text")
        counts.add(f"passages {NO_ID}", path, line, not known)
        return Reference(known, "" if title.strip() in EMPTY_TITLES else title, text, None)
    if is_id:
        return Reference(id_of(item, path, line, counts, "passage id"), "", None, None)
    if not isinstance(item, str):
        raise FormatError(path, line, f"a passage in {name} is {shown(repr(item))} (expected a text)")
    return Reference("", "", item, None)


def row_queries(conversion: Conversion) -> Iterator[Query]:
    """Yield the queries of the rows; their passages are looked up by id, or else by text."""
    for path, line, row in read_rows(conversion):
        query = Query(row.qid, row.text, row.split, path, line)
        for side, passages in ((True, row.positives), (False, row.negatives)):
            for reference in passages:
                pid = known_pid(reference, conversion, path, line)
                conversion.judge(query, pid, int(side), path, line)
                if reference.logit is not None:
                    query.logits.setdefault(pid, reference.logit)
        yield query


def known_pid(reference: Reference, conversion: Conversion, path: Path, line: int) -> str:
    """Return the id of a passage of a row; count texts that are not those of the corpus."""
    layout, (pid, title, text, _) = conversion.layout, reference
    if text is None:
        return pid
    if not pid:
        key = text_id(title, text)
        return key if key in layout.rows else layout.pid_of_text(joined(title, text)) or shown(text)
    if conversion.has_corpus and pid in layout.rows:
        same = layout.has_text(pid, joined(title, text)) or layout.has_text(pid, joined("", text))
        what = "passages with another text than in the corpus: that of the corpus is used"
        conversion.count(what, path, line, not same)
    return pid
