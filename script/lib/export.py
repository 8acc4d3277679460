"""Writes trained models as folders for transformers and sentence-transformers; see script/export_model.py."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from metric.evaluation import MEASURES, compute_metrics, load_reference, load_result
from torch_src.cross_hparams import MODEL_SETTINGS as CROSS_FIXED
from torch_src.dual_hparams import MODEL_SETTINGS as DUAL_FIXED
from torch_src.inference import (
    ModelSource,
    find_trained_model,
    load_cross_model,
    load_dual_model,
    pair_rules,
)
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.models.dual_encoder import LAYERS, pools_prompt, sentence_layers
from torch_src.models.pair_template import PairTemplate, chat_template, template_of
from torch_src.models.tokenization import retriever_rules, save_tokenizer
from torch_src.models.truncation import Truncation
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_folder, atomic_write, read_json, require
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import log, warn
from torch_src.runtime.outputs import check_new_folder
from torch_src.saved_settings import read_saved

PROMPTS = {"query": "query_prefix", "document": "passage_prefix"}


def import_sentence_transformers() -> Any:
    """Return the library; UserError if it cannot be imported."""
    return import_library("sentence_transformers", "requirements-tools.txt", "sentence-transformers")


def export_dual(args: argparse.Namespace, to: Path) -> dict[str, Any]:
    """Write the dual encoder to the folder `to`; return its model settings."""
    library = import_sentence_transformers()
    from sentence_transformers.base.modules import Normalize, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    hp = InferenceDeHparams(output_dir=args.output_dir)
    require(hp.dual_params_path, "trained weights", "run do_dual_train.py first")
    found = find_trained_model(hp, "dual", hp.dual_params_path, DUAL_FIXED)
    fixed, encoder = found.settings, load_dual_model(found)
    if fixed["pooling"] == "pooler":
        raise UserError("pooling pooler: not supported by sentence-transformers; use another pooling")

    include_prompt = pools_prompt(found.config)  # before save_backbone removes it
    layers = {side: export_layers(encoder.tower(side), found.config) for side in ("query", "passage")}

    def modules(side: str, **lengths: int) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            save_backbone(encoder.tower(side), found, folder)
            transformer = Transformer(folder, model_kwargs={"dtype": torch.float32}, **lengths)
        dimension = transformer.get_embedding_dimension()
        pooling = Pooling(dimension, fixed["pooling"], include_prompt=include_prompt)
        return [transformer, pooling, *layers[side], *([Normalize()] if fixed["normalize"] else [])]

    # sentence-transformers counts the tokens of a prompt as well
    query, passage = (rules.max_tokens(found.tokenizer) for rules in retriever_rules(fixed).values())
    report_truncation(hp.dual_params_path, "dual")
    if fixed["share_encoder"]:
        all_modules = modules("passage", max_seq_length=passage, query_length=query, document_length=passage)
    else:
        sides = (modules("query", max_seq_length=query), modules("passage", max_seq_length=passage))
        all_modules = [Router.for_query_document(*sides)]
    model = library.SentenceTransformer(
        modules=all_modules, device="cpu", prompts={name: fixed[prefix] for name, prefix in PROMPTS.items()},
        similarity_fn_name="cosine" if fixed["normalize"] else "dot",
    )  # fmt: skip
    model.save_pretrained(str(to), create_model_card=False)
    return {**fixed, "weights": found.checksum}


def export_layers(tower: PreTrainedModel, config: PretrainedConfig) -> list[Any]:
    """Return the layers after the pooling as modules of sentence-transformers; the tower loses them."""
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm

    def convert(at: dict[str, Any]) -> Any:
        if at["type"] == "Dense":
            activation = getattr(torch.nn, at["activation"])()
            return Dense(at["inputs"], at["outputs"], at["bias"], activation)
        if at["type"] == "LayerNorm":
            return LayerNorm(at["size"])
        return Dropout(at["p"]) if at["type"] == "Dropout" else Normalize()

    found = [convert(at) for at in sentence_layers(config)]
    if found and hasattr(tower, LAYERS):
        for module, own in zip(found, tower.get_submodule(LAYERS).children(), strict=True):
            module.load_state_dict(own.state_dict())
        delattr(tower, LAYERS)
    return found


def export_cross(args: argparse.Namespace, to: Path) -> dict[str, Any]:
    """Write the cross-encoder to the folder `to`; return its model settings."""
    library = import_sentence_transformers()
    hp = InferenceCrossHparams(output_dir=args.output_dir)
    require(hp.cross_params_path, "trained weights", "run do_cross_train.py first")
    found = find_trained_model(hp, "cross", hp.cross_params_path, CROSS_FIXED)
    encoder = load_cross_model(found)
    report_truncation(hp.cross_params_path, "cross")
    if encoder.takes_types:  # by default transformers passes the segment ids of few tokenizers to the model
        names = ["input_ids", "token_type_ids", "attention_mask"]
        found.tokenizer.model_input_names = found.tokenizer.init_kwargs["model_input_names"] = names
    template, length = template_of(found.config), pair_rules(found).max_tokens(found.tokenizer)
    prompt = template.before if template and template.special_tokens else ""
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(encoder.model, found, folder, template)
        model = library.CrossEncoder(
            folder, max_length=length, device="cpu",
            activation_fn=torch.nn.Identity(), model_kwargs={"dtype": torch.float32},
            prompts={"query": prompt} if prompt else None, default_prompt_name="query" if prompt else None,
        )  # fmt: skip
        model.save_pretrained(str(to), create_model_card=False)
    return {**found.settings, "weights": found.checksum}


def save_backbone(
    model: PreTrainedModel, found: ModelSource, folder: str, template: PairTemplate | None = None
) -> None:
    """Write a plain transformers folder: configuration, safetensors, tokenizer.

    The template of a re-ranker's pairs becomes the tokenizer's chat template; without one it has none, as
    sentence-transformers would put it around every text.
    """
    for name in ("sentence_settings", "pair_settings"):  # they are in the files of sentence-transformers
        model.config.__dict__.pop(name, None)
    found.tokenizer.chat_template = None
    if template and not template.special_tokens:
        found.tokenizer.chat_template = chat_template(template)
    model.save_pretrained(folder)
    save_tokenizer(found.tokenizer, Path(folder))


def report_truncation(params_path: str, name: str) -> None:
    """Log which shares of the training texts were truncated."""
    for found in read_json(Path(params_path).with_name(f"{name}_hparams.json")).get("truncation", []):
        Truncation(**found).report()


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Return the metrics of --results; empty without it."""
    if not args.results:
        return {}
    metrics = compute_metrics(load_reference(args.reference), load_result(args.results))
    return {name: metrics[name] for name in MEASURES}


def write_card(
    args: argparse.Namespace, to: Path, settings: dict[str, Any], metrics: dict[str, float]
) -> None:
    """Write README.md of the exported folder: how to load the model, its metrics, its settings."""
    name, task, usage = {
        "dual": ("Dual encoder", "sentence-similarity", DUAL_USAGE),
        "cross": ("Cross-encoder", "text-ranking", CROSS_USAGE),
    }[args.kind]
    table = []
    if metrics:
        table += [
            "## Metrics",
            "",
            f"`{Path(args.results).name}`, scored with `{Path(args.reference).name}`.",
            "",
        ]
        table += ["| metric | value |", "|---|---|"]
        table += [*(f"| {metric} | {value:.4f} |" for metric, value in metrics.items()), ""]
    saved = read_saved(args.output_dir, f"{args.kind}_infer_hparams.json")
    if metrics and saved.get("passage_windows", 1) > 1:
        table += [
            f"Long passages were scored in up to {saved['passage_windows']} windows, the best one counts "
            "(`--passage_windows`); sentence-transformers truncates them after the first.",
            "",
        ]
    lines = [
        "---", "language: zh", "library_name: sentence-transformers", f"pipeline_tag: {task}", "---", "",
        f"# {name} for Chinese passage retrieval", "",
        "```python", usage.strip(), "```", "", *table, "## Settings", "",
        "```json", json.dumps(settings, ensure_ascii=False, indent=1), "```", "",
    ]  # fmt: skip
    with atomic_write(to / "README.md") as file:
        file.write("\n".join(lines))


DUAL_USAGE = """
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries, passages = model.encode_query(["..."]), model.encode_document(["...", "..."])
scores = model.similarity(queries, passages)
"""
CROSS_USAGE = """
from sentence_transformers import CrossEncoder

model = CrossEncoder("PATH")
logits = model.predict([("query", "passage"), ("query", "another passage")])
"""


def export(args: argparse.Namespace) -> None:
    """Export the model and write its card."""
    check_new_folder(args.to, [args.results, args.reference])
    if bool(args.results) != bool(args.reference):
        raise UserError("--results needs --reference, and --reference needs --results")
    metrics = measured(args)
    transformers.logging.set_verbosity_error()  # no progress bars, no warning of an unused pooler
    transformers.logging.disable_progress_bar()
    with atomic_folder(args.to) as folder:
        settings = {"dual": export_dual, "cross": export_cross}[args.kind](args, folder)
        write_card(args, folder, settings, metrics)
    if settings["remove_spaces"]:
        warn("remove_spaces cannot be exported; remove ASCII spaces from texts before encoding them")
    log(f"wrote {args.to}")
