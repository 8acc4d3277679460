"""Knobs that several programs share. Edit a default here, or pass `--name value`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch_src.hparams import DATA_DIR, PRECISIONS, SAMPLE_DIR, Hparams, check_choice, under
from torch_src.recipes import RECIPES, values_text
from torch_src.runtime.errors import UserError
from torch_src.runtime.options import ABOVE_0, COUNT, COUNT_OR_OFF, FROM_0, SEEDS, SHARE, STEPS, STEPS_OR_OFF


@dataclass(frozen=True)
class DataFolder(Hparams):
    """A data folder of the official layout: an empty path is a file in `data_dir`."""

    # main options
    data_dir: str = DATA_DIR  # data folder of the official layout

    # data paths
    passage_dir: str = ""  # passages, part-00.. or all_doc; empty: data_dir/passage-collection
    passage_ids: str = ""  # row -> pid (JSON); empty: passage_dir/passage2id.map.json

    DEBUG = {"data_dir": SAMPLE_DIR}
    INPUTS = {"passage_dir_path": "passages", "passage_ids_path": "row -> pid"}

    @property
    def passage_dir_path(self) -> str:
        return under(self.data_dir, self.passage_dir, "passage-collection")

    @property
    def passage_ids_path(self) -> str:
        return under(self.passage_dir_path, self.passage_ids, "passage2id.map.json")


@dataclass(frozen=True)
class TrainRows(DataFolder):
    """Training rows."""

    # data paths
    train_set: str = ""  # training rows; empty: train/dual.train.tsv (or cross.train.tsv) in data_dir

    TRAIN_FILE = "train/dual.train.tsv"
    INPUTS = {"train_set_path": "training rows"}

    @property
    def train_set_path(self) -> str:
        return under(self.data_dir, self.train_set, self.TRAIN_FILE)


@dataclass(frozen=True)
class DevAnswers(DataFolder):
    """Dev queries with their answers, for metrics."""

    # data paths
    dev_set: str = ""  # queries with answers (JSON lines); empty: data_dir/dev/dev.json; none: no metrics

    INPUTS = {"dev_set_path": "answers"}

    @property
    def dev_set_path(self) -> str:
        return under(self.data_dir, self.dev_set, "dev/dev.json")


@dataclass(frozen=True)
class Queries(DataFolder):
    """The queries of a result."""

    # data paths
    dev_q: str = ""  # dev.q.format, .jsonl, qid TAB query; empty: data_dir/dev/dev.q.format; none: no search

    INPUTS = {"dev_q_path": "queries"}

    @property
    def dev_q_path(self) -> str:
        return under(self.data_dir, self.dev_q, "dev/dev.q.format")


@dataclass(frozen=True)
class QueryIds(Queries):
    """The queries of a result and their qids."""

    # data paths
    dev_q2qid: str = ""  # query text -> qid (JSON); empty: q2qid.dev.json beside dev_q; none: no qids

    INPUTS = {"dev_q2qid_path": "query text -> qid"}

    @property
    def dev_q2qid_path(self) -> str:
        return under(str(Path(self.dev_q_path).parent), self.dev_q2qid, "q2qid.dev.json")


@dataclass(frozen=True)
class TrainedRetriever(DataFolder):
    """A trained retriever and its passage vectors."""

    # data paths
    dual_params: str = ""  # trained retriever; empty: output_dir/dual_params.bin; none: not fine-tuned
    para_emb: str = ""  # folder of the passage vectors; empty: output_dir/para_emb

    INPUTS = {"dual_params_path": "trained retriever"}

    @property
    def dual_params_path(self) -> str:
        return under(self.output_dir, self.dual_params, "dual_params.bin")

    @property
    def para_emb_path(self) -> str:
        return under(self.output_dir, self.para_emb, "para_emb")


@dataclass(frozen=True)
class Run(Hparams):
    """How a program runs."""

    # run
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: str = "auto"  # of the model; auto: the fastest that the hardware supports
    threads: int = 0  # CPU threads of this process; 0: torch's default
    seed: int = 42  # random seed of weights, dropout, order and samples

    CHOICES = {"precision": PRECISIONS}
    RANGES = {"threads": (0, 4096), "seed": SEEDS}


@dataclass(frozen=True)
class Job(Run):
    """A run whose result is skipped when it is up to date."""

    # run
    force: bool = False  # start over even if the result is up to date


@dataclass(frozen=True)
class PlannedJob(Job):
    """A run that can be estimated before it starts."""

    # main options
    plan: bool = False  # print time, memory and disk of this run from a short probe, then exit


@dataclass(frozen=True)
class WithRecipe(Hparams):
    """A program whose defaults can be replaced by a named set."""

    # main options
    recipe: str = "default"  # named set of defaults (recipes.py), which options override

    STAGE: ClassVar[str] = ""  # the program, as a field of Recipe
    CHOICES = {"recipe": tuple(RECIPES)}

    @classmethod
    def recipe_values(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        name = options.get("recipe", cls.recipe)
        check_choice("recipe", name, tuple(RECIPES))
        return getattr(RECIPES[name], cls.STAGE)

    @classmethod
    def more_help(cls) -> list[str]:
        lines = ["", "recipes:"]
        for name, recipe in RECIPES.items():
            lines += [f"  {name}: {recipe.purpose}"]
            values = getattr(recipe, cls.STAGE)
            lines += [f"    {values_text(values)}"] if values else []
        return lines


@dataclass(frozen=True)
class Training(TrainRows, DevAnswers, PlannedJob, WithRecipe):
    """Training of either model."""

    # main options
    grad_cache_chunk: int = -1  # texts or pairs per forward pass (GradCache); -1: from free memory; 0: off

    # data paths
    dev_candidates: str = ""  # run or .res.tsv; empty: data_dir/auxiliary/dev.retrieval.top50.res.tsv

    # model
    remove_spaces: bool = False  # remove ASCII spaces from every text, as the official baseline does
    dropout: float | None = None  # of layers and attention; unset: as in the model's config.json
    lora_rank: int = 0  # LoRA: train only updates of this rank (alpha 2 x rank, no dropout); 0: all weights
    lora_targets: str = "all"  # linear layers that get them, e.g. query,value; all: every one of the encoder

    # optimization
    accumulation_steps: int = 1  # micro-batches per update; adds no in-batch negatives (batch_size does)
    max_steps: int = 0  # stop after this many updates; 0: after `epoch` epochs
    warmup_proportion: float = 0.1  # share of updates with linear warmup of lr, before linear decay to 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    ema_decay: float = 0.0  # decay of averaged weights (evaluated and saved), e.g. 0.999; 0: off

    # evaluation
    eval_every: int = 0  # updates between evaluations on dev; 0: after each epoch; -1: never
    early_stop: int = 0  # stop after this many evaluations without a better MRR@10; 0: never

    # run
    save_every_minutes: float = 15.0  # between extra checkpoints; 0: only after epochs and evaluations
    log_every: int = 20  # updates between log lines; where they are slow, a line every 30 s as well

    # advanced
    tokens_per_batch: int = 0  # padded tokens per forward pass; 0: from free GPU memory, 2,048 on a CPU
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    deterministic: bool = False  # bitwise reproducible on CUDA, or an error; slower; runs on a CPU always are

    INPUTS = {
        "dev_candidates_path": "candidates", "pretrained_model_path": "model", "vocab_path": "vocabulary",
    }  # fmt: skip
    RANGES = {
        "epoch": COUNT, "batch_size": COUNT, "lr": ABOVE_0, "weight_decay": FROM_0, "dropout": (0, 0.9),
        "grad_cache_chunk": (-1, 10**6), "accumulation_steps": COUNT, "max_steps": STEPS_OR_OFF,
        "warmup_proportion": SHARE, "max_grad_norm": ABOVE_0, "ema_decay": (0, 0.999999),
        "eval_every": (-1, 10**8), "early_stop": COUNT_OR_OFF, "save_every_minutes": (0, 10**6),
        "lora_rank": (0, 4096), "log_every": STEPS, "tokens_per_batch": STEPS_OR_OFF,
    }  # fmt: skip

    @property
    def dev_candidates_path(self) -> str:
        return under(self.data_dir, self.dev_candidates, "auxiliary/dev.retrieval.top50.res.tsv")

    def check(self) -> None:
        super().check()
        if self.early_stop and self.eval_every < 0:
            raise UserError("--early_stop requires evaluations on dev (--eval_every 0 or more)")
        if self.lora_targets != type(self).lora_targets and not self.lora_rank:
            raise UserError(f"--lora_targets {self.lora_targets} requires --lora_rank of at least 1, e.g. 16")
