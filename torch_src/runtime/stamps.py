"""Stamps and checksums.

A stamp NAME.stamp.json holds the settings and the checksums of the inputs of an artifact, and the checksum of
the artifact itself. The artifact is up to date while all of them agree.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json, write_json

CODE_VERSION = 1  # increased when the same settings and inputs give different results
READ_SIZE = 1 << 22
CHECKSUM = "checksum"
JsonDict = dict[str, Any]


def checksum_files(paths: Iterable[str | Path]) -> str:
    """Return 16 hex digits over the contents of the files, in this order."""
    digest = xxhash.xxh3_64()
    for path in paths:
        with open(path, "rb") as file:
            while data := file.read(READ_SIZE):
                digest.update(data)
        digest.update(b"\0end of file\0")
    return digest.hexdigest()


def checksum_text(text: str) -> str:
    """Return 16 hex digits over a text."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8"))


def checksum_json(entries: JsonDict) -> str:
    """Return 16 hex digits over a dictionary, except its own checksum."""
    rest = {key: value for key, value in entries.items() if key != CHECKSUM}
    return checksum_text(json.dumps(rest, sort_keys=True))


def changed_files(folder: Path, checksums: dict[str, str]) -> list[Path]:
    """Return the files of {name: checksum} that are missing or have another checksum."""
    paths = {folder / name: checksum for name, checksum in checksums.items()}
    return [path for path, known in paths.items() if not path.exists() or checksum_files([path]) != known]


def write_checked_json(path: str | Path, entries: JsonDict) -> None:
    """Write the entries as JSON, with a checksum over them."""
    write_json(path, {**entries, CHECKSUM: checksum_json(entries)})


def read_checked_json(path: str | Path) -> JsonDict | None:
    """Return what write_checked_json wrote; None when the file is missing, damaged or edited."""
    try:
        entries = read_json(path)
    except UserError:
        return None
    return entries if entries.get(CHECKSUM) == checksum_json(entries) else None


def stamp_path(artifact: str | Path) -> Path:
    return Path(f"{artifact}.stamp.json")


def write_stamp(artifact: str | Path, stamp: JsonDict) -> None:
    """Write the stamp of an artifact, which must be complete."""
    write_json(stamp_path(artifact), {**stamp, "code": CODE_VERSION, CHECKSUM: checksum_files([artifact])})


def clear_stamp(artifact: str | Path) -> None:
    """Empty the stamp before the artifact is replaced: still this program's own, but incomplete."""
    write_json(stamp_path(artifact), {})


def read_stamp(artifact: str | Path) -> JsonDict | None:
    """Return the artifact's stamp; None when the artifact or its stamp is missing, empty or unreadable."""
    try:
        return (read_json(stamp_path(artifact)) or None) if Path(artifact).exists() else None
    except (UserError, OSError):
        return None


def stamp_stage(artifact: str | Path) -> str | None:
    """Return the stage in the artifact's stamp, empty if it is incomplete or damaged; None without one."""
    if not stamp_path(artifact).exists():
        return None
    return str((read_stamp(artifact) or {}).get("stage", ""))


def is_intact(artifact: str | Path) -> bool:
    """Return whether the artifact has a stamp with its checksum."""
    stamp = read_stamp(artifact)
    return stamp is not None and stamp.get(CHECKSUM) == checksum_files([artifact])


def changes(old: JsonDict, new: JsonDict) -> list[str]:
    """Return `field: old -> new` for every field in which a stored stamp differs from a new one."""
    as_read = json.loads(json.dumps({**new, "code": CODE_VERSION}))  # tuples become lists
    return differences({k: v for k, v in old.items() if k != CHECKSUM}, as_read)


def differences(old: JsonDict, new: JsonDict) -> list[str]:
    """Return `field: old -> new` for every field that differs."""
    fields = [field for field in {**old, **new} if old.get(field) != new.get(field)]
    return [f"{field}: {old.get(field, 'missing')} -> {new.get(field, 'missing')}" for field in fields]


def up_to_date(artifact: str | Path, stamp: JsonDict, log: Callable[[str], None]) -> bool:
    """Return whether the artifact is intact and its stamp agrees with `stamp`; log why not."""
    if not Path(artifact).exists():
        return False
    old = read_stamp(artifact)
    if old is None:
        log(f"{artifact}: incomplete, or without a readable stamp; rebuilding it")
    elif different := changes(old, stamp):
        log(f"{artifact}: out of date ({'; '.join(different)}); rebuilding it")
    elif not is_intact(artifact):
        log(f"{artifact}: checksum mismatch; rebuilding it")
    else:
        return True
    return False
