"""Settings of do_cross_train.py. Edit a default here, or pass `--name value`. Shared: common_hparams.py."""

from dataclasses import dataclass

from torch_src.common_hparams import Training
from torch_src.hparams import NONE, TINY_ENCODER, under
from torch_src.runtime.errors import UserError
from torch_src.runtime.options import AT_MOST_ALL, COUNT, FROM_0, PAIR_LENGTH

# Saved in cross_hparams.json; inference reads them there and refuses other values.
MODEL_SETTINGS = ("max_seq_len", "remove_spaces", "vocab_path")


@dataclass(frozen=True)
class CrossHparams(Training):
    """Train the cross-encoder: train/cross.train.tsv -> output/cross_params.bin."""

    # main options
    pretrained_model_path: str = "torch_pretrained_models/ernie-gram-zh"  # folder or hub name
    vocab_path: str = ""  # a WordPiece vocab.txt; empty: the model's own tokenizer
    epoch: int = 3  # passes over the training rows (listwise: over the positives)
    batch_size: int = 64  # pairs per micro-batch (pointwise)
    lr: float = 1e-5  # peak learning rate of AdamW
    loss: str = "listwise"  # listwise: softmax over a group; pointwise: binary, the official recipe

    # model
    dual_params: str = ""  # retriever to start from; empty: output_dir/dual_params.bin if it fits; none: no
    cross_params: str = NONE  # start from this trained re-ranker, head included; none: from the others
    max_seq_len: int = 384  # tokens of query and passage together; only the passage is cut

    # optimization
    group_size: int = 8  # passages per group: one positive, the rest random negatives (listwise)
    groups_per_step: int = 16  # groups per micro-batch (listwise)
    head_lr: float = 0.0  # peak learning rate of randomly initialized weights (the head); 0: lr
    weight_decay: float = 0.01  # of AdamW, on weight matrices only (no biases, no norms)
    r_drop_alpha: float = 0.0  # weight of R-Drop, two passes with different dropout (pointwise); 0: off
    fgm_epsilon: float = 0.0  # step of FGM on the word embeddings; 0: off, the official recipe: 0.01

    # evaluation
    dev_queries: int = 500  # first queries of dev_candidates to re-rank
    dev_depth: int = 50  # candidates per query to re-rank

    STAGE = "cross_train"
    TRAIN_FILE = "train/cross.train.tsv"
    DEBUG = {
        "pretrained_model_path": TINY_ENCODER, "precision": "fp32", "epoch": 1, "lr": 2e-4,
        "group_size": 3, "groups_per_step": 8, "max_seq_len": 224, "dropout": 0.0,
        "dev_queries": 20, "dev_depth": 20,
    }  # fmt: skip
    INPUTS = {"dual_params": "trained retriever", "cross_params": "trained re-ranker"}
    CHOICES = {"loss": ("listwise", "pointwise")}
    RANGES = {
        "max_seq_len": PAIR_LENGTH, "group_size": (2, 1000), "groups_per_step": COUNT,
        "head_lr": FROM_0, "r_drop_alpha": FROM_0, "fgm_epsilon": FROM_0,
        "dev_queries": AT_MOST_ALL, "dev_depth": AT_MOST_ALL,
    }  # fmt: skip

    @property
    def params_path(self) -> str:
        return under(self.output_dir, "", "cross_params.bin")

    @property
    def saved_to(self) -> str:
        return under(self.output_dir, "", "cross_hparams.json")

    def check(self) -> None:
        super().check()
        if self.r_drop_alpha and (self.loss != "pointwise" or self.fgm_epsilon):
            raise UserError("--r_drop_alpha requires --loss pointwise and no --fgm_epsilon")
        if self.dual_params not in ("", NONE) and self.cross_params != NONE:
            raise UserError("--dual_params and --cross_params: name one model to start from")
