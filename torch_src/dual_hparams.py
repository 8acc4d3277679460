"""Settings of do_dual_train.py. Edit a default here, or pass `--name value`. Shared: common_hparams.py."""

from dataclasses import dataclass
from typing import Any

from torch_src.common_hparams import Training
from torch_src.hparams import NONE, POOLINGS, TINY_ENCODER, under
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import to_root
from torch_src.runtime.options import ABOVE_0, FROM_0, LENGTH

# Saved in dual_hparams.json; inference reads them there and refuses other values.
MODEL_SETTINGS = (
    "share_encoder", "pooling", "normalize", "query_prefix", "passage_prefix",
    "q_max_seq_len", "p_max_seq_len", "remove_spaces", "vocab_path",
)  # fmt: skip


@dataclass(frozen=True)
class DualHparams(Training):
    """Train the dual encoder: train/dual.train.tsv -> output/dual_params.bin."""

    # main options
    pretrained_model_path: str = "torch_pretrained_models/ernie-gram-zh"  # folder or hub name
    vocab_path: str = ""  # a WordPiece vocab.txt; empty: the model's own tokenizer
    epoch: int = 10  # passes over the training queries
    batch_size: int = 512  # queries per micro-batch, each with its positive and hard negatives
    lr: float = 3e-5  # peak learning rate of AdamW

    # model
    q_max_seq_len: int = 32  # tokens of a query with [CLS] and [SEP], without the prefix
    p_max_seq_len: int = 384  # tokens of a passage with [CLS] and [SEP], without the prefix
    query_prefix: str = ""  # put before every query, e.g. "query: " for E5
    passage_prefix: str = ""  # put before every passage, e.g. "passage: " for E5
    share_encoder: bool = False  # one encoder for queries and passages
    pooling: str = "cls"  # how token vectors become one vector; pooler: BERT's dense layer on [CLS]
    normalize: bool = False  # scale vectors to length 1 (then set temperature below 1)
    matryoshka_dims: str = ""  # also train vectors cut to these dimensions, e.g. 64,128; empty: off

    # optimization
    hard_negatives: int = 1  # random hard negatives per query, new ones in each epoch
    temperature: float = 1.0  # scores are divided by it; 0.01 to 0.05 with normalize
    weight_decay: float = 0.0  # of AdamW, on weight matrices only (no biases, no norms)
    distill_loss: str = "none"  # distillation of the scores of re-rankers (teacher)
    teacher: tuple[str, ...] = ()  # files of score_training_set.py, averaged; empty: train_set's own scores
    distill_weight: float = 1.0  # weight of distill_loss
    distill_temperature: float = 1.0  # the re-ranker's logits are divided by it
    contrastive_weight: float = 1.0  # weight of the contrastive loss, with distill_loss

    # evaluation
    dev_random_passages: int = 20000  # random passages added to those of dev_candidates

    STAGE = "dual_train"
    DEBUG = {
        # the prefixes are those of the model's folder
        "pretrained_model_path": TINY_ENCODER, "share_encoder": True, "pooling": "mean", "normalize": True,
        "temperature": 0.02, "hard_negatives": 0, "p_max_seq_len": 208, "dropout": 0.0,
        "precision": "fp32", "epoch": 2, "batch_size": 32, "lr": 2e-4,
    }  # fmt: skip
    CHOICES = {"pooling": POOLINGS, "distill_loss": (NONE, "kl", "margin_mse")}
    RANGES = {
        "q_max_seq_len": LENGTH, "p_max_seq_len": LENGTH, "hard_negatives": (0, 1000),
        "temperature": ABOVE_0, "distill_weight": FROM_0, "distill_temperature": ABOVE_0,
        "contrastive_weight": FROM_0, "dev_random_passages": FROM_0,
    }  # fmt: skip

    @property
    def params_path(self) -> str:
        return under(self.output_dir, "", "dual_params.bin")

    @property
    def saved_to(self) -> str:
        return under(self.output_dir, "", "dual_hparams.json")

    @property
    def inputs(self) -> list[str]:
        return [*super().inputs, *self.teacher]

    def to_save(self) -> dict[str, Any]:
        return {**super().to_save(), "teacher": [to_root(path) for path in self.teacher]}

    def check(self) -> None:
        super().check()
        for knob in ("teacher", "distill_weight", "distill_temperature", "contrastive_weight"):
            if self.distill_loss == NONE and getattr(self, knob) != getattr(type(self), knob):
                raise UserError(f"--{knob} requires --distill_loss kl or margin_mse")
        if self.distill_loss != NONE and not self.hard_negatives:
            raise UserError("--distill_loss requires --hard_negatives of at least 1")
        if self.distill_loss != NONE and not (self.distill_weight or self.contrastive_weight):
            raise UserError("--distill_weight 0 --contrastive_weight 0: there is nothing to train on")
        if self.batch_size == 1 and not self.hard_negatives:
            raise UserError("--batch_size 1 --hard_negatives 0: no query would have a negative")
