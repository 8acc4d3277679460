"""Dev retrieval while training: a fixed pool of passages, searched exactly, scored as metric/evaluation.py
does.

The pool: every positive of the dev queries, the auxiliary candidates when they are there, and random passages
of the collection; or the whole collection where that is smaller. Its figures are higher than those of the
full collection.
"""

import os

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.data.formats import DevQuery, read_candidates, read_dev
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.retrieval.encoding import Encoder, to_float16
from torch_src.runtime.log import log, warn

TOPK = 50


class DevRetrieval:
    """Dev queries and their pool of passages, (pid, text) each once."""

    def __init__(self, queries: list[DevQuery], pool: dict[str, str]):
        self.queries = queries
        self.pids, self.passages = np.array(list(pool)), list(pool.values())
        self.reference = {query.qid: set(query.answers) for query in queries}

    def retrieve(self, query_encoder: Encoder, passage_encoder: Encoder) -> dict[str, list[str]]:
        """Return {qid: pids, best first}, at most TOPK, as metric/evaluation.py scores them."""
        queries = query_encoder.encode([query.query for query in self.queries])
        # As they would be stored: the figures are then those of inference over the same passages.
        passages = to_float16(passage_encoder.encode(self.passages), 0).astype(np.float32)
        # A few thousand queries by 10^5 passages: one plain product a slice of queries is enough here.
        result = {}
        for start in range(0, len(queries), 256):
            scores = queries[start : start + 256] @ passages.T
            best = np.argsort(-scores, axis=1, kind="stable")[:, :TOPK]
            for query, rows in zip(self.queries[start : start + 256], best, strict=True):
                result[query.qid] = [str(pid) for pid in self.pids[rows]]
        return result


def build_dev_retrieval(hp, collection_cache: str) -> DevRetrieval | None:
    """Return the dev set and pool that the settings name; None (said once) when the files are not there."""
    for path in (hp.dev_set_path, hp.passage_dir_path, hp.passage_ids_path):
        if not os.path.exists(path):
            warn(f"{path} is not there: no dev retrieval while training, the last weights are kept")
            return None
    queries = read_dev(hp.dev_set_path)
    collection = PassageCollection(hp.passage_dir_path, collection_cache)
    pids = read_passage_ids(hp.passage_ids_path, collection_cache)
    check_length(hp.passage_ids_path, len(pids), len(collection))
    pool, named = _named_passages(hp, queries)
    if len(collection) <= hp.dev_random_passages + len(pool):
        rows, name = range(len(collection)), f"the whole collection of {len(collection):,} passages"
        pool = {}  # in the order of the rows, as inference has it when scores are equal
    else:
        rows = np.random.default_rng([hp.seed, 2]).choice(
            len(collection), hp.dev_random_passages, replace=False
        )
        rows, name = np.sort(rows).tolist(), f"{named} + {hp.dev_random_passages:,} random passages"
    for row in rows:
        pool.setdefault(pids[row].decode(), collection[row])
    lost = sum(pid not in pool for query in queries for pid in query.answers)
    if lost:
        warn(f"{lost} positives of {hp.dev_set_path} have a pid that is not in {hp.passage_ids_path}")
    if name.endswith("random passages"):
        pool = dict(sorted(pool.items()))  # positives stand first otherwise, and would win every tie
        name += f" ({len(pool):,} in all; not the full-collection figures)"
    log(f"dev retrieval: {len(queries):,} queries over {name}")
    return DevRetrieval(queries, pool)


def _named_passages(hp, queries: list[DevQuery]) -> tuple[dict[str, str], str]:
    """Return ({pid: text} of the dev positives and the auxiliary candidates, what they are)."""
    pool = {pid: text for query in queries for pid, text in query.answers.items()}
    ids_path = hp.dev_candidates_path.replace(".res.tsv", ".res.id_map.tsv")
    if not os.path.exists(hp.dev_candidates_path):
        return pool, "dev positives"
    for _, pid, _, text in read_candidates(hp.dev_candidates_path, ids_path):
        pool.setdefault(pid, text)
    return pool, "dev positives + auxiliary candidates"
