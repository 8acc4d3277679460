"""Tiny model folders in the layout of sentence-transformers, for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PACKAGE = "sentence_transformers.models"


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_modules(
    folder: Path,
    pooling: object = "mean",
    after: tuple[str, ...] = (),
    lengths: dict[str, object] | None = None,
    transformer: str = "",
    **general: object,
) -> None:
    """Write modules.json and the files that it names.

    `pooling`: a mode, or a pooling configuration; `after`: kinds of the modules after it; `lengths`: content
    of sentence_bert_config.json; `general`: content of config_sentence_transformers.json.
    """
    kinds = {transformer: "Transformer", "1_Pooling": "Pooling"}
    kinds |= {f"{at}_{kind}": kind for at, kind in enumerate(after, start=2)}
    modules = [
        {"type": f"{PACKAGE}.{kind}", "path": path, "name": f"m{path}"} for path, kind in kinds.items()
    ]
    write_json(folder / "modules.json", modules)
    config = {"pooling_mode": pooling} if isinstance(pooling, str) else pooling
    write_json(folder / "1_Pooling/config.json", config)
    if lengths is not None:
        write_json(folder / transformer / "sentence_bert_config.json", lengths)
    if general:
        write_json(folder / "config_sentence_transformers.json", general)


def write_dense(
    folder: Path, inputs: int, outputs: int, activation: str = "Tanh", bias: bool = True, safe: bool = True
) -> dict[str, torch.Tensor]:
    """Write a Dense module with random weights; return them."""
    package = "linear" if activation == "Identity" else "activation"
    kind = f"torch.nn.modules.{package}.{activation}"
    sizes = {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": kind}
    write_json(folder / "config.json", sizes)
    draw = torch.Generator().manual_seed(inputs + outputs)
    state = {"linear.weight": torch.randn(outputs, inputs, generator=draw) / inputs**0.5}
    if bias:
        state["linear.bias"] = torch.randn(outputs, generator=draw)
    if safe:
        save_file(state, str(folder / "model.safetensors"))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return state
