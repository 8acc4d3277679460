"""Turn a run (query text, row, rank, score) into the JSON that metric/evaluation.py and the leaderboard take.

    python metric/convert_recall_res_to_json.py QUERY2ID PARA2ID MODEL_OUTPUT TOPK [OUTPUT]

QUERY2ID is {query text: qid}. PARA2ID is {"0": pid, "1": pid, ...} by global row, read as a stream.
MODEL_OUTPUT has lines `query text \\t global row \\t rank from 1 \\t score`. TOPK is the number of passages
per query: more is an error, fewer are a warning. Writes {qid: [pid, ...]} in the order of the
rank column, beside MODEL_OUTPUT (`cross_res.json` for `res.rerank*`, `dual_res.json` for any other name) or
to OUTPUT. Needs numpy and xxhash, but no torch.
"""

import os
import sys
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np

from torch_src.data.collection import PassageCollection, collection_files
from torch_src.data.formats import read_q2qid, read_run
from torch_src.data.kinds import PASSAGE_MAP, QUERY_MAP, RUN, check_kinds
from torch_src.data.lines import FormatError, shown, warn_if_cut
from torch_src.data.passage_ids import pids_of
from torch_src.data.results import (
    check_collection,
    check_result_path,
    searched_collection,
    stamp_result,
    write_result,
)
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import warn
from torch_src.runtime.options import OptionParser, positive_int
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import clear_stamp, read_stamp


class Ranking:
    """One query's results in arrays, 24 bytes a result: training runs have 86,395 x 200 of them."""

    __slots__ = ("rows", "ranks", "scores", "lines")

    def __init__(self) -> None:
        self.rows, self.ranks = array("q"), array("I")
        self.scores, self.lines = array("d"), array("I")

    def append(self, row: int, rank: int, score: float, line: int) -> None:
        self.rows.append(row)
        self.ranks.append(rank)
        self.scores.append(score)
        self.lines.append(line)

    def sort(self) -> None:
        """Sort all columns by rank."""
        order = sorted(range(len(self.rows)), key=self.ranks.__getitem__)
        for name in self.__slots__:
            column = getattr(self, name)
            setattr(self, name, array(column.typecode, [column[i] for i in order]))


def default_output(model_output: str) -> str:
    """Return the path beside the run: `cross_res.json` for a re-ranked one, else `dual_res.json`."""
    folder, name = os.path.split(model_output)
    return os.path.join(folder, "cross_res.json" if name.startswith("res.rerank") else "dual_res.json")


def check_paths(model_output: str, output: str | None, inputs: tuple[str, ...]) -> str:
    """Return the output. UserError when it is not a new file or an earlier result.

    A re-ranked run must not replace the first stage's result.
    """
    path = check_result_path(output, default_output(model_output), inputs)
    reranked = os.path.basename(default_output(model_output)) == "cross_res.json"
    if reranked and os.path.basename(path) == "dual_res.json":
        raise UserError(f"{path}: the first stage's result; name another output for a re-ranked run")
    return path


def check_map(model_output: str, para2id: str) -> None:
    """UserError when the run is of another collection than the passages beside the map, if there are any."""
    folder, cache = Path(para2id).parent, Path(model_output).parent / "cache"
    if searched_collection(model_output) is None:
        return
    try:
        collection_files(folder)
    except UserError:
        return
    collection = PassageCollection(folder, cache if cache.is_dir() else None)
    check_collection(model_output, collection.checksum, folder)


def read_results(path: str, qid_of: dict[str, str], topk: int) -> dict[str, Ranking]:
    """Return {qid: Ranking} in file order. A query's lines need not be adjacent."""
    rankings: dict[str, Ranking] = {}
    for line, (query, row, rank, score) in enumerate(read_run(path), start=1):
        qid = qid_of.get(query)
        if qid is None:
            raise FormatError(path, line, f"the query {shown(query)} is not in the query map")
        ranking = rankings.setdefault(qid, Ranking())
        if len(ranking.rows) == topk:
            raise FormatError(path, line, f"too many results for {shown(query)} (expected at most {topk})")
        ranking.append(row, rank, score, line)
    if not rankings:
        raise UserError(f"{path}: no results in it")
    return rankings


def order_by_rank(path: str, ranking: Ranking) -> int:
    """Sort the ranking; return the first line whose score is above that of the rank before, or 0.

    FormatError when a rank or a row is a duplicate.
    """
    ranking.sort()
    line_of: dict[int, int] = {}
    rise = 0
    for i, (row, line) in enumerate(zip(ranking.rows, ranking.lines, strict=True)):
        if i and ranking.ranks[i] == ranking.ranks[i - 1]:
            first = ranking.lines[i - 1]
            message = f"duplicate rank {ranking.ranks[i]} of a query (first in line {first})"
            raise FormatError(path, line, message)
        if row in line_of:
            first, again = sorted((line_of[row], line))
            raise FormatError(path, again, f"duplicate row {row} of a query (first in line {first})")
        line_of[row] = line
        if i and not rise and ranking.scores[i] > ranking.scores[i - 1]:
            rise = line
    return rise


def find_pids(path: str, para2id: str, rankings: dict[str, Ranking]) -> tuple[np.ndarray, list[str]]:
    """Return (ascending rows of the run, their pids); FormatError for a row that the passage map lacks."""
    rows = np.unique(np.concatenate([np.frombuffer(ranking.rows, np.int64) for ranking in rankings.values()]))
    pids = pids_of(para2id, rows)
    missing = {row for row, pid in zip(rows.tolist(), pids, strict=True) if pid is None}
    if missing:
        line, row = min(
            (line, row)
            for ranking in rankings.values()
            for line, row in zip(ranking.lines, ranking.rows, strict=True)
            if row in missing
        )
        message = f"row {row} is not in {para2id}, which lacks {len(missing)} rows of this run"
        raise FormatError(path, line, f"{message}; use the map of the collection that was searched")
    return rows, [pid for pid in pids if pid is not None]


def warn_about(path: str, queries: int, rankings: dict[str, Ranking], topk: int, rises: list[int]) -> None:
    """Warn of everything that is valid but may be a sign of trouble."""
    short = [len(ranking.rows) for ranking in rankings.values() if len(ranking.rows) < topk]
    if short:
        counted = f"{len(short)} of {len(rankings)} queries"
        line = f"{path}: {counted} have fewer than {topk} results, the fewest {min(short)}"
        if (read_stamp(path) or {}).get("stage") == "bm25":
            print(f"{line} (BM25 returns passages that share a word with the query)")
        else:
            warn(line)
    if len(rankings) < queries:
        warn(f"{path}: {queries - len(rankings)} of the {queries} queries of the query map have no result")
    if rises:
        warn(
            f"{path}:{min(rises)}: the score rises with the rank (in {len(rises)} queries); "
            "the rank column is used"
        )


def convert(query2id: str, para2id: str, model_output: str, topk: int, output: str | None = None) -> None:
    """Check the run and write its JSON. On any error nothing is written."""
    inputs = (query2id, para2id, model_output)
    check_kinds((query2id, QUERY_MAP), (para2id, PASSAGE_MAP), (model_output, RUN))
    output = check_paths(model_output, output, inputs)
    check_map(model_output, para2id)
    qid_of = read_q2qid(query2id)
    rankings = read_results(model_output, qid_of, topk)
    warn_if_cut(model_output)
    rises = [rise for ranking in rankings.values() if (rise := order_by_rank(model_output, ranking))]
    rows, pids = find_pids(model_output, para2id, rankings)
    warn_about(model_output, len(qid_of), rankings, topk, rises)
    lists = (
        (qid, [pids[slot] for slot in np.searchsorted(rows, ranking.rows)])
        for qid, ranking in rankings.items()
    )
    clear_stamp(output)
    write_result(output, lists)
    stamp_result(output, "convert_recall_res_to_json", inputs, topk=topk)
    results = sum(len(ranking.rows) for ranking in rankings.values())
    print(f"{len(rankings)} queries, {results} results -> {output}")


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, or 2 when an input is wrong."""
    parser = OptionParser("Convert a run to {qid: [pid, ...]}.")
    parser.add_argument("query2id", metavar="QUERY2ID", help="JSON object {query text: qid}")
    parser.add_argument("para2id", metavar="PARA2ID", help='JSON object {"0": pid, ...} by global row')
    parser.add_argument("model_output", metavar="MODEL_OUTPUT", help="lines: query, row, rank, score")
    parser.add_argument("topk", metavar="TOPK", type=positive_int, help="results that each query should have")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="default: beside MODEL_OUTPUT")
    given = parser.parse_args(argv)
    return exit_status(
        lambda: convert(given.query2id, given.para2id, given.model_output, given.topk, given.output)
    )


if __name__ == "__main__":
    sys.exit(main())
