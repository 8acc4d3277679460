"""A tower compiled by OpenVINO: in bf16 on a CPU a third faster than torch.

Optional: `python -m pip install -r requirements-openvino.txt`. Each run converts the loaded torch model
(seconds); nothing is written.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torch_src.models.dual_encoder import LAYERS
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library

MIN_COSINE = 0.998  # of a text's vectors by OpenVINO and by torch: bf16 rounds to 8 bits
TOKENS = 2048  # padded tokens per forward pass: the fastest of 1,024 to 8,192
PRECISIONS = {"bf16": "bf16", "fp32": "f32"}  # --precision -> OpenVINO's hint


def require_openvino() -> Any:
    """Return the module openvino; UserError when it cannot be imported."""
    return import_library("openvino", "requirements-openvino.txt")


def check_openvino(device: torch.device, precision: str, pooling: str) -> None:
    """UserError when the engine is not installed, or does not support the device, precision or pooling."""
    require_openvino()
    if device.type != "cpu" or precision not in PRECISIONS:
        raise UserError(f"--encoder_engine openvino: needs a CPU and {' or '.join(PRECISIONS)}; use torch")
    if pooling == "pooler":
        raise UserError("--encoder_engine openvino: does not support a pooling layer; use torch")


def smallest_cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Return the smallest cosine between the vectors (N, H) of the same row; nan when one is not finite."""
    one, other = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (one, other))
    return float((one * other).sum(axis=1).min())


class LastLayer(nn.Module):
    """A tower with plain tensors as inputs and output, as the conversion requires."""

    def __init__(self, tower: PreTrainedModel):
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last layer (B, L, H)."""
        return self.tower(input_ids=input_ids, attention_mask=attention_mask)[0]


def convert(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """Return the module as an OpenVINO model, traced with `example`.

    Uses only the frontend: openvino.convert_model sends usage statistics over the network.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracer warnings; tests cover other sizes than the example's
        decoder = TorchScriptPythonDecoder(module, example_input=example)
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(decoder))


class OpenVinoTower:
    """A converted tower in place of the torch one; returns only the last layer (B, L, H) fp32."""

    training = False

    def __init__(self, tower: PreTrainedModel, precision: str):
        """Convert and compile for `precision`, bf16 or fp32, with as many threads as torch."""
        openvino = require_openvino()
        self.config = tower.config
        if layers := getattr(tower, LAYERS, None):
            setattr(self, LAYERS, layers)
        example = (torch.ones((2, 8), dtype=torch.int64), torch.ones((2, 8), dtype=torch.int64))
        converted = convert(LastLayer(tower.cpu().eval()), example)
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }  # fmt: skip
        self.request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """Return (last layer,); the next call reuses its memory."""
        given = {0: input_ids.numpy(), 1: attention_mask.numpy()}
        return (torch.from_numpy(self.request.infer(given, share_inputs=True, share_outputs=True)[0]),)

    def eval(self) -> "OpenVinoTower":
        return self

    def train(self, on: bool = True) -> "OpenVinoTower":
        """Do nothing: the tower cannot be trained."""
        assert not on
        return self
