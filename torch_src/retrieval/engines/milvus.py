"""Search on a Milvus server, or in a local file by Milvus Lite: one collection of passage vectors.

A collection has the row as its primary key, the pid, 8 bytes of the hash of the text, and the vector in fp32:
Milvus Lite has no fp16 field, and a server's fp16 field would round the queries, too. Two properties of the
collection hold its stamp (the manifest of the vectors, and whether an update to them has yet to end) and its
index.
"""

import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torch_src.retrieval.chunks import check_blocks
from torch_src.retrieval.engines.milvus_options import is_milvus_file, parse_params
from torch_src.retrieval.passage_windows import PassageWindows
from torch_src.retrieval.search import best_first, exact_scores
from torch_src.retrieval.vectors import NOT_COMPARED, VectorStore
from torch_src.runtime.errors import UserError
from torch_src.runtime.libraries import import_library
from torch_src.runtime.log import log, warn
from torch_src.runtime.stamps import JsonDict, changes

STAMP, INDEX = "passage_vectors.record", "passage_vectors.index"  # properties of a collection
FIELD, INDEX_NAME = "vector", "vector_idx"
TEXT_HASH_FIELD = "text_hash"  # INT64: the first half of a hash
PID_BYTES = 64  # at least; longer pids may be added later
OLDEST_SERVER = (2, 4)
MAX_HITS = 16384  # per query, and rows that are read at once: Milvus's own limit
HITS_PER_CALL = 1_000_000  # 12 bytes each; a server sends at most 64 MB
QUERIES_PER_CALL = 1000
BATCH_BYTES = 8 << 20  # of fp32 vectors sent at once; a server accepts at most 64 MB
CONNECT_SECONDS = 10.0
PROGRAM = "script/milvus_load.py"
# pymilvus pings every 10 s by default, upon which Milvus Lite closes the connection
CHANNEL = {"grpc.keepalive_time_ms": 300_000}


def token() -> str:
    """Return the credentials (user:password, or a key) from the environment, their only source."""
    return os.getenv("MILVUS_TOKEN", "")


def connect(uri: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return (client, the exceptions it raises); UserError without the package, the file or the server."""
    names = ["grpc", "pymilvus", *(["milvus_lite"] if is_milvus_file(uri) else [])]
    grpc, pymilvus, *_ = (import_library(name, "requirements-milvus.txt") for name in names)
    for name in ("pymilvus", "milvus_lite", "grpc"):  # they log tracebacks of errors that are reported below
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    failures = (pymilvus.MilvusException, grpc.RpcError)
    if is_milvus_file(uri):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
    try:
        client = pymilvus.MilvusClient(uri, token=token(), timeout=CONNECT_SECONDS, grpc_options=CHANNEL)
        version = client.get_server_version(timeout=CONNECT_SECONDS)
    except failures as error:
        fix = "check that it is running and that MILVUS_TOKEN is right"
        if is_milvus_file(uri):
            fix = "check that no other process uses it"
        raise UserError(f"{uri}: no connection to Milvus ({reason(error)}); {fix}") from None
    number = re.match(r"v?(\d+)\.(\d+)", version)
    if number and tuple(map(int, number.groups())) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise UserError(f"{uri}: Milvus {version} is too old (expected {oldest} or later)")
    return client, failures


def reason(error: Exception) -> str:
    """Return a client's error message in one line, without credentials."""
    message = getattr(error, "message", "") or getattr(error, "details", lambda: "")() or str(error)
    line = " ".join(str(message).split())[:300] or type(error).__name__
    for secret in (token(), token().partition(":")[2]):
        line = line.replace(secret, "***") if secret else line
    return line


class Collection:
    """A collection on a server or in a file; its errors become UserErrors of one line."""

    def __init__(self, uri: str, name: str):
        self.uri, self.name = uri, name
        self.client, self.failures = connect(uri)

    def __str__(self) -> str:
        return f"{self.uri}, collection {self.name}"

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the client for this collection."""
        try:
            return getattr(self.client, method)(self.name, *args, **options)
        except self.failures as error:
            raise UserError(f"{self}: {method} failed ({reason(error)})") from None

    def exists(self) -> bool:
        return bool(self.call("has_collection"))

    def properties(self) -> dict[str, str]:
        return dict(self.call("describe_collection").get("properties") or {})

    def stamp(self) -> JsonDict | None:
        """Return the stamp (`manifest` of the vectors, `pids`, `updating`); None for another program's."""
        try:
            found = json.loads(self.properties()[STAMP])
        except (KeyError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("manifest"), dict) else None

    def write_stamp(self, stamp: JsonDict) -> None:
        self.call("alter_collection_properties", {STAMP: json.dumps(stamp)})

    def create(self, stamp: JsonDict, hidden: int, pid_bytes: int, hashed: bool) -> None:
        """Create the collection, empty and without an index. `pid_bytes`: of the longest pid; 0: no pids."""
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        if pid_bytes:
            schema.add_field("pid", DataType.VARCHAR, max_length=max(PID_BYTES, pid_bytes))
        if hashed:
            schema.add_field(TEXT_HASH_FIELD, DataType.INT64)
        schema.add_field(FIELD, DataType.FLOAT_VECTOR, dim=hidden)
        properties = {STAMP: json.dumps(stamp)}
        self.call("create_collection", schema=schema, properties=properties, consistency_level="Strong")

    def can_update(self, old: JsonDict, store: VectorStore, pid_bytes: int) -> bool:
        """Return whether vectors with the manifest `old` can become those of `store` row by row."""
        fields = {field["name"]: field for field in self.call("describe_collection")["fields"]}
        longest = int(fields["pid"]["params"]["max_length"]) if "pid" in fields else 0
        fits = bool(pid_bytes) == bool(longest) and pid_bytes <= longest
        return fits and TEXT_HASH_FIELD in fields and store.differs_only_in_collection(old)

    def drop(self) -> None:
        self.call("drop_collection")

    def index(self) -> str:
        """Return the kind and parameters of the index, as requested; empty without an index."""
        return self.properties().get(INDEX, "")

    def make_index(self, kind: str, params: str) -> None:
        """Build this index unless it exists; it replaces another one."""
        wanted, current = f"{kind} {params}".strip(), self.index()
        if wanted == current:
            return
        if current:
            log(f"{self}: rebuilding the index ({current} -> {wanted})")
            # first: an index under construction has no name
            self.call("alter_collection_properties", {INDEX: ""})
        self.call("release_collection")
        if self.call("list_indexes"):
            self.call("drop_index", INDEX_NAME)
        options = self.client.prepare_index_params()
        settings = parse_params("milvus_params", params)
        # nested: Milvus Lite ignores the client's flat form, servers accept both
        options.add_index(FIELD, kind, INDEX_NAME, metric_type="IP", params={"params": settings})
        self.call("create_index", options)
        self.call("alter_collection_properties", {INDEX: wanted})

    def load(self) -> None:
        """Load the collection, so that it can be counted and searched."""
        self.call("load_collection")

    def count(self, first: int | None = None, last: int = 0) -> int:
        """Return the number of rows; with `first`, of those from `first` up to (not including) `last`."""
        which = "" if first is None else f"row >= {first} and row < {last}"
        return int(self.call("query", filter=which, output_fields=["count(*)"])[0]["count(*)"])

    def read(self, first: int, last: int, fields: list[str]) -> dict[int, dict[str, Any]]:
        """Return row -> these fields of the rows from `first` up to (not including) `last`."""
        which = f"row >= {first} and row < {last}"
        found = self.call("query", filter=which, output_fields=fields, limit=last - first)
        return {entry["row"]: dict(entry) for entry in found}

    def put(self, entries: list[dict[str, Any]], vectors: np.ndarray) -> None:
        """Write rows, given by their fields and vectors (n, H), replacing existing ones."""
        pairs = zip(entries, vectors.astype(np.float32), strict=True)
        self.call("upsert", [{**entry, FIELD: vector} for entry, vector in pairs])

    def delete_from(self, first: int) -> int:
        """Delete the rows from `first` on and return their number."""
        if found := self.count(first, 1 << 62):
            self.call("delete", filter=f"row >= {first}")
        return found

    def search(self, queries: np.ndarray, depth: int, params: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return Milvus's (rows (B, depth) int64, scores (B, depth)); missing ones are -1 and -inf."""
        rows = np.full((len(queries), depth), -1, dtype=np.int64)
        scores = np.full(rows.shape, -np.inf)
        at_once = max(1, min(QUERIES_PER_CALL, HITS_PER_CALL // depth))
        for start in range(0, len(queries), at_once):
            answer = self.call(
                "search", data=list(queries[start : start + at_once]), anns_field=FIELD, limit=depth,
                search_params={"metric_type": "IP", "params": params}, output_fields=["row"],
            )  # fmt: skip
            for at, hits in enumerate(answer, start):
                rows[at, : len(hits)], scores[at, : len(hits)] = hits.ids, hits.distances
        return rows, scores


def fill(
    collection: Collection, store: VectorStore, pids: np.ndarray | None, update: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Write the missing blocks in order and yield the rows (first, last) of each, and how many were written.

    A block that a killed load left incomplete is rewritten. `update`: read all rows and write those with
    another text or pid. UserError when rows are missing at the end.
    """
    count, finished = collection.count(), 0
    batch = max(1, min(MAX_HITS, BATCH_BYTES // (4 * store.hidden)))
    if not update:
        if count == store.rows:
            return
        finished = count // store.block_rows
        if finished and collection.count(0, finished * store.block_rows) != finished * store.block_rows:
            finished = 0  # rows are missing in an earlier block: rewrite everything
    for block in range(finished, store.block_count):
        first, last = store.block_range(block)
        vectors, written = None, 0
        hashes = store.read_hashes(block) if store.hashed else None
        for at in range(first, last, batch):
            end = min(last, at + batch)
            entries = scalar_fields(
                at, end, None if hashes is None else hashes[at - first : end - first], pids
            )
            if update:
                loaded = collection.read(at, end, list(entries[0]))
                entries = [entry for entry in entries if loaded.get(entry["row"]) != entry]
            if entries:
                vectors = store.read_block(block) if vectors is None else vectors
                collection.put(entries, vectors[[entry["row"] - first for entry in entries]])
                written += len(entries)
        yield first, last, written
    if (count := collection.count()) != store.rows:
        raise UserError(f"{collection}: has {count:,} rows (expected {store.rows:,}); pass --force")


def scalar_fields(
    first: int, last: int, hashes: np.ndarray | None, pids: np.ndarray | None
) -> list[dict[str, Any]]:
    """Return what a collection holds of the rows from `first` up to `last`, without the vectors.

    `hashes` (n, 16) uint8: of their texts; `pids` (N,): of all rows.
    """
    entries: list[dict[str, Any]] = [{"row": row} for row in range(first, last)]
    if pids is not None:
        for entry, pid in zip(entries, pids[first:last].tolist(), strict=True):
            entry["pid"] = pid.decode()
    if hashes is not None:
        for entry, half in zip(entries, hashes.view("<i8")[:, 0].tolist(), strict=True):
            entry[TEXT_HASH_FIELD] = half
    return entries


def index_options(index: str) -> str:
    """Return the options of script/milvus_load.py that keep the index `index` (of Collection.index)."""
    kind, _, params = index.partition(" ")
    words = [*(("--milvus_index", kind) if kind else ()), *(("--milvus_params", params) if params else ())]
    return "".join(f" {shlex.quote(word)}" for word in words)


class MilvusSearch:
    """Search in a loaded collection; scores are exact when the blocks of its vectors are on this machine."""

    def __init__(
        self,
        uri: str,
        name: str,
        manifest: JsonDict,
        folder: str,
        params: str,
        load_command: str,
        windows: PassageWindows | None = None,
    ):
        """`folder`: where the blocks may be. UserError unless the collection has all of its vectors.

        windows: of passages, which are the results where the vectors are windows.
        """
        self.windows = windows
        self.params, self.rows = parse_params("search_params", params), manifest["rows"]
        if is_milvus_file(uri) and not Path(uri).exists():
            raise UserError(f"{uri}: no such file; load the vectors first: {load_command}")
        self.collection = collection = Collection(uri, name)
        if not collection.exists():
            raise UserError(f"{collection}: no such collection; load the vectors first: {load_command}")
        self.manifest = self.loaded_manifest(manifest, load_command)
        self.index = collection.index()
        if self.index:
            collection.load()
        if (count := collection.count() if self.index else 0) != self.rows:
            found = f"{count:,} of {self.rows:,} rows can be searched"
            raise UserError(
                f"{collection}: {found}; load the rest: {load_command}{index_options(self.index)}"
            )
        self.flat = self.index == "FLAT"
        self.store = VectorStore.where_complete(folder, self.manifest)

    def loaded_manifest(self, manifest: JsonDict, load_command: str) -> JsonDict:
        """Return the loaded manifest; UserError when more than block size, precision or device differs."""
        stamp = self.collection.stamp()
        if stamp is None:
            raise UserError(f"{self.collection}: not created by {PROGRAM}; pass another --milvus_collection")
        loaded = stamp["manifest"]
        kept = {name: loaded[name] for name in (*NOT_COMPARED, "block_rows") if name in loaded}
        manifest = {**manifest, **kept}
        same_index = f"{load_command}{index_options(self.collection.index())}"
        if different := changes(loaded, manifest):
            update = VectorStore("", manifest).differs_only_in_collection(loaded)
            fix = same_index if update else f"{load_command} --force"
            raise UserError(f"{self.collection}: other vectors ({'; '.join(different)}); load these: {fix}")
        if stamp.get("updating"):
            raise UserError(f"{self.collection}: an update has not ended; finish it: {same_index}")
        return manifest

    @property
    def scores(self) -> str:
        """Origin of the scores, for the stamp of the run."""
        return "those of Milvus" if self.store is None else "exact"

    def check_blocks(self) -> None:
        """Verify the checksums of the blocks (DamagedBlock), or warn that there are none."""
        if self.store is None:
            warn("the vectors are not on this machine: the scores are those of Milvus (fp32, not checked)")
        else:
            check_blocks(self.store)

    def _request(self, queries: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Return Milvus's results as Collection.search; `depth` is at most the number of rows.

        UserError when a FLAT index, which compares every row, finds fewer.
        """
        rows, scores = self.collection.search(queries, depth, self.params)
        if self.flat and (rows < 0).any():
            raise UserError(f"{self.collection}: Milvus returned too few hits; check its query nodes")
        return rows, scores

    def search(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows (B, K) int64, scores (B, K) float64), best first, ties by row.

        A FLAT index gives the results of exact search: the number of requested hits grows until rounding in
        fp32 cannot have excluded one of the best K.
        """
        if self.windows is None:
            return self._search_rows(queries, topk)
        return self.windows.search(self._search_rows, queries, topk, MAX_HITS)

    def _search_rows(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the result of search, of vector rows."""
        keep = min(topk, self.rows)
        if self.store is None:
            return best_first(*self._request(queries, keep), keep)
        rows, scores = np.empty((len(queries), keep), np.int64), np.empty((len(queries), keep))
        most, left = min(self.rows, MAX_HITS), np.arange(len(queries))
        depth = min(2 * keep, most) if self.flat else keep
        while len(left):
            found, milvus_scores = self._request(queries[left], depth)
            exact = exact_scores(self.store, queries[left], found)
            rows[left], scores[left] = best_first(found, exact, keep)
            if not self.flat or depth == self.rows:
                return rows, scores
            left = left[may_be_incomplete(scores[left], exact, milvus_scores)]
            if depth == most:
                break
            depth = min(4 * depth, most)
        if len(left):
            warn(f"{len(left)} queries: the maximum of {most:,} hits may miss some of their last results")
        return rows, scores


def may_be_incomplete(best: np.ndarray, exact: np.ndarray, milvus_scores: np.ndarray) -> np.ndarray:
    """Return (B,) bool: whether a passage that was not found may belong to the best K, `best` (B, K).

    Milvus scores such a passage at most as its last hit, milvus_scores (B, D). Its error is assumed to be at
    most twice the largest error of the hits, whose exact scores are (B, D).
    """
    known = np.isfinite(milvus_scores)
    errors = np.abs(np.where(known, milvus_scores, 0) - np.where(known, exact, 0))
    return best[:, -1] <= milvus_scores[:, -1] + 2 * np.where(known, errors, 0).max(axis=1)
