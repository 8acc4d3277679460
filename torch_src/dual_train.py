"""do_dual_train.py: train/dual.train.tsv -> output/dual_params.bin with dual_hparams.json and dual_model/
beside it.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from metric.evaluation import compute_metrics
from torch_src import hparams
from torch_src.backbones import check_fits, load_config, model_fingerprint, save_model_folder
from torch_src.datasets import DualBatch, DualTrainingSet
from torch_src.dev_retrieval import build_dev_retrieval
from torch_src.devices import choose_device, choose_precision, set_threads
from torch_src.dual_hparams import DEBUG, FIXED_BY_WEIGHTS, DualHparams
from torch_src.dual_model import DualEncoder, load_backbone
from torch_src.encoding import Encoder
from torch_src.helpers import atomic_write, exit_status, say, warn
from torch_src.losses import contrastive_loss, contrastive_scores
from torch_src.stamps import clear_stamp, fingerprint_files, up_to_date, write_stamp
from torch_src.tokenization import (
    TextRules,
    length_sorted_batches,
    load_tokenizer,
    pad,
    tokenize,
    tokenizer_fingerprint,
)
from torch_src.training import Task, Trainer

# Settings that change how a run goes or what it says, but not the weights it ends with.
NOT_STAMPED = {
    "data_dir", "train_set", "dev_set", "passage_dir", "passage_ids", "dev_candidates", "output_dir",
    "log_every", "pretrained_model_path", "vocab_path", "force", "debug",
}  # fmt: skip


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch ready for the model: token ids in, targets and mask out."""

    source: DualBatch
    queries: list[list[int]]
    passages: list[list[int]]


class DualTraining:
    """The parts of a dual-encoder training run; `task()` gives the loop what it asks for."""

    def __init__(self, hp: DualHparams):
        self.hp = hp
        self.device = choose_device(hp.device)
        self.precision = choose_precision(hp.precision, self.device)
        threads = set_threads(hp.threads)
        say(f"device {self.device}  precision {self.precision}  threads {threads}")
        self.rules = {
            "query": TextRules(hp.q_max_seq_len, hp.query_prefix, hp.remove_spaces),
            "passage": TextRules(hp.p_max_seq_len, hp.passage_prefix, hp.remove_spaces),
        }
        self.config = load_config(hp.pretrained_model_path, hp.dropout)
        self.tokenizer = load_tokenizer(hp.pretrained_model_path, hp.vocab_path)
        lengths = {"q_max_seq_len": hp.q_max_seq_len, "p_max_seq_len": hp.p_max_seq_len}
        check_fits(self.config, len(self.tokenizer), lengths, hp.pretrained_model_path)
        self.data = DualTrainingSet(hp.train_set_path, self.rules["passage"].clean)
        self.stamp = self._make_stamp()
        self.done: dict = {}

    def _make_stamp(self) -> dict:
        settings = {k: v for k, v in dataclasses.asdict(self.hp).items() if k not in NOT_STAMPED}
        return {
            "stage": "dual_train", **settings, "precision": self.precision,
            "start": model_fingerprint(self.hp.pretrained_model_path),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "train_rows": fingerprint_files([self.hp.train_set_path]),
            "dev_set": fingerprint_files(filter(os.path.exists, [self.hp.dev_set_path])),
        }  # fmt: skip

    def load(self) -> None:
        """Load the dev set and the model: what takes time, after everything cheap was checked."""
        hp = self.hp
        self.dev = None if hp.eval_every < 0 else build_dev_retrieval(hp, str(Path(hp.output_dir) / "cache"))
        backbone = load_backbone(hp.pretrained_model_path, self.config, hp.pooling, hp.seed)
        self.model = DualEncoder(backbone, hp.share_encoder, hp.pooling, hp.normalize).to(self.device)

    def task(self) -> Task:
        """Return what the loop needs."""
        micro_steps = self.data.steps_per_epoch(self.hp.batch_size)
        return Task(
            self.model, micro_steps, self.prepare, self.loss, self.describe, self.evaluate, self.save_best
        )

    def prepare(self, epoch: int, micro_step: int) -> TokenBatch:
        """Draw and tokenise one micro-batch (in the thread that runs ahead of the model)."""
        hp = self.hp
        # accumulation leaves at most accumulation_steps - 1 micro-batches of an epoch unused
        batch = self.data.batch(hp.seed, epoch, micro_step, hp.batch_size, hp.hard_negatives)
        queries = tokenize(self.tokenizer, batch.queries, self.rules["query"])[0]
        return TokenBatch(batch, queries, tokenize(self.tokenizer, batch.passages, self.rules["passage"])[0])

    def loss(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (loss, in-batch accuracy) of one micro-batch."""
        queries = self.embed_in_chunks("query", batch.queries)
        passages = self.embed_in_chunks("passage", batch.passages)
        scores = contrastive_scores(queries, passages, self.hp.temperature)
        targets = torch.from_numpy(batch.source.targets).to(self.device)
        return contrastive_loss(scores, targets, torch.from_numpy(batch.source.masked).to(self.device))

    def embed_in_chunks(self, side: str, ids: list[list[int]]) -> torch.Tensor:
        """Return the vectors (len(ids), H) fp32, computed in length-sorted chunks and put back in order.

        Every text still meets every other in the loss; only the padding is saved.
        """
        chunks = length_sorted_batches([len(tokens) for tokens in ids], len(ids), self.hp.tokens_per_batch)
        parts = []
        for rows in chunks:
            arrays = pad([ids[row] for row in rows], self.tokenizer.pad_token_id)
            input_ids, mask = (torch.from_numpy(array).to(self.device, non_blocking=True) for array in arrays)
            parts.append(self.model(side, input_ids, mask))
        back = np.argsort(np.concatenate(chunks))
        return torch.cat(parts)[torch.from_numpy(back).to(self.device)]

    def describe(self, batch: TokenBatch) -> str:
        """Name the batch's rows."""
        return f"rows {', '.join(map(str, batch.source.rows[:40]))} of {self.hp.train_set_path}"

    def encoder(self, side: str) -> Encoder:
        """Return the encoder of one side, on the weights as they are now."""
        hp = self.hp
        return Encoder(
            self.model.tower(side), self.tokenizer, self.rules[side], hp.pooling, hp.normalize, self.device,
            self.precision, batch_size=256, tokens_per_batch=16384,
        )  # fmt: skip

    def evaluate(self) -> dict[str, float]:
        """Return the dev metrics; empty without a dev set."""
        if self.dev is None:
            return {}
        metrics = compute_metrics(
            self.dev.reference, self.dev.retrieve(self.encoder("query"), self.encoder("passage"))
        )
        return {name: metrics[name] for name in ("MRR@10", "recall@1", "recall@50")}

    def save_best(self) -> None:
        """Write dual_params.bin and, before it, what inference must know of it."""
        params = Path(self.hp.params_path)
        save_model_folder(params.parent / "dual_model", self.config, self.tokenizer)
        fixed = {name: getattr(self.hp, name) for name in FIXED_BY_WEIGHTS}
        hparams.save(self.hp, params.parent / "dual_hparams.json", fixed_by_weights=fixed,
                     tokenizer=tokenizer_fingerprint(self.tokenizer))  # fmt: skip
        with atomic_write(params, "wb") as file:
            torch.save(self.model.state_dict(), file)


def run(hp: DualHparams) -> None:
    """Train unless the result is up to date."""
    hparams.announce("train the dual encoder", hp)
    training = DualTraining(hp)
    params, checkpoint = hp.params_path, Path(hp.output_dir) / "dual_checkpoint.pt"
    if hp.force:
        checkpoint.unlink(missing_ok=True)
    elif up_to_date(params, training.stamp, say):
        say(f"{params}: up to date")
        return
    training.load()
    task = training.task()
    say(f"{training.data.rows:,} training rows, {training.data.queries:,} distinct queries")
    clear_stamp(params)
    progress = Trainer(hp, task, training.device, training.precision, str(checkpoint), training.stamp).run()
    write_stamp(params, training.stamp)
    say(f"wrote {params} (step {progress.best_step})")
    if training.dev and progress.best <= progress.untrained:
        warn(f"dev MRR@10 {progress.best:.4f} is not above {progress.untrained:.4f} before training: "
             "try a lower --lr, a --temperature below 1 with --normalize, or more epochs")  # fmt: skip


def main(argv: list[str]) -> int:
    """Run with these options; return the exit status."""
    return exit_status(lambda: run(hparams.parse(DualHparams, argv, DEBUG)))
