"""Turn a re-ranker's scores into the JSON that metric/evaluation.py and the leaderboard take.

    python metric/convert_rerank_res_to_json.py SCORE_FILE ID_MAP [OUTPUT]

SCORE_FILE has one number a line, aligned with the lines `qid \\t pid` of ID_MAP. Writes {qid: [pid, ...]}, a
query's passages by score from high to low, at most 50, to `cross_res.json` beside SCORE_FILE or to OUTPUT.
Equal scores keep the order of ID_MAP, that is the first stage's rank. The official tool orders them by the
pid as a string, which says nothing of relevance: where scores tie, the two can differ. Give logits, not
probabilities: saturated ones tie. Standard library alone.
"""

from __future__ import annotations

import argparse
import os
import sys

if __package__:  # imported from the repository root
    from . import common
else:  # run by its path
    import common

InputError, shown = common.InputError, common.shown

KEPT = 50  # passages a query; the metric looks no further


def check_alignment(score_file, id_map):
    """Refuse files of different lengths: line numbers are all that ties a score to its passage."""
    counts = []
    for path in (score_file, id_map):
        with open(path, "rb") as file:
            counts.append(sum(1 for _ in file))
        common.warn_if_cut(path)
    if counts[0] != counts[1]:
        raise InputError(
            f"{score_file}:{min(counts) + 1}: expected as many lines as {id_map}, "
            f"found {counts[0]} scores for {counts[1]} passages"
        )
    if not counts[0]:
        raise InputError(f"{score_file}:1: expected scores, found an empty file")


def parse_ids(path, line, text):
    """(qid, pid) of one line of the id map."""
    columns = text.split("\t")
    if len(columns) != 2 or not all(columns):
        raise InputError(f"{path}:{line}: expected 2 columns (qid, pid) between tabs, found {shown(text)}")
    if text.endswith("\r"):
        raise InputError(
            f"{path}:{line}: expected lines that end in \\n alone, found \\r\\n; "
            "the \\r would become part of the pid"
        )
    return columns


def read_scores(score_file, id_map):
    """{qid: {pid: score}}, passages in the order of the id map."""
    scores_of = {}
    scores = common.text_lines(score_file)
    for line, ids in common.text_lines(id_map):
        qid, pid = parse_ids(id_map, line, ids)
        text = next(scores)[1]
        score = common.finite_number(text)
        if score is None:
            raise InputError(f"{score_file}:{line}: expected one finite number, found {shown(text)}")
        passages = scores_of.setdefault(qid, {})
        if pid in passages:
            raise InputError(
                f"{id_map}:{line}: expected each passage once a query, "
                f"found {shown(pid)} again for {shown(qid)}"
            )
        passages[pid] = score
    return scores_of


def rank(scores):
    """The pids of {pid: score} from the highest score down; sorted() is stable, so ties keep their order."""
    return sorted(scores, key=scores.__getitem__, reverse=True)[:KEPT]


def convert(score_file, id_map, output=None):
    """Check both files, write the JSON and say so. On any error nothing is written."""
    output = output or os.path.join(os.path.dirname(score_file), "cross_res.json")
    common.check_output(output, (score_file, id_map))
    check_alignment(score_file, id_map)
    scores_of = read_scores(score_file, id_map)
    alike = sum(len(scores) > 1 == len(set(scores.values())) for scores in scores_of.values())
    if alike:
        common.warn(
            f"{score_file}: {alike} of {len(scores_of)} queries have one score for all passages "
            "and keep the order of the id map"
        )
    common.write_lists(output, ((qid, rank(scores)) for qid, scores in scores_of.items()))
    common.write_stamp(output, "convert_rerank_res_to_json", (score_file, id_map))
    results = sum(min(len(scores), KEPT) for scores in scores_of.values())
    print(f"{len(scores_of)} queries, {results} results -> {output}")


def main(argv=None):
    """Exit status: 0, or 2 where an input is wrong."""
    parser = argparse.ArgumentParser(description="Convert a re-ranker's scores to {qid: [pid, ...]}.")
    parser.add_argument("score_file", metavar="SCORE_FILE", help="one number a line")
    parser.add_argument("id_map", metavar="ID_MAP", help="lines: qid, pid; aligned with SCORE_FILE")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="default: beside SCORE_FILE")
    given = parser.parse_args(argv)
    return common.exit_status(convert, given.score_file, given.id_map, given.output)


if __name__ == "__main__":
    sys.exit(main())
