"""Layouts of other data sets: passages, judgments and rows of queries, as Passage and Query.

A folder of corpus, queries and qrels (BEIR, MTEB, T2Ranking, MS MARCO), or files with one query and its
passages per row (FlagEmbedding, Tevatron, DPR, DuReader, sentence-transformers, your own).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from script.lib.foreign_files import (
    NO_TITLES,
    Counts,
    Fields,
    Source,
    first_of,
    id_of,
    is_json,
    plain_name,
    text_of,
)
from script.lib.official_layout import OfficialLayoutWriter, Passage, Query, joined
from torch_src.data.formats import EMPTY_TITLES
from torch_src.data.lines import FormatError, archive_errors, finite_number, open_file, shown
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log, warn

TRAIN, DEV_SPLITS = (
    "train",
    ("dev", "validation", "valid", "val", "test"),
)  # the first that exists is the dev set
SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".txt", ".qrels")
CORPORA = ("corpus", "collection", "passage_collection", "passages", "psgs_w100")
SPLIT_END = re.compile(rf"(?:^|.*[-_.])({'|'.join((TRAIN, *DEV_SPLITS))})")
QRELS = re.compile(r"qrels[-_.](?P<retrieval>retrieval[-_.])?(?P<after>[\w-]+)|(?P<before>[\w-]+)[-_.]qrels")

PIDS = ("_id", "id", "docid", "doc_id", "document_id", "pid", "psg_id", "passage_id", "paragraph_id", "docno")
TITLES = ("title", "paragraph_title")
TEXTS = ("text", "contents", "content", "passage", "passage_text", "paragraph_text", "document_text", "body")
QIDS = ("query_id", "question_id", "qid", "_id", "id", "query-id")
QUERIES = ("query", "question", "text", "query_text", "anchor", "contents")
PASSAGE = Fields(
    {"id": PIDS, "title": TITLES, "text": TEXTS},
    ("id", "text"),
    {2: ("id", "text"), 3: ("id", "title", "text")},
)
QUERY = Fields({"id": QIDS, "text": QUERIES}, ("id", "text"), {2: ("id", "text")})
JUDGMENT = Fields(
    {
        "qid": ("query-id", "query_id", "qid", "question_id", "topic"),
        "pid": ("corpus-id", "corpus_id", "pid", "docid", "doc_id", "passage_id", "paragraph_id", "docno"),
        "grade": ("score", "relevance", "rel", "label", "grade", "relevance_score"),
    },
    ("qid", "pid"),
    {2: ("qid", "pid"), 3: ("qid", "pid", "grade"), 4: ("qid", "", "pid", "grade")},
    blanks=True,
)
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
SCORES = {"pos": "pos_scores", "neg": "neg_scores"}
ROW_FIELDS = {
    *QIDS,
    *QUERIES,
    *ROWS,
    *(name for names in ROWS.values() for name in names),
    *SCORES.values(),
    "split",
}


Judged = list[tuple[Path, str]]  # files of judgments with their split, train or dev


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


@dataclass
class Conversion:
    """The options of a conversion, and where its records come from and go."""

    source: Source
    layout: OfficialLayoutWriter
    split: str = ""  # becomes the dev set; empty: the first of DEV_SPLITS that exists
    skip_dangling: bool = False
    min_grade: int = 1  # of a positive
    files: list[tuple[Path, str]] = field(default_factory=list)  # rows, and their split: train or dev
    has_corpus: bool = True

    def count(self, what: str, path: Path, line: int, count: int = 1) -> None:
        self.source.counts.add(what, path, line, count if what else 0)

    def dangling(self, path: Path, line: int, message: str) -> None:
        """FormatError for a judgment of an unknown id, or with --skip_dangling count it."""
        if not self.skip_dangling:
            raise FormatError(path, line, f"{message}; --skip_dangling drops such judgments")
        self.count("judgments of unknown queries or passages: dropped", path, line)

    def judge(self, query: Query, pid: str, grade: int, path: Path, line: int) -> None:
        """Add the judgment of a passage to a query, or count why not; an unknown positive is dangling."""
        positive, known = grade >= self.min_grade, pid in self.layout.rows
        if query.split == "dev" and not positive:
            self.count("dev judgments of negatives: dropped, dev.json holds positives only", path, line)
        elif known:
            self.count(query.judge(pid, grade, self.min_grade), path, line)
        elif positive:
            self.dangling(path, line, f"query {query.qid}: passage {pid} is not in the corpus")
        else:
            self.count("negatives are not in the corpus: omitted", path, line)

    def target(self, split: str, path: Path, line: int) -> str:
        """Return train, dev, or empty for a row of a split that is not converted."""
        name = split.lower()
        if name == TRAIN:
            return TRAIN
        if name == self.split.lower() or (not self.split and name in DEV_SPLITS[:-1]):
            return "dev"
        if name not in DEV_SPLITS and not self.split:
            raise FormatError(path, line, f"split {shown(split)} (expected train or dev)")
        self.count(f"queries of the split {name}: not read (--split {name} reads them)", path, line)
        return ""


# ---- files of a folder


def data_files(folder: Path) -> dict[str, list[Path]]:
    """Return {name without suffix: files} of the data files in a folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = plain_name(path)
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if path.is_file() and suffix:
            found.setdefault(name.removesuffix(suffix), []).append(path)
    return found


def only(paths: list[Path], fix: str = "keep one of them") -> Path:
    """Return the only path; UserError for several."""
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise UserError(f"{paths[0].parent}: {names}: several files of one meaning; {fix}")
    return paths[0]


def find_file(folder: Path, *stems: str, fix: str = "keep one of them") -> Path | None:
    """Return the only data file of these names (without suffix), None without one."""
    files = data_files(folder)
    found = [path for stem in stems for path in files.get(stem, [])]
    return only(found, fix) if found else None


def find_corpus(folder: Path) -> Path | None:
    """Return the corpus of a folder; UserError for several."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such file or folder")
    return find_file(folder, *CORPORA, fix="choose one with --corpus")


def choose_split(found: dict[str, Path], conversion: Conversion, folder: Path) -> list[tuple[Path, str]]:
    """Return (file, train or dev) of the splits to convert, and log the files of other splits."""
    wanted = conversion.split or next((name for name in DEV_SPLITS if name in found), "")
    if conversion.split and conversion.split not in found:
        raise UserError(f"{folder}: no split {conversion.split} (found: {', '.join(found) or 'none'})")
    chosen = [(found[name], target) for name, target in ((TRAIN, TRAIN), (wanted, "dev")) if name in found]
    for name, path in found.items():
        if name not in (TRAIN, wanted):
            lines = count_lines(path)
            conversion.source.opened.add(path)
            log(f"{path}: {lines:,} lines not read; --split {name} reads them as the dev set")
    return chosen


def count_lines(path: Path) -> int:
    with open_file(path) as file, archive_errors(path):
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


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


# ---- passages


def read_passages(path: Path, source: Source, need_ids: bool = True) -> Iterator[Passage]:
    """Yield the passages of a corpus: JSON lines, or a table with columns id, text and title.

    Without `need_ids` a passage may lack an id: a checksum of its text takes its place.
    """
    fields = PASSAGE if need_ids else Fields(PASSAGE.names, ("text",), {1: ("text",), **PASSAGE.orders})
    empty_titles = EMPTY_TITLES if is_json(path) else NO_TITLES
    if source.columns and is_json(path):
        raise UserError(f"--columns: {path} is JSON, whose fields have names; omit it")
    for line, record in source.records(path, fields, source.columns):
        title = text_of(record.get("title"), path, line, "title")
        text = text_of(record["text"], path, line, "text")
        if title.strip() in empty_titles:
            source.counts.add("titles such as null or nan: read as empty", path, line, count=bool(title))
            title = ""
        found = record.get("id")
        known = need_ids or found is not None
        pid = id_of(found, path, line, source.counts, "passage id") if known else text_id(title, text)
        yield Passage(pid, title, text, path, line)


def text_id(title: str, text: str) -> str:
    """Return an id for a passage or query without one, the same for the same text."""
    return xxhash.xxh3_128_hexdigest(f"{title}\n{text}".encode())


def row_passages(conversion: Conversion) -> Iterator[Passage]:
    """Yield each passage of the rows once; FormatError when one id has two texts.

    Counts nothing: the rows are read again for their queries.
    """
    seen: dict[str, tuple[int, Path, int]] = {}
    uncounted = replace(conversion, source=replace(conversion.source, counts=Counts()))
    for path, line, row in read_rows(uncounted, silent=True):
        for reference in (*row.positives, *row.negatives):
            pid, title, text, _ = reference
            if text is None:
                raise FormatError(
                    path, line, f"passage {pid} has no text (expected one, or a corpus: --corpus)"
                )
            hashed = xxhash.xxh3_64_intdigest(f"{title}\n{text}".encode())
            key = pid or text_id(title, text)
            known = seen.get(key)
            if known is None:
                seen[key] = hashed, path, line
                yield Passage(key, title, text, path, line)
            elif known[0] != hashed:
                raise FormatError(path, line, f"passage {key} has another text than in {known[1]}:{known[2]}")


# ---- rows: a query and its passages


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
        raise FormatError(
            path, line, f"expected one of the fields {', '.join(ROWS)}, found {', '.join(entry)}"
        )
    query = first_of(entry, QUERIES)
    if not isinstance(query, str):
        raise FormatError(path, line, f"expected one of the fields {', '.join(QUERIES)}, a string")
    used = [negative for negative in ROWS[name] if entry.get(negative)]
    for negative in used[1:]:
        conversion.count(f"{negative} beside {used[0]}: not read", path, line, len(entry[negative]))
    lists = [references(entry, name, path, line, conversion)]
    lists += [references(entry, negative, path, line, conversion) for negative in used[:1]]
    qid = first_of(entry, QIDS)
    known = (
        text_id("", query) if qid is None else id_of(qid, path, line, conversion.source.counts, "query id")
    )
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
    scores = entry.get(SCORES.get(name, ""))
    if scores is None:
        scores = [None] * len(items)
    if not isinstance(scores, list) or len(scores) != len(items):
        raise FormatError(
            path, line, f"{SCORES[name]} (expected one score for each of {len(items)} in {name})"
        )
    are_ids = name.endswith("_ids") or (name in ("positives", "negatives") and conversion.has_corpus)
    found = []
    for item, score in zip(items, scores, strict=True):
        if score is not None and finite_number(str(score)) is None:
            raise FormatError(
                path, line, f"a score in {SCORES[name]} is {shown(repr(score))} (expected a number)"
            )
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
                    query.logits[pid] = reference.logit
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
        conversion.count(
            "passages with another text than in the corpus: that of the corpus is used", path, line, not same
        )
    return pid


# ---- corpus, queries and judgments in three files


def read_query_texts(path: Path, source: Source) -> dict[str, tuple[str, int]]:
    """Return {qid: (text, line)}; FormatError when one id has two texts."""
    found: dict[str, tuple[str, int]] = {}
    for line, record in source.records(path, QUERY):
        qid = id_of(record["id"], path, line, source.counts, "query id")
        text = text_of(record["text"], path, line, "query")
        known = found.setdefault(qid, (text, line))
        if known[0] != text:
            raise FormatError(path, line, f"query id {qid}: another text than in line {known[1]}")
        source.counts.add("duplicate lines of queries: merged", path, line, known[1] != line)
    return found


def read_judgments(path: Path, source: Source, no_grade: int = 1) -> Iterator[tuple[int, str, str, int]]:
    """Yield (line, qid, pid, grade) of qrels: TREC, TSV with or without header, or JSON lines.

    `no_grade`: the grade in files that list positives without one.
    """
    for line, record in source.records(path, JUDGMENT):
        qid = id_of(record["qid"], path, line, source.counts, "query id")
        pid = id_of(record["pid"], path, line, source.counts, "passage id")
        grade = finite_number(str(record.get("grade", no_grade)))
        if grade is None or not grade.is_integer():
            raise FormatError(path, line, f"grade {shown(str(record['grade']))} (expected an integer)")
        yield line, qid, pid, int(grade)


def judged_queries(queries: Path, judged: Judged, conversion: Conversion) -> Iterator[Query]:
    """Yield the queries of a file that the judgments of its splits name, in that order."""
    texts = read_query_texts(queries, conversion.source)
    seen: set[str] = set()
    for qrels, split in judged:
        found = judged_split(queries, texts, qrels, split, conversion)
        seen |= found.keys()
        yield from found.values()
    unjudged = [line for qid, (_, line) in texts.items() if qid not in seen]
    if unjudged:
        names = " and ".join(qrels.name for qrels, _ in judged)
        conversion.count(f"queries have no judgment in {names}: omitted", queries, unjudged[0], len(unjudged))


def judged_split(
    queries: Path, texts: dict[str, tuple[str, int]], qrels: Path, split: str, conversion: Conversion
) -> dict[str, Query]:
    """Return {qid: query} of one file of judgments."""
    found: dict[str, Query] = {}
    for line, qid, pid, grade in read_judgments(qrels, conversion.source, conversion.min_grade):
        if qid not in texts:
            conversion.dangling(qrels, line, f"query {qid} is not in {queries}")
            continue
        if qid not in found:
            found[qid] = Query(qid, texts[qid][0], split, queries, texts[qid][1])
        conversion.judge(found[qid], pid, grade, qrels, line)
    return found


def qrels_files(folder: Path) -> dict[str, Path]:
    """Return {split: judgments} of a folder: qrels/SPLIT.tsv, qrels.SPLIT.tsv or SPLIT_qrels.jsonl."""
    found, retrieval = data_files(folder / "qrels"), dict[str, list[Path]]()
    for stem, paths in data_files(folder).items():
        if match := QRELS.fullmatch(stem):
            kind = retrieval if match["retrieval"] else found
            kind.setdefault(match["after"] or match["before"], []).extend(paths)
        elif stem == "qrels":
            found.setdefault("dev", []).extend(paths)
    # T2Ranking has both: those for retrieval name the positives, the others have grades for re-ranking
    return {name: only(paths) for name, paths in (found | retrieval).items()}


def folder_queries(folder: Path, conversion: Conversion) -> Iterator[Query]:
    """Yield the queries of a folder with judgments: the training split and one other as dev."""
    splits = qrels_files(folder)
    chosen = choose_split(splits, conversion, folder)
    if not chosen:
        warn(f"{folder}: no judgments (qrels/train.tsv, qrels/dev.tsv, ...): only the passages are converted")
    queries_of: dict[Path, Judged] = {}
    for qrels, target in chosen:
        split = next(name for name, path in splits.items() if path == qrels)
        names = [f"queries{mark}{split}" for mark in "._-"] + [f"{split}{mark}queries" for mark in "._-"]
        queries = find_file(folder, *names) or find_file(folder, "queries", "topics")
        if queries is None:
            raise UserError(f"{folder}: no file queries or queries.{split} in this folder")
        queries_of.setdefault(queries, []).append((qrels, target))
    for queries, judged in queries_of.items():
        yield from judged_queries(queries, judged, conversion)


def table_queries(path: Path, judged: Judged, conversion: Conversion) -> Iterator[Query]:
    """Yield your own queries: rows with their passages, or with judgments in files of their own."""
    if judged:
        yield from judged_queries(path, judged, conversion)
    else:
        if not is_json(path):
            raise UserError(
                f"{path}: a table has no answers; pass the judgments with --qrels or --train_qrels"
            )
        conversion.files = [(path, TRAIN)]
        yield from row_queries(conversion)
