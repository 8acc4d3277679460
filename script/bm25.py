"""BM25 over the whole collection: a lexical baseline, a cold start for mining, half of a hybrid.

    python -m pip install -r requirements-tools.txt
    python script/bm25.py index  --data_dir D --index output/bm25
    python script/bm25.py search --data_dir D --index output/bm25 --run output/bm25/res.top50
    python script/bm25.py fuse   --runs output/res.top50 output/bm25/res.top50 --run output/hybrid/res.top50

Terms: bigrams of Chinese characters (a lone one as it is), Latin words and numbers whole, lower case. The
engine is tantivy, on disk, in bounded memory (--memory_mb); k1 1.2, b 0.75. A run has the same four columns
as that of do_dual_infer.py: it can be converted, scored, re-ranked and mined from. `fuse` joins runs by
reciprocal rank (Cormack et al. 2009), or with --weights by weighted scores, each brought to mean 0 and
variance 1 within a query.
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

import numpy as np

from script.lib.terms import PIECES, terms
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import RunRow, format_run_row, read_queries, read_question_ids, run_by_query
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import duration, log, warn
from torch_src.runtime.output_lock import output_lock
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import (
    clear_stamp,
    fingerprint_files,
    fingerprint_text,
    read_stamp,
    seal,
    up_to_date,
    write_stamp,
)

PIECE_ROWS = 4096  # passages read at a time
RRF = 60  # of reciprocal rank fusion: 1 / (60 + rank)
MARK = "tokens.txt"  # a file of the index folder that its stamp hangs on


def engine():
    """Return tantivy; UserError when it is not installed."""
    try:
        import tantivy
    except ImportError:
        raise UserError("tantivy is not installed: python -m pip install -r requirements-tools.txt") from None
    return tantivy


def schema():
    """Return the schema: terms between blanks, and the row."""
    builder = engine().SchemaBuilder()
    builder.add_text_field("terms", stored=False, tokenizer_name="whitespace", index_option="freq")
    builder.add_integer_field("row", stored=True)
    return builder.build()


def index(given) -> None:
    """Write the index of the collection unless it is up to date."""
    with output_lock(given.index):
        _index(given)


def _index(given) -> None:
    collection = PassageCollection(given.passage_dir, given.index / "cache")
    stamp = {"stage": "bm25", "collection": collection.fingerprint, "terms": PIECES.pattern}
    mark, folder = given.index / MARK, given.index / "tantivy"
    if up_to_date(mark, stamp, log):
        return log(f"{given.index}: up to date")
    clear_stamp(mark)  # first: an index that is half there must not look whole
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tantivy, begun = engine(), time.monotonic()
    writer = tantivy.Index(schema(), path=str(folder)).writer(given.memory_mb << 20, 1)
    for start in range(0, len(collection), PIECE_ROWS):
        for row, text in enumerate(collection[start : start + PIECE_ROWS], start):
            writer.add_document(tantivy.Document(terms=" ".join(terms(text)), row=row))
        if start and start % (64 * PIECE_ROWS) == 0:
            done = start / (time.monotonic() - begun)
            log(f"{start:,}/{len(collection):,} passages  {done:,.0f} passages/s")
    writer.commit()
    writer.wait_merging_threads()
    with atomic_write(mark) as file:
        file.write(f"{len(collection)} passages\n")
    write_stamp(mark, stamp)
    log(f"wrote {given.index} ({len(collection):,} passages) in {duration(time.monotonic() - begun)}")


def search(given) -> None:
    """Write the run of the queries."""
    collection, stamp = (
        PassageCollection(given.passage_dir, given.index / "cache"),
        read_stamp(given.index / MARK),
    )
    if stamp is None or stamp.get("collection") != collection.fingerprint:
        raise UserError(f"{given.index}: no finished index of this collection; run `bm25.py index` first")
    path = given.dev_q
    queries = list(read_question_ids(path)) if path.endswith(".json") else read_queries(path)
    tantivy, made = engine(), schema()
    searcher = tantivy.Index.open(str(given.index / "tantivy")).searcher()
    begun, empty = time.monotonic(), 0
    clear_stamp(given.run)
    with atomic_write(given.run) as file:
        for query in queries:
            hits = best_rows(tantivy, made, searcher, query, given.topk)
            empty += not hits
            for rank, (score, row) in enumerate(hits, start=1):
                file.write(format_run_row(RunRow(query, row, rank, score)))
    seal(given.run, {**stamp, "queries": fingerprint_text("\n".join(queries)), "topk": given.topk})
    if empty:
        log(f"{empty} queries have no term that the collection has: they are not in the run")
    log(f"wrote {given.run} ({len(queries):,} queries) in {duration(time.monotonic() - begun)}")


def best_rows(tantivy, made, searcher, query: str, topk: int) -> list[tuple[float, int]]:
    """Return (score, row) of a query, best first, ties by row. A term asked for twice counts twice."""
    parts = [
        (tantivy.Occur.Should, tantivy.Query.term_query(made, "terms", term, index_option="freq"))
        for term in terms(query)
    ]
    if not parts:
        return []
    hits = searcher.search(tantivy.Query.boolean_query(parts), topk).hits
    return sorted(((score, searcher.doc(at)["row"][0]) for score, at in hits), key=lambda h: (-h[0], h[1]))


def fuse(given) -> None:
    """Write the run that joins several."""
    weights = given.weights or [1.0] * len(given.runs)
    if len(given.runs) < 2 or given.fused is None:
        raise UserError("fuse needs --runs A B ... and --run for the result")
    if given.fused.resolve() in [Path(path).resolve() for path in given.runs]:
        raise UserError(f"--run {given.fused}: one of the runs to fuse")
    if len(weights) != len(given.runs):
        raise UserError(f"--weights: {len(weights)} for {len(given.runs)} runs")
    scores: dict[str, dict[int, float]] = {}
    runs_of: Counter[str] = Counter()
    for path, weight in zip(given.runs, weights, strict=True):
        for query, rows in run_by_query(path):
            runs_of[query] += 1
            if given.weights:
                values = weight * standardised(np.array([row.score for row in rows]))
            else:
                values = np.array([1 / (RRF + row.rank) for row in rows])
            joined = scores.setdefault(query, {})
            floor = float(values.min()) if given.weights else 0.0
            for row, value in zip(rows, values.tolist(), strict=True):
                joined[row.row] = joined.get(row.row, 0.0) + value - floor
    alone = sum(count < len(given.runs) for count in runs_of.values())
    if alone == len(runs_of):
        raise UserError(f"{' '.join(given.runs)}: no query in all of them; are they of one data set?")
    if alone:
        warn(f"{alone:,} of {len(runs_of):,} queries are not in all of the runs")
    clear_stamp(given.run)
    with atomic_write(given.run) as file:
        for query, joined in scores.items():
            best = sorted(joined.items(), key=lambda pair: (-pair[1], pair[0]))[: given.topk]
            for rank, (row, score) in enumerate(best, start=1):
                file.write(format_run_row(RunRow(query, row, rank, score)))
    seal(given.run, {"stage": "fuse", "runs": fingerprint_files(given.runs), "weights": given.weights})
    log(f"wrote {given.run} ({len(scores):,} queries of {len(given.runs)} runs)")


def standardised(values: np.ndarray) -> np.ndarray:
    """Return the values at mean 0 and variance 1; zeros where they are all alike."""
    spread = values.std()
    return (values - values.mean()) / spread if spread > 1e-12 else np.zeros_like(values)


def main(argv: list[str]) -> int:
    """Return the exit status."""
    plain = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    options.add_argument("what", choices=["index", "search", "fuse"])
    options.add_argument("--data_dir", default="dureader-retrieval-baseline-dataset", help="official layout")
    options.add_argument("--passage_dir", default="", help="default: data_dir/passage-collection")
    options.add_argument("--dev_q", default="", help="queries; default: data_dir/dev/dev.q.format")
    options.add_argument("--index", type=Path, default=Path("output/bm25"), help="folder of the index")
    options.add_argument("--run", type=Path, default=None, help="the run to write; default: index/res.topK")
    options.add_argument("--topk", type=int, default=50)
    options.add_argument("--memory_mb", type=int, default=256, help="that indexing may take")
    options.add_argument("--runs", nargs="+", default=[], help="runs to fuse")
    options.add_argument(
        "--weights", nargs="+", type=float, default=[], help="of their scores; default: by rank"
    )
    given = options.parse_args(argv)
    given.passage_dir = given.passage_dir or f"{given.data_dir}/passage-collection"
    given.dev_q = given.dev_q or f"{given.data_dir}/dev/dev.q.format"
    given.fused = given.run
    given.run = given.run or given.index / f"res.top{given.topk}"
    return exit_status(lambda: {"index": index, "search": search, "fuse": fuse}[given.what](given))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
