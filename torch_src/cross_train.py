"""do_cross_train.py: train/cross.train.tsv -> output/cross_params.bin, cross_hparams.json, cross_model/."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from metric.evaluation import MEASURES, compute_metrics
from torch_src import hparams
from torch_src.cross_hparams import MODEL_SETTINGS, CrossHparams
from torch_src.data.candidates import OFFICIAL, Candidates, open_candidates
from torch_src.data.collection import PassageCollection
from torch_src.data.cross_training_set import CrossBatch, CrossTrainingSet
from torch_src.data.formats import read_dev
from torch_src.data.negative_scores import negative_scores_path, read_negative_scores, write_negative_scores
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.models.cross_encoder import load_cross_encoder, start_from_retriever
from torch_src.models.losses import listwise_loss, pointwise_loss, r_drop_loss
from torch_src.models.tokenization import Pairs, TextRules, tokenize_pairs
from torch_src.retrieval import score_checks as guards
from torch_src.retrieval.reranking import PairScorer, pair_tensors, rank_pairs
from torch_src.runtime.devices import autocast, token_budget
from torch_src.runtime.files import require
from torch_src.runtime.log import log, warn
from torch_src.runtime.planning import evenly_spaced, seconds_per_text
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import checksum_files
from torch_src.training.grad_cache import ChunkedForward
from torch_src.training.stage import TrainingStage, rows_named
from torch_src.training.trainer import Progress, Task

FGM_SCALE = 2.0**12  # of a gradient whose direction alone counts, so that fp16 does not round it to zero
LOOKED_AT = 512  # training negatives that are scored at the end, to compare them with the dev candidates


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch ready for the model."""

    source: CrossBatch
    at: tuple[int, int]  # (epoch, micro-step)
    pairs: Pairs  # this process's share
    labels: np.ndarray  # of that share


class DevReranking:
    """A fixed list of dev candidates with the reference."""

    def __init__(
        self, candidates: Candidates, pids: list[str], reference: dict[str, set[str]], qids: dict[str, str]
    ):
        self.candidates, self.pids, self.reference = candidates, np.array(pids), reference
        self.qids = [qids[query] for query in candidates.queries]

    def metrics(self, scores: np.ndarray) -> dict[str, float]:
        """Return the measures of the candidates in the order of these scores."""
        ranked = rank_pairs(self.candidates, scores)
        result = {qid: self.pids[order].tolist() for qid, (_, order) in zip(self.qids, ranked, strict=True)}
        metrics = compute_metrics(self.reference, result)
        return {name: metrics[name] for name in MEASURES}

    def not_relevant(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores of the candidates that are no answer of their query."""
        spans = zip(self.qids, self.candidates.spans(), strict=True)
        wrong = [[pid not in self.reference[qid] for pid in self.pids[span]] for qid, (_, span) in spans]
        return scores[np.concatenate(wrong)]


class CrossTraining(TrainingStage):
    """Training of the cross-encoder on pairs or on groups of one query."""

    name = "cross"
    fixed_by_weights = MODEL_SETTINGS
    lengths = ("max_seq_len",)

    def __init__(self, hp: CrossHparams):
        super().__init__(hp)
        self.config.num_labels = 1
        self.rules = TextRules(hp.max_seq_len, "", hp.remove_spaces)
        self.listwise = hp.loss == "listwise"
        self.units = hp.groups_per_step if self.listwise else hp.batch_size

    def load(self) -> None:
        hp = self.hp
        self.data = CrossTrainingSet(hp.train_set_path, self.rules.clean)
        self.steps = self.data.steps_per_epoch(self.units, self.listwise)  # UserError when they are too many
        log(f"{self.data.rows:,} training rows, {self.data.queries:,} distinct queries")
        short = self.data.short_lists(hp.group_size) if self.listwise else 0
        if short:
            log(
                f"{short:,} of {len(self.data.lists):,} positives have fewer than "
                f"{hp.group_size - 1} negatives: "
                "some stand more than once in their group"
            )
        self.dev = build_dev_reranking(hp) if hp.eval_every >= 0 and self.group.rank == 0 else None
        self.model = load_cross_encoder(hp.pretrained_model_path, self.config, hp.seed, trained=False)
        if hp.dual_params != hparams.NONE:
            start_from_retriever(self.model, hp.dual_params)
        self.checkpoint_gradients(self.model.model)
        self.model.to(self.device)

    def forget(self) -> None:
        negative_scores_path(self.hp.params_path).unlink(missing_ok=True)

    def stamp(self) -> dict:
        start, stamp = self.hp.dual_params, super().stamp()
        if self.hp.eval_every >= 0 and not self.hp.dev_candidates_path.endswith(OFFICIAL):
            stamp |= self.collection_stamp()  # a run names its texts and pids by rows
        if start != hparams.NONE:
            retriever = require(start, "trained retriever", "run do_dual_train.py first")
            stamp["start_weights"] = checksum_files([retriever])
        return stamp

    def state(self) -> dict:
        return self.model.model.state_dict()

    def task(self) -> Task:
        pairs = self.texts_a_step()
        own_lr = dict.fromkeys(self.model.random_parameters, self.hp.head_lr) if self.hp.head_lr else {}
        return Task(
            self.model, self.steps, *self.parts(), queries_per_step=pairs, unit="pairs", own_lr=own_lr
        )

    def prepare(self, epoch: int, micro_step: int) -> TokenBatch:
        """Draw and tokenise one micro-batch (in the thread that runs ahead of the model)."""
        hp = self.hp
        if self.listwise:
            batch = self.data.lists_of(hp.seed, epoch, micro_step, self.units, hp.group_size)
        else:
            batch = self.data.pairs(hp.seed, epoch, micro_step, self.units)
        size = self.group_size
        own = self.group.share(self.units)
        own = slice(own.start * size, own.stop * size)
        pairs = tokenize_pairs(self.tokenizer, batch.queries[own], batch.passages[own], self.rules)
        return TokenBatch(batch, (epoch, micro_step), pairs, batch.labels[own])

    @property
    def group_size(self) -> int:
        """Return the pairs that belong together: a whole group when listwise."""
        return self.hp.group_size if self.listwise else 1

    def backward(self, batch: TokenBatch, begin) -> torch.Tensor:
        """Add the gradient of one micro-batch; return this process's part of its accuracy.

        With FGM it is the gradient of the loss on perturbed word embeddings, and only that.
        """
        if not self.hp.fgm_epsilon:
            return self._plain_backward(batch, begin, 0)
        table = self.model.word_embeddings
        with perturbed(table, self._embedding_gradient(batch, table), self.hp.fgm_epsilon):
            return self._plain_backward(batch, begin, 1)

    def _plain_backward(self, batch: TokenBatch, begin, number: int) -> torch.Tensor:
        passes = [self.logits(batch, number + at) for at in range(2 if self.hp.r_drop_alpha else 1)]
        losses = [self.loss(logits.outputs, batch) for logits in passes]
        loss = torch.stack([loss for loss, _ in losses]).mean()
        if self.hp.r_drop_alpha:
            share = len(batch.labels) / self.units
            loss = loss + self.hp.r_drop_alpha * share * r_drop_loss(*(logits.outputs for logits in passes))
        begin(loss).backward()
        for logits in passes:
            logits.backward(logits.outputs.grad)
        return losses[0][1]

    def _embedding_gradient(self, batch: TokenBatch, table: torch.nn.Parameter) -> torch.Tensor:
        """Return the gradient of all processes' loss with respect to the word embeddings alone."""
        before, table.grad = table.grad, None
        logits = self.logits(batch, 0)
        gradient = torch.autograd.grad(self.loss(logits.outputs, batch)[0], logits.outputs)[0]
        logits.backward(gradient * (FGM_SCALE if self.precision == "fp16" else 1), [table])
        found, table.grad = table.grad, before
        return self.group.sum_(found)

    def logits(self, batch: TokenBatch, number: int) -> ChunkedForward:
        """Return the logits of this process's pairs; `number` tells two passes over one batch apart."""

        def forward(rows) -> torch.Tensor:
            with autocast(self.device, self.precision):
                return self.model(*pair_tensors(batch.pairs, rows, self.tokenizer.pad_token_id, self.device))

        return self.in_chunks(batch.pairs.lengths, forward, (*batch.at, number))

    def loss(self, logits: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this process's parts of (loss, accuracy)."""
        share = len(logits) / (self.units * self.group_size)
        if self.listwise:
            loss, accuracy = listwise_loss(logits, self.hp.group_size)
        else:
            loss, accuracy = pointwise_loss(logits, torch.from_numpy(batch.labels).to(self.device))
        return loss * share, accuracy * share

    def describe(self, batch: TokenBatch) -> str:
        return rows_named(batch.source.rows, self.hp.train_set_path)

    def scorer(self) -> PairScorer:
        """Return the scorer on the weights as they are now."""
        return PairScorer(
            self.model,
            self.tokenizer,
            self.rules,
            self.device,
            self.precision,
            256,
            token_budget(0, self.device),
        )

    def evaluate(self) -> dict[str, float]:
        """Return the dev metrics after re-ranking; empty without dev candidates."""
        return {} if self.dev is None else self.dev.metrics(self.scorer().score_all(self.dev.candidates))

    def evaluation_seconds(self) -> float:
        pairs = self.dev.candidates
        each = seconds_per_text(lambda rows: self.scorer().score_rows(pairs, rows), evenly_spaced(len(pairs)))
        return len(pairs) * each

    def texts_a_step(self) -> int:
        return self.units * self.group_size

    def _load_best(self) -> None:
        """Load the weights that are kept, which need not be the last."""
        state = torch.load(self.hp.params_path, map_location=self.device, weights_only=True)
        self.model.model.load_state_dict(state)

    def mend(self, weights: str) -> None:
        if self.hp.eval_every < 0 or read_negative_scores(self.hp.params_path, weights) is not None:
            return
        log(f"{negative_scores_path(self.hp.params_path)}: missing or damaged; rewriting it")
        self.load()
        self._load_best()
        write_negative_scores(self.hp.params_path, weights, self.scorer().score(self._negatives()))

    def summary(self, progress: Progress) -> None:
        """Warn of collapsed scores, a better retriever, too easy negatives."""
        if self.dev is None:
            return
        self._load_best()
        scores = self.scorer().score_all(self.dev.candidates)
        reranked, retriever = self.dev.metrics(scores), self.dev.metrics(self.dev.candidates.scores)
        order = f"in the retriever's order {retriever['MRR@10']:.4f}, re-ranked {reranked['MRR@10']:.4f}"
        log(f"MRR@10 of the dev candidates: {order}")
        spans = [span for _, span in self.dev.candidates.spans()]
        negatives = self.scorer().score(self._negatives())
        write_negative_scores(self.hp.params_path, progress.best_weights, negatives)
        warnings = (
            guards.collapsed(scores, spans),
            guards.below_retriever(reranked["MRR@10"], retriever["MRR@10"]),
            guards.negatives_too_easy(negatives, self.dev.not_relevant(scores)),
        )
        for warning in filter(None, warnings):
            warn(warning)

    def _negatives(self) -> Pairs:
        """Return some training negatives as pairs."""
        rows = np.flatnonzero(self.data.labels == 0)
        rows = np.random.default_rng([self.hp.seed, 3]).permutation(rows)[:LOOKED_AT]
        found = self.data.file.read(rows.tolist())
        queries, passages = [row.query for row in found], [row.passage for row in found]
        return tokenize_pairs(self.tokenizer, queries, passages, self.rules)


@contextmanager
def perturbed(table: torch.nn.Parameter, gradient: torch.Tensor, epsilon: float) -> Iterator[None]:
    """Within the block the word embeddings are moved by epsilon g / |g|, g the loss's gradient.

    Miyato et al. 2017 (arXiv 1605.07725), here on the whole table as the official recipe has it. A gradient
    of zero or without end moves nothing.
    """
    norm = gradient.double().norm()
    kept = table.detach().clone()
    with torch.no_grad():
        if torch.isfinite(norm) and norm > 0:
            table.data.add_(gradient.to(table.dtype), alpha=epsilon / norm.item())
    try:
        yield
    finally:
        with torch.no_grad():
            table.data.copy_(kept)


def build_dev_reranking(hp: CrossHparams) -> DevReranking | None:
    """Return the dev candidates that the settings name; None (said once) when the files are not there."""
    for path in (hp.dev_set_path, hp.dev_candidates_path):
        if not os.path.exists(path):
            warn(f"{path} is not there: no dev re-ranking while training, the last weights are kept")
            return None
    cache = str(Path(hp.output_dir) / "cache")
    is_run = not hp.dev_candidates_path.endswith(OFFICIAL)
    collection = PassageCollection(hp.passage_dir_path, cache) if is_run else None
    candidates = open_candidates(hp.dev_candidates_path, collection, cache).head(hp.dev_queries, hp.dev_depth)
    dev = {query.query: query for query in read_dev(hp.dev_set_path)}
    unknown = [query for query in candidates.queries if query not in dev]
    if unknown:
        warn(
            f"{hp.dev_candidates_path}: {len(unknown)} queries are not in {hp.dev_set_path}: "
            "no dev re-ranking"
        )
        return None
    pids = candidates.pids
    if is_run:
        ids = read_passage_ids(hp.passage_ids_path, cache)
        check_length(hp.passage_ids_path, len(ids), len(collection))
        pids = ids[candidates.rows]
    reference = {dev[query].qid: set(dev[query].answers) for query in candidates.queries}
    qids = {query: dev[query].qid for query in candidates.queries}
    log(
        f"dev re-ranking: {len(candidates.queries):,} queries, {len(candidates):,} pairs of "
        f"{hp.dev_candidates_path}"
    )
    return DevReranking(candidates, [pid.decode() for pid in pids], reference, qids)


def run(hp: CrossHparams) -> None:
    """Train unless the result is up to date."""
    hparams.announce("train the cross-encoder", hp)
    CrossTraining(hp).run()


def main(argv: list[str]) -> int:
    """Run with these options; return the exit status."""
    return exit_status(lambda: run(hparams.parse(CrossHparams, argv)))
