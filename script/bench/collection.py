"""Opening the collection and the id map at full size: time against a plain read, memory, random rows.

    python script/bench/collection.py --data_dir D --rows 8096668

The passages of D are repeated to --rows in one part (about 6 GB), with a map of synthetic ids. Measures the
first opening (finds line offsets, computes the checksum), later openings, random rows, and the same for
passage2id.map.json. Memory is the peak of unshared memory. `ratio` compares the first opening with reading
the file once in chunks of 4 MB just before it.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

import numpy as np

from script.bench.common import Figures, Variant, make_parser, measure, run_variant, work_folder
from script.bench.synthetic import repeat_collection
from torch_src.data.collection import PassageCollection
from torch_src.data.passage_ids import read_passage_ids

RANDOM_ROWS = 20000


def write_collection(args: argparse.Namespace) -> None:
    """Write the collection and the map, unless the folder holds them."""
    target = args.folder / "passages"
    done = target / "made"
    if not done.exists():
        repeat_collection(Path(args.data_dir) / "passage-collection", target, args.rows)
        done.write_text(str(args.rows))
    elif done.read_text() != str(args.rows):
        raise SystemExit(f"{target}: has another number of rows; name another folder")


def rate(start: float, size: int) -> Figures:
    took = time.perf_counter() - start
    return {"seconds": took, "gb_per_s": size / took / 1e9}


def plain_read(args: argparse.Namespace) -> Figures:
    chunk, start, size = bytearray(1 << 22), time.perf_counter(), 0
    with open(args.folder / "passages/part-00", "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            size += count
    return rate(start, size)


def later_opening(args: argparse.Namespace) -> Figures:
    start = time.perf_counter()
    collection = PassageCollection(args.folder / "passages", args.folder / "cache")
    assert len(collection) == args.rows
    return rate(start, (args.folder / "passages/part-00").stat().st_size)


def first_opening(args: argparse.Namespace) -> Figures:
    for path in (args.folder / "cache").glob("*.offsets.*"):
        path.unlink()
    return later_opening(args)


def random_rows(args: argparse.Namespace) -> Figures:
    collection = PassageCollection(args.folder / "passages", args.folder / "cache")
    rows = np.random.default_rng(0).integers(args.rows, size=RANDOM_ROWS).tolist()
    start = time.perf_counter()
    for row in rows:
        collection[row]
    took = time.perf_counter() - start
    return {"seconds": took, "rows_per_s": RANDOM_ROWS / took}


def later_ids(args: argparse.Namespace) -> Figures:
    start, path = time.perf_counter(), args.folder / "passages/passage2id.map.json"
    assert len(read_passage_ids(path, args.folder / "cache")) == args.rows
    return rate(start, path.stat().st_size)


def first_ids(args: argparse.Namespace) -> Figures:
    for path in (args.folder / "cache").glob("*.ids.*"):
        path.unlink()
    return later_ids(args)


STEPS = (plain_read, first_opening, later_opening, random_rows, first_ids, later_ids)
VARIANTS: dict[str, Variant] = {step.__name__: step for step in STEPS}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="data set in the official layout")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="folder for the files; default: a temporary folder")
    args = parser.parse_args()
    if args.variant:
        return run_variant(args, VARIANTS)
    with work_folder(args) as folder:
        write_collection(args)
        found = measure(args, list(VARIANTS), folder)
    medians = {}
    print(f"\n{'':14} {'median s':>9} {'unshared GB':>12}")
    for name, runs in found.items():
        seconds = statistics.median_high(run["seconds"] for run in runs)
        medians[name] = next(run for run in runs if run["seconds"] == seconds)
        print(f"{name:14} {seconds:9.3f} {medians[name]['unshared_gb']:12.2f}")
    ratio = medians["first_opening"]["seconds"] / medians["plain_read"]["seconds"]
    print(json.dumps({"bench": "collection", "rows": args.rows, "ratio": round(ratio, 3), **medians}))


if __name__ == "__main__":
    main()
