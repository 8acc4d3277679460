"""do_cross_infer.py: res.top50 + cross_params.bin -> res.rerank50, cross_res.json."""

import json
import os
from pathlib import Path

import numpy as np

from metric.evaluation import compute_metrics
from torch_src import hparams
from torch_src.data import kinds
from torch_src.data.candidates import OFFICIAL, Candidates, official_ids_path, open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import RunRow, format_run_row, read_dev
from torch_src.data.kinds import check_kinds
from torch_src.data.negative_scores import read_negative_scores
from torch_src.data.passage_ids import check_length, read_passage_ids, rows_of
from torch_src.data.results import RESULT_STAGES, write_result
from torch_src.inference import LOG_SECONDS, load_cross_model
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_plan import plan_reranking, sample_pairs
from torch_src.inputs import check_inputs
from torch_src.models.cross_encoder import CrossEncoder
from torch_src.models.truncation import sampled, truncation_of_pairs
from torch_src.query_ids import read_query_ids
from torch_src.reranker import Reranker
from torch_src.retrieval import score_checks
from torch_src.retrieval.reranking import fuse, rank_pairs
from torch_src.retrieval.vectors import DamagedBlock, ScoreStore, VectorStore
from torch_src.runtime.devices import peak_memory_gb, worker_count
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write, require
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import log, warn
from torch_src.runtime.outputs import RESULT as RESULT_FILE
from torch_src.runtime.outputs import RUN, Output, begins, check_apart, check_outputs, settings_of
from torch_src.runtime.planning import Plan
from torch_src.runtime.program import exit_status
from torch_src.runtime.progress import Progress
from torch_src.runtime.stamps import (
    JsonDict,
    checksum_files,
    checksum_text,
    clear_stamp,
    up_to_date,
    write_stamp,
)

RESULT = "cross_res.json"
SCORES, ID_MAP = "cross_scores.txt", "cross_id_map.tsv"  # input of the official converter

QidLists = dict[str, list[str]]  # qid -> pids, best first


def main(argv: list[str]) -> int:
    """Run with these options; return the exit status."""
    return exit_status(lambda: run(hparams.parse(InferenceCrossHparams, argv)))


def run(hp: InferenceCrossHparams) -> None:
    """Score the candidates and write the re-ranked run, unless it is up to date."""
    hparams.announce("re-rank", hp)
    check_paths(hp)
    check_inputs(hp, hp.pretrained_model_path, dev_q_path="queries")
    if hp.plan:
        job = CrossInference(hp)
        return job.plan().report(hp.output_dir, job.device)
    with folder_lock(hp.output_dir):
        rerank(CrossInference(hp))


def check_paths(hp: InferenceCrossHparams) -> None:
    """UserError when a file to write is an input or foreign."""
    output, stages = Path(hp.output_dir), ("cross_infer",)
    outputs = [
        Output(output / f"res.rerank{hp.topk}", RUN, stages),
        Output(output / RESULT, RESULT_FILE, RESULT_STAGES),
        Output(output / SCORES, begins(rb"[-+.0-9einfa]+\n"), stages),
        Output(output / ID_MAP, begins(rb"[^\t\n]+\t[^\t\n]+\n"), stages),
        Output(hp.saved_to, settings_of(output / RESULT)),
    ]
    ids = official_ids_path(hp.retrieval_result_path)
    check_outputs(outputs, [*hp.inputs, ids])
    check_apart(output / "cross_scores", hp.inputs)


class CrossInference(Reranker):
    """The inputs of one re-ranking run, checked before any slow step."""

    def __init__(self, hp: InferenceCrossHparams):
        self.output = Path(hp.output_dir)
        self.qids = read_query_ids(hp)
        super().__init__(hp)
        self._open_candidates()
        self.run_path = self.output / f"res.rerank{hp.topk}"
        self.outputs = [self.run_path, *(self.output / name for name in (RESULT, SCORES, ID_MAP))]

    def _open_candidates(self) -> None:
        hp, cache = self.hp, self.output / "cache"
        path, self.id_map = hp.retrieval_result_path, ""
        self.candidates: Candidates
        self.collection: PassageCollection | None = None
        if hp.plan and not os.path.exists(path):
            self.collection = PassageCollection(hp.passage_dir_path, cache)
            self.candidates = sample_pairs(list(self.qids), self.collection, self.device)
            self.pairs = (hp.depth or hp.topk) * len(self.qids)
            return
        first = "do_dual_infer.py --debug" if hp.debug else "do_dual_infer.py"
        require(path, "candidates to re-rank", f"run {first} first")
        if path.endswith(OFFICIAL):
            self.id_map = official_ids_path(path)
        else:
            check_kinds((path, kinds.RUN))
            self.collection = PassageCollection(hp.passage_dir_path, cache)
        self.candidates = open_candidates(path, self.collection, cache)
        assert isinstance(self.candidates.texts, PassageCollection)
        self.passages_checksum = self.candidates.texts.checksum
        if hp.depth:
            self.candidates = self.candidates.head(len(self.candidates.queries), hp.depth)
        self.pairs = len(self.candidates)
        self._check_queries(path)

    def _check_queries(self, path: str) -> None:
        unknown = [query for query in self.candidates.queries if query not in self.qids]
        if unknown:
            raise UserError(
                f"{path}: {len(unknown)} of its queries are not in {self.hp.dev_q_path}, "
                f"e.g. {unknown[0][:60]!r}"
            )
        missing = len(self.qids) - len(self.candidates.queries)
        if missing:
            warn(f"{missing} queries of {self.hp.dev_q_path} have no candidates; their lists are empty")

    def score_stamp(self) -> JsonDict:
        """Return the stamp of the logits."""
        return {
            "stage": "cross_infer",
            **self.stamp(),
            "candidates": checksum_files([self.hp.retrieval_result_path]),
            "passages": self.passages_checksum,
            **({"depth": self.hp.depth} if self.hp.depth else {}),
        }

    def result_stamp(self) -> JsonDict:
        """Return the stamp of the re-ranked run."""
        ids = [path for path in (self.hp.passage_ids_path, self.id_map) if os.path.exists(path)]
        return {
            **self.score_stamp(),
            **({"collection": self.collection.checksum} if self.collection else {}),
            "topk": self.hp.topk,
            "fuse_retriever_weight": self.hp.fuse_retriever_weight,
            "qids": checksum_text(json.dumps(self.qids, ensure_ascii=False)),
            "ids": checksum_files(ids),
        }

    def plan(self) -> Plan:
        scorer = self.scorer(load_cross_model(self.source, trained=False))
        return plan_reranking(scorer, self.candidates, self.pairs)

    def pids_and_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (pids as bytes, global rows int64), both (N,), of all pairs."""
        path = require(self.hp.passage_ids_path, "row -> pid")
        if self.candidates.pids is None:
            assert self.collection is not None
            ids = read_passage_ids(path, self.output / "cache")
            check_length(path, len(ids), len(self.collection))
            return ids[self.candidates.rows], self.candidates.rows
        rows = rows_of(path, self.candidates.pids)
        if (rows < 0).any():
            missing = self.candidates.pids[np.flatnonzero(rows < 0)[0]].decode()
            raise UserError(f"{path}: the candidate {missing} is missing; use the map of its collection")
        return self.candidates.pids, rows


def rerank(job: CrossInference) -> None:
    """Write the re-ranked run and the files made from it, unless they are up to date."""
    stamp = job.result_stamp()
    if not job.hp.force and all([up_to_date(path, stamp, log) for path in job.outputs]):
        log(f"{job.run_path}: up to date")
        return
    pids, rows = job.pids_and_rows()
    texts = job.candidates.texts_of(sampled(len(job.candidates)))
    for found in truncation_of_pairs(job.source.tokenizer, *texts, job.rules):
        found.report()
    logits = score_candidates(job, job.candidates, job.output / "cross_scores", job.score_stamp())
    for path in job.outputs:
        clear_stamp(path)
    result = write_run(job, logits, pids, rows)
    write_official(job, logits, pids)
    hparams.save(job.hp, job.hp.saved_to, fixed_by_weights=job.source.settings)
    for path in job.outputs:
        write_stamp(path, stamp)
    log(f"wrote {job.run_path} ({len(job.candidates.queries):,} queries)  "
        f"peak memory {peak_memory_gb(job.device):.2f} GB")  # fmt: skip
    check_scores(job, logits, pids, result)


def score_candidates(job: Reranker, candidates: Candidates, folder: Path, stamp: JsonDict) -> np.ndarray:
    """Return the logits (N,) float32 of all pairs; finished blocks are kept in `folder`."""
    total = len(candidates)
    model = load_cross_model(job.source)  # may raise, so before scores on disk are deleted
    block_rows = min(job.hp.block_pairs, total)
    store = ScoreStore.create_or_continue(folder, stamp, total, 1, block_rows, log, job.hp.force)
    deleted: set[int] = set()  # damaged blocks
    while True:
        if store.missing_blocks():
            _score_blocks(job, candidates, store, model)
        else:
            log(f"{store.folder}: scores up to date ({total:,} pairs)")
        try:
            return np.concatenate([np.array(block[:, 0]) for _, block in store.blocks()])
        except DamagedBlock as damage:
            store.delete_damaged(damage, deleted)


def _score_blocks(job: Reranker, candidates: Candidates, store: VectorStore, model: CrossEncoder) -> None:
    scorer, missing = job.scorer(model), store.missing_blocks()
    spans = list(map(store.block_range, missing))
    total = sum(last - first for first, last in spans)
    progress = Progress(total, LOG_SECONDS, "scored", "pairs")
    workers = worker_count(-1, job.device, total)
    scored = scorer.score_candidates(candidates, spans, workers, progress.add)
    for block, (_, last) in zip(missing, spans, strict=True):
        logits: list[np.ndarray] = []
        for span, values, pairs in scored:
            logits.append(values[:, None])
            progress.add_truncated(pairs.cut)
            if span[1] == last:
                break
        store.write_block(block, np.concatenate(logits))
    progress.close()


def write_run(job: CrossInference, logits: np.ndarray, pids: np.ndarray, rows: np.ndarray) -> QidLists:
    """Write res.rerank{k} and cross_res.json; return the content of the latter."""
    scores = fuse(job.candidates, logits, job.hp.fuse_retriever_weight)
    with atomic_write(job.run_path) as file:
        for query, order in rank_pairs(job.candidates, scores):
            for number, pair in enumerate(order[: job.hp.topk].tolist(), start=1):
                file.write(format_run_row(RunRow(query, int(rows[pair]), number, float(scores[pair]))))
    result = ranked_pids(job, scores, pids)
    write_result(job.output / RESULT, result.items())
    return result


def ranked_pids(job: CrossInference, scores: np.ndarray, pids: np.ndarray) -> QidLists:
    """Return {qid: the pids of its first topk candidates by score}; ties keep the order of the retriever."""
    result: QidLists = {qid: [] for qids in job.qids.values() for qid in qids or ()}
    for query, order in rank_pairs(job.candidates, scores):
        for qid in job.qids[query] or ():
            result[qid] = [pid.decode() for pid in pids[order[: job.hp.topk]]]
    return result


def write_official(job: CrossInference, logits: np.ndarray, pids: np.ndarray) -> None:
    """Write the input files of the official converter, one line per pair."""
    with atomic_write(job.output / SCORES) as file:
        file.writelines(f"{value:.9g}\n" for value in logits.tolist())
    with atomic_write(job.output / ID_MAP) as file:
        for at, pid in zip(job.candidates.query_of, pids, strict=True):
            qid = (job.qids[job.candidates.queries[at]] or ["-"])[0]
            file.write(f"{qid}\t{pid.decode()}\n")


def check_scores(job: CrossInference, logits: np.ndarray, pids: np.ndarray, result: QidLists) -> None:
    """Warn of collapsed scores; with a reference, compare the retriever with the re-ranker."""
    spans = list(job.candidates.spans())
    if warning := score_checks.collapsed(logits, [span for _, span in spans]):
        warn(warning)
    if job.hp.dev_set == hparams.NONE or not os.path.exists(job.hp.dev_set_path):
        return
    reference = {query.qid: set(query.answers) for query in read_dev(job.hp.dev_set_path)}
    if not any(qid in reference for qid in result):
        log(f"{job.hp.dev_set_path} contains none of these queries; no metrics")
        return

    def mrr(scores: np.ndarray) -> float:
        return compute_metrics(reference, ranked_pids(job, scores, pids))["MRR@10"]

    retriever, reranked = mrr(np.zeros(len(logits))), compute_metrics(reference, result)["MRR@10"]
    log(f"MRR@10 of the candidates in the retriever's order {retriever:.4f}, re-ranked {reranked:.4f}")
    log(score_checks.fused_metrics(lambda weight: mrr(fuse(job.candidates, logits, weight))))
    fused = job.hp.fuse_retriever_weight > 0
    if warning := score_checks.below_retriever(reranked, retriever, fused):
        warn(warning)
    if warning := _easy_negatives(job, logits, pids, reference):
        warn(warning)


def _easy_negatives(
    job: CrossInference, logits: np.ndarray, pids: np.ndarray, reference: dict[str, set[str]]
) -> str | None:
    """Return a warning when the training negatives score far below the irrelevant candidates."""
    if job.source.params is None:
        return None
    negatives = read_negative_scores(job.hp.cross_params_path, job.source.checksum)
    if negatives is None:
        return None
    irrelevant = []
    for query, span in job.candidates.spans():
        answers = {pid for qid in job.qids[query] or () for pid in reference.get(qid, ())}
        irrelevant += [pid.decode() not in answers for pid in pids[span]]
    return score_checks.negatives_too_easy(negatives, logits[np.array(irrelevant)])
