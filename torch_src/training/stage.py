"""A training program around its task: device, stamp, saved files, plan."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from torch_src.data.candidates import OFFICIAL, official_ids_path
from torch_src.data.collection import PassageCollection
from torch_src.models.backbones import check_fits, load_config, model_checksum
from torch_src.models.lora import import_peft, merged_bytes
from torch_src.models.tokenization import TextRules, load_tokenizer, save_tokenizer, tokenizer_checksum
from torch_src.models.trained_settings import model_fields_intact, write_trained_settings
from torch_src.models.truncation import Truncation
from torch_src.runtime.devices import (
    choose_device,
    choose_precision,
    free_gpu_memory,
    free_memory,
    make_deterministic,
    set_threads,
    worker_count,
)
from torch_src.runtime.errors import UserError, is_out_of_memory, nondeterministic_operation
from torch_src.runtime.files import read_json, require
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import duration, log
from torch_src.runtime.outputs import SETTINGS, Output, check_apart, check_outputs
from torch_src.runtime.planning import Plan, checkpoint_gb, fitting_fraction, memory_gb
from torch_src.runtime.stamps import (
    changed_files,
    checksum_files,
    checksum_text,
    clear_stamp,
    stamp_path,
    up_to_date,
    write_stamp,
)
from torch_src.training.checkpoints import delete_checkpoints, save_tensors
from torch_src.training.distributed import Processes
from torch_src.training.grad_cache import Chunking
from torch_src.training.memory import CPU_TOKENS, choose_chunk, measure_memory
from torch_src.training.trainer import Trainer, TrainerOptions, TrainingTask

ROWS_IN_ERROR = 40  # of a batch that an error message lists
PROBED_UPDATES = 3  # that a plan measures, after one warm-up
PROBED_UNITS = 32  # queries, groups or pairs of such an update on a CPU; a whole batch may take half an hour

# Settings that change paths or log lines, but not the weights of a run. `grad_cache_chunk` and
# `tokens_per_batch` are stamped as the user gave them; what was chosen for -1 and 0 is in the checkpoint. The
# files of `teacher` are stamped by their checksums.
NOT_STAMPED = {
    "data_dir", "train_set", "dev_set", "passage_dir", "passage_ids", "dev_candidates", "output_dir",
    "log_every", "save_every_minutes", "pretrained_model_path", "dual_params", "cross_params", "vocab_path",
    "recipe", "force", "debug", "threads", "device", "plan", "teacher",
}  # fmt: skip


def describe_rows(path: str, rows: list[int]) -> str:
    """Return `rows 1, 2, 3 of PATH` for an error; of a large batch the first rows and a count."""
    more = f" and {len(rows) - ROWS_IN_ERROR:,} more" if len(rows) > ROWS_IN_ERROR else ""
    return f"rows {', '.join(map(str, rows[:ROWS_IN_ERROR]))}{more} of {path}"


def checkpoint_activations(backbone: PreTrainedModel) -> None:
    """Recompute activations in the backward pass instead of keeping them; UserError if the model cannot."""
    if not backbone.supports_gradient_checkpointing:
        kind = backbone.config.model_type
        raise UserError(f"--gradient_checkpointing: not possible with a {kind} model; omit it, or lower "
                        "--grad_cache_chunk or --tokens_per_batch to save memory")  # fmt: skip
    if hasattr(backbone, "activation_checkpointing_enable"):  # its name in newer versions of transformers
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    else:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})


@dataclass
class ModelFiles:
    """NAME_params.bin, and beside it NAME_hparams.json and NAME_model/, which inference reads."""

    name: str
    hp: Any
    fixed_by_weights: Sequence[str]  # settings that inference takes from the weights
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self.params = Path(self.hp.params_path)
        self.settings = self.params.with_name(f"{self.name}_hparams.json")
        self.model = self.params.with_name(f"{self.name}_model")
        self.truncation: list[Truncation] = []  # of the training texts, for information

    def check_paths(self) -> None:
        """UserError when a file to write is an input, or not of an earlier training."""
        checkpoint = self.params.with_name(f"{self.name}_checkpoint.pt")
        beside = self.settings.exists() or checkpoint.exists()  # of weights whose stamp was deleted
        is_stamped = stamp_path(self.params).exists()
        outputs = [
            Output(self.params, lambda _: beside, (f"{self.name}_train",)),
            Output(self.settings, lambda path: SETTINGS(path) or checkpoint.exists() or is_stamped),
            Output(checkpoint, lambda _: True),  # damaged ones are reported by the loader
        ]
        check_outputs(outputs, self.hp.inputs)
        check_apart(self.model, self.hp.inputs)
        if weights := [*self.model.glob("*.safetensors"), *self.model.glob("*.bin")]:
            raise UserError(f"{weights[0]}: not written by this program; use another --output_dir")

    def save(self, state: dict[str, torch.Tensor]) -> str:
        """Write all of them; return the checksum of the weights."""
        self.settings.unlink(missing_ok=True)  # first, so that settings never lie beside other weights
        save_tensors(self.params, state)
        weights = checksum_files([self.params])
        self.save_settings(weights)
        return weights

    def checksum(self) -> str | None:
        """Return the checksum of the weights on disk, None when there are none."""
        return checksum_files([self.params]) if self.params.exists() else None

    def save_settings(self, weights: str) -> None:
        """Write settings, configuration and tokenizer of weights with this checksum."""
        self.config.save_pretrained(self.model)
        save_tokenizer(self.tokenizer, self.model)
        model = {
            "fixed_by_weights": {name: getattr(self.hp, name) for name in self.fixed_by_weights},
            "tokenizer": tokenizer_checksum(self.tokenizer),
            "model_files": {path.name: checksum_files([path]) for path in sorted(self.model.iterdir())},
            "weights": weights,
        }
        settings = self.hp.to_save()
        settings["truncation"] = [dataclasses.asdict(each) for each in self.truncation]
        write_trained_settings(self.settings, settings, model)

    def settings_intact(self, weights: str) -> bool:
        """Return whether settings, configuration and tokenizer are those of these weights, undamaged."""
        try:
            saved = read_json(self.settings)
        except UserError:
            return False
        if not model_fields_intact(saved) or saved["weights"] != weights:
            return False
        return not changed_files(self.model, saved["model_files"])


class Setup:
    """Device, processes, configuration and tokenizer: what a program chooses before it loads data and model.

    `hp`: settings of the program; `batch`: name of the batch size that is split between the processes;
    `make_rules`: from the configuration, how texts become token ids, by the knob that limits their length.
    """

    def __init__(
        self,
        name: str,
        hp: Any,
        fixed_by_weights: Sequence[str],
        batch: str,
        make_rules: Callable[[PretrainedConfig], dict[str, TextRules]],
    ):
        self.name, self.hp = name, hp
        if hp.lora_rank:
            import_peft()  # before data and model are loaded
        self.device = choose_device(hp.device)
        if hp.deterministic:
            make_deterministic(self.device)
        self.precision = choose_precision(hp.precision, self.device)
        threads = set_threads(hp.threads)
        self.processes = Processes(self.device)
        deterministic = "  deterministic" if hp.deterministic else ""
        log(f"device {self.device}  precision {self.precision}  threads {threads}{deterministic}")
        rank, world = self.processes.rank, self.processes.world
        if getattr(hp, batch) < world:
            raise UserError(f"--{batch} {getattr(hp, batch)}: must be at least {world}, the processes")
        if world > 1:
            log(f"process {rank + 1} of {world}; they share each batch")
        self.config = load_config(hp.pretrained_model_path, hp.dropout, name)
        self.tokenizer = load_tokenizer(hp.pretrained_model_path, hp.vocab_path, name)
        self.rules = make_rules(self.config)
        check_fits(self.config, self.tokenizer, self.rules, hp.pretrained_model_path)
        texts, tokens = max(0, hp.grad_cache_chunk), hp.tokens_per_batch or CPU_TOKENS
        # until TrainingStage.load chooses what fits into memory
        self.chunking = Chunking(texts, tokens, hp.seed, self.device, self.precision, rank)
        self.files = ModelFiles(name, hp, fixed_by_weights, self.config, self.tokenizer)
        self.cache_dir = str(Path(hp.output_dir) / "cache")

    def stamp(self) -> dict[str, Any]:
        """Return what decides the weights of both models: settings, model to start from, files."""
        hp = self.hp
        unused = set() if hp.lora_rank else {"lora_rank", "lora_targets"}
        settings = {k: v for k, v in dataclasses.asdict(hp).items() if k not in NOT_STAMPED | unused}
        dev = [hp.dev_set_path, hp.dev_candidates_path]
        if hp.dev_candidates_path.endswith(OFFICIAL):
            dev.append(official_ids_path(hp.dev_candidates_path))
        return {
            "stage": f"{self.name}_train",
            **settings,
            "precision": self.precision,
            "start": model_checksum(hp.pretrained_model_path),
            "tokenizer": tokenizer_checksum(self.tokenizer),
            "train_rows": checksum_files([require(hp.train_set_path, "training rows")]),
            "dev": checksum_files([path for path in dev if os.path.exists(path)]),
        }

    def collection_stamp(self) -> dict[str, Any]:
        """Return the checksums of the collection and its ids; empty when a file is missing."""
        hp = self.hp
        if not os.path.exists(hp.passage_dir_path) or not os.path.exists(hp.passage_ids_path):
            return {}
        collection = PassageCollection(hp.passage_dir_path, self.cache_dir)
        ids = checksum_files([hp.passage_ids_path])
        return {"collection": collection.checksum, "passage_ids_map": ids}


class TrainingStage:
    """Runs a task: nothing when the weights are up to date, a plan when asked, else the training."""

    def __init__(self, setup: Setup, task: TrainingTask):
        self.setup, self.task, self.hp = setup, task, setup.hp
        self.processes, self.device = setup.processes, setup.device

    def stamp(self) -> dict[str, Any]:
        """Return what decides the weights."""
        return {**self.setup.stamp(), **self.task.inputs()}

    def load(self) -> None:
        """Load data and model, and choose chunks that fit into memory where the settings name none."""
        task, hp = self.task, self.hp
        task.load()
        if hp.grad_cache_chunk >= 0 and (hp.tokens_per_batch or self.device.type == "cpu"):
            return
        need = measure_memory(task.model, task.probe, self.device, self.setup.precision, bool(hp.ema_decay))
        texts, tokens = choose_chunk(
            hp.grad_cache_chunk,
            hp.tokens_per_batch,
            self.processes.all_reduce_min(
                need.fitting_tokens
            ),  # a resumed run has the same chunks in all processes
            task.texts_per_batch,
            task.max_batch_tokens,
            self.device.type == "cuda",
        )
        task.chunking = dataclasses.replace(task.chunking, texts=texts, tokens=tokens)
        if self.processes.is_first:
            needed = need.total_bytes(tokens if texts else task.max_batch_tokens) / 1e9
            log(f"{task.chunking} (needs about {needed:.1f} GB; {need.free_bytes / 1e9:.1f} GB are free)")

    def trainer(self, folder: str | Path, stamp: dict[str, Any]) -> Trainer:
        """Return the trainer of the loaded task, with checkpoints and curves in `folder`."""
        hp = self.hp
        options = TrainerOptions(
            epochs=hp.epoch,
            lr=hp.lr,
            warmup_proportion=hp.warmup_proportion,
            weight_decay=hp.weight_decay,
            max_grad_norm=hp.max_grad_norm,
            accumulation_steps=hp.accumulation_steps,
            max_steps=hp.max_steps,
            ema_decay=hp.ema_decay,
            eval_every=hp.eval_every,
            early_stop=hp.early_stop,
            save_every_minutes=hp.save_every_minutes,
            log_every=hp.log_every,
            workers=worker_count(
                -1, self.device, hp.epoch * self.task.batches_per_epoch * self.task.texts_per_batch
            ),
        )
        checkpoint = Path(folder) / f"{self.setup.name}_checkpoint.pt"
        return Trainer(self.task, options, self.processes, self.setup.precision, checkpoint, stamp)

    def run(self) -> None:
        """Train unless the weights are up to date; with --plan print an estimate instead."""
        self.setup.files.check_paths()
        try:
            if self.hp.plan:
                self.plan().report(self.hp.output_dir, self.device)
            else:
                with folder_lock(self.hp.output_dir) if self.processes.is_first else nullcontext():
                    self._train()
        except RuntimeError as error:
            if not (operation := nondeterministic_operation(error)):
                raise
            raise UserError(
                f"--deterministic: {operation} has no deterministic form on {self.device}; "
                "omit --deterministic, or use another model (--pretrained_model_path)"
            ) from error
        self.processes.close()

    def _train(self) -> None:
        files, stamp, first = self.setup.files, self.stamp(), self.processes.is_first
        self.processes.require_same(
            int(checksum_text(json.dumps(stamp, sort_keys=True)), 16) >> 1,
            f"{self.hp.train_set_path} or another input differs from that of the first process; "
            "use the same files on all machines",
        )
        if not self.hp.force and self._is_up_to_date(stamp):
            log(f"{files.params}: up to date")
            return
        self.processes.barrier()  # until all have compared the stamps
        self.load()
        trainer = self.trainer(self.hp.output_dir, stamp)
        if self.stamp() != stamp:
            raise UserError(f"{self.hp.train_set_path} or another input changed while it was read; run again")
        if first:
            clear_stamp(files.params)
            if self.hp.force:
                delete_checkpoints(trainer.checkpoint)
        self.processes.barrier()  # before any process looks for a checkpoint
        progress = trainer.run()
        if not first:
            return
        if files.checksum() != progress.best_weights:
            raise UserError(
                f"{files.params}: checksum mismatch with the best weights of this run; "
                "train again with --force"
            )
        files.save_settings(progress.best_weights)
        log(f"wrote {files.params} (step {progress.best_step})")
        self.task.finish(progress)
        # last: a stamp means that everything is complete
        write_stamp(files.params, {**stamp, "weights": progress.best_weights})

    def _is_up_to_date(self, stamp: dict[str, Any]) -> bool:
        """Return whether the weights are up to date; rewrite damaged files beside them."""
        files = self.setup.files
        weights = files.checksum()
        if weights is None or not up_to_date(files.params, {**stamp, "weights": weights}, log):
            return False
        if self.processes.is_first:
            if not files.settings_intact(weights):
                log(f"{files.settings} or {files.model}: missing or damaged; rewritten")
                self.task.load()  # loading the model completes the configuration
                files.save_settings(weights)
            self.task.restore_files(weights)
        return True

    def plan(self) -> Plan:
        """Return the time, memory and disk that the training needs, from a short probe."""
        self.load()
        plan, task = Plan(f"do_{self.setup.name}_train.py"), self.task
        base, fraction = memory_gb(self.device), 1.0
        if self.device.type == "cpu" and task.chunking.texts:
            fraction = task.shrink_batches(PROBED_UNITS)  # GradCache: time follows the batch, memory does not
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, {})
            while (seconds := self._probe(trainer)) is None:
                plan.too_large = True
                trainer = self.trainer(folder, {})
        seconds /= fraction
        chunk = f" with {task.chunking.options}" if plan.too_large else ""
        updates = f"{trainer.schedule.total_steps:,} updates ({seconds:.2f} s each{chunk})"
        plan.add(updates, seconds * trainer.schedule.total_steps)
        if trainer.schedule.evaluations and (each := task.evaluation_seconds()):
            name = f"{trainer.schedule.evaluations} dev evaluations ({duration(each)} each)"
            plan.add(name, each * trainer.schedule.evaluations)
        plan.ram_gb, plan.gpu_gb = memory_gb(self.device)
        trained = sum(p.numel() * p.element_size() for p in task.model.parameters() if p.requires_grad)
        plan.disk_gb = checkpoint_gb(merged_bytes(task.model), trained, bool(self.hp.ema_decay))
        smaller = self._fitting_fraction(base, (plan.ram_gb, plan.gpu_gb))
        plan.advice = f"try {task.chunking.scaled(smaller, task.texts_per_batch).options}"
        if plan.too_large:
            plan.advice = f"out of memory with these settings; {task.chunking.options} fits"
        return plan

    def _probe(self, trainer: Trainer) -> float | None:
        """Return the seconds of an update; when out of memory halve the chunk and return None."""
        task = self.task
        try:
            return float(np.median(trainer.probe(1 + PROBED_UPDATES)[1:]))
        except (RuntimeError, MemoryError) as error:
            smaller = task.chunking.scaled(0.5, task.texts_per_batch)
            # with several processes the others are waiting in a collective
            if self.processes.world > 1 or not is_out_of_memory(error) or not smaller.texts:
                raise
        task.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        log(f"out of memory; trying {smaller.options}")
        task.chunking = smaller
        return None

    def _fitting_fraction(self, base: tuple[float, float], peak: tuple[float, float]) -> float:
        on_gpu = self.device.type == "cuda"
        free = free_gpu_memory(self.device) if on_gpu else free_memory()
        return fitting_fraction(base[on_gpu], peak[on_gpu], free / 1e9)
