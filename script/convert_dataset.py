"""Convert other data sets to the official layout and back; what is dropped or merged is counted and printed.

    python script/convert_dataset.py jsonl passages.jsonl --queries queries.jsonl --to D
    python script/convert_dataset.py jsonl passages.tsv --queries queries.tsv --qrels qrels.txt --to D
    python script/convert_dataset.py auto passages.csv --to D
    python script/convert_dataset.py beir FOLDER --to D
    python script/convert_dataset.py t2ranking FOLDER --to D
    python script/convert_dataset.py msmarco FOLDER --to D
    python script/convert_dataset.py flagembedding train.jsonl --dev dev.jsonl --to D
    python script/convert_dataset.py tevatron FOLDER --to D
    python script/convert_dataset.py dpr FOLDER --to D
    python script/convert_dataset.py hub FOLDER --to D
    python script/convert_dataset.py dureader FOLDER --to D
    python script/convert_dataset.py feedback feedback.jsonl --data_dir D --to FOLDER
    python script/convert_dataset.py to_beir D --to FOLDER
    python script/convert_dataset.py to_trec dual_res.json --reference qrels.txt --to FOLDER
    python script/convert_dataset.py to_trec res.top50 --data_dir D --to FOLDER
    python script/convert_dataset.py from_trec run.txt --to dual_res.json

auto: any of the layouts below, recognized by its files, or passages alone: JSON lines, TSV, CSV or text (a
    passage a line, or paragraphs between blank lines). Columns are guessed and printed; ids may be missing.
jsonl: your own passages (id, text, optionally title) and queries (id, text, positives: [id, ...], optionally
    negatives and split), in JSON lines; or both as JSON lines, TSV or CSV with judgments in files of their
    own: TREC qrels, or qid, pid, grade. --train_qrels FILE for training.
beir, msmarco, t2ranking: corpus.jsonl or collection.tsv, queries.jsonl or queries.SPLIT.tsv, and judgments
    qrels/SPLIT.tsv, qrels.SPLIT.tsv or SPLIT_qrels.jsonl.
flagembedding, tevatron, dpr, hub, dureader: rows of a query and its passages, in one file or in files named
    after their split (train.jsonl, dev.jsonl), with or without a corpus: {query, pos, neg} with optional
    pos_scores and neg_scores; {query_id, query, positive_passages, negative_passages};
    {question, positive_ctxs, hard_negative_ctxs}; {question_id, question, answer_paragraphs};
    {anchor, positive, negative}.
feedback: the clicks on script/demo.py's page (feedback.jsonl in its output folder) over the collection of
    --data_dir, which is linked, not copied. Marked passages are positives, others above them negatives.
    --dev_share of the queries, by a hash of the query, become the dev set.

Files may be gzipped, and in UTF-8, UTF-16 or GB18030 (GBK); --encoding names another. Headers are recognized;
--columns names the columns of a corpus: text=NAME,title=NAME,id=NAME by their names (also of JSON fields), or
all in their order without a header: id,-,text. The dev set is the split dev, validation or test, the first
that exists, or the one that --split names. An id that is not in the corpus is an error, or with
--skip_dangling its judgment is dropped. A passage id that occurs twice is an error, or with --skip_duplicates
the second one is dropped if its text is the same. A title is written before its text, and also to titles.tsv,
so that to_beir can restore it. TABs and line breaks in a text become spaces. A training query without
negatives gets random passages (--seed); mine better ones with script/mine_negatives.py.
"""

import argparse
import codecs
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from script.lib.feedback import feedback_queries
from script.lib.foreign_datasets import (
    TRAIN,
    Conversion,
    data_files,
    find_corpus,
    read_passages,
    read_plain_text,
)
from script.lib.foreign_files import Counts, Source, is_json
from script.lib.foreign_judgments import folder_queries, judged_queries
from script.lib.foreign_layouts import (
    GUESSED,
    OFFICIAL,
    PASSAGES,
    TEXT,
    guess_columns,
    plain_files,
    recognize,
)
from script.lib.foreign_rows import ROWS, row_files, row_passages, row_queries
from script.lib.official_layout import TITLES, OfficialLayoutWriter, Passage, Query
from script.lib.trec_files import (
    check_reference,
    check_result,
    read_grades,
    read_own_run,
    read_ranking,
    read_scored,
)
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import parse_cross_row, read_dev
from torch_src.data.kinds import RUN, check_kinds
from torch_src.data.lines import FormatError, read_lines, split_columns
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.data.results import check_result_path, stamp_result, write_result
from torch_src.data.row_file import text_hash
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_folder, atomic_write
from torch_src.runtime.log import log, warn
from torch_src.runtime.options import OptionParser, number, positive_int, seed
from torch_src.runtime.outputs import check_new_folder
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import clear_stamp

DEV_SHARE = 0.3  # of the queries with feedback
READ_ROWS = 4096  # passages in memory at a time
JUDGED = ("beir", "msmarco", "t2ranking")
IN_ROWS = ("flagembedding", "tevatron", "dpr", "hub", "dureader")
CONVERTED = ("auto", "jsonl", *JUDGED, *IN_ROWS)
# option -> the kinds that read it
OPTIONS = {
    "queries": ("jsonl",),
    "qrels": ("jsonl",),
    "train_qrels": ("jsonl",),
    "corpus": ("auto", *JUDGED, *IN_ROWS),
    "dev": ("auto", *IN_ROWS),
    "split": CONVERTED,
    "skip_dangling": CONVERTED,
    "skip_duplicates": CONVERTED,
    "min_grade": ("auto", "jsonl", *JUDGED),
    "columns": CONVERTED,
    "quotes": CONVERTED,
    "encoding": CONVERTED,
    "data_dir": ("feedback", "to_trec"),
    "dev_share": ("feedback",),
    "reference": ("to_trec",),
}
DPR_COLUMNS = ("id", "text", "title")  # in CSV quotes
KNOWN_AS = {PASSAGES: "passages", TEXT: "plain text", "flagembedding": "rows of a query and its passages"}
T2RANKING_GRADE = 2  # from 0 to 3; the authors count 2 and 3 as relevant


@contextmanager
def new_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Yield a folder that becomes --to when the block ends without an error; --to must be new or empty."""
    names = ("source", "queries", "qrels", "train_qrels", "corpus", "dev", "data_dir", "reference")
    check_new_folder(args.to, [getattr(args, name) for name in names])
    with atomic_folder(args.to) as folder:
        yield folder


def to_official(args: argparse.Namespace) -> None:
    """Convert another data set to the official layout."""
    path = Path(args.source)
    if args.split == TRAIN:
        raise UserError(f"--split {TRAIN}: the dev set cannot be the training queries; name another split")
    is_dpr = args.kind == "dpr"
    columns, names = columns_of(args)
    quotes = args.quotes or ("csv" if is_dpr else "")
    source = Source(columns, DPR_COLUMNS if is_dpr else (), names, quotes, args.encoding or "")
    if args.kind == "auto":
        args.kind, path = recognize(path, source)
        if args.kind == OFFICIAL:
            raise UserError(f"{path}: is in the official layout already; use it as --data_dir {path}")
        log(f"{path}: recognized as {KNOWN_AS.get(args.kind, args.kind)}")
    min_grade = args.min_grade or (T2RANKING_GRADE if args.kind == "t2ranking" else 1)
    with new_folder(args) as folder:
        layout = OfficialLayoutWriter(folder, args.seed, source.counts, min_grade, args.skip_duplicates)
        conversion = Conversion(source, layout, args.split, args.skip_dangling, min_grade)
        passages, queries = records_of(args, path, conversion)
        layout.write_collection(passages, path)
        dev = layout.write_queries(queries, args.queries or path) if queries != () else 0
        if args.split and not dev:
            raise UserError(f"--split {args.split}: no query of this split has a positive passage")
        source.counts.log()
        log_unread(path, source)
    log(f"wrote {args.to}")


def columns_of(args: argparse.Namespace) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return what --columns says: the columns in order, empty for those not read; or {value: its column}."""
    words = args.columns.split(",") if args.columns else []
    named = [word for word in words if word != "-"]
    names = dict(word.split("=", 1) for word in named) if all("=" in word for word in named) else {}
    values = {*names} if names else {*named}
    required = {"text"} if args.kind in ("auto", *IN_ROWS) else {"id", "text"}
    if words and not (required <= values <= {"id", "title", "text"} and len(named) == len(values)):
        expected = f"{' and '.join(sorted(required))}, each once; id, title, - for another column"
        raise UserError(f"--columns {args.columns}: expected {expected}; or by name, text=NAME,title=NAME")
    return ((), names) if names else (tuple(word.replace("-", "") for word in words), {})


def records_of(
    args: argparse.Namespace, path: Path, conversion: Conversion
) -> tuple[Iterator[Passage], Iterable[Query]]:
    """Return the passages and the queries of a data set; nothing is read yet."""
    if args.kind == TEXT:
        return read_plain_text(plain_files(path), conversion.source), ()
    if args.kind == PASSAGES:
        source = guess_columns(path, conversion.source)
        return read_passages(path, source, need_ids=False, fields=GUESSED, line_ids=True), ()
    if args.kind == "jsonl":
        check_no_rows(path, conversion.source)
        return read_passages(path, conversion.source), own_queries(args, conversion)
    corpus = Path(args.corpus) if args.corpus else None
    if corpus is None and not path.is_file():
        corpus = find_corpus(path)
    if args.kind in JUDGED:
        if corpus is None:
            raise UserError(f"{path}: no file corpus or collection in this folder; pass --corpus")
        return read_passages(corpus, conversion.source), folder_queries(path, conversion)
    conversion.files, conversion.has_corpus = row_files(path, conversion), corpus is not None
    if args.dev:
        train = [(file, split) for file, split in conversion.files if split == TRAIN]
        conversion.files = [*train, (Path(args.dev), "dev")]
    if corpus is None:
        if args.columns:
            raise UserError("--columns: there is no corpus file whose columns it could name; omit it")
        log("no corpus file: the collection is the passages of the rows (--corpus names the full one)")
        return row_passages(conversion), row_queries(conversion)
    return read_passages(corpus, conversion.source, need_ids=False), row_queries(conversion)


def check_no_rows(path: Path, source: Source) -> None:
    """UserError when a file of passages begins with a query and its passages."""
    for line, entry in source.entries(path) if is_json(path) else ():
        if name := next((name for name in ROWS if isinstance(entry.get(name), list)), None):
            kinds = ", ".join(IN_ROWS)
            raise FormatError(path, line, f"a query with {name} (expected a passage); use one of {kinds}")
        return


def own_queries(args: argparse.Namespace, conversion: Conversion) -> Iterable[Query]:
    """Return your own queries: rows with their passages, or with judgments in files of their own."""
    named = ((args.train_qrels, TRAIN), (args.qrels, "dev"))
    qrels = [(Path(name), split) for name, split in named if name]
    if not args.queries:
        if qrels:
            raise UserError("--qrels needs the queries that it judges; pass --queries")
        return ()
    queries = Path(args.queries)
    if qrels:
        return judged_queries(queries, qrels, conversion)
    if args.min_grade:
        raise UserError("--min_grade: rows of positives and negatives have no grades; omit it")
    if not is_json(queries):
        raise UserError(f"{queries}: a table has no answers; pass --qrels or --train_qrels")
    conversion.files = [(queries, TRAIN)]
    return row_queries(conversion)


def log_unread(path: Path, source: Source) -> None:
    """Log the data files of the source folder that were not read."""
    found = [*data_files(path).values(), *data_files(path / "qrels").values()]
    unread = [str(file.relative_to(path)) for files in found for file in files if file not in source.opened]
    if unread:
        log(f"{path}: files not read: {', '.join(unread)}")


def from_feedback(args: argparse.Namespace) -> None:
    """Write the clicks on the search page as training and dev files, beside a link to the collection."""
    source = Path(args.source)
    if not args.data_dir:
        raise UserError("feedback needs the data folder that was searched; pass --data_dir")
    collection = Path(args.data_dir) / "passage-collection"
    counts = Counts()
    share = DEV_SHARE if args.dev_share is None else args.dev_share
    passages, queries = feedback_queries(source, collection, share, args.seed, counts)
    with new_folder(args) as folder:
        layout = OfficialLayoutWriter(folder, args.seed, counts)
        layout.link_collection(collection, passages)
        layout.write_queries(queries, source)
        counts.log()
    log(f"wrote {args.to}")


# ---- from the official layout


def to_beir(args: argparse.Namespace) -> None:
    """Write the official layout as a BEIR folder."""
    source = Path(args.source)
    collection = PassageCollection(source / "passage-collection")
    map_path = source / "passage-collection/passage2id.map.json"
    ids = [pid.decode() for pid in read_passage_ids(map_path)]
    check_length(map_path, len(ids), len(collection))
    dev = read_dev(source / "dev/dev.json") if (source / "dev/dev.json").exists() else []
    train = training_queries(source / "train/cross.train.tsv", collection, ids)
    prefix = "train"
    while any(query.qid.startswith(prefix) for query in dev):
        prefix += "_"
    for at, query in enumerate(train):
        query.qid = f"{prefix}{at}"
    known = set(ids)
    unknown = [(query.qid, pid) for query in dev for pid in query.answers if pid not in known]
    if unknown:
        warn(f"{len(unknown):,} dev judgments of passages that are not in the collection, e.g. {unknown[0]}")
    with new_folder(args) as folder:
        write_corpus(
            folder / "corpus.jsonl", collection, ids, read_titles(source / "passage-collection" / TITLES)
        )
        with atomic_write(folder / "queries.jsonl") as file:
            for qid, text in [*((q.qid, q.query) for q in dev), *((q.qid, q.text) for q in train)]:
                file.write(json.dumps({"_id": qid, "text": text}, ensure_ascii=False) + "\n")
        judged = [(q.qid, pid, q.grades.get(pid, 1)) for q in dev for pid in q.answers]
        write_qrels(folder / "qrels/dev.tsv", judged)
        write_qrels(
            folder / "qrels/train.tsv", [(q.qid, pid, g) for q in train for pid, g in q.grades.items()]
        )
    log(f"wrote {args.to} ({len(ids):,} passages, {len(dev):,} dev and {len(train):,} training queries)")


def write_corpus(path: Path, collection: PassageCollection, ids: list[str], titles: dict[int, str]) -> None:
    """Write the passages as JSON lines, with their titles apart from their texts."""
    with atomic_write(path) as file:
        for row, pid in enumerate(ids):
            title, text = titles.get(row, ""), collection[row]
            entry = {"_id": pid, "title": title, "text": text.removeprefix(f"{title} ") if title else text}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


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
    """Return the training queries that have a positive, without qids. Passages are matched by text."""
    if not path.exists():
        return []
    counts, first_row = Counts(), rows_by_text(path, collection)
    found: dict[str, Query] = {}
    for line, text in read_lines(path):
        row = parse_cross_row(text, path, line)
        query = found.setdefault(row.query, Query("", row.query, "train", path, line))
        if (at := first_row[text_hash(row.passage)]) < 0:
            counts.add("training passages are not in the collection: omitted", path, line)
        elif what := query.judge(ids[at], row.label, 1):
            counts.add(what, path, line)
    answered = [query for query in found.values() if any(query.grades.values())]
    for query in found.values():
        if not any(query.grades.values()):
            counts.add("training queries have no positive passage: omitted", path, query.line)
    counts.log()
    return answered


def rows_by_text(path: Path, collection: PassageCollection) -> dict[int, int]:
    """Return {hash of a passage of cross.train.tsv: the first row with that text, or -1}."""
    first_row = {text_hash(parse_cross_row(text, path, line).passage): -1 for line, text in read_lines(path)}
    for start in range(0, len(collection), READ_ROWS):
        for at, text in enumerate(collection[start : start + READ_ROWS], start):
            if first_row.get(hashed := text_hash(text)) == -1:
                first_row[hashed] = at
    return first_row


def to_trec(args: argparse.Namespace) -> None:
    """Write a result as a TREC run, and the reference as qrels."""
    source = Path(args.source)
    if args.reference:
        check_reference(args.reference)
    if args.data_dir:
        check_kinds((source, RUN))
        result = own_run(source, Path(args.data_dir))
    else:
        check_result(source, "pass the --data_dir that was searched")
        result = read_scored(source)
    grades = read_grades(Path(args.reference)) if args.reference else {}
    for path, lists in ((source, result), (args.reference, grades)):
        for qid, pids in lists.items():
            check_trec_ids(path, [qid, *pids])
    if grades and (unknown := len(result.keys() - grades.keys())):
        warn(f"{source}: {unknown:,} queries are not in {args.reference}")
    with new_folder(args) as folder:
        with atomic_write(folder / "run.txt") as file:
            for qid, scores in result.items():
                for rank, (pid, score) in enumerate(scores.items(), start=1):
                    file.write(f"{qid} Q0 {pid} {rank} {score:.9g} dureader\n")
        if args.reference:
            with atomic_write(folder / "qrels.txt") as file:
                for qid, judged in grades.items():
                    file.writelines(f"{qid} 0 {pid} {judged[pid]}\n" for pid in sorted(judged))
    log(f"wrote {args.to}")


def own_run(run: Path, data: Path) -> dict[str, dict[str, float]]:
    """Return {qid: {pid: score}} of a run over the dev queries of a data folder."""
    return read_own_run(run, data / "dev/q2qid.dev.json", data / "passage-collection/passage2id.map.json")


def check_trec_ids(path: Path | str, ids: list[str]) -> None:
    """UserError for an id that would break a column of a TREC file."""
    for name in ids:
        if not name or any(character.isspace() for character in name):
            raise UserError(
                f"{path}: the id {name!r} is empty or has a blank, which separates TREC columns; rename it"
            )


def from_trec(args: argparse.Namespace) -> None:
    """Write a run of another tool as a result, {qid: [pid, ...]}."""
    check_result_path(args.to, "", [args.source])
    check_result(args.source, "convert it with metric/convert_recall_res_to_json.py")
    ranking = read_ranking(Path(args.source))
    clear_stamp(args.to)
    write_result(args.to, ranking.items())
    stamp_result(args.to, "from_trec", [args.source])
    log(f"wrote {args.to} ({len(ranking):,} queries, {sum(map(len, ranking.values())):,} results)")


# ---- the command line

KINDS = dict.fromkeys(CONVERTED, to_official) | {
    "feedback": from_feedback,
    "to_beir": to_beir,
    "to_trec": to_trec,
    "from_trec": from_trec,
}


def encoding(text: str) -> str:
    """Return the name of an encoding; ArgumentTypeError for an unknown one."""
    try:
        "".encode(text)  # LookupError also for codecs that are not of texts
        return codecs.lookup(text).name
    except LookupError:
        raise argparse.ArgumentTypeError(f"{text} (expected for example utf-8, gb18030, big5)") from None


def check_options(args: argparse.Namespace) -> None:
    """UserError for an option that this kind does not read."""
    for name, kinds in OPTIONS.items():
        if getattr(args, name) and args.kind not in kinds:
            raise UserError(f"--{name}: not an option of {args.kind} (read by {', '.join(kinds)})")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("source", help="folder or file to read")
    parser.add_argument("--to", required=True, help="new folder to write; from_trec: a new file")
    parser.add_argument("--queries", default="", help="queries for jsonl")
    parser.add_argument("--qrels", default="", help="their judgments, for the dev set")
    parser.add_argument("--train_qrels", default="", help="their judgments, for training")
    parser.add_argument("--corpus", default="", help="the corpus, if its name is not known or not unique")
    parser.add_argument("--dev", default="", help="rows of the dev set, if SOURCE is a file of training rows")
    parser.add_argument(
        "--split", default="", help="split that becomes the dev set; of a file of rows: theirs"
    )
    parser.add_argument("--skip_dangling", action="store_true", help="drop judgments of unknown ids")
    parser.add_argument("--skip_duplicates", action="store_true", help="drop repeated passages: id and text")
    parser.add_argument("--min_grade", type=positive_int, help="of a positive; default 1, for t2ranking 2")
    parser.add_argument("--columns", default="", help="of a corpus: text=NAME,id=NAME or in order: id,text,-")
    parser.add_argument("--encoding", type=encoding, help="of the files; default: as found")
    parser.add_argument(
        "--quotes", choices=("", "csv", "none"), default="", help="of tables; default: as found"
    )
    parser.add_argument("--data_dir", default="", help="data folder that was searched, for feedback")
    parser.add_argument("--dev_share", type=number(0, 1), help="of the queries, for feedback; default 0.3")
    parser.add_argument("--reference", default="", help="dev.json or qrels, for to_trec")
    parser.add_argument("--seed", type=seed, default=42, help="for random negatives")
    args = parser.parse_args(argv)

    def convert() -> None:
        check_options(args)
        KINDS[args.kind](args)

    return exit_status(convert)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
