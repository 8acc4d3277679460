"""Other people's data sets to the official layout and back, streaming; ids are kept.

    python script/convert_dataset.py beir FOLDER --to D           corpus.jsonl, queries.jsonl, qrels/*.tsv
    python script/convert_dataset.py jsonl CORPUS --queries Q --to D     your own passages and queries
    python script/convert_dataset.py hub FOLDER --to D            rows of the hub mirrors: corpus, train, dev
    python script/convert_dataset.py dureader FOLDER --to D       the original JSON of DuReader-retrieval
    python script/convert_dataset.py to_beir D --to FOLDER        the official layout as a BEIR folder
    python script/convert_dataset.py to_trec RESULT --reference DEV --to FOLDER     run.txt and qrels.txt

Every file may be gzipped. A line of CORPUS is {"id" or "_id" or "docid" or "paragraph_id", "text" or
"contents" or "paragraph_text", and perhaps "title"}, a line of Q {"id", "text", "positives": [id, ...],
perhaps "negatives": [id, ...] and "split": "train" or "dev"}. A title goes before its text and is kept beside
the collection, so that it comes out again. TABs and line ends within a text become blanks, and are counted. A
training query without a negative gets passages drawn at random (--seed): mine better ones afterwards.
"""

import argparse
import gzip
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

import numpy as np

from metric.common import InputError
from metric.evaluation import load_reference, load_result
from torch_src.collection import PassageCollection
from torch_src.errors import UserError
from torch_src.formats import (
    FormatError,
    decode,
    parse_cross_row,
    parse_json,
    raw_lines,
    read_dev,
    read_lines,
    split_columns,
)
from torch_src.helpers import atomic_write, exit_status, say
from torch_src.passage_ids import check_length, read_passage_ids
from torch_src.row_file import text_hash

ID_NAMES, TEXT_NAMES = ("_id", "id", "docid", "pid", "paragraph_id"), ("text", "contents", "paragraph_text")
TITLES = "titles.tsv"  # beside the collection: row and title of each passage that had one


@dataclass
class Query:
    """One query with the ids of its passages."""

    qid: str
    text: str
    positives: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    split: str = "train"


class Cleaner:
    """Makes texts fit into a column; counts those that it had to change."""

    def __init__(self):
        self.changed = 0

    def __call__(self, text: str) -> str:
        clean = text.replace("\t", " ").replace("\r\n", " ").replace("\n", " ")
        self.changed += clean != text
        return clean


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of a UTF-8 file, gzipped or not; a broken archive or line is named."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for line, raw in raw_lines(file, path):
                yield line, decode(raw, path, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: a broken or cut archive ({error})") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line, object) of a JSON-lines file, gzipped or not; FormatError for anything else."""
    for line, text in text_lines(path):
        if not text.strip():
            continue
        value = parse_json(text, path, line)
        if not isinstance(value, dict):
            raise FormatError(path, line, f"expected a JSON object, found {type(value).__name__}")
        yield line, value


def first_of(entry: dict, names: Iterable[str], path: Path, line: int) -> str:
    """Return the text of the first of the names that the object has."""
    for name in names:
        if isinstance(entry.get(name), str | int):
            return str(entry[name])
    raise FormatError(path, line, f"none of {', '.join(names)} in it")


def passages_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (id, title, text) of a corpus: JSON lines, or `id TAB text` and `id TAB title TAB text`."""
    if ".tsv" in path.suffixes:
        for line, text in text_lines(path):
            columns = text.removesuffix("\n").split("\t")
            if len(columns) not in (2, 3):
                raise FormatError(path, line, f"{len(columns)} columns, expected id, text or id, title, text")
            yield columns[0], columns[1] if len(columns) == 3 else "", columns[-1]
        return
    for line, entry in json_lines(path):
        title = entry.get("title")
        text = first_of(entry, TEXT_NAMES, path, line)
        yield first_of(entry, ID_NAMES, path, line), title if isinstance(title, str) else "", text


class Layout:
    """Writes the official layout into `folder`; the collection first, which gives each id its row."""

    def __init__(self, folder: Path, seed: int):
        if folder.exists():
            raise UserError(f"{folder}: is there already; name another folder")
        self.target, self.folder = folder, folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that failed
        self.seed, self.clean = seed, Cleaner()
        self.rows: dict[str, int] = {}
        self.absent = 0  # negatives that are not in the corpus

    def finish(self) -> None:
        """Give the folder its name: it is whole."""
        for path in self.folder.rglob("*.tsv"):
            if not path.stat().st_size:
                path.unlink()  # no titles, no training queries
        self.folder.rename(self.target)

    def write_collection(self, passages: Iterable[tuple[str, str, str]]) -> None:
        """Write part-00, passage2id.map.json and, where there are titles, titles.tsv."""
        folder = self.folder / "passage-collection"
        with ExitStack() as stack:
            names = ("part-00", "passage2id.map.json", TITLES)
            part, ids, titles = (stack.enter_context(atomic_write(folder / name)) for name in names)
            ids.write("{")
            for row, (pid, title, text) in enumerate(passages):
                if not pid or {"\t", "\n", "\0"} & set(pid):
                    raise UserError(f"the id {pid!r}: empty, or with a TAB, a line end or a NUL in it")
                if pid in self.rows:
                    raise UserError(f"the passage {pid} is there twice; ids must be unique")
                self.rows[pid] = row
                title, text = self.clean(title), self.clean(text)
                part.write(f"-\t\t{title} {text}\t0\n" if title else f"-\t\t{text}\t0\n")
                ids.write(
                    f"{',' if row else ''}\n{json.dumps(str(row))}: {json.dumps(pid, ensure_ascii=False)}"
                )
                if title:
                    titles.write(f"{row}\t{title}\n")
            ids.write("\n}\n")
        if not self.rows:
            raise UserError("no passages found")
        say(f"{len(self.rows):,} passages")

    def write_queries(self, queries: Iterable[Query]) -> None:
        """Write train/ and dev/ of the queries, texts taken from the collection that was written."""
        collection = PassageCollection(self.folder / "passage-collection")
        counts = {"train": 0, "dev": 0, "drawn": 0}
        dev: dict[str, Query] = {}
        with ExitStack() as stack:
            names = ("train/dual.train.tsv", "train/cross.train.tsv")
            dual, cross = (stack.enter_context(atomic_write(self.folder / name)) for name in names)
            for number, query in enumerate(queries):
                self._check(query)
                counts[query.split] += 1
                if query.split == "dev":
                    self._add_dev(dev, query)
                else:
                    counts["drawn"] += self._write_training(dual, cross, collection, number, query)
        if dev:
            self._write_dev(dev, collection)
        say(f"{counts['train']:,} training and {counts['dev']:,} dev queries")
        if counts["drawn"]:
            say(f"{counts['drawn']:,} training queries had no negatives: some were drawn at random")
        if self.absent:
            say(f"{self.absent:,} negatives are not in the corpus: left out")
        if self.clean.changed:
            say(f"{self.clean.changed:,} texts had TABs or line ends, which became blanks")

    def _check(self, query: Query) -> None:
        known = [pid for pid in query.negatives if pid in self.rows]
        self.absent += len(query.negatives) - len(known)
        query.negatives = known
        unknown = [pid for pid in query.positives if pid not in self.rows]
        if unknown:
            raise UserError(f"query {query.qid}: the passage {unknown[0]} is not in the corpus")
        if not query.text.strip():
            raise UserError(f"query {query.qid}: its text is empty")
        if not query.positives:
            raise UserError(f"query {query.qid}: no positive passage")

    def _write_training(self, dual, cross, collection, number: int, query: Query) -> bool:
        text, positives = self.clean(query.text), [self.rows[pid] for pid in query.positives]
        negatives = [self.rows[pid] for pid in query.negatives] or self._draw(number, positives)
        for positive in positives:
            for negative in negatives:
                dual.write(f"{text}\t\t{collection[positive]}\t\t{collection[negative]}\t0\n")
            cross.write(f"{text}\t\t{collection[positive]}\t1\n")
        cross.writelines(f"{text}\t\t{collection[negative]}\t0\n" for negative in negatives)
        return not query.negatives

    def _draw(self, number: int, positives: list[int]) -> list[int]:
        draw = np.random.default_rng([self.seed, number])
        rows = draw.choice(len(self.rows), min(len(self.rows), 4 + len(positives)), replace=False).tolist()
        return [row for row in rows if row not in positives][:4]

    def _add_dev(self, dev: dict[str, Query], query: Query) -> None:
        text = self.clean(query.text)
        if text in dev:  # results know a query by its text: one entry with the answers of both
            known = dev[text]
            known.positives += [pid for pid in query.positives if pid not in known.positives]
        else:
            dev[text] = query

    def _write_dev(self, dev: dict[str, Query], collection) -> None:
        folder = self.folder / "dev"
        with atomic_write(folder / "dev.json") as file:
            for text, query in dev.items():
                answers = [
                    {"paragraph_id": pid, "paragraph_text": collection[self.rows[pid]]}
                    for pid in query.positives
                ]
                entry = {"question_id": query.qid, "question": text, "answer_paragraphs": answers}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        with atomic_write(folder / "dev.q.format") as file:
            file.writelines(f"{text}\t-\t-\t0\n" for text in dev)
        with atomic_write(folder / "q2qid.dev.json") as file:
            json.dump({text: query.qid for text, query in dev.items()}, file, ensure_ascii=False)


# ---- sources


def find(folder: Path, *stems: str) -> Path | None:
    """Return the file of the folder whose name begins with one of the stems, the first stem first."""
    for stem in stems if folder.is_dir() else ():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name.split(".")[0] == stem:
                return path
    return None


def required(folder: Path, *stems: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    path = find(folder, *stems)
    if path is None:
        raise UserError(f"{folder}: no file {' or '.join(stems)} in it")
    return path


def beir_queries(folder: Path) -> Iterator[Query]:
    """Yield the queries of a BEIR folder; test and dev judgements are dev."""
    path = required(folder, "queries")
    texts = {first_of(e, ID_NAMES, path, n): first_of(e, TEXT_NAMES, path, n) for n, e in json_lines(path)}
    judged = [("train", "train"), ("dev", "dev")]
    if find(folder / "qrels", "dev") is None:
        judged[1] = ("test", "dev")
    for name, split in judged:
        path = find(folder / "qrels", name)
        if path is None:
            continue
        judged_of: dict[str, tuple[list[str], list[str]]] = {}  # qid -> its positives, its negatives
        for line, text in text_lines(path):
            qid, pid, grade = split_columns(text, 3, path, line, "query-id, corpus-id, score")
            if line == 1 and grade == "score":
                continue
            judged_of.setdefault(qid, ([], []))[grade_of(grade, path, line) <= 0].append(pid)
        for qid, (positives, negatives) in judged_of.items():
            if qid not in texts:
                raise UserError(f"{path}: the query {qid} is not in queries.jsonl")
            if positives:  # dev files have no place for negatives
                yield Query(qid, texts[qid], positives, negatives if split == "train" else [], split)


def grade_of(text: str, path: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise FormatError(path, line, f"score {text[:20]!r} is not a number") from None


def own_queries(path: Path) -> Iterator[Query]:
    """Yield the queries of a file of one's own."""
    for line, entry in json_lines(path):
        split = entry.get("split", "train")
        positives, negatives = entry.get("positives", []), entry.get("negatives", [])
        if (
            split not in ("train", "dev")
            or not isinstance(positives, list)
            or not isinstance(negatives, list)
        ):
            raise FormatError(path, line, "expected id, text, positives: [id, ...], split: train or dev")
        qid, text = first_of(entry, ID_NAMES, path, line), first_of(entry, TEXT_NAMES, path, line)
        yield Query(qid, text, list(map(str, positives)), list(map(str, negatives)), split)


def hub_queries(folder: Path) -> Iterator[Query]:
    """Yield queries of train.jsonl and dev.jsonl: query_id, query, positive_passages, negative_passages."""
    return _listed_queries(folder, ("query_id", "query", "positive_passages", "docid"), "negative_passages")


def dureader_queries(folder: Path) -> Iterator[Query]:
    """Yield the queries of train.json and dev.json: question_id, question, answer_paragraphs."""
    return _listed_queries(folder, ("question_id", "question", "answer_paragraphs", "paragraph_id"))


def _listed_queries(folder: Path, names: tuple[str, str, str, str], negative: str = "") -> Iterator[Query]:
    """Yield the queries of train.* and dev.*; `names`: of qid, text, list of positives, id in that list."""
    qid, query, positive, pid = names
    for split in ("train", "dev"):
        path = find(folder, split)
        for line, entry in json_lines(path) if path else ():
            try:
                positives = [str(passage[pid]) for passage in entry[positive]]
                negatives = [str(passage[pid]) for passage in entry.get(negative, [])]
                yield Query(str(entry[qid]), str(entry[query]), positives, negatives, split)
            except (KeyError, TypeError) as error:
                raise FormatError(path, line, f"missing or malformed: {error}") from None


def to_official(given) -> None:
    """Convert a foreign data set into the official layout."""
    source, layout = Path(given.source), Layout(Path(given.to), given.seed)
    if given.kind == "jsonl":
        layout.write_collection(passages_of(source))
        queries = own_queries(Path(given.queries)) if given.queries else ()
    else:
        stems = {
            "beir": ("corpus",),
            "hub": ("corpus", "passage_collection"),
            "dureader": ("passage_collection",),
        }
        layout.write_collection(passages_of(required(source, *stems[given.kind])))
        queries = {"beir": beir_queries, "hub": hub_queries, "dureader": dureader_queries}[given.kind](source)
    layout.write_queries(queries)
    layout.finish()
    say(f"wrote {given.to}")


# ---- back


def to_beir(given) -> None:
    """Write the official layout as a BEIR folder."""
    source, folder = Path(given.source), Path(given.to)
    collection = PassageCollection(source / "passage-collection")
    map_path = source / "passage-collection/passage2id.map.json"
    ids = [pid.decode() for pid in read_passage_ids(map_path)]
    check_length(map_path, len(ids), len(collection))
    titles = read_titles(source / "passage-collection" / TITLES)
    with atomic_write(folder / "corpus.jsonl") as file:
        for row, pid in enumerate(ids):
            title, text = titles.get(row, ""), collection[row]
            entry = {"_id": pid, "title": title, "text": text.removeprefix(f"{title} ") if title else text}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    dev = read_dev(source / "dev/dev.json") if (source / "dev/dev.json").exists() else []
    train = training_queries(source / "train/cross.train.tsv", collection, ids)
    with atomic_write(folder / "queries.jsonl") as file:
        for qid, text in [*((q.qid, q.query) for q in dev), *((q.qid, q.text) for q in train)]:
            file.write(json.dumps({"_id": qid, "text": text}, ensure_ascii=False) + "\n")
    judged = {
        "dev": [(query.qid, pid, 1) for query in dev for pid in query.answers],
        "train": [
            (query.qid, pid, grade)
            for query in train
            for pids, grade in ((query.positives, 1), (query.negatives, 0))
            for pid in pids
        ],
    }
    for name, rows in judged.items():
        if rows:
            with atomic_write(folder / f"qrels/{name}.tsv") as file:
                file.write("query-id\tcorpus-id\tscore\n")
                file.writelines(f"{qid}\t{pid}\t{grade}\n" for qid, pid, grade in rows)
    say(f"wrote {folder} ({len(ids):,} passages, {len(dev):,} dev and {len(train):,} training queries)")


def read_titles(path: Path) -> dict[int, str]:
    """Return {row: title}; empty where there is no such file."""
    if not path.exists():
        return {}
    rows = (split_columns(text, 2, path, line, "row, title") for line, text in read_lines(path))
    return {int(row): title for row, title in rows}


def training_queries(path: Path, collection: PassageCollection, ids: list[str]) -> list[Query]:
    """Return the training queries that have a positive; the training files have texts alone, no ids."""
    if not path.exists():
        return []
    first_row: dict[int, int] = {}  # hash of a training passage's text -> its first row
    for line, text in read_lines(path):
        first_row[text_hash(parse_cross_row(text, path, line).passage)] = -1
    for start in range(0, len(collection), 4096):
        for at, text in enumerate(collection[start : start + 4096], start):
            if first_row.get(hashed := text_hash(text)) == -1:
                first_row[hashed] = at
    found: dict[str, Query] = {}
    lost = 0
    for line, text in read_lines(path):
        row = parse_cross_row(text, path, line)
        at = first_row[text_hash(row.passage)]
        lost += at < 0
        if at >= 0:
            query = found.setdefault(row.query, Query("", row.query))
            listed = query.positives if row.label else query.negatives
            if ids[at] not in listed:
                listed.append(ids[at])
    if lost:
        say(f"{lost:,} training passages are in no row of the collection: left out")
    answered = [query for query in found.values() if query.positives]
    for number, query in enumerate(answered):
        query.qid = f"train{number}"
        query.negatives = [pid for pid in query.negatives if pid not in query.positives]
    return answered


def to_trec(given) -> None:
    """Write a result as a TREC run and the reference as qrels."""
    result, folder = load_result(given.source), Path(given.to)
    with atomic_write(folder / "run.txt") as file:
        for qid, pids in result.items():
            for rank, pid in enumerate(dict.fromkeys(pids), start=1):
                file.write(f"{qid} Q0 {pid} {rank} {1 / rank:.9g} dureader\n")
    if given.reference:
        with atomic_write(folder / "qrels.txt") as file:
            for qid, pids in load_reference(given.reference).items():
                file.writelines(f"{qid} 0 {pid} 1\n" for pid in sorted(pids))
    say(f"wrote {folder}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    kinds = {name: to_official for name in ("beir", "jsonl", "hub", "dureader")}
    kinds |= {"to_beir": to_beir, "to_trec": to_trec}
    plain = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    options.add_argument("kind", choices=list(kinds))
    options.add_argument("source", help="folder or file to read")
    options.add_argument("--to", required=True, help="folder to write")
    options.add_argument("--queries", default="", help="queries of jsonl")
    options.add_argument("--reference", default="", help="dev.json, of to_trec")
    options.add_argument("--seed", type=int, default=42, help="of negatives that are drawn")
    given = options.parse_args(argv)
    return exit_status(lambda: kinds[given.kind](given), InputError)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
