"""BM25 over the whole collection: a lexical baseline, a source of mined negatives, half of a hybrid.

    python -m pip install -r requirements-demo.txt
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from torch_src.data.collection import PassageCollection, collection_files
from torch_src.data.formats import RunRow, format_run_row, read_query_texts, run_by_query
from torch_src.data.results import common_collection
from torch_src.hparams import DATA_DIR
from torch_src.retrieval.bm25 import (
    ENGINE,
    IS_MARK,
    MARK,
    MEMORY_MB,
    READ_ROWS,
    Bm25Index,
    build_index,
    index_stamp,
    is_index_of,
)
from torch_src.retrieval.fusion import fuse_rankings
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write, from_root
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import duration, log, warn
from torch_src.runtime.options import OptionParser, integer, number, positive_int
from torch_src.runtime.outputs import RUN, Output, check_apart, check_outputs, never
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import (
    checksum_files,
    checksum_text,
    clear_stamp,
    read_stamp,
    stamp_path,
    up_to_date,
    write_stamp,
)

MEMORY_LIMITS = (15, 4000)  # MB, the engine's own


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
    with folder_lock(args.index):
        write_index(args)


def write_index(args: argparse.Namespace) -> None:
    collection = PassageCollection(args.passage_dir, args.index / "cache")
    if up_to_date(args.index / MARK, index_stamp(collection), log):
        return log(f"{args.index}: up to date")
    start_time = time.monotonic()

    def indexed(rows: int) -> None:
        if rows % (64 * READ_ROWS) == 0:
            speed = rows / (time.monotonic() - start_time)
            log(f"indexed {rows:,}/{len(collection):,} passages  {speed:,.0f} passages/s")

    build_index(args.index, collection, args.memory_mb, indexed)


def search(args: argparse.Namespace) -> None:
    """Write the run of the queries."""
    own = never if args.run_option else RUN  # without a stamp
    parts = [args.index / name for name in (MARK, ENGINE, "cache")]
    check_outputs([Output(args.run, own, ("bm25",))], [args.dev_q, args.passage_dir, *parts])
    finished = read_stamp(args.index / MARK) is not None
    collection = PassageCollection(args.passage_dir, args.index / "cache") if finished else None
    if not collection or not is_index_of(args.index, collection):
        raise UserError(f"{args.index}: no finished index of this collection; run `bm25.py index` first")
    queries = read_query_texts(args.dev_q)
    opened = Bm25Index(args.index)
    start, empty, depth = time.monotonic(), 0, min(args.topk, len(collection))
    clear_stamp(args.run)
    with atomic_write(args.run) as file:
        for query in queries:
            hits = opened.search(query, depth)
            empty += not hits
            for rank, (row, score) in enumerate(hits, start=1):
                file.write(format_run_row(RunRow(query, row, rank, score)))
    made_from = {"queries": checksum_text("\n".join(queries)), "topk": args.topk}
    write_stamp(args.run, {**index_stamp(collection), **made_from})
    if empty:
        log(f"{empty} queries share no term with the collection: they are not in the run")
    log(f"wrote {args.run} ({len(queries):,} queries) in {duration(time.monotonic() - start)}")


def fuse(args: argparse.Namespace) -> None:
    """Write a run that combines several."""
    if len(args.runs) < 2 or not args.run_option:
        raise UserError("fuse needs --runs A B ... and --run for the result")
    check_outputs([Output(args.run, never, ("fuse",))], args.runs)
    if args.weights and len(args.weights) != len(args.runs):
        raise UserError(f"--weights: {len(args.weights)} values for {len(args.runs)} runs")
    if args.weights and not any(args.weights):
        raise UserError("--weights: all are 0; at least one must be above 0")
    collection = common_collection(args.runs)
    rankings: dict[str, list[list[tuple[int, float]]]] = {}  # query -> its ranking in each run, if any
    for at, path in enumerate(args.runs):
        for query, rows in run_by_query(path):
            found = rankings.setdefault(query, [[] for _ in args.runs])
            found[at] = [(row.row, row.score) for row in rows]
    partial = sum(not all(found) for found in rankings.values())
    if partial == len(rankings):
        raise UserError(f"{' '.join(args.runs)}: no query is in all runs (expected runs of one data set)")
    if partial:
        warn(f"{partial:,} of {len(rankings):,} queries are not in all runs")
    clear_stamp(args.run)
    with atomic_write(args.run) as file:
        for query, found in rankings.items():
            best = fuse_rankings(found, args.weights)[: args.topk]
            for rank, (row, score) in enumerate(best, start=1):
                file.write(format_run_row(RunRow(query, row, rank, score)))
    made_from = {"runs": checksum_files(args.runs), "weights": args.weights, "topk": args.topk}
    searched = {"collection": collection} if collection else {}
    write_stamp(args.run, {"stage": "fuse", **made_from, **searched})
    log(f"wrote {args.run} ({len(rankings):,} queries of {len(args.runs)} runs)")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("command", choices=["index", "search", "fuse"])
    parser.add_argument("--data_dir", default=from_root(DATA_DIR), help="official layout")
    parser.add_argument("--passage_dir", default="", help="default: data_dir/passage-collection")
    parser.add_argument("--dev_q", default="", help="queries; default: data_dir/dev/dev.q.format")
    parser.add_argument(
        "--index", type=Path, default=Path(from_root("output/bm25")), help="folder of the index"
    )
    parser.add_argument("--run", default="", help="run to write; default: index/res.topK")
    parser.add_argument("--topk", type=positive_int, default=50, help="passages per query")
    parser.add_argument(
        "--memory_mb", type=integer(*MEMORY_LIMITS), default=MEMORY_MB, help="memory for indexing, 15 to 4000"
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
