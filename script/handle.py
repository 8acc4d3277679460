"""Merge part-00, part-01, ... of a passage collection into one file, all_doc.

Two ways to run it:
    python script/handle.py dureader-retrieval-baseline-dataset/passage-collection
    cd .../passage-collection && python handle.py     (after moving this file there)

A passage is identified by its row, counted from 0 over the parts in NUMERIC order, and passage2id.map.json
lists the ids in that order: any other order would assign wrong ids. Uses the standard library only, because
users move this file out of the repository.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 24  # bytes
MERGED = "all_doc"
ID_MAP = "passage2id.map.json"


class UserError(Exception):
    """A mistake of the user or wrong data: printed as one line, exit status 2."""


def numbered_parts(folder: Path) -> list[tuple[int, Path]]:
    """Return (number, file) of every part-NN in the folder, by number: part-2 comes before part-10."""
    found = []
    for path in folder.iterdir():
        match = re.fullmatch(r"part-([0-9]+)", path.name)
        if match and path.is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def checked_parts(folder: Path) -> list[Path]:
    """Return the parts in numeric order; UserError unless they are 0, 1, 2, ... and none is empty."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    numbered = numbered_parts(folder)
    if not numbered:
        raise UserError(f"{folder}: no part-00, part-01, ...; name the passage-collection folder")
    for expected, (number, path) in enumerate(numbered):
        if number < expected:
            raise UserError(f"{path}: duplicate of part {number}; delete one of the two files")
        if number > expected:
            raise UserError(f"{folder}: part-{expected:02d} is missing (found {path.name})")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: empty file; download or unpack it again")
    return [path for _, path in numbered]


def part_chunks(part: Path) -> Iterator[bytes]:
    """Yield the bytes of a part, and a final newline if it has none, so that rows stay separate."""
    last = b""
    with open(part, "rb") as source:
        while chunk := source.read(CHUNK):
            yield chunk
            last = chunk[-1:]
    if last != b"\n":
        yield b"\n"


def rows_if_merged(parts: list[Path], merged: Path) -> list[int] | None:
    """Return the rows of each part if `merged` is exactly the parts in this order, else None.

    Compares bytes: a file merged in another order has the same number of rows.
    """
    if merged.stat().st_size < sum(part.stat().st_size for part in parts):
        return None
    rows = []
    with open(merged, "rb") as file:
        for part in parts:
            rows.append(0)
            for chunk in part_chunks(part):
                if file.read(len(chunk)) != chunk:
                    return None
                rows[-1] += chunk.count(b"\n")
        return None if file.read(1) else rows


def check_space(parts: list[Path], folder: Path) -> None:
    needed = sum(part.stat().st_size + 1 for part in parts)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {needed / 1e9:.2f} GB needed for {MERGED}, {free / 1e9:.2f} GB free")


def merge(parts: list[Path], merged: Path) -> list[int]:
    """Write `merged` and return the rows of each part; an unfinished file has another name."""
    unfinished = merged.with_name(merged.name + ".tmp")
    unfinished.unlink(missing_ok=True)  # from a killed run; its space counts as free
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
    """Return the rows of passage2id.map.json, from its last key; None without a readable one."""
    path = folder / ID_MAP
    if not path.is_file():
        return None
    with open(path, "rb") as source:
        source.seek(max(0, path.stat().st_size - 4096))
        match = re.search(rb'"([0-9]+)"\s*:\s*"[^"]*"\s*\}\s*$', source.read())
    return int(match[1]) + 1 if match else None


def report(rows: list[int], folder: Path) -> None:
    """Print the total; warn if the id map has another number of rows, as when the LAST part is missing."""
    print(f"total    {sum(rows):,} rows from {len(rows)} parts")
    expected = rows_in_id_map(folder)
    if expected is not None and expected != sum(rows):
        found = f"{expected:,} rows, but the parts have {sum(rows):,}"
        print(f"warning: {ID_MAP} has {found}: is a part missing or truncated?", file=sys.stderr)


def collection_folder(argument: str | None) -> Path:
    """Return the given folder, else the folder of this file if it has parts, else the current one."""
    if argument is not None:
        return Path(argument)
    beside = Path(os.path.abspath(__file__)).parent
    return beside if numbered_parts(beside) else Path.cwd()


def run(folder: Path, force: bool) -> None:
    """Merge the parts unless all_doc is up to date."""
    parts = checked_parts(folder)
    merged = folder / MERGED
    if merged.exists() and not force:
        rows = rows_if_merged(parts, merged)
        if rows is not None:
            print(f"{merged}: up to date")
            report(rows, folder)
            return
        print(f"{merged}: differs from the parts in numeric order, merging again", flush=True)
    rows = merge(parts, merged)
    print(f"wrote {merged}  {merged.stat().st_size / 1e9:.2f} GB")
    report(rows, folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Merge part-00, part-01, ... into all_doc in numeric order.")
    parser.add_argument(
        "folder",
        nargs="?",
        help="the passage-collection folder (default: the folder of this file if it has parts, else .)",
    )
    parser.add_argument("--force", action="store_true", help="merge again even if all_doc is up to date")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the terminal's encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        run(collection_folder(args.folder), args.force)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
