"""do_cross_train.py: train/cross.train.tsv -> output/cross_params.bin, cross_hparams.json, cross_model/."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from torch_src import hparams
from torch_src.cross_hparams import MODEL_SETTINGS, CrossHparams
from torch_src.data.candidates import OFFICIAL
from torch_src.data.cross_training_set import CrossBatch, CrossTrainingSet
from torch_src.data.negative_scores import negative_scores_path, read_negative_scores, write_negative_scores
from torch_src.inputs import check_inputs
from torch_src.models.backbones import model_checksum, reranker_settings
from torch_src.models.cross_encoder import (
    CrossEncoder,
    build_cross_encoder,
    describe_reranker,
    load_cross_encoder,
    start_from_reranker,
    start_from_retriever,
)
from torch_src.models.lora import add_adapters, check_targets, describe_adapters, load_merged, merged_state
from torch_src.models.losses import listwise_loss, pointwise_loss, r_drop_loss
from torch_src.models.model_folder import log_overrides
from torch_src.models.tokenization import (
    TextRules,
    TokenTable,
    reranker_rules,
    tokenize_pairs,
    tokenizer_checksum,
)
from torch_src.models.truncation import sampled, truncation_of_pairs
from torch_src.retrieval import score_checks
from torch_src.retrieval.reranking import PairScorer, fuse
from torch_src.runtime.devices import tensors_to, token_budget
from torch_src.runtime.files import require
from torch_src.runtime.log import log, warn
from torch_src.runtime.planning import evenly_spaced, seconds_per_text
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import checksum_files, is_intact, read_stamp
from torch_src.training.dev_evaluation import DevReranking, open_dev_reranking
from torch_src.training.distributed import Processes
from torch_src.training.grad_cache import ChunkedForward
from torch_src.training.memory import probe_inputs
from torch_src.training.stage import Setup, TrainingStage, checkpoint_activations, describe_rows
from torch_src.training.trainer import Output, TrainingProgress, TrainingTask

FGM_LOSS_SCALE = 2.0**12  # keeps fp16 from rounding FGM's gradient to zero; only its direction is used
SAMPLED_NEGATIVES = 512  # training negatives scored at the end, to compare them with the dev candidates


@dataclass(frozen=True)
class CrossInputs:
    """This process's shard of a batch, ready for the model."""

    source: CrossBatch
    place: tuple[int, int]  # (epoch, step)
    pairs: TokenTable
    labels: np.ndarray


@dataclass(frozen=True)
class CrossBatches:
    """Draws and tokenizes the batch of (epoch, step); can be copied to worker processes."""

    hp: CrossHparams
    data: CrossTrainingSet
    tokenizer: PreTrainedTokenizerBase
    rules: TextRules
    groups: int  # in a batch
    group_size: int  # 1: pairs (pointwise)
    processes: Processes

    def __call__(self, place: tuple[int, int]) -> CrossInputs:
        """Return this process's shard of the batch."""
        if self.hp.loss == "listwise":
            source = self.data.group_batch(self.hp.seed, *place, self.groups, self.group_size)
        else:
            source = self.data.pair_batch(self.hp.seed, *place, self.groups)
        groups = self.processes.shard(self.groups)
        shard = slice(groups.start * self.group_size, groups.stop * self.group_size)
        pairs = tokenize_pairs(self.tokenizer, source.queries[shard], source.passages[shard], self.rules)
        return CrossInputs(source, place, pairs, source.labels[shard])


class CrossTask(TrainingTask):
    """Training of the cross-encoder on pairs (pointwise) or on groups of one query (listwise)."""

    model: CrossEncoder
    make_batch: CrossBatches
    unit = "pairs"

    def __init__(self, hp: CrossHparams, setup: Setup):
        if not hp.dual_params:
            hp = setup.files.hp = replace(hp, dual_params=retriever_to_start_from(hp, setup))
        if hp.plan:  # a start that is not trained yet changes neither time nor memory
            starts = {"dual_params": hp.dual_params, "cross_params": hp.cross_params}
            missing: dict[str, Any] = {k: hparams.NONE for k, v in starts.items() if not os.path.exists(v)}
            hp = replace(hp, **missing)
        self.hp, self.setup, self.files = hp, setup, setup.files
        self.device, self.processes, self.chunking = setup.device, setup.processes, setup.chunking
        setup.config.num_labels = 1
        if hp.lora_rank:
            check_targets(lambda: build_cross_encoder(setup.config).model, hp.lora_targets)
        self.rules = setup.rules["max_seq_len"]
        log(describe_reranker(asdict(hp), setup.config))
        self.listwise = hp.loss == "listwise"
        self.accuracy_name = "group" if self.listwise else "pair"
        # the processes share whole groups
        self.groups = hp.groups_per_step if self.listwise else hp.batch_size
        self.group_size = hp.group_size if self.listwise else 1
        self.units_per_batch = self.texts_per_batch = self.groups * self.group_size
        self.max_tokens = self.rules.max_tokens(setup.tokenizer)
        groups = math.ceil(self.groups / self.processes.world)
        passes = 2 if hp.r_drop_alpha else 1
        self.max_batch_tokens = passes * groups * self.group_size * self.max_tokens
        self.dev: DevReranking | None = None

    def inputs(self) -> dict[str, Any]:
        """Return the checksums of the collection, if the dev candidates need it, and of the start weights."""
        hp = self.hp
        needs_collection = hp.eval_every >= 0 and not hp.dev_candidates_path.endswith(OFFICIAL)
        stamp = self.setup.collection_stamp() if needs_collection else {}
        for start, what in ((hp.dual_params, "trained retriever"), (hp.cross_params, "trained re-ranker")):
            if start != hparams.NONE:
                stamp["start_weights"] = checksum_files([require(start, what, "train it first")])
        return stamp

    def load(self) -> None:
        """Load training set, dev candidates and model."""
        hp, setup = self.hp, self.setup
        self.data = CrossTrainingSet(hp.train_set_path, self.rules.clean)
        self.batches_per_epoch = self.data.steps_per_epoch(self.groups, self.listwise)
        sizes = (self.groups, self.group_size)
        self.make_batch = CrossBatches(hp, self.data, setup.tokenizer, self.rules, *sizes, self.processes)
        log(f"{self.data.rows:,} training rows, {self.data.queries:,} distinct queries")
        rows = self.data.file.read(sampled(self.data.rows))
        texts = [row.query for row in rows], [row.passage for row in rows]
        found = truncation_of_pairs(setup.tokenizer, *texts, self.rules)
        self.files.truncation = [each.report() for each in found]
        if self.listwise and (short := self.data.short_groups(hp.group_size)):
            log(
                f"{short:,} of {len(self.data.groups):,} positives have fewer than {hp.group_size - 1} "
                "negatives: their groups repeat some"
            )
        if hp.eval_every >= 0:
            self.dev = open_dev_reranking(
                hp.dev_set_path,
                hp.dev_candidates_path,
                hp.passage_dir_path,
                hp.passage_ids_path,
                hp.dev_queries,
                hp.dev_depth,
                setup.cache_dir,
            )
        self.model = load_cross_encoder(hp.pretrained_model_path, setup.config, hp.seed, trained=False)
        if hp.dual_params != hparams.NONE:
            start_from_retriever(self.model, hp.dual_params, hp.pretrained_model_path, setup.tokenizer)
        if hp.cross_params != hparams.NONE:
            start_from_reranker(self.model, hp.cross_params, hp.pretrained_model_path, setup.tokenizer)
        if hp.gradient_checkpointing:
            checkpoint_activations(self.model.model)
        if hp.head_lr:
            self.peak_lr = dict.fromkeys(self.model.random_parameters, hp.head_lr)
            if not self.peak_lr:
                log(f"--head_lr {hp.head_lr}: has no effect, since no weights are randomly initialized")
        if hp.lora_rank:
            random = [name.removeprefix("model.") for name in self.model.random_parameters]
            add_adapters(self.model.model, hp.lora_rank, hp.lora_targets, hp.seed, setup.precision, random)
            log(describe_adapters(self.model, hp.lora_rank))
        self.model.to(self.device)

    def forward(self, batch: CrossInputs) -> Output:
        """Score the pairs of this process; with FGM the loss is that of the perturbed word embeddings."""
        if self.hp.fgm_epsilon:
            logits = self.logits(batch, 1, self._perturbed_embeddings(batch))
            return Output(*self.loss(logits.outputs, batch), [logits])
        first = self.logits(batch, 0)
        loss, accuracy = self.loss(first.outputs, batch)
        if not self.hp.r_drop_alpha:
            return Output(loss, accuracy, [first])
        second = self.logits(batch, 1)
        loss = torch.stack([loss, self.loss(second.outputs, batch)[0]]).mean()
        weight = self.hp.r_drop_alpha * self._weight(first.outputs)
        loss = loss + weight * r_drop_loss(first.outputs, second.outputs)
        return Output(loss, accuracy, [first, second])

    def logits(self, batch: CrossInputs, number: int, embeddings: Tensor | None = None) -> ChunkedForward:
        """Return the logits of this process's pairs, computed in chunks.

        number: 0 or 1, of the forward passes over this batch; part of the dropout seed.
        embeddings: replace the word embeddings.
        """

        def forward(*tensors: Tensor) -> Tensor:
            with replaced(self.model.word_embeddings, embeddings):
                return self.model(*tensors)

        pad_id = self.setup.tokenizer.pad_token_id
        return self.chunking.run(forward, batch.pairs, pad_id, (*batch.place, number))

    def probe(self, texts: int) -> tuple[Tensor, int]:
        """Return the logits of pairs of the greatest length, and their tokens."""
        input_ids, mask = probe_inputs(texts, self.max_tokens, self.device)
        return self.model(input_ids, mask, torch.zeros_like(mask)), input_ids.numel()

    def shrink_batches(self, units: int) -> float:
        """Make batches of at most `units` groups or pairs; return the fraction of a batch."""
        self.make_batch = replace(self.make_batch, groups=min(units, self.groups))
        return self.make_batch.groups / self.groups

    def _perturbed_embeddings(self, batch: CrossInputs) -> Tensor:
        """Return word embeddings moved by epsilon g / |g|, g their gradient of all processes' loss (FGM).

        Miyato et al. 2017 (arXiv 1605.07725), on the whole table as in the official recipe. If the
        gradient is zero or not finite, the embeddings are unchanged.
        """
        table = self.model.word_embeddings
        trained = table.requires_grad  # with LoRA the table is frozen
        table.requires_grad_()
        logits = self.logits(batch, 0)
        scale = FGM_LOSS_SCALE if self.setup.precision == "fp16" else 1.0
        (self.loss(logits.outputs, batch)[0] * scale).backward()
        accumulated, table.grad = table.grad, None
        logits.backward(inputs=[table])
        gradient, table.grad = table.grad, accumulated
        table.requires_grad_(trained)
        assert gradient is not None
        return perturb(table.detach(), self.processes.all_reduce_sum_(gradient), self.hp.fgm_epsilon)

    def loss(self, logits: Tensor, batch: CrossInputs) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy), each times this process's fraction of the batch."""
        if self.listwise:
            loss, accuracy = listwise_loss(logits, self.hp.group_size)
        else:
            (labels,) = tensors_to(self.device, batch.labels)
            loss, accuracy = pointwise_loss(logits, labels)
        return loss * self._weight(logits), accuracy * self._weight(logits)

    def _weight(self, logits: Tensor) -> float:
        """Return the fraction of the batch that these logits are."""
        return len(logits) / self.texts_per_batch

    def describe(self, batch: CrossInputs) -> str:
        """Return which training rows are in the batch."""
        return describe_rows(self.hp.train_set_path, batch.source.rows)

    def scorer(self) -> PairScorer:
        """Return the scorer with the current weights."""
        return PairScorer(
            self.model,
            self.setup.tokenizer,
            self.rules,
            self.device,
            self.setup.precision,
            batch_size=256,
            tokens_per_batch=token_budget(0, self.device),
        )

    def evaluate(self) -> dict[str, float]:
        """Return the metrics after re-ranking the dev candidates."""
        return {} if self.dev is None else self.dev.evaluate(self.scorer(), self.processes)

    def save(self) -> str:
        """Write cross_params.bin and the files beside it."""
        return self.files.save(merged_state(self.model.model))

    def saved_checksum(self) -> str | None:
        """Return the checksum of cross_params.bin."""
        return self.files.checksum()

    def evaluation_seconds(self) -> float:
        """Return a measured estimate of one dev evaluation."""
        if self.dev is None:
            return 0.0
        pairs, scorer = self.dev.candidates, self.scorer()
        seconds = seconds_per_text(lambda rows: scorer.score_rows(pairs, rows), evenly_spaced(len(pairs)))
        return len(pairs) * seconds / self.processes.world

    def finish(self, progress: TrainingProgress) -> None:
        """Warn of collapsed scores, a re-ranker below its retriever, negatives that are too easy."""
        if self.dev is None:
            return
        dev, candidates = self.dev, self.dev.candidates
        negatives = self._score_negatives(progress.best_weights)
        scores = self.scorer().score_all(candidates)
        reranked, retriever = dev.metrics(scores), dev.metrics(candidates.scores)
        order = f"in the retriever's order {retriever['MRR@10']:.4f}, re-ranked {reranked['MRR@10']:.4f}"
        log(f"MRR@10 of the dev candidates ({len(candidates.queries):,} queries): {order}")
        log(score_checks.fused_metrics(lambda w: dev.metrics(fuse(candidates, scores, w))["MRR@10"]))
        warnings = (
            score_checks.collapsed(scores, [span for _, span in candidates.spans()]),
            score_checks.below_retriever(reranked["MRR@10"], retriever["MRR@10"]),
            score_checks.negatives_too_easy(negatives, dev.irrelevant_scores(scores)),
        )
        for warning in filter(None, warnings):
            warn(warning)

    def restore_files(self, weights: str) -> None:
        """Rewrite the scores of training negatives when they are missing or damaged."""
        path = self.hp.params_path
        if self.hp.eval_every >= 0 and read_negative_scores(path, weights) is None:
            log(f"{negative_scores_path(path)}: missing or damaged; rewritten")
            self.load()
            self._score_negatives(weights)

    def _score_negatives(self, weights: str) -> np.ndarray:
        """Load the best weights, score some training negatives, write and return the scores."""
        state = torch.load(self.hp.params_path, map_location=self.device, weights_only=True)
        load_merged(self.model.model, state)
        rows = np.flatnonzero(self.data.labels == 0)
        rows = np.random.default_rng([self.hp.seed, 3]).permutation(rows)[:SAMPLED_NEGATIVES]
        sample = self.data.file.read(rows.tolist())
        queries, passages = [row.query for row in sample], [row.passage for row in sample]
        pairs = tokenize_pairs(self.setup.tokenizer, queries, passages, self.rules)
        scores = self.scorer().score(pairs)
        write_negative_scores(self.hp.params_path, weights, scores)
        return scores


def retriever_to_start_from(hp: CrossHparams, setup: Setup) -> str:
    """Return the finished retriever of output_dir if it was trained from the same model, else none.

    A model with a trained head, or a re-ranker in --cross_params, is a better start than a retriever.
    """
    path = str(Path(hp.output_dir) / "dual_params.bin")
    kind = (setup.config.architectures or [""])[0]
    has_head = hp.cross_params != hparams.NONE or kind.endswith(("ForSequenceClassification", "ForCausalLM"))
    if has_head or not os.path.exists(path):
        return hparams.NONE
    if not is_intact(path):
        log(f"{path}: not used as the start: its training is not finished, or it was changed since")
        return hparams.NONE
    stamp = read_stamp(path) or {}
    same = model_checksum(hp.pretrained_model_path), tokenizer_checksum(setup.tokenizer)
    if (stamp.get("start"), stamp.get("tokenizer")) == same:
        return path
    log(f"{path}: not used as the start: trained from another model or vocabulary")
    return hparams.NONE


def perturb(table: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    """Return table + epsilon g / |g|; the table itself when the gradient g is zero or not finite."""
    norm = gradient.double().norm()
    usable = torch.isfinite(norm) & (norm > 0)  # on the device: a GPU is not waited for
    step = torch.where(usable, epsilon / norm, 0.0).to(table.dtype)
    return table.addcmul(gradient.to(table.dtype).where(usable, 0.0), step)


@contextmanager
def replaced(parameter: torch.nn.Parameter, values: Tensor | None) -> Iterator[None]:
    """Use `values` as the parameter within the context.

    The backward pass may follow later: an embedding lookup does not save its weight for it.
    """
    own = parameter.data
    parameter.data = own if values is None else values
    try:
        yield
    finally:
        parameter.data = own


def training_stage(hp: CrossHparams) -> TrainingStage:
    """Return the training with these settings; loads neither data nor model."""
    batch = "groups_per_step" if hp.loss == "listwise" else "batch_size"
    setup = Setup(
        "cross", hp, MODEL_SETTINGS, batch, lambda config: {"max_seq_len": reranker_rules(asdict(hp), config)}
    )
    return TrainingStage(setup, CrossTask(hp, setup))


def settings(argv: list[str]) -> CrossHparams:
    """Return the settings: those of the command line, else of the model folder, else the defaults."""
    hp = hparams.parse(CrossHparams, argv)
    own = reranker_settings(hp.pretrained_model_path, CrossHparams.defaults(hp.debug).max_seq_len)
    final = hparams.parse(CrossHparams, argv, own)
    log_overrides(hp.pretrained_model_path, own, asdict(final))
    return final


def run(hp: CrossHparams) -> None:
    """Train unless the result is up to date."""
    hparams.announce("train the cross-encoder", hp)
    plain = CrossHparams.defaults(hp.debug)
    for knob in ("batch_size",) if hp.loss == "listwise" else ("group_size", "groups_per_step"):
        if getattr(hp, knob) != getattr(plain, knob):
            warn(f"--{knob} {getattr(hp, knob)}: has no effect with --loss {hp.loss}")
    check_inputs(hp, hp.pretrained_model_path, train_set_path="training rows")
    training_stage(hp).run()


def main(argv: list[str]) -> int:
    """Run with these options; return the exit status."""
    return exit_status(lambda: run(settings(argv)))
