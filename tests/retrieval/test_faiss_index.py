"""Approximate indexes: what they find against exact search, what is refused, what is kept."""

import types
from importlib import metadata

import numpy as np
import pytest
import torch
from test_search import CPU, full_sort, make_store
from toy_world import lines, make_world, options

from torch_src.retrieval import faiss_index as module
from torch_src.retrieval.faiss_index import FaissSearch, IndexSettings, check_memory, estimate, load_faiss
from torch_src.retrieval.index_options import check_factory, check_search_params
from torch_src.runtime.errors import UserError

FACTORIES = ["Flat", "HNSW16", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4fs,Refine(SQfp16)"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """3,000 vectors in 8 clusters on disk, and 20 queries near them."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(8, 32)) * 3
    vectors = (centres[draw.integers(8, size=3000)] + draw.normal(size=(3000, 32))).astype(np.float16)
    queries = (centres[draw.integers(8, size=20)] + draw.normal(size=(20, 32))).astype(np.float32)
    return make_store(tmp_path_factory.mktemp("ann"), vectors, 700), vectors, queries


def open_index(world, path, factory="IVF8,Flat", params="", stamp=None, **options) -> FaissSearch:
    return FaissSearch(world[0], IndexSettings(factory, params, 0.1, 1), path, stamp or {"a": 1}, **options)


@pytest.mark.parametrize("factory", FACTORIES)
def test_finds_most_of_the_exact_result_with_exact_scores(world, tmp_path, factory):
    store, vectors, queries = world
    params = {"IVF": "nprobe=8", "HNS": "efSearch=200", "Fla": ""}[factory[:3]]
    if "Refine" in factory:
        params += ",k_factor_rf=20"
    index = open_index(world, tmp_path / "i", factory, params)
    rows, scores = index.search(queries, 10)
    expected, expected_scores = full_sort(vectors, queries, 10)
    hits = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), expected.tolist(), strict=True)]
    assert sum(hits) >= (200 if factory in ("Flat", "IVF8,Flat") else 180)
    assert (np.diff(scores, axis=1) <= 0).all()
    if factory == "Flat":
        assert np.array_equal(rows, expected) and np.array_equal(scores, expected_scores)
    assert f"index {factory}: recall@10 " in index.recall(queries, 10, CPU, 7)


def test_fewer_than_topk_results_are_padded(world, tmp_path):
    store, _, queries = world
    index = open_index(world, tmp_path / "i", "IVF8,Flat", "nprobe=1")
    rows, scores = index.search(queries, 2500)
    assert (rows == -1).any() and (np.isneginf(scores) == (rows == -1)).all()
    for found in rows.tolist():
        real = [row for row in found if row >= 0]
        assert len(set(real)) == len(real) > 100 and found[: len(real)] == real


def test_the_index_is_reused_while_its_stamp_agrees(world, tmp_path, capsys):
    path = tmp_path / "para.index"
    first = open_index(world, path).search(world[2], 5)[0]
    made = path.stat().st_mtime_ns
    assert np.array_equal(open_index(world, path).search(world[2], 5)[0], first)
    assert path.stat().st_mtime_ns == made and "up to date" in capsys.readouterr().out
    open_index(world, path, factory="Flat")
    assert "factory: IVF8,Flat -> Flat" in capsys.readouterr().out
    open_index(world, path, factory="Flat", stamp={"a": 2})
    assert "a: 1 -> 2" in capsys.readouterr().out
    made = path.stat().st_mtime_ns
    open_index(world, path, factory="Flat", stamp={"a": 2}, force=True)
    assert path.stat().st_mtime_ns > made


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]])
def test_a_damaged_index_is_rebuilt(world, tmp_path, capsys, damage):
    path = tmp_path / "para.index"
    open_index(world, path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    open_index(world, path)
    assert "checksum mismatch" in capsys.readouterr().out
    assert path.read_bytes() == whole


def test_an_index_of_other_vectors_is_refused(world, tmp_path):
    path = tmp_path / "para.index"
    other = make_store(tmp_path / "other", world[1][:100], 50)
    FaissSearch(other, IndexSettings("Flat", "", 0.1, 1), path, {"a": 1}, force=True)
    with pytest.raises(UserError, match="has 100 vectors .*3,000"):
        open_index(world, path, factory="Flat")


def test_malformed_options_are_user_errors(world, tmp_path):
    with pytest.raises(UserError, match="--index IVF: not a faiss index"):
        open_index(world, tmp_path / "i", factory="IVF")
    with pytest.raises(UserError, match="--search_params nprobes=8"):
        open_index(world, tmp_path / "i", params="nprobe=2,nprobes=8")
    assert (tmp_path / "i").exists()


@pytest.mark.parametrize(("factory", "low", "high"), [("Flat", 128, 129), ("HNSW32", 128 + 256, 128 + 300)])
def test_memory_is_estimated(factory, low, high):
    assert low * 10**6 <= estimate(factory, 32, 10**6)[0] <= high * 10**6


def test_an_index_that_does_not_fit_is_refused_before_it_is_built(world, tmp_path, monkeypatch):
    check_memory("Flat", 89, lambda: 100)
    with pytest.raises(UserError, match="--index Flat: needs about"):
        check_memory("Flat", 91, lambda: 100)
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match="exact search needs no memory"):
        open_index(world, tmp_path / "i", factory="Flat")
    assert not (tmp_path / "i").exists()


def test_training_vectors_are_bounded_by_memory(world, tmp_path):
    index = open_index(world, tmp_path / "i", factory="Flat")
    index.settings.memory_gb = 100 * 8 * 32 / 1e9
    assert index._sample(module.new_index("IVF8,Flat", 32)).shape == (100, 32)
    index.settings.memory_gb = 1.0
    assert torch.from_numpy(index._sample(module.new_index("IVF8,Flat", 32))).shape == (3000, 32)


@pytest.mark.slow
def test_the_program_with_an_index(tmp_path, programs):
    world = make_world(tmp_path)
    words = [
        *options(world, tmp_path / "out"), "--topk", "10",
        "--dual_params", "none", "--pretrained_model_path", str(world / "model"),
    ]  # fmt: skip
    runs = []
    for more in ([], ["--index", "HNSW8", "--search_params", "efSearch=100"]):
        done = programs.run("do_dual_infer.py", [*words, *more], tmp_path / "log")
        assert done.returncode == 0, done.output()
        runs.append(lines(tmp_path / "out/res.top10"))
    assert "recall@10 1.0000" in done.output() and "index:" in done.output().split("out of date")[1]
    assert (tmp_path / "out/para.index").exists() and runs[0] == runs[1]


# ---- loading the library


def only(*installed):
    def distribution(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)

    return distribution


def test_an_empty_faiss_is_refused(monkeypatch):
    monkeypatch.setattr(module.metadata, "distribution", only("faiss-cpu"))
    monkeypatch.setattr(module, "import_module", lambda name: types.ModuleType(name))
    with pytest.raises(UserError, match="faiss.* empty.*pip uninstall -y faiss-cpu faiss-gpu"):
        load_faiss()


def test_both_wheels_are_refused(monkeypatch):
    monkeypatch.setattr(module.metadata, "distribution", only("faiss-cpu", "faiss-gpu"))
    with pytest.raises(UserError, match="both faiss-cpu and faiss-gpu are installed.*pip uninstall"):
        load_faiss()


@pytest.mark.parametrize("error", [ModuleNotFoundError, RuntimeError])  # the latter: without CUDA's libraries
def test_a_missing_faiss_is_a_user_error(monkeypatch, error):
    def fail(name):
        raise error(f"No module named {name!r}")

    monkeypatch.setattr(module.metadata, "distribution", only())
    monkeypatch.setattr(module, "import_module", fail)
    with pytest.raises(UserError, match="faiss cannot be imported.*No module named 'faiss'"):
        load_faiss()


@pytest.mark.parametrize("wheel", [(), ("faiss-cpu",), ("faiss-gpu",)])
def test_a_complete_faiss_is_returned(monkeypatch, wheel):
    monkeypatch.setattr(module.metadata, "distribution", only(*wheel))
    assert callable(load_faiss().knn)


@pytest.mark.parametrize(
    ("factory", "allowed"),
    [
        ("Flat", True), ("HNSW2", True), ("HNSW32_SQ8", True), ("IVF4096,PQ192x4fs,Refine(SQfp16)", True),
        ("OPQ16_64,IVF4,PQ16", True), ("IVF65536_HNSW32,SQfp16", True), ("PCAR64,HNSW32,Flat", True),
        ("HNSW1", False), ("HNSW0", False), ("HNSW-1", False), ("HNSW1_SQ8", False), ("HNSW1000000", False),
        ("IVF0,Flat", False), ("IVF16_HNSW1,Flat", False), ("IVF99999999999999999999,Flat", False),
        ("PQ0", False), ("PQ16x0", False), ("NSG32", False), ("RQ0x8", False), ("LSQ2x8", False),
        ("PCA0,Flat", False), ("IVF4,Flat,Refine(HNSW1)", False), ("IVF4,", False), ("nan", False),
    ],
)  # fmt: skip
def test_factories_that_faiss_does_not_survive_are_refused(factory, allowed):
    if allowed:
        return check_factory(factory)
    with pytest.raises(UserError, match="^--index "):
        check_factory(factory)


@pytest.mark.parametrize("name", ["nprobe", "efSearch", "k_factor_rf", "quantizer_efSearch"])
@pytest.mark.parametrize("value", ["0", "-1", "1e9", "nan", "inf", "", "10000000", "0.5"])
def test_search_parameters_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"^--search_params {name}={value}: expected"):
        check_search_params(f"nprobe=2,{name}={value}")


def test_what_faiss_raises_is_one_line(world, tmp_path):
    with pytest.raises(UserError, match="^--index PCA64,Flat: not possible"):  # vectors have fewer dimensions
        open_index(world, tmp_path / "i", factory="PCA64,Flat")
    with pytest.raises(UserError, match="^--index IVF5000,Flat: 5,000 lists"):
        open_index(world, tmp_path / "i", factory="IVF5000,Flat")
    assert not (tmp_path / "i").exists()
