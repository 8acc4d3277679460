"""Search on Milvus: options, refused inputs, killed loads, requests and the order of results.

The tests at the end run against the real Milvus Lite, in its own environment (docs/tools.md).
"""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_search import full_sort, make_store
from toy_world import lines, make_world, options

from torch_src import hparams
from torch_src.dual_infer import DualInference
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.retrieval.encoding import text_hashes
from torch_src.retrieval.engines import milvus as milvus_engine
from torch_src.retrieval.engines.milvus import Collection, MilvusSearch, fill
from torch_src.retrieval.engines.milvus_options import check_index, check_milvus_file, parse_params
from torch_src.retrieval.vectors import TEXT_HASH, VectorStore
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import write_json
from torch_src.runtime.stamps import checksum_text

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 64
LOAD = "python script/milvus_load.py --output_dir O"


def infer(*argv):
    return hparams.parse(InferenceDeHparams, list(argv))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """300 vectors on disk in blocks of 64, every third one of them the same, and 9 queries."""
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(300, 16)).astype(np.float16)
    vectors[::3] = vectors[0]
    store = make_store(tmp_path_factory.mktemp("milvus"), vectors, BLOCK)
    queries = draw.normal(size=(9, 16)).astype(np.float32)
    queries[0] = vectors[0]  # its best 100 are tied
    return store, vectors, queries


class FakeFailure(Exception):
    """What the client of FakeMilvus raises."""


class FakeMilvus:
    """A client with one collection, a dictionary; fails after `lives` writes, returns at most `most` hits."""

    def __init__(self, manifest=None, index="FLAT", lives=10**9, noise=0.0, most=10**9):
        self.rows, self.lives, self.noise, self.writes = {}, lives, noise, []
        self.most = most
        self.properties = {milvus_engine.INDEX: index} if index else {}
        if manifest is not None:
            self.properties[milvus_engine.STAMP] = json.dumps({"manifest": manifest, "pids": "none"})
        self.depths = []

    def has_collection(self, name):
        return bool(self.properties)

    def describe_collection(self, name):
        return {"properties": self.properties}

    def load_collection(self, name):
        pass

    def upsert(self, name, entries):
        if not self.lives:
            raise KeyboardInterrupt
        self.lives -= 1
        self.writes.append(entries[0]["row"])
        self.rows.update((entry["row"], entry) for entry in entries)

    def query(self, name, filter, output_fields):
        first, last = map(int, re.findall(r"\d+", filter)) if filter else (0, 10**9)
        return [{"count(*)": sum(first <= row < last for row in self.rows)}]

    def search(self, name, data, limit, **_):
        """Return hits whose scores are off by up to `noise`; ties come in random order."""
        if len(data[0]) != 16:
            raise FakeFailure("vector dimension\n mismatch, user:geheim")
        self.depths.append(limit)
        rows = np.array(sorted(self.rows))
        vectors = np.array([self.rows[row]["vector"] for row in rows.tolist()])
        draw, answer = np.random.default_rng(1), []
        for query in data:
            scores = vectors @ query + draw.uniform(-self.noise, self.noise, len(rows))
            best = np.lexsort((draw.permutation(len(rows)), -scores))[: min(limit, self.most)]
            answer.append(FakeHits(rows[best].tolist(), scores[best].tolist()))
        return answer


class FakeHits(list):
    def __init__(self, ids, distances):
        super().__init__(ids)
        self.ids, self.distances = ids, distances


@pytest.fixture
def use(monkeypatch):
    """Return use(client), which makes every connection return this client."""

    def use(client):
        monkeypatch.setattr(milvus_engine, "connect", lambda uri: (client, (FakeFailure,)))
        return client

    return use


def filled(world, **options) -> FakeMilvus:
    client = FakeMilvus(world[0].manifest, **options)
    for row, vector in enumerate(world[1].astype(np.float32)):
        client.rows[row] = {"row": row, "vector": vector}
    return client


def open_search(world, uri="http://h:1", params="", folder=None) -> MilvusSearch:
    folder = folder or world[0].folder
    return MilvusSearch(uri, "passages", world[0].manifest, folder, params, LOAD)


def test_the_knobs_of_milvus():
    hp = infer("--engine", "milvus", "--output_dir", "O", "--search_params", "ef=100")
    assert (hp.milvus_uri_path, hp.milvus_collection) == ("O/milvus.db", "passages")
    assert infer("--engine", "milvus", "--milvus_uri", "https://h:1").milvus_uri_path == "https://h:1"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--engine faiss", "--engine faiss: expected one of exact, milvus"),
        ("--engine milvus --index Flat", "--index"),
        ("--engine milvus --plan", "--plan"),
        ("--milvus_uri x.db", "require --engine milvus"),
        ("--milvus_collection x", "require --engine milvus"),
        ("--search_params ef=1", "or --engine milvus"),
        ("--engine milvus --milvus_uri milvus", "--milvus_uri: expected NAME.db"),
        ("--engine milvus --milvus_uri ftp://h:1", "expected NAME.db or http"),
        ("--engine milvus --milvus_uri http://h:port", "expected NAME.db or http"),
        ("--engine milvus --milvus_uri http://", "expected NAME.db or http"),
        ("--engine milvus --milvus_uri http://h:1/db", "without a path or a query"),
    ],
)
def test_contradicting_options_are_refused(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        infer(*argv.split())


@pytest.mark.parametrize(
    "uri, message",
    [
        ("http://root:geheim@h:19530", "MILVUS_TOKEN"),
        ("root:geheim@h:19530", "MILVUS_TOKEN"),
        ("root:geheim@h:19530/x.db", "MILVUS_TOKEN"),
        ("geheim@h", "MILVUS_TOKEN"),
        ("http://root:geheim", "expected NAME.db"),
        ("https://root:geheim%40h:19530", "expected NAME.db"),
        ("http://h:19530?token=geheim", "expected NAME.db"),
        ("http://h:19530#geheim", "expected NAME.db"),
        ("http://h:19530/geheim", "expected NAME.db"),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_printed(uri, message):
    with pytest.raises(UserError, match=message) as refused:
        infer("--engine", "milvus", "--milvus_uri", uri)
    assert "geheim" not in str(refused.value)


def test_a_file_and_a_server_are_accepted():
    for uri in ("x.db", "me@home/x.db", "http://h:19530/", "https://h"):
        assert infer("--engine", "milvus", "--milvus_uri", uri).milvus_uri_path == uri


def test_parameters_that_look_like_numbers_are_numbers():
    assert parse_params("x", "M=32,ratio=0.5,metric=a,low=-1") == dict(M=32, ratio=0.5, metric="a", low=-1)
    for bad in ("M", "M=", "=3", "M=1,x"):
        with pytest.raises(UserError, match=f"--x {bad}: expected name=value"):
            parse_params("x", bad)


@pytest.mark.parametrize("missing", ["pymilvus", "milvus_lite"])
def test_without_the_package_the_requirements_file_is_named(monkeypatch, tmp_path, missing):
    for name in ("grpc", "pymilvus", "milvus_lite"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    with pytest.raises(UserError, match=f"{missing} is not installed.*requirements-milvus.txt"):
        milvus_engine.connect(str(tmp_path / "x.db"))


@pytest.mark.parametrize("lives", [0, 1, 2, 4])
def test_a_killed_load_resumes_at_its_block(world, use, monkeypatch, lives):
    monkeypatch.setattr(milvus_engine, "BATCH_BYTES", 40 * 4 * 16)  # 40 rows a write, two writes a block
    client = use(FakeMilvus(world[0].manifest, lives=lives))
    with pytest.raises(KeyboardInterrupt):
        list(fill(Collection("http://h:1", "passages"), world[0], None))
    client.lives, client.writes = 10**9, []
    done = list(fill(Collection("http://h:1", "passages"), world[0], None))
    assert client.writes[0] == done[0][0] == lives // 2 * BLOCK and done[-1][1] == 300
    assert sorted(client.rows) == list(range(300))
    assert np.array_equal([client.rows[row]["vector"] for row in range(300)], world[1].astype(np.float32))
    assert list(fill(Collection("http://h:1", "passages"), world[0], None)) == []


def test_rows_that_a_server_lost_are_rewritten(world, use):
    client = use(filled(world))
    del client.rows[70]
    pids = np.array([f"p{row}".encode() for row in range(300)])
    assert len(list(fill(Collection("http://h:1", "passages"), world[0], pids))) == 5
    assert client.rows[70]["pid"] == "p70" and len(client.rows) == 300
    forgetful = use(FakeMilvus(world[0].manifest))
    forgetful.upsert = lambda name, entries: None
    with pytest.raises(UserError, match="has 0 rows .*300"):
        list(fill(Collection("http://h:1", "passages"), world[0], None))


def test_a_damaged_block_is_neither_loaded_nor_used_for_scores(world, use, tmp_path):
    store = make_store(tmp_path, world[1], BLOCK)
    path = store.block_path(1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    client = use(FakeMilvus(store.manifest))
    with pytest.raises(UserError, match="block-00001.npy: checksum mismatch"):
        list(fill(Collection("http://h:1", "passages"), store, None))
    assert sorted(client.rows) == list(range(BLOCK))
    use(filled((store, world[1], None)))
    with pytest.raises(UserError, match="block-00001.npy: checksum mismatch"):
        open_search((store, world[1], None)).check_blocks()


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("topk", [1, 5, 40, 99, 300, 1000])
def test_a_flat_index_gives_the_exact_result_despite_ties(world, use, topk, noise):
    use(filled(world, noise=noise))
    rows, scores = open_search(world).search(world[2], topk)
    expected = full_sort(world[1], world[2], topk)
    assert np.array_equal(rows, expected[0]) and np.array_equal(scores, expected[1])


def test_more_hits_are_requested_only_for_queries_that_need_them(world, use):
    client = use(filled(world))
    open_search(world).search(world[2][1:], 5)
    assert client.depths == [10]
    client.depths.clear()
    open_search(world).search(world[2], 5)
    assert client.depths == [10, 40, 160]


def test_a_warning_when_ties_exceed_the_hit_limit(world, use, monkeypatch, capsys):
    monkeypatch.setattr(milvus_engine, "MAX_HITS", 20)
    use(filled(world))
    open_search(world).search(world[2], 5)
    assert "WARNING 1 queries: the maximum of 20 hits" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("topk", [5, 1000])
def test_too_few_hits_of_a_flat_index_are_an_error(world, use, tmp_path, blocks, topk):
    use(filled(world, most=4))
    search = open_search(world, folder=None if blocks else tmp_path)
    with pytest.raises(UserError, match="collection passages: Milvus returned too few hits"):
        search.search(world[2], topk)
    use(filled(world, most=4, index="HNSW M=8"))  # may find fewer
    search = open_search(world, folder=None if blocks else tmp_path)
    assert (search.search(world[2], topk)[0][:, 4:] == -1).all()


def test_topk_hits_are_requested_from_an_approximate_index(world, use):
    client = use(filled(world, index="HNSW M=8"))
    open_search(world, params="ef=50").search(world[2], 5)
    assert client.depths == [5]


def test_without_blocks_the_scores_are_those_of_milvus(world, use, tmp_path, capsys):
    client = use(filled(world))
    search = open_search(world, folder=tmp_path)
    search.check_blocks()
    assert search.scores == "those of Milvus" and open_search(world).scores == "exact"
    rows, scores = search.search(world[2], 5)
    assert "WARNING" in capsys.readouterr().err and client.depths == [5]
    assert np.array_equal(rows[1:], full_sort(world[1], world[2], 5)[0][1:])
    assert np.allclose(scores, full_sort(world[1], world[2], 5)[1], atol=1e-5)


def test_missing_incomplete_or_different_vectors_are_refused(world, use, tmp_path):
    manifest = world[0].manifest
    refused = [
        (FakeMilvus(None, index=""), "no such collection; load the vectors first"),
        (FakeMilvus(None, index="FLAT"), "not created by script/milvus_load.py"),
        (
            FakeMilvus({**manifest, "weights": "other"}),
            "other vectors .weights: other -> missing.; load these",
        ),
        (FakeMilvus(manifest, index=""), "0 of 300 rows can be searched; load the rest"),
        (FakeMilvus(manifest), "0 of 300 rows can be searched; load the rest"),
    ]
    for client, message in refused:
        use(client)
        with pytest.raises(UserError, match=f"http://h:1, collection passages: {message}"):
            open_search(world)
    with pytest.raises(UserError, match="x.db: no such file; load .*milvus_load.py --output_dir O"):
        open_search(world, str(tmp_path / "x.db"))
    assert not (tmp_path / "x.db").exists()


def test_missing_rows_are_added_to_the_present_index(world, use):
    params = "M=16,efConstruction=100"
    for index, words in (("FLAT", "FLAT"), (f"HNSW {params}", f"HNSW --milvus_params {params}")):
        use(FakeMilvus(world[0].manifest, index=index))
        with pytest.raises(UserError, match=f"load the rest: {LOAD} --milvus_index {words}$"):
            open_search(world)


def open_inference(folder, *more) -> DualInference:
    """Return an inference on the tiny world in `folder`, made when it is not there."""
    if not (folder / "data").exists():
        make_world(folder)
    words = [*options(folder, folder / "out"), "--dual_params", "none", "--device", "cpu"]
    words += ["--pretrained_model_path", str(folder / "model"), *more]
    return DualInference(infer(*words), 5, 10)


ON_SERVER = ("--engine", "milvus", "--milvus_uri", "http://h:1")


def test_vectors_of_another_device_and_block_size_are_searched(use, tmp_path):
    other = dict(device="cuda", precision="bf16", block_rows=7)
    manifest = {**open_inference(tmp_path).passage_manifest, **other}
    store = VectorStore(tmp_path / "out/para_emb", manifest)
    client = use(FakeMilvus(manifest))
    client.rows = {row: {"row": row} for row in range(store.rows)}
    inference = open_inference(tmp_path, *ON_SERVER)
    assert inference.milvus.store is None
    write_json(store.manifest_path, manifest)
    for block in range(store.block_count):
        first, last = store.block_range(block)
        hashes = np.zeros((last - first, 16), np.uint8)
        store.write_block(block, np.zeros((last - first, store.hidden), np.float16), hashes=hashes)
    inference = open_inference(tmp_path, *ON_SERVER)
    assert inference.milvus.store.manifest["device"] == "cuda"  # of the blocks that were loaded
    stamp = inference.run_stamp()
    assert (stamp["passage device"], stamp["passage precision"], stamp["block_rows"]) == ("cuda", "bf16", 7)
    assert (stamp["query device"], stamp["query precision"]) == ("cpu", "fp32")
    use(FakeMilvus({**manifest, "weights": "other"}))
    with pytest.raises(UserError, match=r"other vectors \(weights: other -> \w+\); load these"):
        open_inference(tmp_path, *ON_SERVER)


@pytest.mark.parametrize("ids", ["given", "beside", "none"])
def test_the_command_in_the_error_loads_these_vectors(use, tmp_path, monkeypatch, ids):
    folder = make_world(tmp_path / "a b; c")
    index = "HNSW M=16,efConstruction=100"
    use(FakeMilvus(open_inference(folder).passage_manifest, index=index))
    passages = folder / "data/passage-collection"
    path = {"given": "my ids.json", "beside": f"{passages}/passage2id.map.json", "none": "none"}[ids]
    more = ("--passage_dir", str(passages)) if ids == "beside" else ("--passage_ids", path)
    with pytest.raises(UserError, match="load the rest: .* script/milvus_load.py") as refused:
        open_inference(folder, *ON_SERVER, *more)
    seen, loader = [], runpy.run_path(str(ROOT / "script/milvus_load.py"))
    monkeypatch.setitem(loader["main"].__globals__, "run", seen.append)
    assert loader["main"](shlex.split(str(refused.value).split("load the rest: ")[1])[2:]) == 0
    assert (seen[0].output_dir, seen[0].data_dir) == (str(folder / "out"), str(folder / "data"))
    assert (seen[0].milvus_index, seen[0].milvus_params) == tuple(index.split())
    assert (seen[0].passage_ids, seen[0].milvus_uri) == (path, "http://h:1")


def test_a_failure_is_one_line_without_credentials(world, use, monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "user:geheim")
    use(filled(world))
    with pytest.raises(UserError) as failed:
        Collection("http://h:1", "passages").search(world[2][:, :3], 5, {})
    assert str(failed.value) == (
        "http://h:1, collection passages: search failed (vector dimension mismatch, ***)"
    )


def test_blocks_of_other_vectors_are_not_used(world, tmp_path):
    store, vectors, _ = world
    assert VectorStore.where_complete(store.folder, store.manifest).rows == 300
    assert VectorStore.where_complete(store.folder, {**store.manifest, "weights": "other"}) is None
    assert VectorStore.where_complete(tmp_path / "none", store.manifest) is None
    assert not (tmp_path / "none").exists()


# The tests below use the real Milvus Lite.


@pytest.fixture
def lite(tmp_path):
    """Return the path of a file of Milvus Lite, which is closed at the end."""
    path = str(tmp_path / "milvus.db")
    yield path
    release(path)


def release(path: str) -> None:
    from milvus_lite.server_manager import server_manager_instance
    from pymilvus.client.connection_manager import ConnectionManager

    ConnectionManager.get_instance().close_all()
    server_manager_instance.release_server(path)


def load(folder, *more) -> int:
    """Run script/milvus_load.py in this process; return its exit status."""
    main = runpy.run_path(str(ROOT / "script/milvus_load.py"))["main"]
    return main(["--output_dir", str(folder), "--para_emb", str(folder), "--passage_ids", "none", *more])


@pytest.mark.milvus
def test_the_real_flat_index_gives_the_exact_result(world, lite, capsys):
    assert load(world[0].folder, "--milvus_uri", lite) == 0
    assert "300 passages, index FLAT in " in capsys.readouterr().out
    for topk in (1, 7, 120, 1000):
        rows, scores = open_search(world, lite).search(world[2], topk)
        expected = full_sort(world[1], world[2], topk)
        assert np.array_equal(rows, expected[0]) and np.array_equal(scores, expected[1])
    assert load(world[0].folder, "--milvus_uri", lite) == 0
    assert "index FLAT, up to date" in capsys.readouterr().out


@pytest.mark.milvus
def test_pids_are_stored_with_their_rows(world, lite, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({str(row): f"段落{row}" for row in range(300)}), encoding="utf-8")
    assert load(world[0].folder, "--milvus_uri", lite, "--passage_ids", str(ids)) == 0
    collection = Collection(lite, "passages")
    found = collection.call("query", filter="row in [7, 299]", output_fields=["row", "pid"])
    assert {entry["row"]: entry["pid"] for entry in found} == {7: "段落7", 299: "段落299"}


@pytest.mark.milvus
def test_another_index_replaces_the_old_one_without_a_new_load(tmp_path, lite, capsys):
    vectors = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float16)
    queries = np.random.default_rng(1).normal(size=(20, 16)).astype(np.float32)
    world = (make_store(tmp_path / "vectors", vectors, 100), vectors, queries)
    given = (world[0].folder, "--milvus_uri", lite)
    load(*given)
    assert load(*given, "--milvus_index", "HNSW", "--milvus_params", "M=16,efConstruction=100") == 0
    output = capsys.readouterr().out.split("index FLAT in ")[1]
    assert "rebuilding the index (FLAT -> HNSW M=16,efConstruction=100)" in output and "up to date" in output
    search = open_search(world, lite, "ef=200")
    assert search.index == "HNSW M=16,efConstruction=100"
    described = search.collection.call("describe_index", milvus_engine.INDEX_NAME)
    assert (described["params"]["M"], described["params"]["efConstruction"]) == (16, 100)
    expected = full_sort(vectors, queries, 10)[1]
    assert (search.search(queries, 10)[1] == expected).mean() > 0.9
    for wrong in (
        ["NOSUCH"],
        ["IVF_PQ"],
        ["HNSW", "M=1"],
        ["HNSW", "M=nan"],
        ["HNSW", "nlist=4"],
        ["IVF_FLAT", "nlist=0"],
    ):
        words = [
            word for pair in zip(("--milvus_index", "--milvus_params"), wrong, strict=False) for word in pair
        ]
        capsys.readouterr()
        assert load(*given, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert wrong[-1] in line
    assert open_search(world, lite).index == "HNSW M=16,efConstruction=100"  # refused before it was dropped
    assert load(*given) == 0
    assert np.array_equal(open_search(world, lite).search(queries, 10)[1], expected)


@pytest.mark.milvus
def test_other_vectors_replace_the_old_ones_in_a_file(world, lite, tmp_path, capsys):
    load(world[0].folder, "--milvus_uri", lite)
    other = make_store(tmp_path / "other", world[1][:100] + np.float16(1), 50)
    with pytest.raises(UserError, match="other vectors .rows: 300 -> 100"):
        open_search((other, None, None), lite)
    assert load(other.folder, "--milvus_uri", lite) == 0
    assert "reloading (rows: 300 -> 100; block_rows: 64 -> 50)" in capsys.readouterr().out
    rows, scores = open_search((other, None, None), lite).search(world[2], 9)
    expected = full_sort(world[1][:100] + np.float16(1), world[2], 9)
    assert np.array_equal(rows, expected[0]) and np.array_equal(scores, expected[1])


@pytest.mark.milvus
def test_a_server_keeps_other_vectors_without_force(world, tmp_path, capsys):
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, database, port = start_server_in_thread(str(tmp_path / "data"), "127.0.0.1", 0)
    uri = f"http://127.0.0.1:{port}"
    try:
        other = make_store(tmp_path / "other", world[1][:100], 50)
        assert load(other.folder, "--milvus_uri", uri) == 0
        assert load(world[0].folder, "--milvus_uri", uri) == 2
        assert "contains other vectors (rows: 100 -> 300; block_rows: 50 -> 64)" in capsys.readouterr().err
        assert load(world[0].folder, "--milvus_uri", uri, "--force") == 0
        rows, _ = open_search(world, uri).search(world[2], 20)
        assert np.array_equal(rows, full_sort(world[1], world[2], 20)[0])
        client = Collection(uri, "foreign").client
        client.create_collection("foreign", dimension=4)
        assert load(world[0].folder, "--milvus_uri", uri, "--milvus_collection", "foreign", "--force") == 2
        assert "foreign: not created by this program" in capsys.readouterr().err
        client.close()
    finally:
        server.stop(grace=0)
        database.close()


@pytest.mark.milvus
def test_an_old_server_is_refused(lite, monkeypatch):
    import pymilvus

    monkeypatch.setattr(pymilvus.MilvusClient, "get_server_version", lambda self, **_: "v2.2.9")
    with pytest.raises(UserError, match="milvus.db: Milvus v2.2.9 is too old .*2.4"):
        Collection(lite, "passages")


@pytest.mark.milvus
def test_a_server_without_the_methods_is_one_line():
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(UserError, match="no connection to Milvus .*UNIMPLEMENTED") as failed:
            Collection(f"http://127.0.0.1:{port}", "passages")
        assert "\n" not in str(failed.value)
    finally:
        server.stop(0)


@pytest.mark.milvus
def test_no_server(monkeypatch, capfd):
    monkeypatch.setattr(milvus_engine, "CONNECT_SECONDS", 1.0)
    with pytest.raises(UserError, match="http://127.0.0.1:1: no connection to Milvus"):
        Collection("http://127.0.0.1:1", "passages")
    assert "Traceback" not in capfd.readouterr().err


def hashed_store(folder, texts: list[str], weights="a") -> tuple[VectorStore, np.ndarray, np.ndarray]:
    """Return (vectors on disk with the hashes of these texts, the vectors, 9 queries)."""
    draws = (np.random.default_rng(list(f"{weights} {text}".encode())) for text in texts)
    vectors = np.stack([draw.normal(size=16) for draw in draws]).astype(np.float16)
    stamp = {"weights": weights, **TEXT_HASH, "collection": checksum_text("\n".join(texts))}
    store = VectorStore.create_or_continue(folder, stamp, *vectors.shape, BLOCK, print)
    for block in range(store.block_count):
        first, last = store.block_range(block)
        store.write_block(block, vectors[first:last], hashes=text_hashes(texts[first:last]))
    return store, vectors, np.random.default_rng(1).normal(size=(9, 16)).astype(np.float32)


def load_texts(folder, lite: str, texts: list[str], pids: list[str] | None = None, weights="a"):
    """Write the vectors of these texts and load them; return (exit status, the world)."""
    world = hashed_store(folder, texts, weights)
    ids = folder.parent / f"{folder.name}.json"
    pids = pids or [f"p{row}" for row in range(len(texts))]
    ids.write_text(json.dumps(dict(enumerate(pids))))
    return load(folder, "--milvus_uri", lite, "--passage_ids", str(ids)), world


def content(collection: Collection) -> list[dict]:
    fields = ["row", "pid", milvus_engine.TEXT_HASH_FIELD, milvus_engine.FIELD]
    return sorted(collection.read(0, 1000, fields).values(), key=lambda entry: entry["row"])


@pytest.fixture
def writes(monkeypatch):
    """Return the list of the rows that each request writes."""
    rows, put = [], Collection.put

    def record(self, entries, vectors):
        put(self, entries, vectors)
        rows.append([entry["row"] for entry in entries])

    monkeypatch.setattr(milvus_engine, "BATCH_BYTES", 40 * 4 * 16)  # 40 rows a request, two a block
    monkeypatch.setattr(Collection, "put", record)
    return rows


TEXTS = [f"text {number}" for number in range(150)]
PIDS = [f"p{number}" for number in range(150)]


@pytest.mark.milvus
@pytest.mark.parametrize(
    ("texts", "pids", "rows", "deleted"),
    [
        ([*TEXTS, "new", "text 3"], [*PIDS, "a pid of another length", "q"], [150, 151], 0),
        ([*TEXTS[:100], "new", *TEXTS[100:]], [*PIDS[:100], "q", *PIDS[100:]], range(100, 151), 0),
        (TEXTS[:60], PIDS[:60], [], 90),
        (TEXTS[5:], PIDS[5:], range(145), 5),
        (["edited", *TEXTS[1:99], "edited, too", *TEXTS[100:]], PIDS, [0, 99], 0),
        (TEXTS, [*PIDS[:70], "q", *PIDS[71:]], [70], 0),
        ([TEXTS[1], TEXTS[0], *TEXTS[2:]], PIDS, [0, 1], 0),
        (TEXTS, PIDS, [], None),
    ],
    ids=["appended", "inserted", "cut", "removed", "edited", "another pid", "reordered", "unchanged"],
)
def test_only_changed_rows_are_written(tmp_path, lite, writes, capsys, texts, pids, rows, deleted):
    load_texts(tmp_path / "old", lite, TEXTS, PIDS)
    writes.clear()
    capsys.readouterr()
    status, world = load_texts(tmp_path / "new", lite, texts, pids)
    output = capsys.readouterr().out
    assert status == 0 and [row for request in writes for row in request] == list(rows)
    if deleted is None:
        assert "up to date" in output
    else:
        counts = f"{len(rows)} written, {len(texts) - len(rows)} kept, {deleted} deleted"
        assert counts in output and "rebuilding" not in output
    search = open_search(world, lite)
    found = search.search(world[2], 20)
    assert all(map(np.array_equal, found, full_sort(world[1], world[2], 20)))
    ids = ("--passage_ids", str(tmp_path / "new.json"))
    load(world[0].folder, "--milvus_uri", lite, *ids, "--milvus_collection", "fresh")
    fresh = Collection(lite, "fresh")
    assert content(search.collection) == content(fresh) and search.collection.stamp() == fresh.stamp()


@pytest.mark.milvus
@pytest.mark.parametrize("lives", [0, 1, 2])
def test_a_killed_update_is_not_searched_and_resumes(tmp_path, lite, writes, monkeypatch, capsys, lives):
    load_texts(tmp_path / "old", lite, TEXTS)
    old, put, writes[:] = open_search(hashed_store(tmp_path / "old", TEXTS), lite), Collection.put, []

    def fail(self, entries, vectors):
        if len(writes) == lives:
            raise KeyboardInterrupt
        put(self, entries, vectors)

    texts = ["edited", *TEXTS[1:70], "edited, too", *TEXTS[71:140]]
    with monkeypatch.context() as patch:
        patch.setattr(Collection, "put", fail)
        if lives < 2:
            assert load_texts(tmp_path / "new", lite, texts)[0] == 130
        else:  # before the last stamp
            patch.setattr(Collection, "delete_from", lambda *_: 0)
            assert load_texts(tmp_path / "new", lite, texts)[0] == 2
            assert "has 150 rows (expected 140)" in capsys.readouterr().err
    world = hashed_store(tmp_path / "new", texts)
    with pytest.raises(UserError, match=f"an update has not ended; finish it: {LOAD} --milvus_index FLAT$"):
        open_search(world, lite)
    with pytest.raises(UserError, match=f"other vectors .*; load these: {LOAD} --milvus_index FLAT$"):
        open_search((old.store, None, None), lite)
    capsys.readouterr()
    assert load_texts(tmp_path / "new", lite, texts)[0] == 0
    assert [row for request in writes for row in request] == [0, 70]
    assert f"{2 - lives} written, {138 + lives} kept" in capsys.readouterr().out
    found = open_search(world, lite).search(world[2], 20)
    assert all(map(np.array_equal, found, full_sort(world[1], world[2], 20)))
    assert load_texts(tmp_path / "old", lite, TEXTS)[0] == 0  # and back
    assert "12 written, 138 kept, 0 deleted" in capsys.readouterr().out


@pytest.mark.milvus
def test_an_update_keeps_the_index_and_needs_the_same_settings(tmp_path, lite, writes, capsys):
    index = ("--milvus_index", "HNSW", "--milvus_params", "M=16,efConstruction=100")
    load(hashed_store(tmp_path / "old", TEXTS)[0].folder, "--milvus_uri", lite, *index)
    writes.clear()
    world = hashed_store(tmp_path / "new", [*TEXTS, "new"])
    assert load(world[0].folder, "--milvus_uri", lite, *index) == 0
    assert writes == [[150]] and "rebuilding" not in capsys.readouterr().out
    rows, _ = open_search(world, lite, "ef=200").search(world[1][150:].astype(np.float32), 5)
    assert rows[0, 0] == 150
    writes.clear()
    assert load_texts(tmp_path / "pids", lite, [*TEXTS, "new"])[0] == 0  # has no field for them
    assert "reloading (pids: none" in capsys.readouterr().out and len(sum(writes, [])) == 151
    writes.clear()
    assert load_texts(tmp_path / "weights", lite, TEXTS, weights="b")[0] == 0
    assert "reloading (weights: a -> b" in capsys.readouterr().out and len(sum(writes, [])) == 150


def start_load(folder, uri: str) -> subprocess.Popen:
    words = [sys.executable, "script/milvus_load.py", "--para_emb", str(folder), "--passage_ids", "none"]
    return subprocess.Popen(
        [*words, "--milvus_uri", uri], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.milvus
@pytest.mark.slow
def test_a_load_killed_by_a_signal_resumes(tmp_path, lite):
    vectors = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float16)
    store = make_store(tmp_path / "vectors", vectors, 2000)
    running = start_load(store.folder, lite)
    first = running.stdout.readline()
    assert "loaded 2,000/20,000 passages" in first, first + running.stdout.read()
    os.kill(running.pid, signal.SIGSTOP)  # it must not end in the meantime
    second = start_load(store.folder, lite)
    assert "no connection to Milvus" in second.communicate()[0] and second.returncode == 2
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    again = start_load(store.folder, lite)
    output = again.communicate()[0]
    assert again.returncode == 0 and "20,000 passages, index FLAT" in output
    assert "loaded 20,000/20,000" in output and "loaded 2,000/" not in output
    queries = np.random.default_rng(1).normal(size=(20, 32)).astype(np.float32)
    rows, scores = open_search((store, None, None), lite).search(queries, 50)
    expected = full_sort(vectors, queries, 50)
    assert np.array_equal(rows, expected[0]) and np.array_equal(scores, expected[1])


@pytest.mark.milvus
@pytest.mark.slow
def test_milvus_gives_the_same_run(tmp_path, programs):
    world, out, log = make_world(tmp_path), tmp_path / "out", tmp_path / "log"
    words = [*options(world, out), "--topk", "10", "--dual_params", "none"]
    words += ["--pretrained_model_path", str(world / "model")]
    run = lambda *more: programs.run("do_dual_infer.py", [*words, *more], log)  # noqa: E731
    on_milvus = ("--engine", "milvus")
    assert run(*on_milvus).returncode == 2 and "script/milvus_load.py --output_dir" in log.read_text()
    assert run().returncode == 0
    exact = lines(out / "res.top10")
    loader = [
        sys.executable,
        "script/milvus_load.py",
        "--output_dir",
        str(out),
        "--data_dir",
        f"{world}/data",
    ]
    assert subprocess.run(loader, cwd=ROOT).returncode == 0
    done = run(*on_milvus)
    assert done.returncode == 0, done.output()
    assert "Milvus FLAT: recall@10 1.0000" in done.output() and lines(out / "res.top10") == exact
    stamp = json.loads((out / "res.top10.stamp.json").read_text())
    assert (stamp["engine"], stamp["milvus_uri"]) == ("milvus", str(out / "milvus.db"))
    assert "up to date" in run(*on_milvus).output()
    (out / "para_emb/manifest.json").rename(out / "elsewhere.json")  # a machine without the vectors
    done = run(*on_milvus, "--force")
    assert done.returncode == 0 and "the scores are those of Milvus" in done.output()
    columns = [[line.split("\t")[:3] for line in run] for run in (exact, lines(out / "res.top10"))]
    assert columns[0] == columns[1]


@pytest.mark.parametrize(
    ("kind", "params", "allowed"),
    [
        ("FLAT", "", True), ("HNSW", "M=2,efConstruction=1", True), ("IVF_SQ8", "nlist=64", True),
        ("flat", "", False), ("NOSUCH", "", False), ("IVF_PQ", "", False), ("FLAT", "M=4", False),
        ("HNSW", "M=1", False), ("HNSW", "M=0", False), ("HNSW", "M=-1", False), ("HNSW", "M=1e9", False),
        ("HNSW", "M=nan", False), ("HNSW", "M=2.5", False), ("HNSW", "efConstruction=0", False),
        ("IVF_FLAT", "nlist=0", False), ("IVF_FLAT", "nlist=1000000000", False),
    ],
)  # fmt: skip
def test_indexes_of_milvus_lite(kind, params, allowed):
    if allowed:
        return check_index("x.db", kind, params)
    with pytest.raises(UserError, match=r"^--milvus_(index|params) "):
        check_index("x.db", kind, params)


def test_a_server_decides_about_its_indexes_but_not_about_numbers():
    check_index("http://h:1", "SCANN", "reorder_k=5,nlist=8")
    for kind, params in (("SCANN", "nlist=0"), ("", ""), ("HNSW;", "")):
        with pytest.raises(UserError):
            check_index("http://h:1", kind, params)


@pytest.mark.parametrize("params", ["nprobe=0", "ef=0", "ef=-5", "ef=nan", "ef=1e9", "efSearch=8", "nprobe"])
def test_search_parameters_are_checked_at_the_door(params):
    with pytest.raises(UserError, match="^--search_params "):
        infer("--engine", "milvus", "--search_params", params)


def test_a_foreign_file_or_folder_is_no_milvus_file(tmp_path):
    check_milvus_file(str(tmp_path / "new.db"))
    (tmp_path / "a.db").write_text("mine")
    (tmp_path / "b.db").mkdir()
    check_milvus_file(str(tmp_path / "b.db"))
    (tmp_path / "b.db/mine").write_text("mine")
    for name in ("a.db", "b.db"):
        with pytest.raises(UserError, match=f"{name}: exists"):
            check_milvus_file(str(tmp_path / name))
    (tmp_path / "c.db/collections").mkdir(parents=True)
    check_milvus_file(str(tmp_path / "c.db"))
