"""Choices that depend on the device."""

import pytest
import torch

from torch_src.runtime import devices
from torch_src.runtime.devices import worker_count

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("processors", "texts", "expected"),
    [(16, 10**6, 12), (64, 10**6, 16), (2, 10**6, 1), (1, 10**6, 1), (16, 100, 0), (16, 20_000, 4)],
)
def test_processes_that_tokenize(monkeypatch, processors, texts, expected):
    monkeypatch.setattr(devices.os, "cpu_count", lambda: processors)
    assert worker_count(-1, CUDA, texts) == expected
    assert worker_count(-1, CPU, texts) == 0 and worker_count(3, CPU, texts) == worker_count(3, CUDA, 1) == 3


def test_processes_of_one_machine_share_its_processors(monkeypatch):
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert worker_count(-1, CUDA, 10**6) == 6
