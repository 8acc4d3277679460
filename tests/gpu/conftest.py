"""Tests on a GPU use the attention kernels that the programs use."""

import pytest
import torch

from torch_src.runtime.devices import choose_device


@pytest.fixture(scope="session", autouse=True)
def gpu_settings():
    if torch.cuda.is_available():
        choose_device("cuda")
