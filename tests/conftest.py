"""Shared fixtures; skips marked tests whose requirements are not installed."""

import gc
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may use the network

ROOT = Path(__file__).resolve().parents[1]
VOCAB = ROOT / "tests/tiny_bert/vocab.txt"
PACKAGES = {
    "tools": ("sentence_transformers", "ir_measures", "tantivy", "matplotlib", "openvino"),
    "browser": ("playwright",),
    "milvus": ("pymilvus", "milvus_lite"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, packages in PACKAGES.items():
        missing = [name for name in packages if find_spec(name) is None]
        if missing and item.get_closest_marker(marker):
            pytest.skip(f"not installed: {', '.join(missing)} (sh script/test.sh -m {marker} installs it)")
    if item.get_closest_marker("real") and not (ROOT.parent / "shared/models").is_dir():
        pytest.skip("no real data beside the checkout")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, those of real data: otherwise one process would end with them alone."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


def pytest_collection_finish() -> None:
    """Exempt the imported libraries from garbage collection: the programs call gc.collect()."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def measure_products_once():
    """Measure the fastest product once for all searches of the session."""
    from torch_src.retrieval import search

    search.fastest_kind = cache(search.fastest_kind)


@pytest.fixture(scope="session")
def tokenizer():
    """The WordPiece tokenizer of the sample data."""
    from torch_src.models.tokenization import load_tokenizer

    return load_tokenizer("", str(VOCAB))


@pytest.fixture(scope="session")
def tiny_encoder() -> Path:
    """The folder of the encoder in the sample data."""
    return ROOT / "script/sample_data/tiny_encoder"


@pytest.fixture
def tiny_config(tokenizer):
    """A BERT of width 32 with 2 layers and 64 positions; large initial weights: vectors differ clearly."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )


@pytest.fixture
def tiny_bert(tiny_config):
    """Return a function: (seed, add_pooling_layer) -> BertModel in eval mode."""
    import torch
    from transformers import BertModel

    def build(seed: int = 0, add_pooling_layer: bool = False):
        torch.manual_seed(seed)
        return BertModel(tiny_config, add_pooling_layer=add_pooling_layer).eval()

    return build


@pytest.fixture(scope="session")
def programs():
    """A server that starts the four programs quickly, each in its own process."""
    from preloaded import Preloaded

    with Preloaded() as server:
        yield server


@pytest.fixture
def quick_calls(programs, monkeypatch, tmp_path):
    """Make run_all.py and run_rounds.py start their programs from the server; return what they printed."""
    from script import run_all, run_rounds
    from torch_src.runtime.errors import UserError

    printed: list[str] = []

    def call(command: list[str]) -> None:
        done = programs.run(command[0], command[1:], tmp_path / "program.log")
        printed.append(done.output())
        if done.returncode:
            raise UserError(f"{command[0]}: {done.output()}")

    monkeypatch.setattr(run_all, "call", call)
    monkeypatch.setattr(run_rounds, "call", call)
    return printed


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A world with a trained dual encoder and its run res.top10; tests change only copies of it."""
    from toy_world import make_world, options, train_options

    from torch_src import dual_infer, dual_train

    world = make_world(tmp_path_factory.mktemp("trained"))
    assert dual_train.main(train_options(world, world / "output")) == 0
    assert dual_infer.main(options(world, world / "output"), topk=10, bs=4) == 0
    return world


@pytest.fixture
def trained_copy(trained, tmp_path) -> Path:
    """A copy of the trained world that a test may change."""
    from toy_world import copy_world

    return copy_world(trained, tmp_path / "world")


@pytest.fixture
def host_copies(monkeypatch) -> list[str]:
    """Names of the methods by which tensors are read on the host from here on, in order."""
    import torch

    copies: list[str] = []
    for name in ("cpu", "item", "tolist", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, real=real, name=name: copies.append(name) or real(tensor)
        )
    return copies


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the path of Chromium; the test is skipped on a machine without it."""
    import shutil

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    return path or pytest.skip("no Chromium on this machine")
