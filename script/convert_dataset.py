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
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

from metric.common import InputError
from metric.evaluation import load_reference, load_result
from script.lib.foreign_datasets import (
    beir_queries,
    dureader_queries,
    hub_queries,
    own_queries,
    passages_of,
    required,
)
from script.lib.official_layout import TITLES, Layout, Query
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import parse_cross_row, read_dev, read_lines, split_columns
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.data.row_file import text_hash
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import log
from torch_src.runtime.program import exit_status


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
    log(f"wrote {given.to}")


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
    log(f"wrote {folder} ({len(ids):,} passages, {len(dev):,} dev and {len(train):,} training queries)")


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
        log(f"{lost:,} training passages are in no row of the collection: left out")
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
    log(f"wrote {folder}")


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
