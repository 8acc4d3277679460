"""Score a result against the reference, with the measures of DuReader-retrieval.

    python metric/evaluation.py REFERENCE RESULT

REFERENCE is dev.json, a JSON object a line: {question_id, answer_paragraphs: [{paragraph_id}, ...]}.
RESULT is one JSON object {qid: [pid, ...]}, best first. Prints one JSON line: MRR@10, QueriesRanked,
recall@1, recall@50, the three measures as fractions. recall@k is a hit rate: the share of queries with a
relevant passage among the first k; trec_eval's recall is another measure. Standard library alone.
"""

from __future__ import annotations

import argparse
import json
import sys

if __package__:  # imported from the repository root
    from . import common
else:  # run by its path
    import common

InputError, shown = common.InputError, common.shown

MRR_DEPTH = 10  # ranks that MRR looks at
DEPTH = 50  # ranks that anything looks at; what stands below is cut
MEASURES = ("MRR@10", "recall@1", "recall@50")


def answers_of(sample):
    """(qid, set of relevant pids) of one reference object, or None where it has another shape."""
    if not isinstance(sample, dict) or not isinstance(sample.get("question_id"), str):
        return None
    paragraphs = sample.get("answer_paragraphs")
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, dict) for paragraph in paragraphs):
        return None
    pids = [paragraph.get("paragraph_id") for paragraph in paragraphs]
    return (sample["question_id"], set(pids)) if all(isinstance(pid, str) for pid in pids) else None


def load_reference(path):
    """{qid: set of relevant pids} in file order, none of the sets empty."""
    reference = {}
    for line, text in common.text_lines(path):
        try:
            sample = answers_of(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{line}: expected one JSON object a line, found {error}") from None
        if sample is None:
            raise InputError(
                f"{path}:{line}: expected {{question_id: text, answer_paragraphs: "
                f"[{{paragraph_id: text}}, ...]}}, found {shown(text)}"
            )
        qid, pids = sample
        if qid in reference:
            raise InputError(f"{path}:{line}: expected each question_id once, found {shown(qid)} again")
        if not pids:
            raise InputError(f"{path}:{line}: expected an answer paragraph, found none for {shown(qid)}")
        reference[qid] = pids
    if not reference:
        raise InputError(f"{path}:1: expected reference queries, found an empty file")
    return reference


class RepeatedQid(Exception):
    """A qid that a result names twice; its one argument is the qid."""


def line_at(data, position):
    """The line, from 1, of a position in the bytes of a file."""
    return data.count(b"\n", 0, max(0, position)) + 1


def once_each(pairs):
    """The pairs of a JSON object as a dict; json alone would keep the last of two equal keys in silence."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedQid(key)
        found[key] = value
    return found


def parse_result(path, data):
    """The JSON value in the bytes of a result file."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once_each)
    except RepeatedQid as error:
        qid = error.args[0]
        line = line_at(data, data.rfind(json.dumps(qid).encode("ascii")))
        raise InputError(f"{path}:{line}: expected each qid once, found {shown(qid)} again") from None
    except UnicodeDecodeError as error:
        line = line_at(data, error.start)
        raise InputError(f"{path}:{line}: expected UTF-8, found {data[error.start :][:4]!r}") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}:{line}: expected one JSON object, found {error}") from None


def load_result(path):
    """{qid: list of pids, best first}, lists as long as they are in the file."""
    with open(path, "rb") as file:
        data = file.read()
    result = parse_result(path, data)
    if not isinstance(result, dict):
        raise InputError(f"{path}:1: expected {{qid: [pid, ...]}}, found a JSON {type(result).__name__}")
    for qid, pids in result.items():
        if not isinstance(pids, list) or not all(isinstance(pid, str) for pid in pids):
            line = line_at(data, data.find(json.dumps(qid).encode("ascii")))
            raise InputError(
                f"{path}:{line}: expected a list of pid strings for {shown(qid)}, found {shown(repr(pids))}"
            )
    return result


def per_query(reference, result):
    """{qid: {measure: value}} for every reference query, in that order; without a list all values are 0."""
    values = {}
    for qid, relevant in reference.items():
        ranks = (rank for rank, pid in enumerate(result.get(qid, ())[:DEPTH], 1) if pid in relevant)
        first = next(ranks, None)
        values[qid] = {
            "MRR@10": 1.0 / first if first and first <= MRR_DEPTH else 0.0,
            "recall@1": 1.0 if first == 1 else 0.0,
            "recall@50": 1.0 if first else 0.0,
        }
    return values


def compute_metrics(reference, result):
    """{MRR@10, QueriesRanked, recall@1, recall@50}: means over the reference queries, and how many lists.

    InputError where no query is in common: that is a result of another set, not a score of 0.
    """
    if not any(qid in reference for qid in result):
        raise InputError(
            f"expected queries of the reference, found none of its {len(reference)} "
            f"among the {len(result)} of the result"
        )
    totals = dict.fromkeys(MEASURES, 0.0)
    for values in per_query(reference, result).values():
        for name in MEASURES:  # one by one: sum() rounds otherwise from Python 3.12 on
            totals[name] += values[name]
    means = {name: total / len(reference) for name, total in totals.items()}
    return {
        "MRR@10": means["MRR@10"],
        "QueriesRanked": len(result),
        "recall@1": means["recall@1"],
        "recall@50": means["recall@50"],
    }


def warn_about(path, reference, result):
    """One line for each thing that lowers the numbers or leaves them alone without a word."""
    repeats = [len(pids[:DEPTH]) - len(set(pids[:DEPTH])) for pids in result.values()]
    if any(repeats):
        common.warn(f"{path}: {sum(repeats)} repeated pids waste ranks, in {sum(map(bool, repeats))} queries")
    missing, unknown = len(reference.keys() - result.keys()), len(result.keys() - reference.keys())
    if missing:
        common.warn(f"{path}: {missing} of the {len(reference)} reference queries have no list and count 0")
    if unknown:
        common.warn(f"{path}: {unknown} queries are not in the reference; they count in QueriesRanked alone")


def evaluate(reference_path, result_path):
    """Print the measures as one JSON line."""
    reference, result = load_reference(reference_path), load_result(result_path)
    common.warn_if_stale(result_path)
    try:
        metrics = compute_metrics(reference, result)
    except InputError as error:
        raise InputError(f"{result_path}:1: {error}") from None
    warn_about(result_path, reference, result)
    print(json.dumps(metrics))


def main(argv=None):
    """Exit status: 0, or 2 where an input is wrong."""
    parser = argparse.ArgumentParser(description="Print MRR@10, recall@1 and recall@50 of a result.")
    parser.add_argument("reference", metavar="REFERENCE", help="dev.json: a JSON object a line")
    parser.add_argument("result", metavar="RESULT", help="JSON object {qid: [pid, ...]}")
    given = parser.parse_args(argv)
    return common.exit_status(evaluate, given.reference, given.result)


if __name__ == "__main__":
    sys.exit(main())
