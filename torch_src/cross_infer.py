"""do_cross_infer.py: res.top50 + cross_params.bin -> res.rerank50, cross_res.json."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from metric.evaluation import compute_metrics
from torch_src import hparams
from torch_src.cross_hparams import MODEL_SETTINGS, CrossHparams
from torch_src.data.candidates import OFFICIAL, OFFICIAL_IDS, Candidates, open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.data.formats import RunRow, format_run_row, read_dev
from torch_src.data.negative_scores import read_negative_scores
from torch_src.data.passage_ids import check_length, read_passage_ids, rows_of
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_stage import (
    LOG_SECONDS,
    FoundModel,
    find_pretrained_model,
    find_trained_model,
    planned_before_training,
    read_query_ids,
)
from torch_src.models.backbones import check_fits, load_weights
from torch_src.models.cross_encoder import CrossEncoder, build_cross_encoder, load_cross_encoder
from torch_src.models.tokenization import TextRules
from torch_src.retrieval import score_checks as guards
from torch_src.retrieval.reranking import PairScorer, fuse, rank_pairs
from torch_src.retrieval.vectors import DamagedBlock, ScoreStore
from torch_src.runtime.devices import (
    choose_device,
    choose_precision,
    peak_memory_gb,
    set_threads,
    token_budget,
)
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write, require
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import log, warn
from torch_src.runtime.planning import KEPT_GB, Plan, evenly, memory_gb, seconds_a_text
from torch_src.runtime.program import exit_status
from torch_src.runtime.progress import Progress
from torch_src.runtime.stamps import checksum_files, checksum_text, clear_stamp, up_to_date, write_stamp

RESULT = "cross_res.json"
SCORES, ID_MAP = "cross_scores.txt", "cross_id_map.tsv"  # what the official converter reads


def find_model(hp: InferenceCrossHparams) -> FoundModel:
    """Return the model that the settings name: fine-tuned, or with `--cross_params none` as it is."""
    if hp.cross_params != hparams.NONE and not planned_before_training(hp, hp.cross_params_path):
        return find_trained_model(hp, "cross", hp.cross_params_path, MODEL_SETTINGS)
    return find_pretrained_model(hp, CrossHparams.defaults(hp.debug), MODEL_SETTINGS)


def load_model(model: FoundModel, seed: int, trained: bool = True) -> CrossEncoder:
    """Return the cross-encoder with its weights, on the CPU; not `trained`: its head may be random."""
    if model.params is None:
        encoder = load_cross_encoder(model.path, model.config, seed, trained)
    else:
        encoder = build_cross_encoder(model.config)
        load_weights(model.params, encoder.model, "do_cross_train.py")
    model.require_unchanged()
    return encoder


def pair_scorer(
    found: FoundModel, model: CrossEncoder, hp: InferenceCrossHparams, device: torch.device, precision: str
) -> PairScorer:
    """Return the scorer of a model that is on the device already, with what its weights fix."""
    rules = TextRules(found.fixed["max_seq_len"], "", found.fixed["remove_spaces"])
    sizes = (hp.batch_size, token_budget(0, device))
    return PairScorer(model, found.tokenizer, rules, device, precision, *sizes)


class CrossInference:
    """One re-ranking run, its inputs checked before anything long starts."""

    def __init__(self, hp: InferenceCrossHparams):
        self.hp, self.output = hp, Path(hp.output_dir)
        self.device = choose_device(hp.device)
        self.precision = choose_precision(hp.precision, self.device)
        self.threads = set_threads(hp.threads)
        log(f"device {self.device}  precision {self.precision}  threads {self.threads}")
        self.qids = read_query_ids(hp)
        self._open_candidates()
        self.model = find_model(hp)
        lengths = {"max_seq_len": self.model.fixed["max_seq_len"]}
        check_fits(self.model.config, len(self.model.tokenizer), lengths, self.model.path)

    def _open_candidates(self) -> None:
        hp, cache = self.hp, str(self.output / "cache")
        if hp.plan and not os.path.exists(hp.retrieval_result_path):  # before there is anything to re-rank
            self.collection = PassageCollection(hp.passage_dir_path, cache)
            self.candidates = imagined_candidates(list(self.qids), self.collection)
            self.pairs = hp.topk * len(self.qids)
            return
        source = require(hp.retrieval_result_path, "candidates to re-rank", "run do_dual_infer.py first")
        self.official = source.endswith(OFFICIAL)
        self.id_map = source[: -len(OFFICIAL)] + OFFICIAL_IDS if self.official else ""
        self.collection = None if self.official else PassageCollection(hp.passage_dir_path, cache)
        self.candidates = open_candidates(source, self.collection, cache)
        self.pairs = len(self.candidates)
        self._check_queries(source)

    def _check_queries(self, source: str) -> None:
        unknown = [query for query in self.candidates.queries if query not in self.qids]
        if unknown:
            raise UserError(
                f"{source}: {len(unknown)} of its queries are not in {self.hp.dev_q_path}, "
                f"the first: {unknown[0][:60]!r}"
            )
        without = len(self.qids) - len(self.candidates.queries)
        if without:
            warn(
                f"{without} queries of {self.hp.dev_q_path} have no candidates: "
                "their lists are empty and count 0"
            )

    def score_stamp(self) -> dict:
        """Return what decides the scores of the pairs."""
        texts = self.collection or self.candidates.texts
        return {
            "stage": "cross_infer", **self.model.decides, **self.model.fixed,
            "candidates": checksum_files([self.hp.retrieval_result_path]), "passages": texts.checksum,
            "precision": self.precision, "device": self.device.type,
        }  # fmt: skip

    def result_stamp(self) -> dict:
        """Return what decides the re-ranked run."""
        ids = [path for path in (self.hp.passage_ids_path, self.id_map) if os.path.exists(path)]
        more = {"topk": self.hp.topk, "fuse_retriever_weight": self.hp.fuse_retriever_weight}
        qids = checksum_text(json.dumps(self.qids, ensure_ascii=False))
        return {**self.score_stamp(), **more, "qids": qids, "ids": checksum_files(ids)}

    def scores(self) -> np.ndarray:
        """Return the logits (N,) float32 of all pairs; finished blocks of them are kept on disk."""
        hp, total = self.hp, len(self.candidates)
        model = load_model(self.model, hp.seed)  # before anything on disk is given up for it
        folder = self.output / "cross_scores"
        store = ScoreStore.create_or_continue(
            folder, self.score_stamp(), total, 1, min(hp.block_pairs, total), log, hp.force
        )
        dropped: set[int] = set()
        while True:
            missing = store.missing_blocks()
            if missing:
                self._score_blocks(store, missing, model.to(self.device))
            else:
                log(f"{folder}: scores up to date ({total:,} pairs)")
            try:
                return np.concatenate([np.array(block[:, 0]) for _, block in store.blocks()])
            except DamagedBlock as damage:
                store.delete_damaged(damage, dropped)

    def scorer(self, model: CrossEncoder) -> PairScorer:
        return pair_scorer(self.model, model, self.hp, self.device, self.precision)

    def plan(self) -> Plan:
        """Return what scoring would take."""
        planned = Plan("do_cross_infer.py")
        scorer = self.scorer(load_model(self.model, self.hp.seed, trained=False))
        tokens, few = [], self.candidates

        def score(rows: list[int]) -> None:
            tokens.extend(scorer.score_rows(few, rows)[1].lengths)

        each = seconds_a_text(score, evenly(len(few)))
        mean = np.mean(tokens)
        what = f"score {self.pairs:,} pairs ({mean:.0f} tokens, {mean / each:,.0f} tokens/s)"
        planned.add(what, each * self.pairs)
        planned.ram_gb, planned.gpu_gb = memory_gb(self.device)
        planned.ram_gb += KEPT_GB
        planned.disk_gb = 150 * self.pairs / 1e9  # a line of each of four files, and the scores in blocks
        planned.advice = "lower --batch_size or --block_pairs"
        return planned

    def _score_blocks(self, store: ScoreStore, missing: list[int], model: CrossEncoder) -> None:
        scorer = self.scorer(model)
        total = sum(last - first for first, last in map(store.block_range, missing))
        progress = Progress(total, LOG_SECONDS, "scored", "pairs")
        for block in missing:
            first, last = store.block_range(block)
            logits = np.empty((last - first, 1), dtype=np.float32)
            for start, values, pairs in scorer.score_candidates(self.candidates, first, last):
                logits[start - first : start - first + len(values), 0] = values
                progress.add(len(values), sum(pairs.lengths), pairs.cut)
            store.write_block(block, logits)
        progress.close()

    def pids_and_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (pids as bytes, global rows), both (N,), of all pairs."""
        path = require(self.hp.passage_ids_path, "row -> pid")
        if not self.official:
            ids = read_passage_ids(path, str(self.output / "cache"))
            check_length(path, len(ids), len(self.collection))
            return ids[self.candidates.rows], self.candidates.rows
        rows = rows_of(path, self.candidates.pids)
        if (rows < 0).any():
            missing = self.candidates.pids[np.flatnonzero(rows < 0)[0]].decode()
            raise UserError(
                f"{path}: the candidate {missing} is not in it; is it the map of another collection?"
            )
        return self.candidates.pids, rows

    def write(self, run_path: Path, logits: np.ndarray) -> dict[str, list[str]]:
        """Write res.rerank{k}, cross_res.json and the files of the official converter; return {qid: pids}."""
        pids, rows = self.pids, self.rows
        scores = fuse(self.candidates, logits, self.hp.fuse_retriever_weight)
        result = {qid: [] for qids in self.qids.values() for qid in qids or ()}
        with atomic_write(run_path) as file:
            for query, order in rank_pairs(self.candidates, scores):
                for rank, pair in enumerate(order[: self.hp.topk].tolist(), start=1):
                    file.write(format_run_row(RunRow(query, int(rows[pair]), rank, float(scores[pair]))))
                for qid in self.qids[query] or ():
                    result[qid] = [pid.decode() for pid in pids[order[: self.hp.topk]]]
        with atomic_write(self.output / RESULT) as file:
            json.dump(result, file, ensure_ascii=False)
        self._write_official(logits, pids)
        return result

    def _write_official(self, logits: np.ndarray, pids: np.ndarray) -> None:
        with atomic_write(self.output / SCORES) as file:
            file.writelines(f"{value:.9g}\n" for value in logits.tolist())
        with atomic_write(self.output / ID_MAP) as file:
            for at, pid in zip(self.candidates.query_of, pids, strict=True):
                qid = (self.qids[self.candidates.queries[at]] or ["-"])[0]
                file.write(f"{qid}\t{pid.decode()}\n")

    def look(self, logits: np.ndarray, result: dict[str, list[str]]) -> None:
        """Warn of collapsed scores; with a reference compare both stages, and warn if the second is worse."""
        warning = guards.collapsed(logits, [span for _, span in self.candidates.spans()])
        if warning:
            warn(warning)
        if self.hp.dev_set == hparams.NONE or not os.path.exists(self.hp.dev_set_path):
            return
        reference = {query.qid: set(query.answers) for query in read_dev(self.hp.dev_set_path)}
        if not any(qid in reference for qid in result):
            return log(f"{self.hp.dev_set_path} has none of these queries: not scored")
        before = {qid: [] for qid in result}
        for query, span in self.candidates.spans():
            for qid in self.qids[query] or ():
                before[qid] = [pid.decode() for pid in self.pids[span]][: self.hp.topk]
        retriever, reranked = (compute_metrics(reference, run)["MRR@10"] for run in (before, result))
        log(f"MRR@10 of the candidates as they came {retriever:.4f}, re-ranked {reranked:.4f}")
        warnings = (guards.below_retriever(reranked, retriever), self.easy_negatives(logits, reference))
        for warning in filter(None, warnings):
            warn(warning)

    def easy_negatives(self, logits: np.ndarray, reference: dict[str, set[str]]) -> str | None:
        """Return a warning when the training negatives, as scored after training, were easier than these."""
        if self.model.params is None:
            return None
        negatives = read_negative_scores(self.hp.cross_params_path, self.model.checksum)
        if negatives is None:
            return None
        wrong = []
        for query, span in self.candidates.spans():
            answers = set().union(*(reference.get(qid, ()) for qid in self.qids[query] or ()))
            wrong += [pid.decode() not in answers for pid in self.pids[span]]
        return guards.negatives_too_easy(negatives, logits[np.array(wrong)])


def imagined_candidates(queries: list[str], collection: PassageCollection) -> Candidates:
    """Return pairs of some queries with some passages, in place of a run that is not there yet."""
    rows = np.array(evenly(len(collection)))
    few = queries[: len(rows)]
    query_of = np.arange(len(rows), dtype=np.int32) % len(few)
    texts = [collection[row] for row in rows.tolist()]
    return Candidates(few, query_of, rows, np.zeros(len(rows), np.float32), None, None, texts)


def run(hp: InferenceCrossHparams) -> None:
    """Score the candidates and write the re-ranked run, unless it is up to date."""
    hparams.announce("re-rank", hp)
    if hp.plan:
        inference = CrossInference(hp)
        return inference.plan().say(hp.output_dir, inference.device)
    with folder_lock(hp.output_dir):
        _run(hp)


def _run(hp: InferenceCrossHparams) -> None:
    inference = CrossInference(hp)
    path = inference.output / f"res.rerank{hp.topk}"
    stamp = inference.result_stamp()
    outputs = [path, *(inference.output / name for name in (RESULT, SCORES, ID_MAP))]
    if not hp.force and all([up_to_date(output, stamp, log) for output in outputs]):
        return log(f"{path}: up to date")
    inference.pids, inference.rows = inference.pids_and_rows()
    logits = inference.scores()
    for output in outputs:
        clear_stamp(output)
    result = inference.write(path, logits)
    hparams.save(hp, inference.output / "cross_infer_hparams.json", fixed_by_weights=inference.model.fixed)
    for output in outputs:
        write_stamp(output, stamp)
    log(f"wrote {path} ({len(inference.candidates.queries):,} queries)  "
        f"peak memory {peak_memory_gb(inference.device):.2f} GB")  # fmt: skip
    inference.look(logits, result)


def main(argv: list[str]) -> int:
    """Run with these options; return the exit status."""
    return exit_status(lambda: run(hparams.parse(InferenceCrossHparams, argv)))
