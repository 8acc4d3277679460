"""Search on a Milvus server, or in a local file by Milvus Lite: one collection of passage vectors.

A collection has the row as its primary key, the pid, and the vector in fp32: Milvus Lite has no fp16 field,
and a server's fp16 field would round the queries, too. Two properties of it say what it holds: the manifest
of the vectors, and the index.
"""

import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from torch_src.retrieval.engines.milvus_uri import is_milvus_file
from torch_src.retrieval.search import best_first, check_blocks, exact_scores
from torch_src.retrieval.vectors import NOT_COMPARED, VectorStore
from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log, warn
from torch_src.runtime.stamps import changes

RECORD, INDEX = "passage_vectors.record", "passage_vectors.index"  # properties of a collection
FIELD, INDEX_NAME = "vector", "vector_idx"
OLDEST_SERVER = (2, 4)
MOST_HITS = 16384  # hits a query: Milvus's own limit
HITS_AT_ONCE = 1_000_000  # in one answer: 12 bytes each, a server sends 64 MB at most
QUERIES_AT_ONCE = 1000
BATCH_BYTES = 8 << 20  # of fp32 vectors sent at once: a server takes 64 MB at most
PATIENCE = 10.0  # seconds for a connection
COMMAND = "python script/milvus_load.py"
# The library's own pings, every 10 s, are more than Milvus Lite's server allows: it hangs up on them.
CHANNEL = {"grpc.keepalive_time_ms": 300_000}


def token() -> str:
    """Return the credentials (user:password, or a key), which come by this variable alone."""
    return os.getenv("MILVUS_TOKEN", "")


def parse_params(option: str, text: str) -> dict[str, int | float | str]:
    """Return `M=16,efConstruction=200` as a dictionary; UserError when it is malformed."""
    params = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise UserError(f"--{option} {text}: expected name=value,name=value")
        number = re.fullmatch(r"-?\d+(\.\d+)?", value)
        params[name] = (float(value) if "." in value else int(value)) if number else value
    return params


def connect(uri: str) -> tuple[object, tuple[type[Exception], ...]]:
    """Return a client, and what it raises; UserError without the package, the file or the server."""
    try:
        import grpc
        import pymilvus

        if is_milvus_file(uri):
            import milvus_lite  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed: python -m pip install -r requirements-milvus.txt (its first "
            "lines say where)"
        ) from None
    for name in ("pymilvus", "milvus_lite", "grpc"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # they log tracebacks of what we say in a line
    failures = (pymilvus.MilvusException, grpc.RpcError)
    if is_milvus_file(uri):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
    try:
        client = pymilvus.MilvusClient(uri, token=token(), timeout=PATIENCE, grpc_options=CHANNEL)
        version = client.get_server_version(timeout=PATIENCE)
    except failures as error:
        mend = "is it running, and MILVUS_TOKEN right?"
        if is_milvus_file(uri):
            mend = "does another process use it?"
        raise UserError(f"{uri}: no connection to Milvus ({reason(error)}); {mend}") from None
    number = re.match(r"v?(\d+)\.(\d+)", version)
    if number and tuple(map(int, number.groups())) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise UserError(f"{uri}: Milvus {version} is too old, {oldest} or later is needed")
    return client, failures


def reason(error: Exception) -> str:
    """Return what a client says of a failure: one line, without credentials."""
    told = getattr(error, "message", "") or getattr(error, "details", lambda: "")() or str(error)
    line = " ".join(str(told).split())[:300] or type(error).__name__
    for secret in (token(), token().partition(":")[2]):
        line = line.replace(secret, "***") if secret else line
    return line


class Collection:
    """A collection on a server or in a file; every failure there is a UserError of one line."""

    def __init__(self, uri: str, name: str):
        self.uri, self.name = uri, name
        self.client, self.failures = connect(uri)

    def __str__(self) -> str:
        return f"{self.uri}, collection {self.name}"

    def call(self, method: str, *args, **options):
        """Return what a method of the client returns for this collection."""
        try:
            return getattr(self.client, method)(self.name, *args, **options)
        except self.failures as error:
            raise UserError(f"{self}: {method} failed ({reason(error)})") from None

    def exists(self) -> bool:
        """Return whether it is there."""
        return bool(self.call("has_collection"))

    def properties(self) -> dict[str, str]:
        """Return its properties."""
        return dict(self.call("describe_collection").get("properties") or {})

    def record(self) -> dict | None:
        """Return what it was made for: `manifest` of the vectors, `pids`; None when it is not one of ours."""
        try:
            found = json.loads(self.properties()[RECORD])
        except (KeyError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("manifest"), dict) else None

    def create(self, record: dict, hidden: int, longest_pid: int) -> None:
        """Make it, empty, without an index. `longest_pid`: bytes; 0: without pids."""
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        if longest_pid:
            schema.add_field("pid", DataType.VARCHAR, max_length=longest_pid)
        schema.add_field(FIELD, DataType.FLOAT_VECTOR, dim=hidden)
        properties = {RECORD: json.dumps(record)}
        self.call("create_collection", schema=schema, properties=properties, consistency_level="Strong")

    def drop(self) -> None:
        """Remove it with all that it holds."""
        self.call("drop_collection")

    def index(self) -> str:
        """Return the index and its parameters, as they were asked for; empty without."""
        return self.properties().get(INDEX, "")

    def make_index(self, kind: str, params: str) -> None:
        """Give it this index instead of the one that it has, unless it is that one already."""
        wanted, has = f"{kind} {params}".strip(), self.index()
        if wanted == has:
            return
        if has:
            log(f"{self}: the index is made again ({has} -> {wanted})")
            self.call("alter_collection_properties", {INDEX: ""})  # first: a half-made one has no name
        self.call("release_collection")
        if self.call("list_indexes"):
            self.call("drop_index", INDEX_NAME)
        asked = self.client.prepare_index_params()
        settings = parse_params("milvus_params", params)
        # One level deeper than the client's own form, which Milvus Lite does not read; servers take both.
        asked.add_index(FIELD, kind, INDEX_NAME, metric_type="IP", params={"params": settings})
        self.call("create_index", asked)
        self.call("alter_collection_properties", {INDEX: wanted})

    def load(self) -> None:
        """Make it ready to be counted and searched."""
        self.call("load_collection")

    def count(self, first: int | None = None, last: int = 0) -> int:
        """Return how many rows it has; with `first`, how many from there up to (not including) `last`."""
        which = "" if first is None else f"row >= {first} and row < {last}"
        return int(self.call("query", filter=which, output_fields=["count(*)"])[0]["count(*)"])

    def put(self, first: int, vectors: np.ndarray, pids: np.ndarray | None) -> None:
        """Write the vectors (n, H) of the rows from `first` on; a row that is there is written over."""
        entries = [{"row": first + at, FIELD: vector} for at, vector in enumerate(vectors.astype(np.float32))]
        if pids is not None:
            for entry, pid in zip(entries, pids.tolist(), strict=True):
                entry["pid"] = pid.decode()
        self.call("upsert", entries)

    def search(self, queries: np.ndarray, depth: int, params: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return what Milvus finds: (rows (B, depth) int64, its scores (B, depth)); -1 and -inf at the end
        where that is fewer.
        """
        rows = np.full((len(queries), depth), -1, dtype=np.int64)
        scores = np.full(rows.shape, -np.inf)
        at_once = max(1, min(QUERIES_AT_ONCE, HITS_AT_ONCE // depth))
        for start in range(0, len(queries), at_once):
            answer = self.call(
                "search", data=list(queries[start : start + at_once]), anns_field=FIELD, limit=depth,
                search_params={"metric_type": "IP", "params": params}, output_fields=["row"],
            )  # fmt: skip
            for at, hits in enumerate(answer, start):
                rows[at, : len(hits)], scores[at, : len(hits)] = hits.ids, hits.distances
        return rows, scores


def fill(collection: Collection, store: VectorStore, pids: np.ndarray | None) -> Iterator[tuple[int, int]]:
    """Write what is missing, a block at a time in order, and yield each written block's rows (first, last).

    A block in which a load was killed is written again. UserError when the rows do not become complete.
    """
    there, batch = collection.count(), max(1, BATCH_BYTES // (4 * store.hidden))
    if there == store.rows:
        return
    whole = there // store.block_rows
    if whole and collection.count(0, whole * store.block_rows) != whole * store.block_rows:
        whole = 0  # rows are missing among the first ones: everything is written over
    for block in range(whole, store.block_count):
        first, last = store.block_range(block)
        vectors = store.read_block(block)
        for at in range(first, last, batch):
            end = min(last, at + batch)
            collection.put(at, vectors[at - first : end - first], None if pids is None else pids[at:end])
        yield first, last
    if (there := collection.count()) != store.rows:
        raise UserError(f"{collection}: {there:,} rows are there, not {store.rows:,}; pass --force")


def index_options(index: str) -> str:
    """Return the options of script/milvus_load.py that keep this index (Collection.index)."""
    kind, _, params = index.partition(" ")
    words = [*(("--milvus_index", kind) if kind else ()), *(("--milvus_params", params) if params else ())]
    return "".join(f" {shlex.quote(word)}" for word in words)


class MilvusSearch:
    """Top-k passages by a loaded collection; exact scores where the blocks of its vectors are here, too."""

    def __init__(self, uri: str, name: str, manifest: dict, folder, params: str, load_command: str):
        """`folder`: where the blocks may be. UserError naming `load_command` unless the collection holds all
        vectors of this manifest.
        """
        self.params, self.rows = parse_params("search_params", params), manifest["rows"]
        if is_milvus_file(uri) and not Path(uri).exists():
            raise UserError(f"{uri}: no such file; load the vectors first: {load_command}")
        self.collection = collection = Collection(uri, name)
        if not collection.exists():
            raise UserError(f"{collection}: not there; load the vectors first: {load_command}")
        self.manifest = self.loaded_manifest(manifest, load_command)
        self.index = collection.index()
        if self.index:
            collection.load()
        if (there := collection.count() if self.index else 0) != self.rows:
            what = f"{there:,} of {self.rows:,} rows can be searched"
            raise UserError(f"{collection}: {what}; load the rest: {load_command}{index_options(self.index)}")
        self.flat = self.index == "FLAT"
        self.store = VectorStore.where_complete(folder, self.manifest)

    def loaded_manifest(self, manifest: dict, load_command: str) -> dict:
        """Return the manifest of the vectors as they were loaded; UserError unless they are those of
        `manifest`, in blocks of whatever size and encoded on whatever device.
        """
        record = self.collection.record()
        if record is None:
            raise UserError(f"{self.collection}: not made by {COMMAND}; give another --milvus_collection")
        held = record["manifest"]
        kept = {name: held[name] for name in (*NOT_COMPARED, "block_rows") if name in held}
        if different := changes(held, {**manifest, **kept}):
            what = f"other vectors ({'; '.join(different)})"
            raise UserError(f"{self.collection}: {what}; load these: {load_command} --force")
        return {**manifest, **kept}

    @property
    def scores(self) -> str:
        """Return whose scores are given."""
        return "those of Milvus" if self.store is None else "exact"

    def check_blocks(self) -> None:
        """Check the bytes of the blocks (DamagedBlock), or warn that there are none."""
        if self.store is None:
            warn("no such vectors on this machine: the scores are those of Milvus (fp32, not checked)")
        else:
            check_blocks(self.store)

    def ask(self, queries: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what Milvus finds, as Collection.search; `depth` is at most the number of rows.

        UserError when an index FLAT, which looks at every row, finds fewer.
        """
        rows, scores = self.collection.search(queries, depth, self.params)
        if self.flat and (rows < 0).any():
            raise UserError(
                f"{self.collection}: Milvus gave fewer hits than it holds; is a query node down? run again"
            )
        return rows, scores

    def search(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows (B, K) int64, scores (B, K) float64), best first, ties by row.

        An index FLAT gives what exact search gives: more than K are asked for, and more again as long as
        rounding in fp32 could have kept one of the best K out.
        """
        keep = min(topk, self.rows)
        if self.store is None:
            return best_first(*self.ask(queries, keep), keep)
        rows, scores = np.empty((len(queries), keep), np.int64), np.empty((len(queries), keep))
        most, left = min(self.rows, MOST_HITS), np.arange(len(queries))
        depth = min(2 * keep, most) if self.flat else keep
        while len(left):
            found, theirs = self.ask(queries[left], depth)
            exact = exact_scores(self.store, queries[left], found)
            rows[left], scores[left] = best_first(found, exact, keep)
            left = left[unsure(scores[left], exact, theirs)] if self.flat and depth < self.rows else left[:0]
            if depth == most:
                break
            depth = min(4 * depth, most)
        if len(left):
            warn(
                f"{len(left)} queries: Milvus returns too few hits ({most:,}) to be sure of the last of them"
            )
        return rows, scores


def unsure(best: np.ndarray, exact: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return (B,) bool: whether a passage beyond those found could belong to the best K (B, K).

    One that was not found has, by their reckoning, a score of at most the last one's (B, D), and their
    error is taken from the passages that were found, twice over.
    """
    known = np.isfinite(theirs)
    error = np.where(known, np.abs(np.where(known, theirs, 0) - np.where(known, exact, 0)), 0).max(axis=1)
    return best[:, -1] <= theirs[:, -1] + 2 * error
