"""What the layouts of other data sets share: names of fields, splits, files of a folder, passages."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import xxhash

from script.lib.foreign_files import NO_TITLES, Fields, Source, id_of, is_json, plain_name, text_of, uncounted
from script.lib.official_layout import OfficialLayoutWriter, Passage, Query
from torch_src.data.formats import EMPTY_TITLES
from torch_src.data.lines import FormatError, archive_errors, open_file, shown
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log

TRAIN = "train"
# the first that exists is the dev set; MS MARCO has dev.small
DEV_SPLITS = ("dev", "dev.small", "validation", "valid", "val", "test")
SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".txt", ".qrels")
LONGEST_PARAGRAPH = 20  # lines on average: in longer ones a blank line here or there is an accident
SENTENCE_ENDS = ("。", "！", "？", "；", "”", ".", "!", "?", ";")
CORPORA = ("corpus", "collection", "passage_collection", "passages", "psgs_w100")

PIDS = (
    *("_id", "id", "docid", "doc_id", "document_id", "pid", "psg_id", "passage_id", "paragraph_id", "docno"),
    *("编号", "文档编号", "段落编号"),
)
TITLES = ("title", "paragraph_title", "标题")
TEXTS = (
    *(
        "text",
        "contents",
        "content",
        "passage",
        "passage_text",
        "paragraph_text",
        "document_text",
        "body",
        "segment",
    ),
    *("正文", "内容", "文本"),
)
QIDS = ("query_id", "question_id", "qid", "_id", "id", "query-id", "编号", "问题编号")
QUERIES = ("query", "question", "text", "query_text", "anchor", "contents", "问题", "查询")
PASSAGE = Fields(
    {"id": PIDS, "title": TITLES, "text": TEXTS},
    ("id", "text"),
    {2: ("id", "text"), 3: ("id", "title", "text")},
)


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


# ---- passages


def read_passages(
    path: Path, source: Source, need_ids: bool = True, fields: Fields = PASSAGE, line_ids: bool = False
) -> Iterator[Passage]:
    """Yield the passages of a corpus: JSON lines, or a table with columns id, text and title.

    Without `need_ids` a passage may lack an id: a checksum of its text takes its place, or with `line_ids`
    NAME:LINE.
    """
    if not need_ids:
        fields = replace(fields, required=("text",), orders={1: ("text",), **fields.orders})
    if source.names:
        names: dict[str, tuple[str, ...]] = {value: (name,) for value, name in source.names.items()}
        fields = replace(fields, names=names, header=True)
    empty_titles = EMPTY_TITLES if is_json(path) else NO_TITLES
    if source.columns and is_json(path):
        raise UserError(f"--columns: the fields of JSON have names; pass text=FIELD,id=FIELD for {path}")
    for line, record in source.records(path, fields, source.columns):
        title = text_of(record.get("title"), path, line, "title")
        text = text_of(record["text"], path, line, "text")
        if title.strip() in empty_titles:
            source.counts.add("titles such as null or nan: read as empty", path, line, count=bool(title))
            title = ""
        found = record.get("id")
        if need_ids or found is not None:
            pid = id_of(found, path, line, source.counts, "passage id")
        else:
            pid = f"{path.name}:{line}" if line_ids else text_id(title, text)
        yield Passage(pid, title, text, path, line)


def read_plain_text(paths: list[Path], source: Source) -> Iterator[Passage]:
    """Yield the passages of text files: paragraphs between blank lines, or else each line.

    A paragraph's lines are joined. The id is NAME:LINE.
    """
    for path in paths:
        paragraphs = has_paragraphs(path, source)
        log(f"{path}: {'paragraphs between blank lines' if paragraphs else 'each line'} as passages")
        taken: list[str] = []
        first = 0
        for line, text in chain(source.lines(path), [(0, "")]):
            if text.strip():
                first = first if taken else line
                taken.append(text.strip())
            if taken and not (paragraphs and text.strip()):
                yield Passage(f"{path.name}:{first}", "", join_lines(taken), path, first)
                taken = []


def has_paragraphs(path: Path, source: Source) -> bool:
    """Return whether blank lines separate paragraphs of several lines, which mostly end within a sentence."""
    groups = lines = sentences = 0
    last = ""  # the line before, of the same group
    for _, raw in uncounted(source).lines(path):
        text = raw.strip()
        groups, lines = groups + bool(text and not last), lines + bool(text)
        sentences += bool(text and last.endswith(SENTENCE_ENDS))
        last = text
    return 1 < groups < lines <= LONGEST_PARAGRAPH * groups and 2 * sentences < lines - groups


def join_lines(lines: list[str]) -> str:
    """Return wrapped lines as one, with a space where Latin words meet."""
    text = lines[0]
    for line in lines[1:]:
        text += line if ord(text[-1]) > 0x2E7F or ord(line[0]) > 0x2E7F else f" {line}"
    return text


def text_id(title: str, text: str) -> str:
    """Return an id for a passage or query without one, the same for the same text."""
    return xxhash.xxh3_128_hexdigest(f"{title}\n{text}".encode())
