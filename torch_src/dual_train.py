"""do_dual_train.py: train/dual.train.tsv -> output/dual_params.bin, dual_hparams.json, dual_model/."""

from dataclasses import dataclass
from pathlib import Path

import torch

from metric.evaluation import MEASURES, compute_metrics
from torch_src import hparams
from torch_src.data.dual_training_set import DualBatch, DualTrainingSet
from torch_src.data.mined_files import read_teacher, sidecar_path
from torch_src.dual_hparams import MODEL_SETTINGS, DualHparams
from torch_src.models.dual_encoder import DualEncoder, load_backbone, shorten
from torch_src.models.losses import contrastive_loss, contrastive_scores, distillation_loss
from torch_src.models.model_folder import own_settings
from torch_src.models.tokenization import TextRules, pad, tokenize
from torch_src.retrieval.encoding import Encoder
from torch_src.runtime.devices import autocast, tensors_to, token_budget
from torch_src.runtime.log import log, warn
from torch_src.runtime.planning import evenly_spaced, seconds_per_text
from torch_src.runtime.program import exit_status
from torch_src.runtime.stamps import checksum_files
from torch_src.training.dev_evaluation import build_dev_retrieval
from torch_src.training.grad_cache import ChunkedForward
from torch_src.training.stage import TrainingStage, rows_named
from torch_src.training.trainer import Progress, Task


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch ready for the model: this process's share of the token ids, targets and mask of all."""

    source: DualBatch
    at: tuple[int, int]  # (epoch, micro-step)
    queries: list[list[int]]
    passages: list[list[int]]


class DualTraining(TrainingStage):
    """Training of the two towers by in-batch and hard negatives."""

    name = "dual"
    fixed_by_weights = MODEL_SETTINGS
    lengths = ("q_max_seq_len", "p_max_seq_len")

    def __init__(self, hp: DualHparams):
        super().__init__(hp)
        if hp.normalize and hp.temperature >= 1:
            warn("--normalize with a temperature of 1 or more: scores within [-1, 1] are too flat to learn")
        self.rules = {
            "query": TextRules(hp.q_max_seq_len, hp.query_prefix, hp.remove_spaces),
            "passage": TextRules(hp.p_max_seq_len, hp.passage_prefix, hp.remove_spaces),
        }
        hidden = self.config.hidden_size
        self.dims = [*hparams.dimensions("matryoshka_dims", hp.matryoshka_dims, hidden), hidden]

    def load(self) -> None:
        hp = self.hp
        teacher = None if hp.distill_loss == hparams.NONE else read_teacher(hp.train_set_path)
        self.data = DualTrainingSet(hp.train_set_path, self.rules["passage"].clean, teacher)
        self.steps = self.data.steps_per_epoch(hp.batch_size)  # UserError when the batch is too large
        log(f"{self.data.rows:,} training rows, {self.data.queries:,} distinct queries")
        evaluates = hp.eval_every >= 0 and self.group.rank == 0
        self.dev = build_dev_retrieval(hp, str(Path(hp.output_dir) / "cache")) if evaluates else None
        backbone = load_backbone(hp.pretrained_model_path, self.config, hp.pooling, hp.seed)
        self.checkpoint_gradients(backbone)
        self.model = DualEncoder(backbone, hp.share_encoder, hp.pooling, hp.normalize).to(self.device)

    def stamp(self) -> dict:
        hp, stamp = self.hp, super().stamp()
        if hp.eval_every >= 0:
            stamp |= self.collection_stamp()  # the pool of dev decides which weights are kept
        if hp.distill_loss != hparams.NONE:
            stamp["teacher"] = checksum_files([sidecar_path(hp.train_set_path)])
        return stamp

    def task(self) -> Task:
        hp = self.hp
        negatives = hp.batch_size * (1 + hp.hard_negatives) - 1
        return Task(
            self.model, self.steps, *self.parts(), queries_per_step=hp.batch_size, negatives=negatives
        )

    def prepare(self, epoch: int, micro_step: int) -> TokenBatch:
        """Draw one micro-batch and tokenise this process's share (in the thread that runs ahead)."""
        hp = self.hp
        batch = self.data.batch(hp.seed, epoch, micro_step, hp.batch_size, hp.hard_negatives)
        own = (("query", batch.queries), ("passage", batch.passages))
        ids = [
            tokenize(self.tokenizer, texts[self.group.share(len(texts))], self.rules[side])[0]
            for side, texts in own
        ]
        return TokenBatch(batch, (epoch, micro_step), *ids)

    def backward(self, batch: TokenBatch, begin) -> torch.Tensor:
        """Add the gradient of one micro-batch; return this process's part of its accuracy.

        Each process encodes its share of the queries and passages and holds its queries against the passages
        of all. What the others' queries ask of its passages comes back as a sum over the processes.
        """
        queries, passages = (
            self.embed("query", batch, batch.queries),
            self.embed("passage", batch, batch.passages),
        )
        count, own = len(batch.source.queries), self.group.share(len(batch.source.queries))
        everyones = self.group.gather(passages.outputs.detach(), len(batch.source.passages)).requires_grad_()
        loss, accuracy = self.loss(queries.outputs, everyones, batch.source, own)
        share = len(queries.outputs) / count
        begin(loss * share).backward()
        queries.backward(queries.outputs.grad)
        passages.backward(self.group.sum_(everyones.grad)[self.group.share(len(everyones))])
        return accuracy * share

    def loss(
        self, queries: torch.Tensor, passages: torch.Tensor, batch: DualBatch, own: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (loss, accuracy) of this process's queries (`own` of the batch) against all passages."""
        hp = self.hp
        arrays = (batch.targets, batch.masked, batch.lists, batch.teacher)
        targets, masked, lists, teacher = tensors_to(self.device, *(array[own] for array in arrays))
        losses, accuracies = [], []
        for dims in self.dims:
            scores = contrastive_scores(
                *(shorten(v, dims, hp.normalize) for v in (queries, passages)), hp.temperature
            )
            loss, accuracy = contrastive_loss(scores, targets, masked)
            if hp.distill_loss != hparams.NONE:
                distilled = distillation_loss(hp.distill_loss, scores, lists, teacher, hp.distill_temperature)
                loss = hp.contrastive_weight * loss + hp.distill_weight * distilled
            losses.append(loss)
            accuracies.append(accuracy)
        return torch.stack(losses).mean(), accuracies[-1]

    def embed(self, side: str, batch: TokenBatch, ids: list[list[int]]) -> ChunkedForward:
        """Return the vectors (len(ids), H) fp32, chunk by chunk."""

        def forward(rows) -> torch.Tensor:
            arrays = pad([ids[row] for row in rows], self.tokenizer.pad_token_id)
            with autocast(self.device, self.precision):
                return self.model(side, *tensors_to(self.device, *arrays))

        return self.in_chunks([len(tokens) for tokens in ids], forward, (*batch.at, side == "query"))

    def describe(self, batch: TokenBatch) -> str:
        return rows_named(batch.source.rows, self.hp.train_set_path)

    def encoder(self, side: str) -> Encoder:
        """Return the encoder of one side, on the weights as they are now."""
        hp = self.hp
        return Encoder(
            self.model.tower(side), self.tokenizer, self.rules[side], hp.pooling, hp.normalize, self.device,
            self.precision, batch_size=512, tokens_per_batch=token_budget(0, self.device),
        )  # fmt: skip

    def evaluate(self) -> dict[str, float]:
        """Return the dev metrics; empty without a dev set."""
        if self.dev is None:
            return {}
        result = self.dev.retrieve(self.encoder("query"), self.encoder("passage"))
        metrics = compute_metrics(self.dev.reference, result)
        return {name: metrics[name] for name in MEASURES}

    def evaluation_seconds(self) -> float:
        texts = [self.dev.passages[row] for row in evenly_spaced(len(self.dev.passages))]
        queries = [query.query for query in self.dev.queries]
        some = [queries[row] for row in evenly_spaced(len(queries))]
        passages = len(self.dev.passages) * seconds_per_text(self.encoder("passage").encode, texts)
        return passages + len(queries) * seconds_per_text(self.encoder("query").encode, some)

    def texts_a_step(self) -> int:
        return self.hp.batch_size * (2 + self.hp.hard_negatives)

    def summary(self, progress: Progress) -> None:
        if self.dev and progress.best <= progress.untrained:
            warn(
                f"dev MRR@10 {progress.best:.4f} is not above {progress.untrained:.4f} before training: "
                "try a lower --lr, a --temperature below 1 with --normalize, or more epochs"
            )


def settings(argv: list[str]) -> DualHparams:
    """Return the settings; the options win over the model folder, which wins over the defaults."""
    hp = hparams.parse(DualHparams, argv)
    return hparams.parse(DualHparams, argv, own_settings(hp.pretrained_model_path))


def run(hp: DualHparams) -> None:
    """Train unless the result is up to date."""
    hparams.announce("train the dual encoder", hp)
    DualTraining(hp).run()


def main(argv: list[str]) -> int:
    """Run with these options; return the exit status."""
    return exit_status(lambda: run(settings(argv)))
