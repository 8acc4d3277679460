"""Dev evaluation while training, shared between the processes and scored by metric/evaluation.py.

Dual encoder: exact retrieval over a fixed pool of passages: every positive of the dev queries, the auxiliary
candidates when present, and random passages; or the whole collection when that is smaller. The metrics are
higher than those over the full collection. Cross-encoder: re-ranking of fixed candidates.
"""

import os
from pathlib import Path

import numpy as np
import torch

from metric.evaluation import MEASURES, compute_metrics
from torch_src.data.candidates import OFFICIAL, Candidates, official_ids_path, open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import DevQuery, read_candidates, read_dev
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.retrieval.encoding import Encoder, to_float16
from torch_src.retrieval.reranking import PairScorer, rank_pairs
from torch_src.runtime.log import log, warn
from torch_src.training.distributed import Processes

DEPTH = 50  # passages retrieved for a query
QUERIES_AT_ONCE = 256  # rows of one product with all pool passages
Result = dict[str, list[str]]  # qid -> pids, best first


class DevRetrieval:
    """Dev queries and the pool of passages, each (pid, text) once."""

    def __init__(self, queries: list[DevQuery], pool: dict[str, str]):
        self.queries = [query.query for query in queries]
        self.qids = [query.qid for query in queries]
        self.reference = {query.qid: set(query.answers) for query in queries}
        self.pids, self.passages = np.array(list(pool)), list(pool.values())

    def evaluate(
        self, query_encoder: Encoder, passage_encoder: Encoder, processes: Processes
    ) -> dict[str, float]:
        """Return the dev metrics; each process encodes its shard of the queries and passages."""
        queries = _encode_shared(query_encoder, self.queries, processes)
        # rounded to fp16 as stored vectors are: the metrics equal those of inference over the same passages
        passages = to_float16(_encode_shared(passage_encoder, self.passages, processes), 0)
        result = self._search(queries, passages.astype(np.float32)) if processes.is_first else {}
        return _metrics(self.reference, result, processes)

    def _search(self, queries: np.ndarray, passages: np.ndarray) -> Result:
        result = {}
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            scores = queries[start : start + QUERIES_AT_ONCE] @ passages.T
            best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
            for qid, rows in zip(self.qids[start : start + QUERIES_AT_ONCE], best, strict=True):
                result[qid] = [str(pid) for pid in self.pids[rows]]
        return result


class DevReranking:
    """Fixed dev candidates with their pids and the reference."""

    def __init__(self, candidates: Candidates, pids: list[str], queries: dict[str, DevQuery]):
        """`queries`: query text -> dev query of every query in `candidates`."""
        self.candidates, self.pids = candidates, np.array(pids)
        self.qids = [queries[query].qid for query in candidates.queries]
        self.reference = {queries[query].qid: set(queries[query].answers) for query in candidates.queries}

    def scores(self, scorer: PairScorer, processes: Processes) -> np.ndarray:
        """Return the logits (N,) float32 of all candidates; each process scores its shard."""
        shard = processes.shard(len(self.candidates))
        scored = scorer.score_candidates(self.candidates, [(shard.start, shard.stop)])
        logits = np.concatenate([np.empty(0, np.float32), *(found for _, found, _ in scored)])
        return _gather(logits, len(self.candidates), processes)

    def evaluate(self, scorer: PairScorer, processes: Processes) -> dict[str, float]:
        """Return the dev metrics after re-ranking."""
        scores = self.scores(scorer, processes)
        return _metrics(self.reference, self._ranked(scores) if processes.is_first else {}, processes)

    def metrics(self, scores: np.ndarray) -> dict[str, float]:
        """Return the metrics of the candidates in the order of these scores."""
        return _measures(self.reference, self._ranked(scores))

    def _ranked(self, scores: np.ndarray) -> Result:
        ranked = zip(self.qids, rank_pairs(self.candidates, scores), strict=True)
        return {qid: self.pids[order].tolist() for qid, (_, order) in ranked}

    def irrelevant_scores(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores of the candidates that do not answer their query."""
        spans = zip(self.qids, self.candidates.spans(), strict=True)
        irrelevant = [[pid not in self.reference[qid] for pid in self.pids[span]] for qid, (_, span) in spans]
        return scores[np.concatenate(irrelevant)]


def _measures(reference: dict[str, set[str]], result: Result) -> dict[str, float]:
    metrics = compute_metrics(reference, result)
    return {name: float(metrics[name]) for name in MEASURES}


def _metrics(reference: dict[str, set[str]], result: Result, processes: Processes) -> dict[str, float]:
    """Return the metrics that the first process computes from its result."""
    metrics = _measures(reference, result) if processes.is_first else dict.fromkeys(MEASURES, 0.0)
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=processes.device)
    return dict(zip(MEASURES, processes.broadcast_(values).tolist(), strict=True))


def _encode_shared(encoder: Encoder, texts: list[str], processes: Processes) -> np.ndarray:
    shard = texts[processes.shard(len(texts))]
    vectors = encoder.encode(shard) if shard else np.empty((0, encoder.width), np.float32)
    return _gather(vectors, len(texts), processes)


def _gather(rows: np.ndarray, count: int, processes: Processes) -> np.ndarray:
    if processes.world == 1:
        return rows
    return processes.all_gather_rows(torch.from_numpy(rows).to(processes.device), count).cpu().numpy()


def open_dev_retrieval(
    dev_set: str,
    passage_dir: str,
    passage_ids: str,
    candidates: str,
    random_passages: int,
    seed: int,
    cache_dir: str,
) -> DevRetrieval | None:
    """Return the dev queries and their pool; None, with a warning, when a file is missing."""
    if _is_missing(dev_set, passage_dir, passage_ids):
        return None
    queries = read_dev(dev_set)
    collection = PassageCollection(passage_dir, cache_dir)
    pids = read_passage_ids(passage_ids, cache_dir)
    check_length(passage_ids, len(pids), len(collection))
    pool, source = {pid: text for query in queries for pid, text in query.answers.items()}, "dev positives"
    if os.path.exists(candidates):
        source += " + auxiliary candidates"
        for _, pid, _, text in read_candidates(candidates, official_ids_path(candidates)):
            pool.setdefault(pid, text)
    if len(collection) <= random_passages + len(pool):
        # in row order: ties rank as at inference
        pool = {}
        for row in range(len(collection)):
            pool.setdefault(pids[row].decode(), collection[row])
        source = f"the whole collection of {len(collection):,} passages"
        missing = sum(pid not in pool for query in queries for pid in query.answers)
        if missing:
            warn(f"{dev_set}: {missing} positives have a pid that is not in {passage_ids}")
    else:
        draw = np.random.default_rng([seed, 2])
        for row in np.sort(draw.choice(len(collection), random_passages, replace=False)).tolist():
            pool.setdefault(pids[row].decode(), collection[row])
        pool = dict(sorted(pool.items()))  # positives first would win every tie
        source += f" + {random_passages:,} random passages"
        source += f" ({len(pool):,} in total; metrics are higher than over the full collection)"
    log(f"dev retrieval: {len(queries):,} queries over {source}")
    return DevRetrieval(queries, pool)


def open_dev_reranking(
    dev_set: str,
    candidates_path: str,
    passage_dir: str,
    passage_ids: str,
    queries: int,
    depth: int,
    cache_dir: str,
) -> DevReranking | None:
    """Return `depth` dev candidates of each of the first `queries` queries; None when a file is missing."""
    if _is_missing(dev_set, candidates_path):
        return None
    is_run = not candidates_path.endswith(OFFICIAL)
    collection = PassageCollection(passage_dir, cache_dir) if is_run else None
    candidates = open_candidates(candidates_path, collection, cache_dir).head(queries, depth)
    dev = {query.query: query for query in read_dev(dev_set)}
    unknown = [query for query in candidates.queries if query not in dev]
    if unknown:
        warn(f"{candidates_path}: {len(unknown)} queries are not in {dev_set}; no dev evaluation")
        return None
    pids = candidates.pids
    if collection is not None:
        ids = read_passage_ids(passage_ids, cache_dir)
        check_length(passage_ids, len(ids), len(collection))
        pids = ids[candidates.rows]
    assert pids is not None
    log(
        f"dev re-ranking: {len(candidates.queries):,} queries, {len(candidates):,} pairs of {candidates_path}"
    )
    return DevReranking(candidates, [pid.decode() for pid in pids], dev)


def _is_missing(*paths: str) -> bool:
    for path in paths:
        if not Path(path).exists():
            warn(f"{path}: no such file; no dev evaluation, the last weights are saved as the best")
            return True
    return False
