"""Load the passage vectors of do_dual_infer.py into Milvus, for `do_dual_infer.py --engine milvus`.

    python -m pip install -r requirements-milvus.txt      # in an environment of its own
    python script/milvus_load.py --output_dir output --milvus_uri output/milvus.db
    python script/milvus_load.py --output_dir output --milvus_uri http://HOST:19530 --milvus_index HNSW \\
        --milvus_params M=32,efConstruction=200

A uri that ends in .db is a file of Milvus Lite; a server's credentials (user:password, or a key) are read
from the environment variable MILVUS_TOKEN. A row of the collection holds row, pid and vector; inner product.
A load that was killed goes on at its block when the command is run again, another index replaces the old one
without a new load, and vectors of other weights are never mixed: in a file they are replaced, on a server
only with --force.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

import numpy as np

from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.retrieval.engines.milvus import Collection, fill, parse_params
from torch_src.retrieval.engines.milvus_uri import check_milvus_uri, is_milvus_file
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.log import duration, log
from torch_src.runtime.program import exit_status, leave
from torch_src.runtime.stamps import changes, fingerprint_text


def open_vectors(folder: str) -> VectorStore:
    """Return the vectors of a folder; UserError unless they are all there."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{path}: no vectors there; run do_dual_infer.py first, which makes them")
    manifest = read_json(path)
    if missing := {"rows", "hidden", "block_rows"} - manifest.keys():
        raise UserError(f"{path}: not a manifest of vectors ({', '.join(sorted(missing))} missing)")
    store = VectorStore(folder, manifest)
    if blocks := store.missing_blocks():
        raise UserError(
            f"{folder}: {len(blocks)} of {store.block_count} blocks are missing; let do_dual_infer.py end"
        )
    return store


def read_pids(given, rows: int) -> np.ndarray | None:
    """Return the pids (N,) bytes; None with --passage_ids none."""
    if given.passage_ids == "none":
        return None
    pids = read_passage_ids(given.passage_ids, str(Path(given.output_dir) / "cache"))
    check_length(given.passage_ids, len(pids), rows)
    return pids


def prepare(collection: Collection, record: dict, longest_pid: int, force: bool) -> None:
    """Make the collection for this record, or keep the one that is there for it."""
    if collection.exists():
        old = collection.record()
        if old is None:
            raise UserError(f"{collection}: not made by this program; give another --milvus_collection")
        different = changes(old["manifest"], record["manifest"])
        if old.get("pids") != record["pids"]:
            different.append(f"pids: {old.get('pids')} -> {record['pids']}")
        if not different and not force:
            return
        if different and not force and not is_milvus_file(collection.uri):
            raise UserError(
                f"{collection}: holds other vectors ({'; '.join(different)}); "
                "--force replaces them, another --milvus_collection keeps them"
            )
        log(f"{collection}: loaded again ({'; '.join(different) or '--force'})")
        collection.drop()
    collection.create(record, record["manifest"]["hidden"], longest_pid)


def run(given) -> None:
    check_milvus_uri(given.milvus_uri)
    parse_params("milvus_params", given.milvus_params)
    store = open_vectors(given.para_emb)
    pids = read_pids(given, store.rows)
    known = "none" if pids is None else fingerprint_text(b"\n".join(pids.tolist()).decode())
    collection = Collection(given.milvus_uri, given.milvus_collection)
    record = {"manifest": store.manifest, "pids": known}
    prepare(collection, record, 0 if pids is None else pids.dtype.itemsize, given.force)
    collection.make_index(given.milvus_index, given.milvus_params)
    collection.load()
    begun, loaded = time.monotonic(), 0
    for first, last in fill(collection, store, pids):
        loaded += last - first
        speed = loaded / (time.monotonic() - begun)
        left = duration((store.rows - last) / speed)
        log(f"loaded {last:,}/{store.rows:,} passages  {speed:,.0f} passages/s  eta {left}")
    collection.call("flush")  # what is in memory there goes to disk, and into the index
    took = f" in {duration(time.monotonic() - begun)}" if loaded else ", up to date"
    log(f"{collection}: {store.rows:,} passages, index {collection.index()}{took}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    plain = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    options.add_argument("--output_dir", default="output", help="where do_dual_infer.py wrote para_emb")
    options.add_argument("--para_emb", default="", help="folder of vectors; default: output_dir/para_emb")
    options.add_argument("--data_dir", default="dureader-retrieval-baseline-dataset", help="official layout")
    options.add_argument(
        "--passage_ids", default="", help="row -> pid; default: data_dir/passage-collection's; none: no pids"
    )
    options.add_argument(
        "--milvus_uri", default="", help="NAME.db or http://host:19530; default: output_dir's"
    )
    options.add_argument("--milvus_collection", default="passages", help="its name there")
    options.add_argument("--milvus_index", default="FLAT", help="FLAT (exact), HNSW, IVF_FLAT, ...")
    options.add_argument("--milvus_params", default="", help="of the index: M=32,efConstruction=200")
    options.add_argument("--force", action="store_true", help="load again, replacing what is there")
    given = options.parse_args(argv)
    given.para_emb = given.para_emb or f"{given.output_dir}/para_emb"
    given.passage_ids = given.passage_ids or f"{given.data_dir}/passage-collection/passage2id.map.json"
    given.milvus_uri = given.milvus_uri or f"{given.output_dir}/milvus.db"
    return exit_status(lambda: run(given))


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
