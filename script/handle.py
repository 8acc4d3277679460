"""Merge part-00, part-01, ... of a passage collection into one file, all_doc.

Two ways to run it:
    python script/handle.py dureader-retrieval-baseline-dataset/passage-collection
    cd .../passage-collection && python handle.py     (after moving this file there)

A passage is known by its row, counted from 0 over the parts in NUMERIC order, and passage2id.map.json
names the rows in that order: any other order would give every passage another passage's id. Standard
library only, because this file is moved away from the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 24  # bytes read at once
MERGED = "all_doc"
ID_MAP = "passage2id.map.json"


class Fault(Exception):
    """The user's or the data's fault: printed as one line, exit status 2."""


def numbered_parts(folder: Path) -> list[tuple[int, Path]]:
    """(number, file) of every part-NN in folder, by number: part-2 stands before part-10."""
    found = []
    for path in folder.iterdir():
        match = re.fullmatch(r"part-([0-9]+)", path.name)
        if match and path.is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def checked_parts(folder: Path) -> list[Path]:
    """The parts in numeric order; Fault unless they run 0, 1, 2, ... and none is empty."""
    if not folder.is_dir():
        raise Fault(f"{folder}: no such folder")
    numbered = numbered_parts(folder)
    if not numbered:
        raise Fault(f"{folder}: no part-00, part-01, ... here; name the passage-collection folder")
    for expected, (number, path) in enumerate(numbered):
        if number < expected:
            raise Fault(f"{path}: part {number} is there twice, under two spellings")
        if number > expected:
            raise Fault(f"{folder}: part-{expected:02d} is missing, yet {path.name} is there")
        if path.stat().st_size == 0:
            raise Fault(f"{path}: empty, as after a broken download or unpacking")
    return [path for _, path in numbered]


def part_chunks(part: Path) -> Iterator[bytes]:
    """The bytes of one part, with a final newline added where it lacks one: rows are never glued."""
    last = b""
    with open(part, "rb") as source:
        while chunk := source.read(CHUNK):
            yield chunk
            last = chunk[-1:]
    if last != b"\n":
        yield b"\n"


def rows_if_merged(parts: list[Path], merged: Path) -> list[int] | None:
    """Rows of each part if merged holds exactly the parts in this order, else None.

    Bytes are compared, not rows counted: a file merged in another order has the right number of rows.
    """
    if merged.stat().st_size < sum(part.stat().st_size for part in parts):
        return None
    rows = []
    with open(merged, "rb") as there:
        for part in parts:
            rows.append(0)
            for chunk in part_chunks(part):
                if there.read(len(chunk)) != chunk:
                    return None
                rows[-1] += chunk.count(b"\n")
        return None if there.read(1) else rows


def check_space(parts: list[Path], folder: Path) -> None:
    needed = sum(part.stat().st_size + 1 for part in parts)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Fault(f"{folder}: {needed / 1e9:.2f} GB needed for {MERGED}, {free / 1e9:.2f} GB free")


def merge(parts: list[Path], merged: Path) -> list[int]:
    """Write merged anew and return the rows of each part; a half-written file never bears its name."""
    unfinished = merged.with_name(merged.name + ".tmp")
    unfinished.unlink(missing_ok=True)  # left by a killed run: its room counts as free
    check_space(parts, merged.parent)
    rows = []
    try:
        with open(unfinished, "wb") as out:
            for part in parts:
                rows.append(0)
                for chunk in part_chunks(part):
                    out.write(chunk)
                    rows[-1] += chunk.count(b"\n")
                print(f"{part.name}  {rows[-1]:,} rows", flush=True)
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(merged)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows


def rows_in_id_map(folder: Path) -> int | None:
    """Rows that passage2id.map.json names, from its last key alone; None if it cannot be told."""
    path = folder / ID_MAP
    if not path.is_file():
        return None
    with open(path, "rb") as source:
        source.seek(max(0, path.stat().st_size - 4096))
        match = re.search(rb'"([0-9]+)"\s*:\s*"[^"]*"\s*\}\s*$', source.read())
    return int(match[1]) + 1 if match else None


def report(rows: list[int], folder: Path) -> None:
    """Print the total; warn where the map names more or fewer rows, as when the LAST part is missing."""
    print(f"total    {sum(rows):,} rows from {len(rows)} parts")
    named = rows_in_id_map(folder)
    if named is not None and named != sum(rows):
        print(
            f"warning: {ID_MAP} ends at row {named - 1:,}, that is {named:,} rows, but the parts hold "
            f"{sum(rows):,}: is a part missing or cut short?",
            file=sys.stderr,
        )


def collection_folder(argument: str | None) -> Path:
    """The folder named; else the one this file lies in, if it holds parts; else the current one."""
    if argument is not None:
        return Path(argument)
    beside = Path(os.path.abspath(__file__)).parent
    return beside if numbered_parts(beside) else Path.cwd()


def run(folder: Path, force: bool) -> None:
    parts = checked_parts(folder)
    merged = folder / MERGED
    if merged.exists() and not force:
        rows = rows_if_merged(parts, merged)
        if rows is not None:
            print(f"{merged} is up to date: it holds exactly the parts in numeric order")
            report(rows, folder)
            return
        print(f"{merged} is not the parts in numeric order: merging again", flush=True)
    rows = merge(parts, merged)
    print(f"wrote {merged}  {merged.stat().st_size / 1e9:.2f} GB")
    report(rows, folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Merge part-00, part-01, ... into all_doc in numeric order.")
    parser.add_argument(
        "folder",
        nargs="?",
        help="the passage-collection folder (default: where this file "
        "lies if it holds parts, else the current folder)",
    )
    parser.add_argument("--force", action="store_true", help="write all_doc anew even if it is up to date")
    args = parser.parse_args(argv)
    try:
        run(collection_folder(args.folder), args.force)
    except (Fault, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
