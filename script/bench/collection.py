"""Opening the collection and the id map at full size: time against a plain read, memory, random rows.

    python script/bench/collection.py --data_dir D --rows 8096668

The passages of D are repeated to --rows in one part (about 6 GB), with a map of made-up ids. First opening
(offsets found, checksum taken), later openings, random rows; then the same for passage2id.map.json. Each
step runs in a process of its own; memory is the most unshared memory of that process. `ratio` is the first
opening against reading the file once in pieces of 4 MB, which ran just before it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path: the root is not on it

import numpy as np
from common import in_turn, parser, run_side

from torch_src.data.collection import PassageCollection
from torch_src.data.passage_ids import read_passage_ids

RANDOM_ROWS = 20000


def make(given) -> None:
    """Write the collection and the map, unless they are there."""
    target = given.folder / "passages"
    made = target / "made"
    if made.exists():
        if made.read_text() != str(given.rows):
            raise SystemExit(f"{target}: holds another number of rows; name another folder")
        return
    target.mkdir(parents=True, exist_ok=True)
    source = sorted((Path(given.data_dir) / "passage-collection").glob("part-*"))
    lines = [line + b"\n" for part in source for line in part.read_bytes().split(b"\n")[:-1]]
    with open(target / "part-00", "wb") as file:
        for row in range(0, given.rows, len(lines)):
            file.writelines(lines[: given.rows - row])
    with open(target / "passage2id.map.json", "w", encoding="ascii") as file:
        file.write("{")
        file.writelines(f'{", " if row else ""}"{row}": "{row:032x}"' for row in range(given.rows))
        file.write("}\n")
    made.write_text(str(given.rows))


def plain_read(given) -> dict:
    piece, begun, size = bytearray(1 << 22), time.perf_counter(), 0
    with open(given.folder / "passages/part-00", "rb", buffering=0) as file:
        while count := file.readinto(piece):
            size += count
    return rate(begun, size)


def rate(begun: float, size: int) -> dict:
    took = time.perf_counter() - begun
    return {"seconds": took, "gb_per_s": size / took / 1e9}


def opened(given) -> dict:
    begun = time.perf_counter()
    collection = PassageCollection(given.folder / "passages", given.folder / "cache")
    assert len(collection) == given.rows
    return rate(begun, (given.folder / "passages/part-00").stat().st_size)


def first_opening(given) -> dict:
    for path in (given.folder / "cache").glob("*.offsets.*"):
        path.unlink()
    return opened(given)


def random_rows(given) -> dict:
    collection = PassageCollection(given.folder / "passages", given.folder / "cache")
    rows = np.random.default_rng(0).integers(given.rows, size=RANDOM_ROWS).tolist()
    begun = time.perf_counter()
    for row in rows:
        collection[row]
    took = time.perf_counter() - begun
    return {"seconds": took, "rows_per_s": RANDOM_ROWS / took}


def ids(given) -> dict:
    begun, path = time.perf_counter(), given.folder / "passages/passage2id.map.json"
    assert len(read_passage_ids(path, given.folder / "cache")) == given.rows
    return rate(begun, path.stat().st_size)


def first_ids(given) -> dict:
    for path in (given.folder / "cache").glob("*.ids.*"):
        path.unlink()
    return ids(given)


SIDES = {
    "plain_read": plain_read, "first_opening": first_opening, "later_opening": opened,
    "random_rows": random_rows, "first_ids": first_ids, "later_ids": ids,
}  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data_dir", required=True)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--folder", type=Path, help="where the files are kept; default: a temporary folder")
    given = options.parse_args()
    if given.side:
        return run_side(given, SIDES)
    with tempfile.TemporaryDirectory() as temporary:
        if given.folder is None:
            given.folder = Path(temporary)
            sys.argv += ["--folder", temporary]
        make(given)
        found = in_turn(given, list(SIDES), Path(temporary))
    best = {
        name: sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2] for name, runs in found.items()
    }
    print(f"\n{'':14} {'median s':>9} {'unshared GB':>12}")
    for name, run in best.items():
        print(f"{name:14} {run['seconds']:9.3f} {run['unshared_gb']:12.2f}")
    ratio = best["first_opening"]["seconds"] / best["plain_read"]["seconds"]
    print(json.dumps({"bench": "collection", "rows": given.rows, "ratio": round(ratio, 3), **best}))


if __name__ == "__main__":
    main()
