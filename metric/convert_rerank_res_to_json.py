"""Turn a re-ranker's scores into the JSON that metric/evaluation.py and the leaderboard take.

    python metric/convert_rerank_res_to_json.py SCORE_FILE ID_MAP [OUTPUT]

SCORE_FILE has one number a line, aligned with the lines `qid \\t pid` of ID_MAP. Writes {qid: [pid, ...]}, a
query's passages by score from high to low, at most 50, to `cross_res.json` beside SCORE_FILE or to OUTPUT.
Equal scores keep the order of ID_MAP, which is the first stage's rank. The official tool orders them by the
pid as a string, which is unrelated to relevance: with equal scores the two can differ. Pass logits, not
probabilities: saturated probabilities are equal. Needs numpy and xxhash, but no torch.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

from torch_src.data.formats import read_id_map, read_scores
from torch_src.data.kinds import ID_MAP, SCORES, check_kinds
from torch_src.data.lines import FormatError, read_together, shown, warn_if_cut
from torch_src.data.results import check_result_path, check_same_candidates, stamp_result, write_result
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import warn
from torch_src.runtime.options import OptionParser
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import clear_stamp

DEPTH = 50  # passages per query; the metrics use no more


def read_scored(score_file: str, id_map: str) -> dict[str, dict[str, float]]:
    """Return {qid: {pid: score}}, passages in the order of the id map; the files must be equally long."""
    scores_of: dict[str, dict[str, float]] = {}
    rows = read_together(read_scores(score_file), score_file, read_id_map(id_map), id_map)
    for line, score, (qid, pid) in rows:
        passages = scores_of.setdefault(qid, {})
        if pid in passages:
            raise FormatError(id_map, line, f"duplicate passage {shown(pid)} of the query {shown(qid)}")
        passages[pid] = score
    if not scores_of:
        raise UserError(f"{score_file}: no scores in it")
    return scores_of


def rank(scores: dict[str, float]) -> list[str]:
    """Return the pids from the highest score down; sorted() is stable, so ties keep their order."""
    return sorted(scores, key=scores.__getitem__, reverse=True)[:DEPTH]


def convert(score_file: str, id_map: str, output: str | None = None) -> None:
    """Check both files and write the JSON. On any error nothing is written."""
    check_kinds((score_file, SCORES), (id_map, ID_MAP))
    default = os.path.join(os.path.dirname(score_file), "cross_res.json")
    output = check_result_path(output, default, (score_file, id_map))
    check_same_candidates(score_file, id_map)
    scores_of = read_scored(score_file, id_map)
    for path in (score_file, id_map):
        warn_if_cut(path)
    equal = sum(len(scores) > 1 == len(set(scores.values())) for scores in scores_of.values())
    if equal:
        counted = f"{equal} of {len(scores_of)} queries"
        warn(f"{score_file}: {counted} have one score for all passages and keep the order of the id map")
    clear_stamp(output)
    write_result(output, ((qid, rank(scores)) for qid, scores in scores_of.items()))
    stamp_result(output, "convert_rerank_res_to_json", (score_file, id_map))
    results = sum(min(len(scores), DEPTH) for scores in scores_of.values())
    print(f"{len(scores_of)} queries, {results} results -> {output}")


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, or 2 when an input is wrong."""
    parser = OptionParser("Convert a re-ranker's scores to {qid: [pid, ...]}.")
    parser.add_argument("score_file", metavar="SCORE_FILE", help="one number a line")
    parser.add_argument("id_map", metavar="ID_MAP", help="lines: qid, pid; aligned with SCORE_FILE")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="default: beside SCORE_FILE")
    given = parser.parse_args(argv)
    return exit_status(lambda: convert(given.score_file, given.id_map, given.output))


if __name__ == "__main__":
    sys.exit(main())
