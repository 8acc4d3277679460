"""do_dual_train.py: train/dual.train.tsv -> output/dual_params.bin, dual_hparams.json, dual_model/."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from torch_src import hparams
from torch_src.data.dual_training_set import DualBatch, DualTrainingSet
from torch_src.data.mined_files import read_teachers, teacher_files
from torch_src.dual_hparams import MODEL_SETTINGS, DualHparams
from torch_src.inputs import check_inputs
from torch_src.models.backbones import folder_settings
from torch_src.models.dual_encoder import (
    DualEncoder,
    build_backbone,
    describe_retriever,
    load_backbone,
    load_query_backbone,
    pools_prompt,
    shorten,
    vector_width,
)
from torch_src.models.lora import add_adapters, check_targets, describe_adapters
from torch_src.models.losses import contrastive_loss, contrastive_scores, distillation_loss
from torch_src.models.model_folder import log_overrides
from torch_src.models.tokenization import LENGTHS, TextRules, TokenTable, exclude_prompt, retriever_rules
from torch_src.models.truncation import sampled, truncation_of_texts
from torch_src.retrieval.encoding import Encoder
from torch_src.runtime.devices import tensors_to, token_budget
from torch_src.runtime.log import log, warn
from torch_src.runtime.planning import evenly_spaced, seconds_per_text
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import checksum_files
from torch_src.training.dev_evaluation import DevRetrieval, open_dev_retrieval
from torch_src.training.distributed import Processes
from torch_src.training.grad_cache import ChunkedForward
from torch_src.training.memory import probe_inputs
from torch_src.training.stage import Setup, TrainingStage, checkpoint_activations, describe_rows
from torch_src.training.trainer import Output, TrainingProgress, TrainingTask


@dataclass(frozen=True)
class DualInputs:
    """A batch ready for the model: targets and masks of all of it, token ids of this process's shard."""

    source: DualBatch
    place: tuple[int, int]  # (epoch, step)
    queries: TokenTable
    passages: TokenTable


@dataclass(frozen=True)
class DualBatches:
    """Draws and tokenizes the batch of (epoch, step); can be copied to worker processes."""

    hp: DualHparams
    data: DualTrainingSet
    tokenizer: PreTrainedTokenizerBase
    rules: dict[str, TextRules]
    processes: Processes

    def __call__(self, place: tuple[int, int]) -> DualInputs:
        """Return the batch, with the token ids of this process's shard of its queries and passages."""
        source = self.data.batch(self.hp.seed, *place, self.hp.batch_size, self.hp.hard_negatives)
        texts = {"query": source.queries, "passage": source.passages}
        queries, passages = (
            TokenTable.of_texts(
                self.tokenizer, all_texts[self.processes.shard(len(all_texts))], self.rules[side]
            )
            for side, all_texts in texts.items()
        )
        return DualInputs(source, place, queries, passages)


class DualTask(TrainingTask):
    """Contrastive training of two towers with in-batch and hard negatives."""

    model: DualEncoder
    make_batch: DualBatches
    accuracy_name = "in-batch"

    def __init__(self, hp: DualHparams, setup: Setup):
        self.hp, self.setup, self.files = hp, setup, setup.files
        self.device, self.processes, self.chunking = setup.device, setup.processes, setup.chunking
        self.units_per_batch = hp.batch_size
        self.texts_per_batch = hp.batch_size * (2 + hp.hard_negatives)
        if hp.normalize and hp.temperature >= 1:
            warn("--normalize with a --temperature of 1 or more: scores in [-1, 1] are too flat to learn")
        if hp.lora_rank:
            check_targets(lambda: build_backbone(setup.config, hp.pooling), hp.lora_targets)
        self.rules = {side: setup.rules[knob] for side, knob in LENGTHS.items()}
        if not pools_prompt(setup.config):
            self.rules = {side: exclude_prompt(rules, setup.tokenizer) for side, rules in self.rules.items()}
        self.max_tokens = {side: rules.max_tokens(setup.tokenizer) for side, rules in self.rules.items()}
        texts = {"query": hp.batch_size, "passage": hp.batch_size * (1 + hp.hard_negatives)}
        self.max_batch_tokens = sum(
            math.ceil(texts[side] / self.processes.world) * tokens for side, tokens in self.max_tokens.items()
        )
        log(describe_retriever(asdict(hp), setup.config))
        hidden = vector_width(setup.config)
        self.dims = [*hparams.dimensions("matryoshka_dims", hp.matryoshka_dims, hidden), hidden]
        self.dev: DevRetrieval | None = None

    def inputs(self) -> dict[str, Any]:
        """Return the checksums of the collection, from which the dev pool is drawn, and of the teacher."""
        stamp = self.setup.collection_stamp() if self.hp.eval_every >= 0 else {}
        if self.hp.distill_loss != hparams.NONE:
            stamp["teacher"] = checksum_files(teacher_files(self.hp.train_set_path, self.hp.teacher))
        return stamp

    def load(self) -> None:
        """Load training set, dev set and model."""
        hp, setup = self.hp, self.setup
        self.data = DualTrainingSet(hp.train_set_path, self.rules["passage"].clean)
        if hp.distill_loss != hparams.NONE:
            self.data.teacher = read_teachers(hp.train_set_path, hp.teacher, self.data.rows)
            log(describe_teacher(self.data.teacher))
        self.batches_per_epoch = self.data.steps_per_epoch(hp.batch_size)
        self.make_batch = DualBatches(hp, self.data, setup.tokenizer, self.rules, self.processes)
        log(f"{self.data.rows:,} training rows, {self.data.queries:,} distinct queries")
        self._report_truncation()
        negatives = hp.batch_size * (1 + hp.hard_negatives) - 1
        log(f"each query is compared with {negatives} negatives in a batch (fewer with duplicate texts)")
        if hp.hard_negatives and (short := self.data.short_queries(hp.hard_negatives)):
            log(
                f"{short:,} of {self.data.queries:,} queries have fewer than {hp.hard_negatives} hard "
                "negatives: they add what they have"
            )
        if hp.eval_every >= 0:
            self.dev = open_dev_retrieval(
                hp.dev_set_path,
                hp.passage_dir_path,
                hp.passage_ids_path,
                hp.dev_candidates_path,
                hp.dev_random_passages,
                hp.seed,
                setup.cache_dir,
            )
        start = (hp.pretrained_model_path, setup.config, hp.pooling, hp.seed)
        backbone, query_backbone = load_backbone(*start), load_query_backbone(*start)
        for tower in filter(None, (backbone, query_backbone)):
            if hp.gradient_checkpointing:
                checkpoint_activations(tower)
            if hp.lora_rank:
                add_adapters(tower, hp.lora_rank, hp.lora_targets, hp.seed, setup.precision)
        options = (hp.share_encoder, hp.pooling, hp.normalize, query_backbone)
        self.model = DualEncoder(backbone, *options).to(self.device)
        if hp.lora_rank:
            log(describe_adapters(self.model, hp.lora_rank))

    def _report_truncation(self) -> None:
        """Log which shares of the training texts are truncated; they are saved with the weights."""
        rows = self.data.file.read(sampled(self.data.rows))
        queries, passages = [row.query for row in rows], [text for row in rows for text in row[1:]]
        found = truncation_of_texts(self.setup.tokenizer, queries, passages, self.rules)
        self.files.truncation = [each.report() for each in found]

    def forward(self, batch: DualInputs) -> Output:
        """Score this process's queries against the passages of all processes."""
        queries = self.embed("query", batch, batch.queries)
        passages = self.embed("passage", batch, batch.passages)
        count = len(batch.source.queries)
        # differentiable: the queries of the other processes also contribute to the gradient of a passage
        all_passages = self.processes.all_gather_rows(passages.outputs, len(batch.source.passages))
        shard = self.processes.shard(count)
        loss, accuracy = self.loss(queries.outputs, all_passages, batch.source, shard)
        weight = len(queries.outputs) / count
        return Output(loss * weight, accuracy * weight, [queries, passages])

    def embed(self, side: str, batch: DualInputs, tokens: TokenTable) -> ChunkedForward:
        """Return the vectors (len(tokens), H) fp32, computed in chunks."""

        def forward(input_ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(side, input_ids, mask, self.rules[side].prompt_tokens)

        pad_id = self.setup.tokenizer.pad_token_id
        return self.chunking.run(forward, tokens, pad_id, (*batch.place, side == "query"))

    def probe(self, texts: int) -> tuple[Tensor, int]:
        """Return the vectors of passages of the greatest length, and their tokens."""
        inputs = probe_inputs(texts, self.max_tokens["passage"], self.device)
        return self.model("passage", *inputs, self.rules["passage"].prompt_tokens), inputs[0].numel()

    def shrink_batches(self, units: int) -> float:
        """Make batches of at most `units` queries; return the fraction of a batch."""
        hp = replace(self.hp, batch_size=min(units, self.hp.batch_size))
        self.make_batch = replace(self.make_batch, hp=hp)
        return hp.batch_size / self.hp.batch_size

    def loss(
        self, queries: Tensor, passages: Tensor, source: DualBatch, shard: slice
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy) of the queries in this shard of the batch against all its passages."""
        hp = self.hp
        arrays = (source.targets, source.masked, source.lists, source.teacher)
        targets, masked, lists, teacher = tensors_to(self.device, *(array[shard] for array in arrays))
        losses, accuracies = [], []
        for dims in self.dims:
            short_queries, short_passages = (shorten(v, dims, hp.normalize) for v in (queries, passages))
            scores = contrastive_scores(short_queries, short_passages, hp.temperature)
            loss, accuracy = contrastive_loss(scores, targets, masked)
            if hp.distill_loss != hparams.NONE:
                distilled = distillation_loss(hp.distill_loss, scores, lists, teacher, hp.distill_temperature)
                loss = hp.contrastive_weight * loss + hp.distill_weight * distilled
            losses.append(loss)
            accuracies.append(accuracy)
        return torch.stack(losses).mean(), accuracies[-1]

    def describe(self, batch: DualInputs) -> str:
        """Return which training rows are in the batch."""
        return describe_rows(self.hp.train_set_path, batch.source.rows)

    def encoder(self, side: str) -> Encoder:
        """Return the encoder of one side with the current weights."""
        return Encoder(
            self.model.tower(side),
            self.setup.tokenizer,
            self.rules[side],
            self.hp.pooling,
            self.hp.normalize,
            self.device,
            self.setup.precision,
            batch_size=512,
            tokens_per_batch=token_budget(0, self.device),
        )

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of retrieval on dev."""
        if self.dev is None:
            return {}
        return self.dev.evaluate(self.encoder("query"), self.encoder("passage"), self.processes)

    def save(self) -> str:
        """Write dual_params.bin and the files beside it."""
        return self.files.save(self.model.stored_state())

    def saved_checksum(self) -> str | None:
        """Return the checksum of dual_params.bin."""
        return self.files.checksum()

    def evaluation_seconds(self) -> float:
        """Return a measured estimate of one dev evaluation."""
        if self.dev is None:
            return 0.0
        sides = (("query", self.dev.queries), ("passage", self.dev.passages))
        seconds = 0.0
        for side, texts in sides:
            sample = [texts[row] for row in evenly_spaced(len(texts))]
            seconds += len(texts) * seconds_per_text(self.encoder(side).encode, sample)
        return seconds / self.processes.world

    def finish(self, progress: TrainingProgress) -> None:
        """Warn when training did not raise the dev metric."""
        if self.dev and progress.best <= progress.untrained:
            warn(
                f"dev MRR@10 {progress.best:.4f} is not above {progress.untrained:.4f} before training: "
                "try a lower --lr, a --temperature below 1 with --normalize, or more epochs"
            )


def describe_teacher(teacher: np.ndarray) -> str:
    """Return the share of rows that a teacher knows, and how far apart it ranks positives and negatives."""
    margins = teacher[:, 0] - teacher[:, 1]
    known = margins[~np.isnan(margins)]
    low, middle, high = np.quantile(known, [0.05, 0.5, 0.95])
    return (
        f"teacher: knows {len(known):,} of {len(teacher):,} rows; its logit of the positive is higher in "
        f"{100 * np.mean(known > 0):.0f}%, by {middle:.1f} (median; 5% {low:.1f}, 95% {high:.1f})"
    )


def training_stage(hp: DualHparams) -> TrainingStage:
    """Return the training with these settings; loads neither data nor model."""
    rules = {LENGTHS[side]: rule for side, rule in retriever_rules(asdict(hp)).items()}
    setup = Setup("dual", hp, MODEL_SETTINGS, "batch_size", lambda _: rules)
    return TrainingStage(setup, DualTask(hp, setup))


def settings(argv: list[str]) -> DualHparams:
    """Return the settings: those of the command line, else of the model folder, else the defaults."""
    hp = hparams.parse(DualHparams, argv)
    path, defaults = hp.pretrained_model_path, DualHparams.defaults(hp.debug)
    # the folder's longest text may be too long to train with: the recipe's length, unless it is for this side
    own = folder_settings(path, {name: getattr(defaults, name) for name in LENGTHS.values()})
    final = hparams.parse(DualHparams, argv, own)
    log_overrides(path, own, asdict(final))
    return final


def run(hp: DualHparams) -> None:
    """Train unless the result is up to date."""
    hparams.announce("train the dual encoder", hp)
    check_inputs(hp, hp.pretrained_model_path, train_set_path="training rows")
    training_stage(hp).run()


def main(argv: list[str]) -> int:
    """Run with these options; return the exit status."""
    return exit_status(lambda: run(settings(argv)))
