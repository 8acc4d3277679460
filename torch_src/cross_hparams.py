"""Settings of do_cross_train.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass

from torch_src.hparams import (
    SAMPLE_DIR,
    TINY_MODEL,
    OfficialLayout,
    check_choice,
    check_range,
    check_training,
    under,
)
from torch_src.runtime.errors import UserError

# What the weights fix: saved in cross_hparams.json, read from there by inference.
FIXED_BY_WEIGHTS = ("max_seq_len", "remove_spaces", "vocab_path")
LOSSES = ("pointwise", "listwise")
FROM_PRETRAINED = "none"  # --dual_params none: the encoder starts from pretrained_model_path


@dataclass(frozen=True)
class CrossHparams(OfficialLayout):
    """Train the cross-encoder: train/cross.train.tsv -> output/cross_params.bin."""

    # the knobs most people change first
    pretrained_model_path: str = "torch_pretrained_models/ernie-gram-zh"  # folder or hub name
    vocab_path: str = ""  # a WordPiece vocab.txt; empty: the model's own tokenizer
    epoch: int = 3  # passes over the training rows (listwise: over the positives)
    batch_size: int = 64  # pairs a step and micro-batch (pointwise)
    lr: float = 1e-5  # peak learning rate of AdamW
    loss: str = "pointwise"  # pointwise (binary, the official recipe) or listwise (softmax over a group)
    group_size: int = 8  # passages a group: one positive, the others negatives drawn afresh (listwise)
    groups_per_step: int = 16  # groups a step and micro-batch (listwise)
    dual_params: str = FROM_PRETRAINED  # trained retriever: start from its passage tower; none: do not
    head_lr: float = 0.0  # peak learning rate of the weights drawn at random (the head); 0: lr

    # files
    data_dir: str = "dureader-retrieval-baseline-dataset"  # official layout; empty paths below follow it
    train_set: str = ""  # training rows, 4 columns; empty: data_dir/train/cross.train.tsv
    dev_set: str = ""  # dev queries with answers (JSON lines); empty: data_dir/dev/dev.json
    dev_candidates: str = ""  # run or .res.tsv; empty: data_dir/auxiliary/dev.retrieval.top50.res.tsv
    passage_dir: str = ""  # the collection, for a run; empty: data_dir/passage-collection
    passage_ids: str = ""  # row -> pid (JSON), for a run; empty: passage_dir/passage2id.map.json
    output_dir: str = "output"  # where everything is written

    # what goes in
    max_seq_len: int = 384  # tokens of query and passage together; only the passage is cut
    remove_spaces: bool = False  # remove ASCII spaces from every text, as the official baseline does
    dropout: float | None = None  # of layers and attention; default: as the model's config.json has it

    # optimisation
    r_drop_alpha: float = 0.0  # weight of R-Drop between two passes of other dropout (pointwise); 0: off
    fgm_epsilon: float = 0.0  # FGM: step on the word embeddings; 0: off, the official recipe: 0.01
    warmup_proportion: float = 0.1  # share of the steps in which lr rises from 0; then it falls linearly to 0
    weight_decay: float = 0.01  # AdamW, on weight matrices only (not biases and norms)
    max_grad_norm: float = 1.0  # gradient norm is clipped to this
    grad_cache_chunk: int = 0  # pairs a forward pass: memory follows it, not the batch (GradCache); 0: off
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them: less memory
    ema_decay: float = 0.0  # of averaged weights, which are then evaluated and saved; 0: off, usual: 0.999
    accumulation_steps: int = 1  # micro-batches summed into one update
    max_steps: int = 0  # stop after so many updates; 0: epoch decides
    tokens_per_batch: int = 2048  # padded tokens a forward pass: a step runs in length-sorted chunks

    # evaluation while training
    eval_every: int = 0  # updates between dev re-rankings; 0: once an epoch; -1: never
    dev_queries: int = 500  # the first so many queries of dev_candidates are re-ranked
    dev_depth: int = 50  # candidates a query that are re-ranked
    save_every_minutes: float = 15.0  # between checkpoints, beside those of epochs and evaluations; 0: none
    early_stop: int = 0  # stop after so many dev re-rankings without a better MRR@10; 0: never

    # the run
    precision: str = "auto"  # auto, bf16, fp16 or fp32
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    threads: int = 0  # CPU threads of this process; 0: what torch chooses
    deterministic: bool = False  # on CUDA: the same bytes each time, slower; a CPU gives them anyway
    seed: int = 42  # head, dropout, order and draws
    log_every: int = 20  # updates between log lines
    plan: bool = False  # print time, memory and disk of this run from a short probe, and exit
    force: bool = False  # train again although the result is up to date, and from the start
    debug: bool = False  # a few minutes on a CPU with no download: sample data, small random model

    @property
    def train_set_path(self) -> str:
        return under(self.data_dir, self.train_set, "train/cross.train.tsv")

    @property
    def params_path(self) -> str:
        return under(self.output_dir, "", "cross_params.bin")

    def check(self) -> None:
        """UserError for a value out of range."""
        check_training(self)
        check_choice("loss", self.loss, LOSSES)
        for name, low in (("groups_per_step", 1), ("group_size", 2), ("dev_queries", 1), ("dev_depth", 1)):
            check_range(name, getattr(self, name), low)
        for name in ("fgm_epsilon", "head_lr", "r_drop_alpha"):
            check_range(name, getattr(self, name), 0)
        check_range("max_seq_len", self.max_seq_len, 8)
        if self.r_drop_alpha and (self.loss != "pointwise" or self.fgm_epsilon):
            raise UserError("--r_drop_alpha is for --loss pointwise without --fgm_epsilon")


# --debug lowers these defaults; an explicit option still wins.
DEBUG = dict(
    data_dir=SAMPLE_DIR, output_dir="output/debug", pretrained_model_path=TINY_MODEL, precision="fp32",
    epoch=8, lr=1e-3, loss="listwise", group_size=7, max_seq_len=160, dropout=0.0, dev_queries=90,
)  # fmt: skip
