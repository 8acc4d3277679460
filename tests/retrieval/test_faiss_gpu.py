"""A faiss index on GPUs, played by the CPU here; tests/gpu/test_gpu_faiss.py runs its checks on CUDA."""

import types

import faiss
import numpy as np
import pytest
import torch
from retrieval.test_search import full_sort, make_store
from toy_world import lines, make_world, options

from torch_src import dual_infer, inference_plan
from torch_src.retrieval import faiss_gpu, faiss_index
from torch_src.retrieval.faiss_gpu import IndexGpus
from torch_src.retrieval.faiss_index import FaissSearch, IndexSettings, index_gpus, inverted_lists, new_index
from torch_src.runtime.errors import UserError

OUT_OF_MEMORY = "alloc fail type FlatData size 9 bytes (cudaMalloc error out of memory [2])"
KINDS_ON_GPU = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)


def faiss_error(message: str) -> RuntimeError:
    return RuntimeError(
        f"Error in virtual faiss::Index* f(const g&) at /project/faiss/gpu/A.cu:253: {message}"
    )


class FakeFaiss:
    """faiss whose GPUs are the CPU: flat indexes in fp16, `capacity` vectors in all, faiss's errors."""

    def __init__(self, capacity: int = 10**9):
        self.capacity, self.temporary, self.devices = capacity, [], []

    def __getattr__(self, name: str):
        return getattr(faiss, name)

    def get_num_gpus(self) -> int:
        return 2

    def StandardGpuResources(self):  # noqa: N802
        return types.SimpleNamespace(setTempMemory=self.temporary.append, setPinnedMemory=lambda size: None)

    GpuClonerOptions = types.SimpleNamespace
    GpuParameterSpace = faiss.ParameterSpace

    def index_cpu_to_gpu(self, resources, device, index, options):
        inner = index
        while isinstance(inner, faiss.IndexPreTransform):
            inner = faiss.downcast_index(inner.index)
        if type(inner) is faiss.IndexFlat and options.useFloat16:
            clone = faiss.IndexScalarQuantizer(index.d, faiss.ScalarQuantizer.QT_fp16, index.metric_type)
        elif isinstance(inner, KINDS_ON_GPU):
            clone = faiss.clone_index(index)
        else:
            raise faiss_error("This index type is not implemented on GPU.")
        add = clone.add

        def limited_add(vectors):
            self.capacity -= len(vectors)
            if self.capacity < 0:
                raise faiss_error(f"StandardGpuResources: {OUT_OF_MEMORY}\n")
            add(vectors)

        clone.add = limited_add
        self.devices.append(device)
        return clone

    index_gpu_to_cpu = staticmethod(faiss.clone_index)


def fake_gpus(count: int = 1, capacity: int = 10**9, free: float = 1e9) -> IndexGpus:
    return IndexGpus(FakeFaiss(capacity), list(range(count)), lambda gpu: int(free), chunk_rows=256)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return clustered_world(tmp_path_factory.mktemp("ann"))


def clustered_world(folder):
    """Return 3,000 vectors in 8 clusters on disk, the vectors, and 20 queries near them."""
    draw = np.random.default_rng(0)
    centers = draw.normal(size=(8, 32)) * 3
    vectors = (centers[draw.integers(8, size=3000)] + draw.normal(size=(3000, 32))).astype(np.float16)
    queries = (centers[draw.integers(8, size=20)] + draw.normal(size=(20, 32))).astype(np.float32)
    return make_store(folder, vectors, 700), vectors, queries


def open_index(world, path, factory, gpus, params="nprobe=2", topk=10, **options) -> FaissSearch:
    params = params if "IVF" in factory else ""
    return FaissSearch(
        world[0], IndexSettings(factory, params, 0.1, 1, topk), path, {"a": 1}, gpus=gpus, **options
    )


def fraction_found(rows: np.ndarray, expected: np.ndarray) -> float:
    return float(
        np.mean([len(set(a) & set(b)) for a, b in zip(rows.tolist(), expected.tolist(), strict=True)]) / 10
    )


def is_on_gpus(index: FaissSearch) -> bool:
    return isinstance(index.index, faiss_gpu.GpuIndex)


# ---- the checks that run on CUDA, too


def check_flat(world, gpus: IndexGpus, path) -> FaissSearch:
    """A flat index in fp16 finds the exact result, to rounding, and its file has no vectors."""
    index = open_index(world, path, "Flat", gpus)
    rows, scores = index.search(world[2], 10)
    expected, expected_scores = full_sort(world[1], world[2], 10)
    assert is_on_gpus(index) and fraction_found(rows, expected) >= 0.99
    same = rows == expected
    assert np.array_equal(scores[same], expected_scores[same]) and (rows >= 0).all()
    assert faiss.read_index(str(path)).ntotal == 0
    again = open_index(world, path, "Flat", gpus).search(world[2], 10)
    assert np.array_equal(again[0], rows) and np.array_equal(again[1], scores)
    return index


def check_lists(world, factory: str, gpus: IndexGpus, folder, slack: float = 0.02) -> FaissSearch:
    """An index of inverted lists finds what the CPU's finds, but for a fraction of `slack`.

    Its file serves both, and later runs.
    """
    expected, _ = full_sort(world[1], world[2], 10)
    on_cpu = open_index(world, folder / "cpu", factory, None)
    path = folder / "gpu"
    index = open_index(world, path, factory, gpus)
    rows, scores = index.search(world[2], 10)
    assert is_on_gpus(index) and not is_on_gpus(on_cpu)
    assert fraction_found(rows, expected) >= fraction_found(on_cpu.search(world[2], 10)[0], expected) - slack
    assert (np.diff(scores, axis=1) <= 0).all()
    saved = faiss.read_index(str(path))
    assert saved.ntotal == len(world[1]) and faiss.extract_index_ivf(saved).nprobe == 1
    made = path.stat().st_mtime_ns
    for where in (gpus, None):
        reloaded = open_index(world, path, factory, where)
        assert fraction_found(reloaded.search(world[2], 10)[0], rows) >= 1 - slack
    assert path.stat().st_mtime_ns == made
    return index


def check_falls_back(world, factory: str, params: str, topk: int, gpus: IndexGpus, path) -> None:
    """An index or a search that GPUs do not support is on the CPU."""
    index = open_index(world, path, factory, gpus, params, topk)
    same = open_index(world, path, factory, None, params, topk)
    assert not is_on_gpus(index)
    assert np.array_equal(index.search(world[2], 10)[0], same.search(world[2], 10)[0])


FALLBACKS = [
    ("HNSW8", "", 10, "not implemented on GPU"),
    ("IVF8,PQ2x4fs,Refine(SQfp16)", "nprobe=2", 10, "not implemented on GPU"),
    ("IVF8,Flat", "max_codes=99", 10, "max_codes"), ("IVF8,Flat", "nprobe=2049", 10, "nprobe=2049"),
    ("Flat", "", 2049, "topk 2,049"),
]  # fmt: skip


# ---- on the CPU


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_flat_index_in_shards_finds_the_exact_result(world, tmp_path, monkeypatch, count):
    monkeypatch.setattr(faiss_gpu, "FLAT_SHARD_BYTES", 500 * 64)
    gpus = fake_gpus(count)
    index = check_flat(world, gpus, tmp_path / "i")
    sizes = [shard.ntotal for shard in index.index.shards]
    assert sizes == [512] * 5 + [440]
    per_gpu = 6 // count
    assert gpus.faiss.devices[-6:] == [shard // per_gpu for shard in range(6)]
    assert np.array_equal(index.search(world[2], 10)[0], full_sort(world[1], world[2], 10)[0])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("factory", ["IVF8,Flat", "PCA16,IVF8,SQ8"])
def test_inverted_lists_find_what_the_cpu_finds(world, tmp_path, count, factory):
    index = check_lists(world, factory, fake_gpus(count), tmp_path)
    assert len(index.index.shards) == count


def test_training_uses_the_gpu_and_frees_it(monkeypatch):
    gpus, clones = fake_gpus(), []
    clone = gpus.faiss.index_cpu_to_gpu

    def kept(*arguments):
        clones.append(clone(*arguments))
        return clones[-1]

    gpus.faiss.index_cpu_to_gpu = kept
    index = new_index("IVF8,PQ8x4fs,Refine(SQfp16)", 32)  # trained on a GPU, then searched on the CPU
    gpus.train(index, np.random.default_rng(0).standard_normal((512, 32), dtype=np.float32))
    assert index.is_trained and inverted_lists(index) == 8 and len(clones) == 1
    assert clones[0].ntotal == 8 and clones[0].thisown and isinstance(clones[0], faiss.IndexFlat)
    assert faiss.extract_index_ivf(index).clustering_index is None


@pytest.mark.parametrize(("factory", "params", "topk", "reason"), FALLBACKS)
def test_what_gpus_do_not_support_is_on_the_cpu(world, tmp_path, capsys, factory, params, topk, reason):
    check_falls_back(world, factory, params, topk, fake_gpus(), tmp_path / "i")
    printed = capsys.readouterr()
    assert f"index {factory}: on the CPU ({reason}" in printed.out.replace("This index type is ", "")
    assert "WARNING" not in printed.err


def test_an_index_too_large_for_the_gpus_is_on_the_cpu(world, tmp_path, capsys, monkeypatch):
    gpus = fake_gpus(2, free=1e5)
    index = open_index(world, tmp_path / "i", "Flat", gpus)
    assert not is_on_gpus(index) and "WARNING index Flat: on the CPU (needs about" in capsys.readouterr().err
    assert faiss.read_index(str(tmp_path / "i")).ntotal == 3000
    monkeypatch.setattr(faiss_index, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match="--index Flat: needs about"):
        open_index(world, tmp_path / "i", "Flat", gpus, force=True)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQfp16"])
@pytest.mark.parametrize("is_saved", [False, True])
def test_out_of_memory_while_filling_falls_back_to_the_cpu(world, tmp_path, capsys, factory, is_saved):
    if is_saved:
        open_index(world, tmp_path / "i", factory, fake_gpus())
    index = open_index(world, tmp_path / "i", factory, fake_gpus(capacity=2000))
    assert not is_on_gpus(index) and "cudaMalloc error out of memory" in capsys.readouterr().err
    assert faiss.read_index(str(tmp_path / "i")).ntotal == 3000
    other = open_index(world, tmp_path / "i", factory, None)
    assert np.array_equal(index.search(world[2], 10)[0], other.search(world[2], 10)[0])


def test_other_errors_of_a_gpu_end_the_run(world, tmp_path):
    def broken(*_):
        raise faiss_error("Error: 'a == b' failed: broken")

    gpus = fake_gpus()
    gpus.fill = broken
    with pytest.raises(UserError, match=r"^--index Flat: not possible .*\('a == b' failed: broken\)"):
        open_index(world, tmp_path / "i", "Flat", gpus)
    assert not (tmp_path / "i").exists()
    gpus = fake_gpus()
    gpus.train = broken
    with pytest.raises(UserError, match="^--index IVF8,Flat: cannot be trained"):
        open_index(world, tmp_path / "i", "IVF8,Flat", gpus)


def test_training_without_gpu_memory_is_on_the_cpu(world, tmp_path, capsys):
    def full(*_):
        raise faiss_error(OUT_OF_MEMORY)

    gpus = fake_gpus()
    gpus.train = full
    assert is_on_gpus(open_index(world, tmp_path / "i", "IVF8,Flat", gpus))
    assert "training on the CPU" in capsys.readouterr().err


def test_a_file_without_vectors_gets_them_from_the_blocks(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(faiss_index, "free_memory", lambda: 1000)
    path = tmp_path / "i"
    rows = open_index(world, path, "IVF8,SQ8", fake_gpus()).search(world[2], 10)[0]
    assert "without vectors" in capsys.readouterr().out and faiss.read_index(str(path)).ntotal == 0
    trained = path.read_bytes()
    monkeypatch.undo()
    for how in ({"gpus": fake_gpus()}, {"gpus": fake_gpus(), "build": False}, {"gpus": None, "build": False}):
        again = open_index(world, path, "IVF8,SQ8", **how)
        assert np.array_equal(again.search(world[2], 10)[0], rows) and path.read_bytes() == trained
    assert np.array_equal(open_index(world, path, "IVF8,SQ8", None).search(world[2], 10)[0], rows)
    assert faiss.read_index(str(path)).ntotal == 3000


def test_memory_of_a_gpu(monkeypatch):
    gpus = fake_gpus(2, free=1.6e9)
    gpus.chunk_rows, temporary = 1000, 10**8  # a sixteenth of the free memory
    flat, lists = new_index("Flat", 32), new_index("IVF8,SQ8", 32)
    assert gpus.bytes_needed(flat, 10**6) == 500_000 * 64 * 2 + temporary  # one shard, which moves
    monkeypatch.setattr(faiss_gpu, "FLAT_SHARD_BYTES", 100_000 * 64)
    assert gpus.bytes_needed(flat, 10**6) == 500_000 * 64 + 100_000 * 64 + temporary
    assert gpus.bytes_needed(lists, 10**6) == (500_000 + 16 * 8) * 1.5 * (32 + 8) + 8 * 32 * 4 + temporary
    assert (gpus.saved_bytes(flat, 10**6), gpus.saved_bytes(lists, 10**6)) == (0, 40 * 10**6)
    gpus.free_bytes = lambda gpu: (64 << 30, 48 << 30)[gpu]
    gpus.fill(flat, 4, [(0, np.zeros((4, 32), np.float16))])
    assert gpus.faiss.temporary == [3 << 29] * 2
    gpus.spare_bytes = int(0.8 * (48 << 30))
    assert gpus.memory_reason(flat, 10**6) == "" and "needs about 33.6 GB" in gpus.memory_reason(flat, 10**9)


def test_which_gpus(monkeypatch, capsys):
    cuda = [torch.device("cuda", 1), torch.device("cuda", 2)]
    assert index_gpus([torch.device("cpu")]) is None
    assert index_gpus(cuda) is None and "faiss finds no GPU" in capsys.readouterr().out  # the CPU's faiss
    monkeypatch.setattr(faiss_index, "load_faiss", FakeFaiss)
    gpus = index_gpus(cuda, spare_gb=2)
    assert gpus is not None and gpus.devices == [1, 2] and gpus.spare_bytes == 2 * 10**9


def test_the_plan_counts_the_memory_of_an_index_on_a_gpu(monkeypatch):
    monkeypatch.setattr(inference_plan, "_plan_encoding", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(inference_plan, "memory_gb", lambda device: (1.0, 0.25))
    monkeypatch.setattr(inference_plan, "_stores_on_disk", lambda *_: [])
    hp = types.SimpleNamespace(index="IVF8,SQ8", recall_queries=0, device="cpu", passage_windows=1)
    retriever = types.SimpleNamespace(hp=hp, width=32, collection=range(10**7), device=torch.device("cpu"))
    plan = inference_plan.plan_retrieval(retriever, 5, 10, 10, fake_gpus(free=16e9))
    assert plan.gpu_gb == pytest.approx(0.25 + 0.6 + 1.0, abs=0.001)  # exact search, lists, temporary memory
    assert plan.ram_gb == pytest.approx(1.25)
    assert plan.disk_gb == pytest.approx(1e7 * (64 + 16 + 8 + 40) / 1e9)
    assert not plan.parts


def test_the_program_on_gpus(tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path)
    words = [
        *options(world, tmp_path / "out"), "--topk", "10",
        "--dual_params", "none", "--pretrained_model_path", str(world / "model"),
    ]  # fmt: skip
    assert dual_infer.main(words) == 0
    exact = lines(tmp_path / "out/res.top10")
    gpus = fake_gpus()
    monkeypatch.setattr(dual_infer, "index_gpus", lambda devices, spare_gb: gpus)
    for index in (["--index", "IVF2,Flat", "--search_params", "nprobe=2"], ["--index", "Flat"]):
        assert dual_infer.main([*words, *index]) == 0
        assert lines(tmp_path / "out/res.top10") == exact
    printed = capsys.readouterr()
    assert "recall@10 1.0000" in printed.out and printed.out.count(" on 1 GPU: ") == 2
    assert "para.index: out of date" in printed.out and "WARNING index" not in printed.err
    (tmp_path / "out/para.index").unlink()
    gpus.free_bytes = lambda gpu: 1
    assert (
        dual_infer.main([*words, "--index", "Flat", "--topk", "5"]) == 0
    )  # checks it before it encodes, too
    assert capsys.readouterr().err.count("index Flat: on the CPU (needs about") == 1
