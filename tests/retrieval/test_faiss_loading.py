"""The faiss library: hollow, doubled and missing wheels are named."""

import types
from importlib import metadata

import pytest

from torch_src.retrieval import faiss_loading as module
from torch_src.retrieval.faiss_loading import load_faiss
from torch_src.runtime.errors import UserError


def only(*installed):
    def distribution(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)

    return distribution


def test_a_hollow_faiss_is_named(monkeypatch):
    monkeypatch.setattr(module.metadata, "distribution", only("faiss-cpu"))
    monkeypatch.setattr(module, "import_module", lambda name: types.ModuleType(name))
    with pytest.raises(UserError, match="faiss is hollow.*pip uninstall -y faiss-cpu faiss-gpu"):
        load_faiss()


def test_both_wheels_are_refused(monkeypatch):
    monkeypatch.setattr(module.metadata, "distribution", only("faiss-cpu", "faiss-gpu"))
    with pytest.raises(UserError, match="both faiss-cpu and faiss-gpu are installed.*pip uninstall"):
        load_faiss()


def test_a_missing_faiss_is_named(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(module.metadata, "distribution", only())
    monkeypatch.setattr(module, "import_module", fail)
    with pytest.raises(UserError, match="faiss cannot be imported.*No module named 'faiss'"):
        load_faiss()


@pytest.mark.parametrize("wheel", [(), ("faiss-cpu",), ("faiss-gpu",)])
def test_a_whole_faiss_is_returned(monkeypatch, wheel):
    monkeypatch.setattr(module.metadata, "distribution", only(*wheel))
    assert callable(load_faiss().knn)
