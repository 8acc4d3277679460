"""The retriever as inference needs it: the model that the settings name, its weights, encoders, passages."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from torch_src import hparams
from torch_src.data.collection import PassageCollection
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.dual_hparams import MODEL_SETTINGS, DualHparams
from torch_src.inference_de_hparams import OPENVINO, InferenceDeHparams
from torch_src.inference_stage import (
    FoundModel,
    find_pretrained_model,
    find_trained_model,
    planned_before_training,
)
from torch_src.models.backbones import check_fits, load_weights
from torch_src.models.dual_encoder import DualEncoder, build_backbone, load_backbone
from torch_src.models.model_folder import own_settings
from torch_src.models.tokenization import TextRules
from torch_src.retrieval.encoding import Encoder
from torch_src.retrieval.engines.openvino import TOKENS, OpenVinoTower, check_openvino
from torch_src.runtime.devices import choose_device, choose_precision, set_threads, token_budget
from torch_src.runtime.files import require
from torch_src.runtime.log import log


def find_model(hp: InferenceDeHparams) -> FoundModel:
    """Return the model that the settings name: fine-tuned, or with `--dual_params none` as it is."""
    if hp.dual_params != hparams.NONE and not planned_before_training(hp, hp.dual_params_path):
        return find_trained_model(hp, "dual", hp.dual_params_path, MODEL_SETTINGS)
    trained = DualHparams.defaults(hp.debug)
    own = own_settings(hp.pretrained_model_path or trained.pretrained_model_path)
    return find_pretrained_model(hp, replace(trained, **own), MODEL_SETTINGS)


def load_model(model: FoundModel, seed: int) -> DualEncoder:
    """Return the dual encoder with its weights, on the CPU."""
    fixed = model.fixed
    shape = (fixed["share_encoder"], fixed["pooling"], fixed["normalize"])
    if model.params is None:
        encoder = DualEncoder(load_backbone(model.path, model.config, fixed["pooling"], seed), *shape)
    else:
        encoder = DualEncoder(build_backbone(model.config, fixed["pooling"]), *shape)
        load_weights(model.params, encoder, "do_dual_train.py")
    model.require_unchanged()
    return encoder


class Retriever:
    """A dual encoder and its collection: found and checked before anything long starts."""

    def __init__(self, hp: InferenceDeHparams):
        self.hp = hp
        self.device = choose_device(hp.device)
        self.precision = choose_precision(hp.precision, self.device)
        self.threads = set_threads(hp.threads)
        log(f"device {self.device}  precision {self.precision}  threads {self.threads}")
        self.model = find_model(hp)
        lengths = {name: self.model.fixed[name] for name in ("q_max_seq_len", "p_max_seq_len")}
        check_fits(self.model.config, len(self.model.tokenizer), lengths, self.model.path)
        hparams.check_range("vector_dims", hp.vector_dims, 0, self.model.config.hidden_size)
        if hp.encoder_engine == OPENVINO:
            check_openvino(self.device, self.precision, self.model.fixed["pooling"])
        self.collection = PassageCollection(hp.passage_dir_path, str(Path(hp.output_dir) / "cache"))
        self.output = Path(hp.output_dir)

    def passage_ids(self) -> np.ndarray | None:
        """Return the pids (N,) as bytes; None with `--passage_ids none`.

        The map must be exactly as long as the collection, or every pid after the gap would be wrong.
        """
        if self.hp.passage_ids == hparams.NONE:
            return None
        path = require(self.hp.passage_ids_path, "row -> pid", "pass --passage_ids none to go without")
        ids = read_passage_ids(path, str(self.output / "cache"))
        check_length(path, len(ids), len(self.collection))
        return ids

    def vector_stamp(self, side: str) -> dict:
        """Return what decides the vectors of one side."""
        fixed = self.model.fixed
        length = {"query": "q_max_seq_len", "passage": "p_max_seq_len"}[side]
        names = ("pooling", "normalize", "remove_spaces", f"{side}_prefix", length)
        more = {"vector_dims": self.hp.vector_dims} if self.hp.vector_dims else {}
        if side == "passage" and self.hp.encoder_engine == OPENVINO:
            more["encoder_engine"] = OPENVINO
        return {
            **self.model.decides, **{name: fixed[name] for name in names}, **more,
            "precision": self.precision, "device": self.device.type,
        }  # fmt: skip

    def encoder(self, side: str, model: DualEncoder) -> Encoder:
        fixed, hp = self.model.fixed, self.hp
        length = {"query": "q_max_seq_len", "passage": "p_max_seq_len"}[side]
        rules = TextRules(fixed[length], fixed[f"{side}_prefix"], fixed["remove_spaces"])
        tower, budget = (
            model.tower(side).to(self.device).eval(),
            token_budget(0, self.device),
        )
        if side == "passage" and hp.encoder_engine == OPENVINO:
            tower, budget = OpenVinoTower(tower, self.precision), TOKENS
        return Encoder(
            tower, self.model.tokenizer, rules, fixed["pooling"], fixed["normalize"], self.device,
            self.precision, hp.batch_size, budget, hp.vector_dims,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Return the dimensions of a stored vector."""
        return self.hp.vector_dims or self.model.config.hidden_size
