"""Export trained models as folders that transformers and sentence-transformers load.

    python -m pip install -r requirements-tools.txt
    python script/export_model.py dual --output_dir output --to output/export/dual
    python script/export_model.py cross --output_dir output --to output/export/cross

`dual` gives a SentenceTransformer with its prefixes as prompts (encode_query, encode_document), pooling,
normalisation and lengths; un-tied towers go through its Router. `cross` gives a CrossEncoder whose predict()
are logits. Both hold a model card with settings, stamp and, with --results, measured metrics. What cannot be
carried over (remove_spaces) is said. sentence-transformers cuts the longer text of a pair, we always the
passage: scores differ for queries longer than half of max_seq_len.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

import torch
import transformers

from metric.evaluation import MEASURES, compute_metrics, load_reference, load_result
from torch_src import cross_infer, retriever
from torch_src.cross_hparams import FIXED_BY_WEIGHTS as CROSS_FIXED
from torch_src.dual_hparams import FIXED_BY_WEIGHTS as DUAL_FIXED
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.inference_stage import FoundModel, find_trained_model
from torch_src.models.tokenization import save_tokenizer
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import log, warn
from torch_src.runtime.program import exit_status

PROMPTS = {"query": "query_prefix", "document": "passage_prefix"}


def sentence_transformers():
    """Return the library; UserError when it is not installed."""
    try:
        import sentence_transformers
    except ImportError:
        raise UserError(
            "sentence-transformers is not installed: python -m pip install -r requirements-tools.txt"
        ) from None
    return sentence_transformers


def export_dual(given) -> dict:
    """Write the dual encoder; return what its weights fix."""
    library = sentence_transformers()
    from sentence_transformers.base.modules import Normalize, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    hp = InferenceDeHparams(output_dir=given.output_dir)
    found = find_trained_model(hp, "dual", hp.dual_params_path, DUAL_FIXED)
    fixed, encoder = found.fixed, retriever.load_model(found, 0)
    if fixed["pooling"] == "pooler":
        raise UserError("pooling=pooler: sentence-transformers has no such pooling; export cls or mean")

    def modules(side: str, **lengths) -> list[torch.nn.Module]:
        with tempfile.TemporaryDirectory() as folder:
            save_backbone(encoder.tower(side), found, folder)
            transformer = Transformer(folder, model_kwargs={"dtype": torch.float32}, **lengths)
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=fixed["pooling"])
        return [transformer, pooling, *([Normalize()] if fixed["normalize"] else [])]

    query, passage = fixed["q_max_seq_len"], fixed["p_max_seq_len"]
    if fixed["share_encoder"]:
        made = modules("passage", max_seq_length=passage, query_length=query, document_length=passage)
    else:
        sides = (modules("query", max_seq_length=query), modules("passage", max_seq_length=passage))
        made = [Router.for_query_document(*sides)]
    model = library.SentenceTransformer(
        modules=made, device="cpu", prompts={name: fixed[prefix] for name, prefix in PROMPTS.items()},
        similarity_fn_name="cosine" if fixed["normalize"] else "dot",
    )  # fmt: skip
    model.save_pretrained(str(given.to), create_model_card=False)
    return {**fixed, "weights": found.fingerprint}


def export_cross(given) -> dict:
    """Write the cross-encoder; return what its weights fix."""
    library = sentence_transformers()
    hp = InferenceCrossHparams(output_dir=given.output_dir)
    found = find_trained_model(hp, "cross", hp.cross_params_path, CROSS_FIXED)
    encoder = cross_infer.load_model(found, 0)
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(encoder.model, found, folder)
        model = library.CrossEncoder(
            folder, max_length=found.fixed["max_seq_len"], activation_fn=torch.nn.Identity(), device="cpu",
            model_kwargs={"dtype": torch.float32},
        )  # fmt: skip
        model.save_pretrained(str(given.to), create_model_card=False)
    return {**found.fixed, "weights": found.fingerprint}


def save_backbone(model, found: FoundModel, folder: str) -> None:
    """Write a plain transformers folder: configuration, safetensors, tokenizer."""
    if hasattr(model.config, "random_init"):
        del model.config.random_init  # of the sample's model: these weights are trained ones
    model.save_pretrained(folder)
    save_tokenizer(found.tokenizer, Path(folder))


def measured(given) -> dict[str, float]:
    """Return the metrics of --results; empty without."""
    if not given.results:
        return {}
    metrics = compute_metrics(load_reference(given.reference), load_result(given.results))
    return {name: metrics[name] for name in MEASURES}


def write_card(given, fixed: dict, metrics: dict[str, float]) -> None:
    """Write README.md of the exported folder: what it is, how to load it, what was measured, what made it."""
    use = {"dual": DUAL_USE, "cross": CROSS_USE}[given.kind]
    task = {"dual": "sentence-similarity", "cross": "text-ranking"}[given.kind]
    rows = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    table = ["## Measured", "", f"`{Path(given.results).name}` against `{Path(given.reference).name}`.", ""]
    table += ["| measure | value |", "|---|---|", *rows, ""] if rows else []
    settings = json.dumps(fixed, ensure_ascii=False, indent=1)
    name = {"dual": "Dual encoder", "cross": "Cross-encoder"}[given.kind]
    lines = [
        "---", "language: zh", "library_name: sentence-transformers", f"pipeline_tag: {task}", "---", "",
        f"# {name} for Chinese passage retrieval", "",
        "```python", use.strip(), "```", "", *(table if rows else []), "## What made it", "", "```json",
        settings, "```", "",
    ]  # fmt: skip
    with atomic_write(Path(given.to) / "README.md") as file:
        file.write("\n".join(lines))


DUAL_USE = """
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries, passages = model.encode_query(["..."]), model.encode_document(["...", "..."])
scores = model.similarity(queries, passages)
"""
CROSS_USE = """
from sentence_transformers import CrossEncoder

model = CrossEncoder("PATH")
logits = model.predict([("query", "passage"), ("query", "another passage")])
"""


def run(given) -> None:
    if given.to.exists() and any(given.to.iterdir()):
        raise UserError(f"{given.to}: not empty; name another folder, or delete it")
    if bool(given.results) != bool(given.reference):
        raise UserError("--results and --reference go together")
    metrics = measured(given)
    transformers.logging.set_verbosity_error()  # its bars, and its word of a pooler that is not used
    transformers.logging.disable_progress_bar()
    fixed = {"dual": export_dual, "cross": export_cross}[given.kind](given)
    write_card(given, fixed, metrics)
    if fixed["remove_spaces"]:
        warn("remove_spaces cannot be carried over: remove ASCII spaces from texts before encoding them")
    log(f"wrote {given.to}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    plain = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    options.add_argument("kind", choices=["dual", "cross"])
    options.add_argument("--output_dir", default="output", help="where NAME_params.bin lies")
    options.add_argument("--to", type=Path, required=True, help="the folder to write")
    options.add_argument("--results", default="", help="dual_res.json or cross_res.json, for the model card")
    options.add_argument("--reference", default="", help="dev.json, to score --results")
    given = options.parse_args(argv)
    return exit_status(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
