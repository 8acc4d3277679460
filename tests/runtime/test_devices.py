"""Choices that depend on the device."""

import pytest
import torch

from torch_src.runtime import devices
from torch_src.runtime.devices import free_gpu_memory, worker_count

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


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 70), (0.5, 50)])
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_free_gpu_memory_respects_the_limit_of_the_process(monkeypatch, name, fraction, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)
    limits = {None: fraction, 1: fraction}  # as torch: a device without an index is refused
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", limits.__getitem__, raising=False)
    assert free_gpu_memory(torch.device(name)) == expected
