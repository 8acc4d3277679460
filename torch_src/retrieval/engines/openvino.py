"""A tower compiled by OpenVINO, for encoding on a CPU: bf16 products a third faster than torch's there.

Optional: `python -m pip install -r requirements-openvino.txt`. The tower is converted from the loaded torch
model each time (seconds); nothing is written.
"""

import warnings

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torch_src.runtime.errors import UserError

TOKENS = 2048  # padded tokens of one forward pass: the fastest of 1,024 to 8,192
PRECISIONS = {"bf16": "bf16", "fp32": "f32"}  # ours -> OpenVINO's hint


def require_openvino():
    """Return the module openvino; UserError when it is not installed."""
    try:
        import openvino
    except ImportError:
        raise UserError(
            "--encoder_engine openvino: not installed; python -m pip install -r requirements-openvino.txt"
        ) from None
    return openvino


def check_openvino(device: torch.device, precision: str, pooling: str) -> None:
    """UserError where the engine is not installed or cannot do what is asked."""
    require_openvino()
    if device.type != "cpu" or precision not in PRECISIONS:
        raise UserError(f"--encoder_engine openvino: for a CPU in {' or '.join(PRECISIONS)}; use torch")
    if pooling == "pooler":
        raise UserError("--encoder_engine openvino: gives no output of a pooling layer; use torch")


class LastLayer(nn.Module):
    """A tower whose forward pass takes and gives plain tensors, as a conversion wants it."""

    def __init__(self, tower: PreTrainedModel):
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last layer (B, L, H)."""
        return self.tower(input_ids=input_ids, attention_mask=attention_mask)[0]


def convert(module: nn.Module, example: tuple[Tensor, ...]):
    """Return the module as a model of OpenVINO, traced with `example`.

    By the frontend alone: openvino.convert_model would send a report of its use over the network.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: what depends on a size is compared by the tests
        decoder = TorchScriptPythonDecoder(module, example_input=example)
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(decoder))


class OpenVinoTower:
    """Called like the torch tower that it was made of; gives the last layer alone, (B, L, H) fp32."""

    training = False

    def __init__(self, tower: PreTrainedModel, precision: str):
        """Convert and compile; `precision` is bf16 or fp32, the threads are torch's."""
        openvino = require_openvino()
        self.config = tower.config
        example = (torch.ones((2, 8), dtype=torch.int64), torch.ones((2, 8), dtype=torch.int64))
        converted = convert(LastLayer(tower.cpu().eval()), example)
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }  # fmt: skip
        self.request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """Return (last layer,). Its memory is used again by the next call."""
        given = {0: input_ids.numpy(), 1: attention_mask.numpy()}
        return (torch.from_numpy(self.request.infer(given, share_inputs=True, share_outputs=True)[0]),)

    def eval(self) -> "OpenVinoTower":
        return self

    def train(self, on: bool = True) -> "OpenVinoTower":
        """Do nothing: there is nothing to train."""
        assert not on
        return self
