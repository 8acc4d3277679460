"""Load the passage vectors of do_dual_infer.py into Milvus, for `do_dual_infer.py --engine milvus`.

    python -m pip install -r requirements-milvus.txt      # in an environment of its own
    python script/milvus_load.py --output_dir output --milvus_uri output/milvus.db
    python script/milvus_load.py --output_dir output --milvus_uri http://HOST:19530 --milvus_index HNSW \\
        --milvus_params M=32,efConstruction=200

A uri that ends in .db is a file of Milvus Lite. Credentials for a server (user:password, or a key) are read
from the environment variable MILVUS_TOKEN. A row of the Milvus collection holds row, pid, vector and a hash
of the text; the similarity is the inner product. The same command resumes a killed load at its block. When
passages were added, removed or edited, it writes only the rows whose text or pid changed. A changed index is
rebuilt without a new load. Vectors of different weights are never mixed: in a file the old ones are replaced,
on a server only with --force.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np

from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.hparams import DATA_DIR, OUTPUT
from torch_src.retrieval.engines.milvus_options import (
    check_index,
    check_milvus_file,
    check_milvus_uri,
    is_milvus_file,
)
from torch_src.retrieval.vectors import VectorStore
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import from_root, read_json
from torch_src.runtime.log import duration, log
from torch_src.runtime.options import OptionParser
from torch_src.runtime.program import exit_status, exit_with
from torch_src.runtime.stamps import changes, checksum_text

if TYPE_CHECKING:
    from torch_src.retrieval.engines.milvus import Collection


def open_vectors(folder: str) -> VectorStore:
    """Return the vectors of a folder; UserError if they are incomplete."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{path}: no such file (passage vectors); run do_dual_infer.py first")
    manifest = read_json(path)
    if missing := {"rows", "hidden", "block_rows"} - manifest.keys():
        raise UserError(f"{path}: not a manifest of vectors (missing: {', '.join(sorted(missing))})")
    store = VectorStore(folder, manifest)
    if blocks := store.missing_blocks():
        missing_blocks = f"{len(blocks)} of {store.block_count} blocks are missing"
        raise UserError(f"{folder}: {missing_blocks}; run do_dual_infer.py again")
    return store


def read_pids(args: argparse.Namespace, store: VectorStore) -> np.ndarray | None:
    """Return the pid of each vector, (N,) bytes; None with --passage_ids none."""
    from torch_src.retrieval.passage_windows import FIRST_WINDOW, cached_windows  # here: as in run

    if args.passage_ids == "none":
        return None
    cache, windows = Path(args.output_dir) / "cache", None
    if "passage_windows" in store.manifest and (windows := cached_windows(cache, store.manifest)) is None:
        path = cache / FIRST_WINDOW
        raise UserError(f"{path}: missing, or not of these vectors; run do_dual_infer.py again")
    pids = read_passage_ids(args.passage_ids, str(cache))
    check_length(args.passage_ids, len(pids), windows.passages if windows else store.rows)
    return np.repeat(pids, np.diff(windows.first)) if windows else pids


def prepare(
    collection: "Collection", record: dict[str, Any], store: VectorStore, pid_bytes: int, force: bool
) -> bool:
    """Create the Milvus collection for this record, unless it exists; return whether rows may have changed.

    In that case its stamp is marked first, so that it is not searched until the update ends.
    """
    if collection.exists():
        old = collection.stamp()
        if old is None:
            raise UserError(f"{collection}: not created by this program; pass another --milvus_collection")
        different = changes(old["manifest"], record["manifest"])
        if old.get("pids") != record["pids"]:
            different.append(f"pids: {old.get('pids')} -> {record['pids']}")
        if old.get("updating"):
            different.append("an update has not ended")
        if not different and not force:
            return False
        if not force and collection.can_update(old["manifest"], store, pid_bytes):
            log(f"{collection}: updating the rows that changed ({'; '.join(different)})")
            collection.write_stamp({**record, "updating": True})
            return True
        if different and not force and not is_milvus_file(collection.uri):
            fix = "pass --force to replace them, or another --milvus_collection to keep them"
            raise UserError(f"{collection}: contains other vectors ({'; '.join(different)}); {fix}")
        log(f"{collection}: reloading ({'; '.join(different) or '--force'})")
        collection.drop()
    collection.create(record, store.hidden, pid_bytes, store.hashed)
    return False


def run(args: argparse.Namespace) -> None:
    """Create the collection and its index, and load the missing vectors."""
    from torch_src.retrieval.engines.milvus import Collection, fill  # here: --help takes no second

    check_milvus_uri(args.milvus_uri)
    check_index(args.milvus_uri, args.milvus_index, args.milvus_params)
    check_milvus_file(args.milvus_uri)
    store = open_vectors(args.para_emb)
    pids = read_pids(args, store)
    unit = "windows" if "passage_windows" in store.manifest else "passages"
    known = "none" if pids is None else checksum_text(b"\n".join(pids.tolist()).decode())
    collection = Collection(args.milvus_uri, args.milvus_collection)
    record = {"manifest": store.manifest, "pids": known}
    pid_bytes = 0 if pids is None else pids.dtype.itemsize
    update = prepare(collection, record, store, pid_bytes, args.force)
    collection.make_index(args.milvus_index, args.milvus_params)
    collection.load()
    start, done, written = time.monotonic(), 0, 0
    deleted = collection.delete_from(store.rows) if update else 0
    for first, last, changed in fill(collection, store, pids, update):
        done, written = done + last - first, written + changed
        speed = done / (time.monotonic() - start)
        left = duration((store.rows - last) / speed)
        what = "compared" if update else "loaded"
        log(f"{what} {last:,}/{store.rows:,} {unit}  {speed:,.0f} {unit}/s  eta {left}")
    collection.call("flush")  # write what is in memory to disk and to the index
    took = f" in {duration(time.monotonic() - start)}" if done else ", up to date"
    if update:
        collection.write_stamp(record)
        took += f" ({written:,} written, {store.rows - written:,} kept, {deleted:,} deleted)"
    log(f"{collection}: {store.rows:,} {unit}, index {collection.index()}{took}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    parser = OptionParser(__doc__)
    parser.add_argument("--output_dir", default=from_root(OUTPUT), help="output folder of do_dual_infer.py")
    parser.add_argument("--para_emb", default="", help="folder of vectors; default: output_dir/para_emb")
    parser.add_argument("--data_dir", default=from_root(DATA_DIR), help="official layout")
    parser.add_argument(
        "--passage_ids",
        default="",
        help="row -> pid (JSON), or none; default: that of data_dir",
    )
    parser.add_argument(
        "--milvus_uri", default="", help="NAME.db or http://host:19530; default: output_dir/milvus.db"
    )
    parser.add_argument("--milvus_collection", default="passages", help="name of the Milvus collection")
    parser.add_argument("--milvus_index", default="FLAT", help="FLAT (exact), HNSW, IVF_FLAT, ...")
    parser.add_argument("--milvus_params", default="", help="index parameters: M=32,efConstruction=200")
    parser.add_argument("--force", action="store_true", help="replace the vectors that are there")
    args = parser.parse_args(argv)
    args.para_emb = args.para_emb or f"{args.output_dir}/para_emb"
    args.passage_ids = args.passage_ids or f"{args.data_dir}/passage-collection/passage2id.map.json"
    args.milvus_uri = args.milvus_uri or f"{args.output_dir}/milvus.db"
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
