"""Convert other data sets to the official layout and back. Ids are kept; memory is bounded.

    python script/convert_dataset.py beir FOLDER --to D           corpus.jsonl, queries.jsonl, qrels/*.tsv
    python script/convert_dataset.py jsonl CORPUS --queries Q --to D     your own passages and queries
    python script/convert_dataset.py hub FOLDER --to D            rows of the hub mirrors: corpus, train, dev
    python script/convert_dataset.py dureader FOLDER --to D       the original JSON of DuReader-retrieval
    python script/convert_dataset.py to_beir D --to FOLDER        the official layout as a BEIR folder
    python script/convert_dataset.py to_trec RESULT --reference DEV --to FOLDER     run.txt and qrels.txt

Every input file may be gzipped. A line of CORPUS is {"id" or "_id" or "docid" or "paragraph_id", "text" or
"contents" or "paragraph_text", optionally "title"}; a line of Q is {"id", "text", "positives": [id, ...],
optionally "negatives": [id, ...] and "split": "train" or "dev"}. A title is written before its text, and also
to titles.tsv, so that to_beir can restore it. TABs and line breaks in a text become spaces. A training query
without negatives gets random passages (--seed); mine better ones with script/mine_negatives.py.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from metric.evaluation import load_reference, load_result
from script.lib.foreign_datasets import (
    beir_queries,
    dureader_queries,
    hub_queries,
    jsonl_queries,
    read_passages,
    require_file,
)
from script.lib.official_layout import TITLES, OfficialLayoutWriter, Query
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import parse_cross_row, read_dev
from torch_src.data.lines import read_lines, split_columns
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.data.row_file import text_hash
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import log
from torch_src.runtime.program import exit_status

READ_ROWS = 4096  # passages in memory at a time
# kind -> (names of the corpus file, reader of the queries)
FOLDER_KINDS = {
    "beir": (("corpus",), beir_queries),
    "hub": (("corpus", "passage_collection"), hub_queries),
    "dureader": (("passage_collection",), dureader_queries),
}


def to_official(args: argparse.Namespace) -> None:
    """Convert another data set to the official layout."""
    source, layout = Path(args.source), OfficialLayoutWriter(Path(args.to), args.seed)
    queries: Iterable[Query]
    if args.kind == "jsonl":
        corpus, queries = source, jsonl_queries(Path(args.queries)) if args.queries else ()
    else:
        stems, reader = FOLDER_KINDS[args.kind]
        corpus, queries = require_file(source, *stems), reader(source)
    layout.write_collection(read_passages(corpus))
    layout.write_queries(queries)
    layout.finish()
    log(f"wrote {args.to}")


def to_beir(args: argparse.Namespace) -> None:
    """Write the official layout as a BEIR folder."""
    source, folder = Path(args.source), Path(args.to)
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
    write_qrels(folder / "qrels/dev.tsv", [(q.qid, pid, 1) for q in dev for pid in q.answers])
    judged = [(q.qid, pid, score) for q in train
              for pids, score in ((q.positives, 1), (q.negatives, 0)) for pid in pids]  # fmt: skip
    write_qrels(folder / "qrels/train.tsv", judged)
    log(f"wrote {folder} ({len(ids):,} passages, {len(dev):,} dev and {len(train):,} training queries)")


def write_qrels(path: Path, rows: list[tuple[str, str, int]]) -> None:
    """Write a BEIR judgment file of (qid, pid, score), unless there are no rows."""
    if rows:
        with atomic_write(path) as file:
            file.write("query-id\tcorpus-id\tscore\n")
            file.writelines(f"{qid}\t{pid}\t{score}\n" for qid, pid, score in rows)


def read_titles(path: Path) -> dict[int, str]:
    """Return {row: title}; empty without such a file."""
    if not path.exists():
        return {}
    rows = (split_columns(text, 2, path, line, "row, title") for line, text in read_lines(path))
    return {int(row): title for row, title in rows}


def training_queries(path: Path, collection: PassageCollection, ids: list[str]) -> list[Query]:
    """Return the training queries that have a positive. Rows have no ids: passages are matched by text."""
    if not path.exists():
        return []
    first_row: dict[int, int] = {}  # hash of a training passage -> the first row with that text
    for line, text in read_lines(path):
        first_row[text_hash(parse_cross_row(text, path, line).passage)] = -1
    for start in range(0, len(collection), READ_ROWS):
        for at, text in enumerate(collection[start : start + READ_ROWS], start):
            if first_row.get(hashed := text_hash(text)) == -1:
                first_row[hashed] = at
    found: dict[str, Query] = {}
    missing = 0
    for line, text in read_lines(path):
        row = parse_cross_row(text, path, line)
        at = first_row[text_hash(row.passage)]
        if at < 0:
            missing += 1
            continue
        query = found.setdefault(row.query, Query("", row.query))
        pids = query.positives if row.label else query.negatives
        if ids[at] not in pids:
            pids.append(ids[at])
    if missing:
        log(f"{missing:,} training passages are not in the collection: omitted")
    answered = [query for query in found.values() if query.positives]
    for number, query in enumerate(answered):
        query.qid = f"train{number}"
        query.negatives = [pid for pid in query.negatives if pid not in query.positives]
    return answered


def to_trec(args: argparse.Namespace) -> None:
    """Write a result as a TREC run, and the reference as qrels."""
    result, folder = load_result(args.source), Path(args.to)
    with atomic_write(folder / "run.txt") as file:
        for qid, pids in result.items():
            for rank, pid in enumerate(dict.fromkeys(pids), start=1):
                file.write(f"{qid} Q0 {pid} {rank} {1 / rank:.9g} dureader\n")
    if args.reference:
        with atomic_write(folder / "qrels.txt") as file:
            for qid, answers in load_reference(args.reference).items():
                file.writelines(f"{qid} 0 {pid} 1\n" for pid in sorted(answers))
    log(f"wrote {folder}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    kinds = {name: to_official for name in (*FOLDER_KINDS, "jsonl")}
    kinds |= {"to_beir": to_beir, "to_trec": to_trec}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=list(kinds))
    parser.add_argument("source", help="folder or file to read")
    parser.add_argument("--to", required=True, help="folder to write")
    parser.add_argument("--queries", default="", help="queries for jsonl")
    parser.add_argument("--reference", default="", help="dev.json, for to_trec")
    parser.add_argument("--seed", type=int, default=42, help="for random negatives")
    args = parser.parse_args(argv)
    return exit_status(lambda: kinds[args.kind](args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
