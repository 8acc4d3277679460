"""The settings that the programs saved in their output folder, for what reads that folder afterwards."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch_src.hparams import NONE, OUTPUT, PATHS, Hparams, from_saved
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.stamps import JsonDict

SAVED = (
    "dual_infer_hparams.json", "dual_hparams.json", "cross_infer_hparams.json", "cross_hparams.json",
)  # fmt: skip
# Read from the first of these files that exists.
DATA = ("data_dir", "passage_dir", "passage_ids", "debug")
# Of this machine or of the run, not of the vectors.
NOT_SAVED = (
    "output_dir", "device", "precision", "threads", "topk", "search_memory_gb", "bs", "batch_size", "force",
    "plan", "workers", "encoder_engine",
)  # fmt: skip
RERANKER = ("pretrained_model_path", "vocab_path", "max_seq_len", "remove_spaces")
WINDOWS = ("passage_windows", "window_stride")


def read_saved(output_dir: str, name: str) -> dict[str, Any]:
    """Return the settings that a program saved in its output folder; empty without the file."""
    path = Path(output_dir) / name
    values = read_json(path) if path.exists() else {}
    paths = {knob: from_saved(knob, value) for knob, value in values.items() if knob in PATHS and value}
    return values | paths


def saved_search(output_dir: str, settings: type[Hparams]) -> dict[str, Any]:
    """Return those of the saved data and search settings that a settings class has."""
    saved = {name: read_saved(output_dir, name) for name in SAVED}
    found: dict[str, Any] = {}
    for name in reversed(SAVED):
        found |= {knob: saved[name][knob] for knob in DATA if knob in saved[name]}
    search = saved["dual_infer_hparams.json"]
    known = {knob.name for knob in fields(InferenceDeHparams)} & {knob.name for knob in fields(settings)}
    found |= {name: search[name] for name in known - {*NOT_SAVED} if name in search}
    if search.get("engine") == "milvus":
        found["search_params"] = ""  # for the index there
    if found.get("dev_q") == NONE:
        found["dev_q"] = ""  # only the search had none
    return found


def retriever_settings(path: str, options: dict[str, Any]) -> InferenceDeHparams:
    """Return the settings of a retriever: an output folder, a model folder or a hub name."""
    plain = InferenceDeHparams.defaults(debug=False)
    if not _is_output(path, "dual"):
        given = {"dual_params": NONE, "pretrained_model_path": path}
        hp = replace(plain, **{**given, **options})
    else:
        own = ("engine", "milvus_uri", "milvus_collection", "debug")
        saved = {k: v for k, v in saved_search(path, InferenceDeHparams).items() if k not in own}
        hp = replace(plain, **{**saved, **options, "output_dir": path})
    hp.check()
    return hp


def reranker_settings(path: str, options: dict[str, Any]) -> InferenceCrossHparams:
    """Return the settings of a re-ranker: an output folder, a model folder or a hub name."""
    plain = InferenceCrossHparams.defaults(debug=False)
    if not _is_output(path, "cross"):
        given: dict[str, Any] = {"cross_params": NONE, "pretrained_model_path": path}
    else:
        given = {"output_dir": path}
        saved = read_saved(path, "cross_infer_hparams.json")
        given |= {name: saved[name] for name in WINDOWS if name in saved}
        if saved.get("cross_params") == NONE:
            given |= {name: saved[name] for name in RERANKER} | {"cross_params": NONE}
    hp = replace(plain, **{**given, **options})
    hp.check()
    return hp


def _is_output(path: str, name: str) -> bool:
    """Return whether a folder holds a model of the programs, `name` dual or cross; UserError for nothing."""
    folder = Path(path)
    if any((folder / f"{name}{file}").exists() for file in ("_params.bin", "_infer_hparams.json")):
        return True
    if path == OUTPUT and not folder.exists():
        raise UserError(f"{path}: no such folder; name an output folder of the programs, or a model")
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "modules.json")):
        expected = f"{name}_params.bin of the programs, or config.json of a model"
        raise UserError(f"{path}: no model in this folder (expected {expected})")
    return False


def for_vectors(hp: InferenceDeHparams, manifest: JsonDict, device: str) -> InferenceDeHparams:
    """Return the settings for questions to vectors with this manifest; `device`: type of the one here."""
    precision = hp.precision
    if precision == "auto" and manifest.get("device") == device:
        precision = manifest.get("precision", "auto")
    windows = {name: manifest.get(name, getattr(InferenceDeHparams, name)) for name in WINDOWS}
    return replace(hp, precision=precision, vector_dims=manifest.get("vector_dims", 0), **windows)
