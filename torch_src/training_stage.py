"""What both training programs do around the loop: choose, check, stamp, load, save, warn."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torch_src import hparams
from torch_src.backbones import check_fits, load_config, model_fingerprint
from torch_src.devices import choose_device, choose_precision, set_threads
from torch_src.helpers import atomic_write, say
from torch_src.stamps import clear_stamp, fingerprint_files, up_to_date, write_stamp
from torch_src.tokenization import (
    length_sorted_batches,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)
from torch_src.training import Progress, Task, Trainer

# Settings that change where things lie or what is said, but not the weights a run ends with.
NOT_STAMPED = {
    "data_dir", "train_set", "dev_set", "passage_dir", "passage_ids", "dev_candidates", "output_dir",
    "log_every", "pretrained_model_path", "dual_params", "vocab_path", "force", "debug", "threads", "device",
}  # fmt: skip


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
        self.precision = choose_precision(hp.precision, self.device)
        say(f"device {self.device}  precision {self.precision}  threads {set_threads(hp.threads)}")
        self.config = load_config(hp.pretrained_model_path, hp.dropout)
        self.tokenizer = load_tokenizer(hp.pretrained_model_path, hp.vocab_path)
        lengths = {name: getattr(hp, name) for name in self.lengths}
        check_fits(self.config, len(self.tokenizer), lengths, hp.pretrained_model_path)

    def load(self) -> None:
        """Load the dev set and the model: what takes time, after everything cheap was checked."""
        raise AssertionError("a subclass loads its model")

    def task(self) -> Task:
        """Return what the loop needs."""
        raise AssertionError("a subclass makes its task")

    def summary(self, progress: Progress) -> None:
        """Say what the finished run was worth; warn where it was worth little."""
        raise AssertionError("a subclass looks at its result")

    def stamp(self) -> dict:
        """Return what decides the weights: settings, the model started from, the files."""
        settings = {k: v for k, v in dataclasses.asdict(self.hp).items() if k not in NOT_STAMPED}
        ids_path = self.hp.dev_candidates_path.replace(".res.tsv", ".res.id_map.tsv")
        dev = [self.hp.dev_set_path, *{self.hp.dev_candidates_path: 0, ids_path: 0}]
        dev = [path for path in dev if os.path.exists(path)]
        return {
            "stage": f"{self.name}_train", **settings, "precision": self.precision,
            "start": model_fingerprint(self.hp.pretrained_model_path),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "train_rows": fingerprint_files([self.hp.train_set_path]), "dev": fingerprint_files(dev),
        }  # fmt: skip

    def in_chunks(self, lengths: list[int], forward) -> Tensor:
        """Return forward's rows for all texts, run in length-sorted chunks and put back in order.

        `forward(rows)` gives one row of output for each of `rows`. Every text still takes part in one loss;
        only the padding is saved.
        """
        chunks = length_sorted_batches(lengths, len(lengths), self.hp.tokens_per_batch)
        parts = torch.cat([forward(rows) for rows in chunks])
        return parts[torch.from_numpy(np.argsort(np.concatenate(chunks))).to(self.device)]

    def state(self) -> dict:
        """Return the state dict that is saved."""
        return self.model.state_dict()

    def best_fingerprint(self) -> str | None:
        """Return the fingerprint of NAME_params.bin, None when it is not there."""
        return fingerprint_files([self.hp.params_path]) if os.path.exists(self.hp.params_path) else None

    def save_best(self) -> str:
        """Write NAME_params.bin and what inference must know of it; return its fingerprint."""
        params = Path(self.hp.params_path)
        folder = params.parent / f"{self.name}_model"  # inference then needs no folder but the result's
        self.config.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
        fixed = {name: getattr(self.hp, name) for name in self.fixed_by_weights}
        record = {"fixed_by_weights": fixed, "tokenizer": tokenizer_fingerprint(self.tokenizer)}
        with atomic_write(params, "wb") as file:
            torch.save(self.state(), file)
            file.flush()
            weights = fingerprint_files([file.name])
            hparams.save(self.hp, params.parent / f"{self.name}_hparams.json", **record, weights=weights)
        return weights

    def _is_done(self, params: str, stamp: dict) -> bool:
        record = Path(params).parent / f"{self.name}_hparams.json"
        if not record.exists():
            clear_stamp(params)
        return up_to_date(params, {**stamp, "weights": self.best_fingerprint()}, say)

    def run(self) -> None:
        """Train unless the result is up to date."""
        params, checkpoint = self.hp.params_path, Path(self.hp.output_dir) / f"{self.name}_checkpoint.pt"
        stamp = self.stamp()
        if self.hp.force:
            checkpoint.unlink(missing_ok=True)
        elif self._is_done(params, stamp):
            say(f"{params}: up to date")
            return
        self.load()
        clear_stamp(params)
        progress = Trainer(self.hp, self.task(), self.device, self.precision, str(checkpoint), stamp).run()
        write_stamp(params, {**stamp, "weights": progress.best_weights})
        say(f"wrote {params} (step {progress.best_step})")
        self.summary(progress)
