"""What both training programs do around the loop: choose, check, stamp, load, save, warn."""

import dataclasses
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from torch_src.data.collection import PassageCollection
from torch_src.models.backbones import check_fits, load_config, model_checksum
from torch_src.models.tokenization import (
    length_sorted_batches,
    load_tokenizer,
    save_tokenizer,
    tokenizer_checksum,
)
from torch_src.models.trained_settings import model_fields_intact, write_trained_settings
from torch_src.runtime.devices import (
    choose_device,
    choose_precision,
    free_gpu_memory,
    free_memory,
    make_deterministic,
    set_threads,
)
from torch_src.runtime.errors import UserError, is_out_of_memory
from torch_src.runtime.files import read_json, require
from torch_src.runtime.locks import folder_lock
from torch_src.runtime.log import duration, log
from torch_src.runtime.planning import Plan, checkpoint_gb, memory_gb, smaller_chunk
from torch_src.runtime.stamps import (
    changed_files,
    checksum_files,
    clear_stamp,
    up_to_date,
    write_stamp,
)
from torch_src.training.checkpoints import delete_checkpoints, save_tensors
from torch_src.training.distributed import ProcessGroup
from torch_src.training.grad_cache import ChunkedForward
from torch_src.training.trainer import Progress, Task, Trainer

NAMED_ROWS = 40  # of a batch, at most, in an error
PROBED_UPDATES = 3  # that a plan times, after one more

# Settings that change where things lie or what is said, but not the weights a run ends with.
NOT_STAMPED = {
    "data_dir", "train_set", "dev_set", "passage_dir", "passage_ids", "dev_candidates", "output_dir",
    "log_every", "save_every_minutes", "pretrained_model_path", "dual_params", "vocab_path", "force", "debug",
    "threads", "device", "plan",
}  # fmt: skip


def rows_named(rows: list[int], path: str) -> str:
    """Return `rows 1, 2, 3 of PATH` for an error; of a large batch the first ones and how many more."""
    more = f" and {len(rows) - NAMED_ROWS:,} more" if len(rows) > NAMED_ROWS else ""
    return f"rows {', '.join(map(str, rows[:NAMED_ROWS]))}{more} of {path}"


class TrainingStage:
    """Base of the two training programs; `name` is dual or cross, `hp` their settings.

    A subclass opens its training set, sets `self.model` in load(), and brings task() and summary().
    """

    name: str
    fixed_by_weights: tuple[str, ...]
    lengths: tuple[str, ...]  # the knobs that are lengths in tokens

    def __init__(self, hp):
        self.hp = hp
        self.device = choose_device(hp.device)
        if hp.deterministic:
            make_deterministic(self.device)
        self.precision = choose_precision(hp.precision, self.device)
        threads = set_threads(hp.threads)
        tokens = hp.tokens_per_batch or (16384 if self.device.type == "cuda" else 2048)
        self.hp = dataclasses.replace(hp, tokens_per_batch=tokens)
        self.group = ProcessGroup(self.device)
        same = "  deterministic" if hp.deterministic else ""
        log(f"device {self.device}  precision {self.precision}  threads {threads}{same}")
        self._check_share()
        if self.group.world > 1:
            log(f"process {self.group.rank + 1} of {self.group.world}; they share each step's batch")
        self.config = load_config(hp.pretrained_model_path, hp.dropout)
        self.tokenizer = load_tokenizer(hp.pretrained_model_path, hp.vocab_path)
        lengths = {name: getattr(hp, name) for name in self.lengths}
        check_fits(self.config, len(self.tokenizer), lengths, hp.pretrained_model_path)

    def _check_share(self) -> None:
        for name in ("batch_size", "groups_per_step"):
            if hasattr(self.hp, name):
                if getattr(self.hp, name) < self.group.world:
                    raise UserError(f"--{name} {getattr(self.hp, name)}: must be at least {self.group.world}")

    def load(self) -> None:
        """Load the dev set and the model: what takes time, after everything cheap was checked."""
        raise AssertionError("a subclass loads its model")

    def task(self) -> Task:
        """Return what the loop needs."""
        raise AssertionError("a subclass makes its task")

    def parts(self) -> tuple:
        """Return what both tasks give the loop, in Task's order after the model and its steps."""
        return (
            self.prepare, self.backward, self.describe, self.evaluate, self.save_best, self.best_checksum,
        )  # fmt: skip

    def summary(self, progress: Progress) -> None:
        """Say what the finished run was worth; warn where it was worth little."""
        raise AssertionError("a subclass looks at its result")

    def forget(self) -> None:
        """Delete what was found out about the weights that are about to be replaced."""

    def stamp(self) -> dict:
        """Return what decides the weights: settings, the model started from, the files."""
        settings = {k: v for k, v in dataclasses.asdict(self.hp).items() if k not in NOT_STAMPED}
        if not self.hp.deterministic:
            del settings["deterministic"]  # as before there was this knob
        ids_path = self.hp.dev_candidates_path.replace(".res.tsv", ".res.id_map.tsv")
        dev = [self.hp.dev_set_path, *{self.hp.dev_candidates_path: 0, ids_path: 0}]
        dev = [path for path in dev if os.path.exists(path)]
        rows = require(self.hp.train_set_path, "training rows", "get it with `sh script/download.sh`")
        return {
            "stage": f"{self.name}_train", **settings, "precision": self.precision,
            "start": model_checksum(self.hp.pretrained_model_path),
            "tokenizer": tokenizer_checksum(self.tokenizer),
            "train_rows": checksum_files([rows]), "dev": checksum_files(dev),
        }  # fmt: skip

    def collection_stamp(self) -> dict:
        """Return the checksums of the collection and its map, as far as they are there."""
        hp = self.hp
        if not os.path.exists(hp.passage_dir_path) or not os.path.exists(hp.passage_ids_path):
            return {}
        collection = PassageCollection(hp.passage_dir_path, str(Path(hp.output_dir) / "cache"))
        return {
            "collection": collection.checksum, "passage_ids_map": checksum_files([hp.passage_ids_path]),
        }  # fmt: skip

    def in_chunks(self, lengths: list[int], forward, at: tuple[int, ...]) -> ChunkedForward:
        """Return forward's outputs for all texts, run in length-sorted chunks and put back in order.

        `forward(rows)` gives one row of output for each of `rows`; `at` names this place in the run, for its
        dropout. Every text still takes part in one loss; only the padding is saved, and with grad_cache_chunk
        the memory.
        """
        cached = self.hp.grad_cache_chunk
        chunks = length_sorted_batches(lengths, cached or len(lengths), self.hp.tokens_per_batch)
        seed = (self.hp.seed, *map(int, at), self.group.rank)
        return ChunkedForward(forward, chunks, seed, bool(cached))

    def checkpoint_gradients(self, backbone) -> None:
        """Compute activations once more in the backward pass instead of keeping them, when asked."""
        if not self.hp.gradient_checkpointing:
            return
        if hasattr(backbone, "activation_checkpointing_enable"):  # its name in newer versions of transformers
            backbone.activation_checkpointing_enable({"use_reentrant": False})
        else:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})

    def state(self) -> dict:
        """Return the state dict that is saved."""
        return self.model.state_dict()

    def best_checksum(self) -> str | None:
        """Return the checksum of NAME_params.bin, None when it is not there."""
        return checksum_files([self.hp.params_path]) if os.path.exists(self.hp.params_path) else None

    @property
    def record_path(self) -> Path:
        return Path(self.hp.params_path).with_name(f"{self.name}_hparams.json")

    @property
    def model_folder(self) -> Path:
        """Return where configuration and tokenizer are kept, for inference."""
        return Path(self.hp.params_path).with_name(f"{self.name}_model")

    def save_best(self) -> str:
        """Write NAME_params.bin and what inference must know of it; return its checksum.

        The record goes first and comes last: weights never stand beside the settings of others.
        """
        self.record_path.unlink(missing_ok=True)
        save_tensors(self.hp.params_path, self.state())
        weights = checksum_files([self.hp.params_path])
        self.write_record(weights)
        return weights

    def write_record(self, weights: str) -> None:
        """Write NAME_model/ and NAME_hparams.json of weights with this checksum."""
        self.config.save_pretrained(self.model_folder)
        save_tokenizer(self.tokenizer, self.model_folder)
        fixed = {name: getattr(self.hp, name) for name in self.fixed_by_weights}
        files = sorted(self.model_folder.iterdir())
        model = {
            "fixed_by_weights": fixed,
            "tokenizer": tokenizer_checksum(self.tokenizer),
            "model_files": {path.name: checksum_files([path]) for path in files},
            "weights": weights,
        }
        write_trained_settings(self.record_path, dataclasses.asdict(self.hp), model)

    def record_is_sound(self) -> bool:
        """Return whether record and model folder are, byte for byte, what was written beside the weights."""
        try:
            record = read_json(self.record_path)
        except UserError:
            return False
        return model_fields_intact(record) and not changed_files(self.model_folder, record["model_files"])

    def _is_done(self, params: str, stamp: dict) -> bool:
        weights = self.best_checksum()
        if not up_to_date(params, {**stamp, "weights": weights}, log):
            return False
        if self.group.rank == 0 and not self.record_is_sound():
            log(f"{self.record_path}, {self.model_folder}: missing or damaged; rewriting them")
            self.load()  # the configuration is complete once there is a model of it
            self.write_record(weights)
        if self.group.rank == 0:
            self.mend(weights)
        return True

    def mend(self, weights: str) -> None:
        """Write again what a finished training left beside its weights, where that is damaged."""

    def evaluation_seconds(self) -> float:
        """Return about how long one measurement on dev takes, by a probe."""
        raise AssertionError("a subclass knows what it measures")

    def texts_a_step(self) -> int:
        """Return the texts, or pairs, of one micro-batch."""
        raise AssertionError("a subclass knows its batch")

    def plan(self) -> Plan:
        """Return what the training would take."""
        self.load()
        planned = Plan(f"do_{self.name}_train.py")
        base = memory_gb(self.device)
        while True:
            with tempfile.TemporaryDirectory() as folder:
                hp = dataclasses.replace(self.hp, output_dir=folder)
                place = f"{folder}/none"
                trainer = Trainer(hp, self.task(), self.device, self.precision, place, {}, self.group)
            if seconds := self._probe(trainer):
                break
            planned.too_large = True
        chunk = f" with --grad_cache_chunk {self.hp.grad_cache_chunk}" if planned.too_large else ""
        what = f"{trainer.total_steps:,} updates ({seconds:.2f} s each{chunk})"
        planned.add(what, seconds * trainer.total_steps)
        if (evaluations := trainer.evaluations()) and self.dev is not None:
            each = self.evaluation_seconds()
            what = f"{evaluations} dev evaluations ({duration(each)} each)"
            planned.add(what, each * evaluations)
        planned.ram_gb, planned.gpu_gb = memory_gb(self.device)
        planned.disk_gb = checkpoint_gb(self.model, bool(self.hp.ema_decay))
        planned.advice = self._advice(base, (planned.ram_gb, planned.gpu_gb))
        if planned.too_large:
            planned.advice = f"out of memory as set; --grad_cache_chunk {self.hp.grad_cache_chunk} went"
        return planned

    def _probe(self, trainer: Trainer) -> float | None:
        """Return seconds of one update; None when memory did not suffice, and half the chunk is set."""
        try:
            return float(np.median(trainer.probe(1 + PROBED_UPDATES)[1:]))
        except (RuntimeError, MemoryError) as error:
            chunk = (self.hp.grad_cache_chunk or self.texts_a_step()) // 2
            if self.group.world > 1 or not is_out_of_memory(error) or not chunk:
                raise  # (the others would wait within a sum for this one)
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        log(f"out of memory; looking at --grad_cache_chunk {chunk}")
        self.hp = dataclasses.replace(self.hp, grad_cache_chunk=chunk)
        return None

    def _advice(self, base: tuple[float, float], peak: tuple[float, float]) -> str:
        cuda = self.device.type == "cuda"
        free = free_gpu_memory(self.device) if cuda else free_memory()
        texts = self.hp.grad_cache_chunk or self.texts_a_step()
        return f"try --grad_cache_chunk {smaller_chunk(texts, base[cuda], peak[cuda], free / 1e9)}"

    def run(self) -> None:
        """Train unless the result is up to date, or say what it would take."""
        if self.hp.plan:
            self.plan().report(self.hp.output_dir, self.device)
        else:
            with folder_lock(self.hp.output_dir) if self.group.rank == 0 else nullcontext():
                self._run()
        self.group.close()

    def _run(self) -> None:
        params, checkpoint = self.hp.params_path, Path(self.hp.output_dir) / f"{self.name}_checkpoint.pt"
        stamp, first = self.stamp(), self.group.rank == 0
        if self.hp.force:
            if first:
                delete_checkpoints(checkpoint)
            self.group.wait()
        elif self._is_done(params, stamp):
            log(f"{params}: up to date")
            return
        self.group.wait()  # the first process must not change what the others are looking at
        self.load()
        if self.stamp() != stamp:
            raise UserError("an input changed while it was being read; run again")
        if first:
            clear_stamp(params)
            self.forget()
        task = self.task()
        if task.negatives:
            log(f"each query is held against {task.negatives} negatives in a step (fewer where texts repeat)")
        progress = Trainer(
            self.hp, task, self.device, self.precision, str(checkpoint), stamp, self.group
        ).run()
        if first:
            if self.best_checksum() != progress.best_weights:
                raise UserError(
                    f"{params}: no longer the best weights of this run (replaced or damaged); train again "
                    "with --force"
                )
            if not self.record_is_sound():
                self.write_record(progress.best_weights)
            log(f"wrote {params} (step {progress.best_step})")
            self.summary(progress)
            write_stamp(params, {**stamp, "weights": progress.best_weights})  # last: it says that all is done
