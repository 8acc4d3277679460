"""BM25 over the whole collection: a lexical baseline, a source of mined negatives, half of a hybrid.

    python -m pip install -r requirements-tools.txt
    python script/bm25.py index  --data_dir D --index output/bm25
    python script/bm25.py search --data_dir D --index output/bm25 --run output/bm25/res.top50
    python script/bm25.py fuse   --runs output/res.top50 output/bm25/res.top50 --run output/hybrid/res.top50

Terms are pairs of adjacent characters of Chinese and other scripts without spaces, and words and numbers of
all other scripts, in lower case and NFKC. A single character in a query matches every passage that has it.
The engine is tantivy: an index on disk, bounded memory (--memory_mb), k1 1.2, b 0.75. A run has the same four
columns as the one of do_dual_infer.py: it can be converted, scored, re-ranked and mined. `fuse` combines runs
by reciprocal rank (Cormack et al. 2009), or with --weights by a weighted sum of scores, each normalized to
mean 0 and variance 1 within its query.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import numpy as np

from script.lib.terms import PIECES, is_single, single_characters, terms
from torch_src.data.collection import PassageCollection, collection_files
from torch_src.data.formats import RunRow, format_run_row, read_query_texts, run_by_query
from torch_src.data.results import common_collection
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import atomic_folder, atomic_write
from torch_src.runtime.libraries import import_library
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import duration, log, warn
from torch_src.runtime.options import OptionParser, integer, number, positive_int
from torch_src.runtime.outputs import RUN, Output, begins, check_apart, check_outputs, never
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import (
    JsonDict,
    checksum_files,
    checksum_text,
    clear_stamp,
    read_stamp,
    stamp_path,
    up_to_date,
    write_stamp,
)

READ_ROWS = 4096  # passages in memory at a time
RRF_OFFSET = 60  # reciprocal rank fusion scores a rank by 1 / (60 + rank)
MARK = "tokens.txt"  # the file of the index folder with the stamp
IS_MARK = begins(rb"[0-9]+ passages\n")
TERMS, CHARACTERS = "terms", "characters"  # fields of the index
MEMORY_MB = (15, 4000)  # the engine's own limits


def import_tantivy() -> Any:
    """Return the module; UserError if it cannot be imported."""
    return import_library("tantivy", "requirements-tools.txt")


@contextmanager
def engine_errors(folder: Path) -> Iterator[None]:
    """Turn what tantivy raises (ValueError, or a panic that is no Exception) into a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and not isinstance(error, ValueError | OverflowError):
            raise
        fix = "is the disk full? else delete the folder and run `bm25.py index` again"
        raise UserError(f"{folder}: the search engine failed ({first_line(error)[:200]}); {fix}") from error


def make_schema(tantivy: Any) -> Any:
    """Return the schema of the index: terms and characters separated by spaces, and the row."""
    builder = tantivy.SchemaBuilder()
    for field in (TERMS, CHARACTERS):
        builder.add_text_field(field, stored=False, tokenizer_name="whitespace", index_option="freq")
    builder.add_integer_field("row", stored=True)
    return builder.build()


def index_stamp(collection: PassageCollection) -> JsonDict:
    """Return the stamp of the index of a collection."""
    return {"stage": "bm25", "collection": collection.checksum, "terms": f"NFKC {PIECES.pattern}"}


def check_index_folder(folder: Path, passage_dir: str) -> None:
    """UserError unless the folder is missing, empty, or an index of this program."""
    check_apart(folder, [passage_dir])
    mark = folder / MARK
    if not folder.is_dir() or stamp_path(mark).exists() or (mark.is_file() and IS_MARK(mark)):
        return
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in ("lock", "cache")):
        raise UserError(f"{folder}: not an index of bm25.py (it contains {foreign[0]}); name another folder")


def index(args: argparse.Namespace) -> None:
    """Write the index of the collection unless it is up to date."""
    check_index_folder(args.index, args.passage_dir)
    collection_files(args.passage_dir)  # UserError before a folder is made
    with folder_lock(args.index), engine_errors(args.index):
        write_index(args)


def write_index(args: argparse.Namespace) -> None:
    collection = PassageCollection(args.passage_dir, args.index / "cache")
    stamp, mark = index_stamp(collection), args.index / MARK
    if up_to_date(mark, stamp, log):
        return log(f"{args.index}: up to date")
    tantivy, start_time = import_tantivy(), time.monotonic()
    clear_stamp(mark)  # first: an incomplete index must not have a stamp
    with atomic_folder(args.index / "tantivy") as folder:
        writer = tantivy.Index(make_schema(tantivy), path=str(folder)).writer(args.memory_mb << 20, 1)
        for start in range(0, len(collection), READ_ROWS):
            for row, text in enumerate(collection[start : start + READ_ROWS], start):
                writer.add_document(document(tantivy, text, row))
            if start and start % (64 * READ_ROWS) == 0:
                speed = start / (time.monotonic() - start_time)
                log(f"indexed {start:,}/{len(collection):,} passages  {speed:,.0f} passages/s")
        writer.commit()
        writer.wait_merging_threads()
    with atomic_write(mark) as file:
        file.write(f"{len(collection)} passages\n")
    write_stamp(mark, stamp)
    log(f"wrote {args.index} ({len(collection):,} passages) in {duration(time.monotonic() - start_time)}")


def document(tantivy: Any, text: str, row: int) -> Any:
    """Return the entry of a passage."""
    fields = {TERMS: " ".join(terms(text)), CHARACTERS: " ".join(single_characters(text))}
    return tantivy.Document(row=row, **fields)


def search(args: argparse.Namespace) -> None:
    """Write the run of the queries."""
    own = never if args.run_option else RUN  # without a stamp
    parts = [args.index / name for name in (MARK, "tantivy", "cache")]
    check_outputs([Output(args.run, own, ("bm25",))], [args.dev_q, args.passage_dir, *parts])
    found = read_stamp(args.index / MARK)
    collection = PassageCollection(args.passage_dir, args.index / "cache") if found else None
    stamp = index_stamp(collection) if collection else {}
    if not found or not collection or not stamp.items() <= found.items():
        raise UserError(f"{args.index}: no finished index of this collection; run `bm25.py index` first")
    queries = read_query_texts(args.dev_q)
    tantivy = import_tantivy()
    schema = make_schema(tantivy)
    start, empty, depth = time.monotonic(), 0, min(args.topk, len(collection))
    with engine_errors(args.index):
        searcher = tantivy.Index.open(str(args.index / "tantivy")).searcher()
        clear_stamp(args.run)
        with atomic_write(args.run) as file:
            for query in queries:
                hits = best_rows(tantivy, schema, searcher, query, depth)
                empty += not hits
                for rank, (score, row) in enumerate(hits, start=1):
                    file.write(format_run_row(RunRow(query, row, rank, score)))
    write_stamp(args.run, {**stamp, "queries": checksum_text("\n".join(queries)), "topk": args.topk})
    if empty:
        log(f"{empty} queries share no term with the collection: they are not in the run")
    log(f"wrote {args.run} ({len(queries):,} queries) in {duration(time.monotonic() - start)}")


def best_rows(tantivy: Any, schema: Any, searcher: Any, query: str, topk: int) -> list[tuple[float, int]]:
    """Return (score, row), best first, ties by row. A term that the query repeats counts each time.

    A single character is compared with all characters of a passage, not with its pairs.
    """
    clauses = [
        (tantivy.Occur.Should, tantivy.Query.term_query(schema, field, term, index_option="freq"))
        for term in terms(query)
        for field in [CHARACTERS if is_single(term) else TERMS]
    ]
    if not clauses:
        return []
    hits = searcher.search(tantivy.Query.boolean_query(clauses), topk).hits
    return sorted(((score, searcher.doc(at)["row"][0]) for score, at in hits), key=lambda h: (-h[0], h[1]))


def fuse(args: argparse.Namespace) -> None:
    """Write a run that combines several."""
    weights = args.weights or [1.0] * len(args.runs)
    if len(args.runs) < 2 or not args.run_option:
        raise UserError("fuse needs --runs A B ... and --run for the result")
    check_outputs([Output(args.run, never, ("fuse",))], args.runs)
    if len(weights) != len(args.runs):
        raise UserError(f"--weights: {len(weights)} values for {len(args.runs)} runs")
    if not any(weights):
        raise UserError("--weights: all are 0; at least one must be above 0")
    collection = common_collection(args.runs)
    scores: dict[str, dict[int, float]] = {}
    runs_with: Counter[str] = Counter()  # query -> number of runs that contain it
    for path, weight in zip(args.runs, weights, strict=True):
        for query, rows in run_by_query(path):
            runs_with[query] += 1
            if args.weights:
                values = weight * standardized(np.array([row.score for row in rows]))
            else:
                values = np.array([1 / (RRF_OFFSET + row.rank) for row in rows])
            fused = scores.setdefault(query, {})
            floor = float(values.min()) if args.weights else 0.0  # the score of passages not in this run
            for line, value in zip(rows, values.tolist(), strict=True):
                fused[line.row] = fused.get(line.row, 0.0) + value - floor
    partial = sum(count < len(args.runs) for count in runs_with.values())
    if partial == len(runs_with):
        raise UserError(f"{' '.join(args.runs)}: no query is in all runs (expected runs of one data set)")
    if partial:
        warn(f"{partial:,} of {len(runs_with):,} queries are not in all runs")
    clear_stamp(args.run)
    with atomic_write(args.run) as file:
        for query, fused in scores.items():
            best = sorted(fused.items(), key=lambda pair: (-pair[1], pair[0]))[: args.topk]
            for rank, (row, score) in enumerate(best, start=1):
                file.write(format_run_row(RunRow(query, row, rank, score)))
    made_from = {"runs": checksum_files(args.runs), "weights": args.weights, "topk": args.topk}
    searched = {"collection": collection} if collection else {}
    write_stamp(args.run, {"stage": "fuse", **made_from, **searched})
    log(f"wrote {args.run} ({len(scores):,} queries of {len(args.runs)} runs)")


def standardized(values: np.ndarray) -> np.ndarray:
    """Return the values at mean 0 and variance 1; zeros if they are all equal."""
    spread = values.std()
    return (values - values.mean()) / spread if spread > 1e-12 else np.zeros_like(values)


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("command", choices=["index", "search", "fuse"])
    parser.add_argument("--data_dir", default="dureader-retrieval-baseline-dataset", help="official layout")
    parser.add_argument("--passage_dir", default="", help="default: data_dir/passage-collection")
    parser.add_argument("--dev_q", default="", help="queries; default: data_dir/dev/dev.q.format")
    parser.add_argument("--index", type=Path, default=Path("output/bm25"), help="folder of the index")
    parser.add_argument("--run", default="", help="run to write; default: index/res.topK")
    parser.add_argument("--topk", type=positive_int, default=50, help="passages per query")
    parser.add_argument(
        "--memory_mb", type=integer(*MEMORY_MB), default=256, help="memory for indexing, 15 to 4000"
    )
    parser.add_argument("--runs", nargs="+", default=[], help="runs to fuse")
    parser.add_argument(
        "--weights", nargs="+", type=number(0, 1e6), default=[], help="of scores; default: fuse by rank"
    )
    args = parser.parse_args(argv)
    args.passage_dir = args.passage_dir or f"{args.data_dir}/passage-collection"
    args.dev_q = args.dev_q or f"{args.data_dir}/dev/dev.q.format"
    args.run_option = args.run
    args.run = Path(args.run or args.index / f"res.top{args.topk}")
    return exit_status(lambda: {"index": index, "search": search, "fuse": fuse}[args.command](args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
