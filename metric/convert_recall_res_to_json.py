"""Turn a run (query text, row, rank, score) into the JSON that metric/evaluation.py and the leaderboard take.

    python metric/convert_recall_res_to_json.py QUERY2ID PARA2ID MODEL_OUTPUT TOPK [OUTPUT]

QUERY2ID is {query text: qid}. PARA2ID is {"0": pid, "1": pid, ...} by global row, read as a stream.
MODEL_OUTPUT has lines `query text \\t global row \\t rank from 1 \\t score`. TOPK is the number of passages
that each query should have: more is an error, fewer a warning. Writes {qid: [pid, ...]} in the order of the
rank column, beside MODEL_OUTPUT (`cross_res.json` for `res.rerank*`, `dual_res.json` for any other name) or
to OUTPUT. Standard library alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from array import array
from bisect import bisect_left

if __package__:  # imported from the repository root
    from . import common
else:  # run by its path
    import common

InputError, shown = common.InputError, common.shown


class Ranking:
    """One query's results in arrays, 24 bytes a result: training runs have 86,395 x 200 of them."""

    __slots__ = ("rows", "ranks", "scores", "lines")

    def __init__(self):
        self.rows, self.ranks = array("q"), array("I")
        self.scores, self.lines = array("d"), array("I")

    def append(self, row, rank, score, line):
        self.rows.append(row)
        self.ranks.append(rank)
        self.scores.append(score)
        self.lines.append(line)


def default_output(model_output):
    """The path beside the run: `cross_res.json` for a re-ranked one, else `dual_res.json`."""
    folder, name = os.path.split(model_output)
    return os.path.join(folder, "cross_res.json" if name.startswith("res.rerank") else "dual_res.json")


def check_paths(model_output, output, inputs):
    """Refuse an output over an input, and a re-ranked run over the first stage's result."""
    common.check_output(output, inputs)
    reranked = os.path.basename(default_output(model_output)) == "cross_res.json"
    if reranked and os.path.basename(output) == "dual_res.json":
        raise InputError(f"{output}: expected another name for a re-ranked run, found the first stage's")


def read_q2qid(path):
    """{query text: qid}, one to one: a run knows its queries by their text alone."""
    qid_of, line_of = {}, {}
    for line, key, value in common.json_pairs(path):
        query, qid = common.json_text(path, line, key), common.json_text(path, line, value)
        if query in qid_of:
            raise InputError(
                f"{path}:{line}: expected each query text once, found {shown(query)} again; "
                "the map cannot tell two queries of the same text apart: merge them, "
                "one line in dev.q.format and one qid whose answers are the union"
            )
        if qid in line_of:
            raise InputError(
                f"{path}:{line}: expected each qid once, found {shown(qid)} again, "
                f"which line {line_of[qid]} gives to another query"
            )
        qid_of[query], line_of[qid] = qid, line
    return qid_of


def parse_result(path, line, text):
    """(query, row, rank, score) of one line of a run."""
    columns = text.split("\t")
    if len(columns) != 4:
        raise InputError(
            f"{path}:{line}: expected 4 columns (query text, row, rank, score) between tabs, "
            f"found {len(columns)}"
        )
    row, rank = common.whole_number(columns[1]), common.whole_number(columns[2], digits=9)
    score = common.finite_number(columns[3])
    if row is None:
        raise InputError(f"{path}:{line}: expected a row, an integer from 0, found {shown(columns[1])}")
    if not rank:
        raise InputError(f"{path}:{line}: expected a rank, an integer from 1, found {shown(columns[2])}")
    if score is None:
        raise InputError(f"{path}:{line}: expected a score, a finite number, found {shown(columns[3])}")
    return columns[0], row, rank, score


def read_results(path, qid_of, topk):
    """{qid: Ranking} in file order. A query's lines need not be adjacent."""
    rankings = {}
    for line, text in common.text_lines(path):
        query, row, rank, score = parse_result(path, line, text)
        qid = qid_of.get(query)
        if qid is None:
            raise InputError(f"{path}:{line}: expected a query of the query map, found {shown(query)}")
        ranking = rankings.get(qid)
        if ranking is None:
            ranking = rankings[qid] = Ranking()
        if len(ranking.rows) == topk:
            raise InputError(
                f"{path}:{line}: expected at most {topk} results a query, found one more for {shown(query)}"
            )
        ranking.append(row, rank, score, line)
    if not rankings:
        raise InputError(f"{path}:1: expected results, found an empty file")
    return rankings


def order_by_rank(path, ranking):
    """Sort the ranking by rank; no rank or row may repeat. Return the first line whose score rises, or 0."""
    order = sorted(range(len(ranking.rows)), key=ranking.ranks.__getitem__)
    for name in Ranking.__slots__:
        column = getattr(ranking, name)
        setattr(ranking, name, array(column.typecode, [column[i] for i in order]))
    line_of, rise = {}, 0
    for i, row in enumerate(ranking.rows):
        line = ranking.lines[i]
        if i and ranking.ranks[i] == ranking.ranks[i - 1]:
            raise InputError(
                f"{path}:{line}: expected each rank once a query, found rank {ranking.ranks[i]} "
                f"again (first in line {ranking.lines[i - 1]})"
            )
        if row in line_of:
            first, again = sorted((line_of[row], line))
            raise InputError(
                f"{path}:{again}: expected each row once a query, found row {row} again "
                f"(first in line {first})"
            )
        line_of[row] = line
        if i and not rise and ranking.scores[i] > ranking.scores[i - 1]:
            rise = line
    return rise


def read_rows(path, wanted, chunk_bytes=common.CHUNK_BYTES):
    """The pids of the `wanted` rows (sorted, unique) in their order, None for a row that the map lacks."""
    pids = [None] * len(wanted)
    for line, key, value in common.json_pairs(path, chunk_bytes):
        text = common.json_text(path, line, key)
        row = common.whole_number(text)
        if row is None or (text[0] == "0" and len(text) > 1):
            raise InputError(
                f"{path}:{line}: expected a row number as key, found {shown(text)}; is this the passage map?"
            )
        slot = bisect_left(wanted, row)
        if slot < len(wanted) and wanted[slot] == row:
            if pids[slot] is not None:
                raise InputError(f"{path}:{line}: expected each row once, found row {row} again")
            pids[slot] = common.json_text(path, line, value)
    return pids


def check_rows(path, para2id, rankings, wanted, pids):
    """Refuse a run that names rows which the passage map lacks: it comes from another collection."""
    absent = {wanted[slot] for slot, pid in enumerate(pids) if pid is None}
    if absent:
        line, row = min(
            (ranking.lines[i], row)
            for ranking in rankings.values()
            for i, row in enumerate(ranking.rows)
            if row in absent
        )
        raise InputError(
            f"{path}:{line}: expected a row of {para2id}, found {row} ({len(absent)} rows are "
            "missing there); are run and map of the same collection?"
        )


def warn_about(path, qid_of, rankings, topk, rises):
    """One line for each thing that is legal but may be a sign of trouble."""
    short = [len(ranking.rows) for ranking in rankings.values() if len(ranking.rows) < topk]
    if short:
        common.warn(
            f"{path}: {len(short)} of {len(rankings)} queries have fewer than {topk} results, "
            f"the fewest {min(short)}"
        )
    if len(rankings) < len(qid_of):
        common.warn(
            f"{path}: {len(qid_of) - len(rankings)} of the {len(qid_of)} queries of the query map "
            "have no result"
        )
    if rises:
        common.warn(
            f"{path}:{min(rises)}: the score rises with the rank (so in {len(rises)} queries); "
            "the rank column decides"
        )


def convert(query2id, para2id, model_output, topk, output=None):
    """Check the run, write its JSON and say so. On any error nothing is written."""
    output = output or default_output(model_output)
    check_paths(model_output, output, (query2id, para2id, model_output))
    qid_of = read_q2qid(query2id)
    rankings = read_results(model_output, qid_of, topk)
    common.warn_if_cut(model_output)
    rises = [rise for rise in (order_by_rank(model_output, ranking) for ranking in rankings.values()) if rise]
    wanted = array("q", sorted({row for ranking in rankings.values() for row in ranking.rows}))
    pids = read_rows(para2id, wanted)
    check_rows(model_output, para2id, rankings, wanted, pids)
    warn_about(model_output, qid_of, rankings, topk, rises)
    common.write_lists(
        output,
        (
            (qid, [pids[bisect_left(wanted, row)] for row in ranking.rows])
            for qid, ranking in rankings.items()
        ),
    )
    inputs = (query2id, para2id, model_output)
    common.write_stamp(output, "convert_recall_res_to_json", inputs, topk=topk)
    results = sum(len(ranking.rows) for ranking in rankings.values())
    print(f"{len(rankings)} queries, {results} results -> {output}")


def positive(text):
    """The integer from 1 that an argument spells."""
    number = common.whole_number(text)
    if not number:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, found {text!r}")
    return number


def main(argv=None):
    """Exit status: 0, or 2 where an input is wrong."""
    parser = argparse.ArgumentParser(description="Convert a run to {qid: [pid, ...]}.")
    parser.add_argument("query2id", metavar="QUERY2ID", help="JSON object {query text: qid}")
    parser.add_argument("para2id", metavar="PARA2ID", help='JSON object {"0": pid, ...} by global row')
    parser.add_argument("model_output", metavar="MODEL_OUTPUT", help="lines: query, row, rank, score")
    parser.add_argument("topk", metavar="TOPK", type=positive, help="results that each query should have")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="default: beside MODEL_OUTPUT")
    given = parser.parse_args(argv)
    return common.exit_status(
        convert, given.query2id, given.para2id, given.model_output, given.topk, given.output
    )


if __name__ == "__main__":
    sys.exit(main())
