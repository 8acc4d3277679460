"""The sample collection has the properties its README lists: sizes, lengths, balance and matching ids."""

from collections import Counter

from toy_world import SAMPLE, lines

from torch_src.data.collection import PassageCollection
from torch_src.data.formats import (
    parse_cross_row,
    parse_dual_row,
    read_candidates,
    read_dev,
    read_q2qid,
    read_queries,
)
from torch_src.data.passage_ids import read_passage_ids

COLLECTION = PassageCollection(SAMPLE / "passage-collection")
PASSAGES = COLLECTION[:]


def test_sizes_and_lengths():
    dev = read_dev(SAMPLE / "dev/dev.json")
    train = {row.split("\t")[0] for row in lines(SAMPLE / "train/dual.train.tsv")}
    assert (len(PASSAGES), len(train), len(dev)) == (450, 630, 180)
    assert len(set(PASSAGES)) == 450 and all(50 <= len(text) <= 300 for text in PASSAGES)
    assert not train & {query.query for query in dev}


def test_ids_match():
    ids = [pid.decode() for pid in read_passage_ids(SAMPLE / "passage-collection/passage2id.map.json")]
    texts = dict(zip(ids, PASSAGES, strict=True))
    dev = read_dev(SAMPLE / "dev/dev.json")
    q2qid = read_q2qid(SAMPLE / "dev/q2qid.dev.json")
    assert [q2qid[query] for query in read_queries(SAMPLE / "dev/dev.q.format")] == [q.qid for q in dev]
    assert all(texts[pid] == text for query in dev for pid, text in query.answers.items())
    auxiliary = [SAMPLE / f"auxiliary/dev.retrieval.top50.{end}.tsv" for end in ("res", "res.id_map")]
    candidates = list(read_candidates(*auxiliary))
    assert len(candidates) == 180 * 50 and all(texts[pid] == text for _, pid, _, text in candidates)


def test_training_passages_are_in_the_collection():
    known = set(PASSAGES)
    for at, text in enumerate(lines(SAMPLE / "train/dual.train.tsv"), start=1):
        row = parse_dual_row(text, "dual.train.tsv", at)
        assert row.positive in known and row.negative in known and row.positive != row.negative


def test_negatives_reveal_no_positive():
    """A model that only learns which passages are often relevant has no advantage."""
    rows = [parse_cross_row(text, "c", at) for at, text in enumerate(lines(SAMPLE / "train/cross.train.tsv"))]
    labels = [row.label for row in rows]
    assert labels == [1, 0, 0, 0, 0, 0, 0] * (len(rows) // 7)
    positives = Counter(row.passage for row in rows if row.label)
    negatives = Counter(row.passage for row in rows if not row.label)
    assert negatives == Counter({passage: 6 * count for passage, count in positives.items()})
    answers = {(row.query, row.passage) for row in rows if row.label}
    assert not answers & {(row.query, row.passage) for row in rows if not row.label}


def test_queries_do_not_repeat_their_passages():
    for query in read_dev(SAMPLE / "dev/dev.json"):
        grams = {query.query[at : at + 2] for at in range(len(query.query) - 1)}
        for text in query.answers.values():
            assert sum(gram in text for gram in grams) <= 0.6 * len(grams), query.query
