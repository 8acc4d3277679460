"""Encoding by OpenVINO: equal to torch up to rounding, other stamp, unsupported settings refused."""

import sys

import numpy as np
import pytest
import torch
from toy_world import make_world, options
from transformers import AutoConfig

from torch_src import dual_infer, inference
from torch_src.models.dual_encoder import embed, load_backbone
from torch_src.retrieval.engines.openvino import OpenVinoTower, check_openvino
from torch_src.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.tools
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_its_vectors_equal_those_of_torch_for_every_size(world, pooling):
    path = str(world / "model")
    tower = load_backbone(path, AutoConfig.from_pretrained(path), pooling, 1).eval()
    compiled = OpenVinoTower(tower, "fp32")
    draw = torch.Generator().manual_seed(0)
    for texts, length in ((1, 2), (2, 8), (5, 64), (17, 3), (1, 1)):
        ids = torch.randint(5, 400, (texts, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, length // 2 + 1 :] = 0
        with torch.inference_mode():
            one, other = (embed(each, ids, mask, pooling, True) for each in (compiled, tower))
        assert (one - other).abs().max() < 1e-5


def infer(world, output, *more: str) -> int:
    words = ["--dual_params", "none", "--pretrained_model_path", str(world / "model"), "--pooling", "mean"]
    return dual_infer.main([*options(world, output), *words, *more], topk=10)


@pytest.mark.tools
def test_the_program_with_openvino(world, tmp_path, capsys):
    openvino = ["--encoder_engine", "openvino"]
    assert infer(world, tmp_path / "torch") == 0
    assert infer(world, tmp_path / "one", *openvino) == 0
    assert infer(world, tmp_path / "two", *openvino) == 0
    blocks = [tmp_path / name / "para_emb/block-00000.npy" for name in ("torch", "one", "two")]
    assert blocks[1].read_bytes() == blocks[2].read_bytes()
    assert np.abs(np.load(blocks[0]).astype(float) - np.load(blocks[1]).astype(float)).max() < 2e-2
    capsys.readouterr()
    assert infer(world, tmp_path / "one", *openvino) == 0
    assert "up to date" in capsys.readouterr().out
    assert infer(world, tmp_path / "one") == 0
    assert "encoder_engine: openvino -> missing" in capsys.readouterr().out


class Noisy(torch.nn.Module):
    """Stands for a compiled tower: the states of torch, with noise or not finite."""

    def __init__(self, tower, precision, noise):
        super().__init__()
        self.tower, self.config, self.noise = tower, tower.config, noise

    def forward(self, **given):
        states = self.tower(**given)[0]
        return (states + self.noise * torch.randn(states.shape, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize(("noise", "used"), [
    pytest.param(0.001, True, marks=pytest.mark.slow), (1.0, False),
    pytest.param(float("nan"), False, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_model_that_it_computes_otherwise_is_encoded_by_torch(
    world, tmp_path, capsys, monkeypatch, noise, used
):
    assert infer(world, tmp_path / "torch") == 0
    monkeypatch.setattr(inference, "check_openvino", lambda *_: None)
    monkeypatch.setattr(inference, "OpenVinoTower", lambda *given: Noisy(*given, noise))
    capsys.readouterr()
    assert infer(world, tmp_path / "one", "--encoder_engine", "openvino") == 0
    assert ("WARNING --encoder_engine openvino" in capsys.readouterr().err) is not used
    blocks = [tmp_path / name / "para_emb/block-00000.npy" for name in ("torch", "one")]
    assert (blocks[0].read_bytes() == blocks[1].read_bytes()) is not used


def test_a_model_that_it_cannot_convert_is_encoded_by_torch(world, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("no such operation")

    monkeypatch.setattr(inference, "check_openvino", lambda *_: None)
    monkeypatch.setattr(inference, "OpenVinoTower", fail)
    assert infer(world, tmp_path, "--encoder_engine", "openvino") == 0
    assert "no such operation" in capsys.readouterr().err


@pytest.mark.tools
@pytest.mark.parametrize(("device", "precision", "pooling", "message"), [
    ("cuda", "bf16", "mean", "needs a CPU"), ("cpu", "fp16", "mean", "bf16 or fp32"),
    ("cpu", "bf16", "pooler", "pooling layer"),
])  # fmt: skip
def test_unsupported_settings_are_refused(device, precision, pooling, message):
    check_openvino(CPU, "fp32", "cls")
    with pytest.raises(UserError, match=message):
        check_openvino(torch.device(device), precision, pooling)


def test_without_it_the_requirements_file_is_named(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert infer(world, tmp_path, "--encoder_engine", "openvino") == 2
    assert "requirements-openvino.txt" in capsys.readouterr().err
