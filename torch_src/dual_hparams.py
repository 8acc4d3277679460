"""Settings of do_dual_train.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass

from torch_src.hparams import (
    POOLINGS,
    SAMPLE_DIR,
    TINY_MODEL,
    OfficialLayout,
    check_choice,
    check_range,
    check_training,
    under,
)
from torch_src.runtime.errors import UserError

# What the weights fix: saved in dual_hparams.json, read from there by inference.
FIXED_BY_WEIGHTS = (
    "share_encoder", "pooling", "normalize", "query_prefix", "passage_prefix",
    "q_max_seq_len", "p_max_seq_len", "remove_spaces", "vocab_path",
)  # fmt: skip


DISTILL_LOSSES = ("none", "kl", "margin_mse")


@dataclass(frozen=True)
class DualHparams(OfficialLayout):
    """Train the dual encoder: train/dual.train.tsv -> output/dual_params.bin."""

    # the knobs most people change first
    pretrained_model_path: str = "torch_pretrained_models/ernie-gram-zh"  # folder or hub name
    vocab_path: str = ""  # a WordPiece vocab.txt; empty: the model's own tokenizer
    epoch: int = 10  # passes over the training queries
    batch_size: int = 32  # queries a step and micro-batch, each with its positive and hard negatives
    lr: float = 3e-5  # peak learning rate of AdamW

    # files
    data_dir: str = "dureader-retrieval-baseline-dataset"  # official layout; empty paths below follow it
    train_set: str = ""  # training rows, 6 columns; empty: data_dir/train/dual.train.tsv
    dev_set: str = ""  # dev queries with answers (JSON lines); empty: data_dir/dev/dev.json
    passage_dir: str = ""  # the collection, part-00.. or all_doc; empty: data_dir/passage-collection
    passage_ids: str = ""  # row -> pid (JSON); empty: passage_dir/passage2id.map.json
    dev_candidates: str = ""  # more of the dev pool; empty: data_dir/auxiliary/dev.retrieval.top50.res.tsv
    output_dir: str = "output"  # where everything is written

    # what goes in
    q_max_seq_len: int = 32  # tokens, [CLS] and [SEP] included
    p_max_seq_len: int = 384  # tokens, [CLS] and [SEP] included
    query_prefix: str = ""  # put before every query, e.g. "query: " for E5
    passage_prefix: str = ""  # put before every passage, e.g. "passage: " for E5
    remove_spaces: bool = False  # remove ASCII spaces from every text, as the official baseline does
    hard_negatives: int = 1  # hard negatives a query and step, drawn afresh each epoch

    # the model
    share_encoder: bool = False  # one tower for queries and passages
    pooling: str = "cls"  # cls, mean or pooler
    normalize: bool = False  # scale vectors to length 1 (then set temperature below 1)
    dropout: float | None = None  # of layers and attention; default: as the model's config.json has it
    temperature: float = 1.0  # scores are divided by it in the loss; 0.01 to 0.05 with normalize

    # a teacher's scores, and small vectors
    distill_loss: str = "none"  # none, kl or margin_mse: learn the re-ranker's scores in a mined train_set
    distill_weight: float = 1.0  # of that loss
    distill_temperature: float = 1.0  # the re-ranker's logits are divided by it
    contrastive_weight: float = 1.0  # of the contrastive loss beside it
    matryoshka_dims: str = ""  # e.g. 64,128: these first dimensions alone are trained to retrieve, too

    # optimisation
    warmup_proportion: float = 0.1  # share of the steps in which lr rises from 0; then it falls linearly to 0
    weight_decay: float = 0.0  # AdamW, on weight matrices only (not biases and norms)
    max_grad_norm: float = 1.0  # gradient norm is clipped to this
    grad_cache_chunk: int = 0  # texts a forward pass: memory follows it, not the batch (GradCache); 0: off
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them: less memory
    ema_decay: float = 0.0  # of averaged weights, which are then evaluated and saved; 0: off, usual: 0.999
    accumulation_steps: int = 1  # micro-batches of batch_size queries summed into one update
    max_steps: int = 0  # stop after so many updates; 0: epoch decides
    tokens_per_batch: int = 2048  # padded tokens a forward pass: a step runs in length-sorted chunks

    # evaluation while training
    eval_every: int = 0  # updates between dev retrievals; 0: once an epoch; -1: never
    dev_random_passages: int = 20000  # random passages of the collection in the dev pool
    save_every_minutes: float = 15.0  # between checkpoints, beside those of epochs and evaluations; 0: none
    early_stop: int = 0  # stop after so many dev retrievals without a better MRR@10; 0: never

    # the run
    precision: str = "auto"  # auto, bf16, fp16 or fp32
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    threads: int = 0  # CPU threads of this process; 0: what torch chooses
    deterministic: bool = False  # on CUDA: the same bytes each time, slower; a CPU gives them anyway
    seed: int = 42  # weights, dropout, order and draws
    log_every: int = 20  # updates between log lines
    plan: bool = False  # print time, memory and disk of this run from a short probe, and exit
    force: bool = False  # train again although the result is up to date, and from the start
    debug: bool = False  # a few minutes on a CPU with no download: sample data, small random model

    @property
    def train_set_path(self) -> str:
        return under(self.data_dir, self.train_set, "train/dual.train.tsv")

    @property
    def params_path(self) -> str:
        return under(self.output_dir, "", "dual_params.bin")

    def check(self) -> None:
        """UserError for a value out of range."""
        check_training(self)
        check_choice("pooling", self.pooling, POOLINGS)
        for name, low in (("hard_negatives", 0), ("dev_random_passages", 0), ("temperature", 1e-12)):
            check_range(name, getattr(self, name), low)
        for name in ("q_max_seq_len", "p_max_seq_len"):
            check_range(name, getattr(self, name), 3)
        check_choice("distill_loss", self.distill_loss, DISTILL_LOSSES)
        for name, low in (("distill_weight", 0), ("contrastive_weight", 0), ("distill_temperature", 1e-12)):
            check_range(name, getattr(self, name), low)
        if self.distill_loss != "none" and not self.hard_negatives:
            raise UserError(
                "--distill_loss needs hard negatives, whose scores are learnt; --hard_negatives is 0"
            )
        if self.batch_size == 1 and not self.hard_negatives:
            raise UserError("--batch_size 1 --hard_negatives 0: no query would have a negative to learn from")


# --debug lowers these defaults; an explicit option still wins. Mean pooling and a temperature: two layers
# with random weights learn next to nothing in ten epochs from a raw [CLS] product.
DEBUG = dict(
    data_dir=SAMPLE_DIR, output_dir="output/debug", pretrained_model_path=TINY_MODEL, precision="fp32",
    epoch=10, batch_size=32, lr=1e-3, p_max_seq_len=160, share_encoder=True, pooling="mean", normalize=True,
    temperature=0.05,
)  # fmt: skip
