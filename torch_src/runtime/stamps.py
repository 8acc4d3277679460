"""Stamps: every artifact NAME carries NAME.stamp.json, which says what made it.

A stamp is a flat dictionary of the settings that matter and fingerprints of the inputs (their content, not
their time). A result whose stamp still agrees is up to date; one that disagrees is made again and the log
says which field changed. A sealed stamp also holds the fingerprint of the artifact itself.
"""

import json
from pathlib import Path

import xxhash

from torch_src.runtime.files import write_json

CODE_VERSION = 1  # raised when the same settings and inputs would give other results
READ_SIZE = 1 << 22
CONTENT = "content"  # field of a sealed stamp


def fingerprint_files(paths) -> str:
    """Return 16 hex digits over the contents of the files, in the order given."""
    digest = xxhash.xxh3_64()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(READ_SIZE):
                digest.update(piece)
        digest.update(b"\0end of file\0")
    return digest.hexdigest()


def fingerprint_text(text: str) -> str:
    """Return 16 hex digits over a text."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8"))


def stamp_path(artifact) -> Path:
    """Return the path of an artifact's stamp."""
    return Path(f"{artifact}.stamp.json")


def write_stamp(artifact, stamp: dict) -> None:
    """Write the stamp; the artifact must be complete by then, since a stamp means that it is."""
    write_json(stamp_path(artifact), {**stamp, "code": CODE_VERSION})


def seal(artifact, stamp: dict) -> None:
    """Write the stamp with the fingerprint of the artifact: a later change to a byte of it is noticed."""
    write_stamp(artifact, {**stamp, CONTENT: fingerprint_files([artifact])})


def is_sealed(artifact) -> bool:
    """Return whether the artifact is, byte for byte, what its sealed stamp was written for."""
    stamp = read_stamp(artifact)
    return stamp is not None and stamp.get(CONTENT) == fingerprint_files([artifact])


def clear_stamp(artifact) -> None:
    """Remove the stamp: the artifact is about to change."""
    stamp_path(artifact).unlink(missing_ok=True)


def changed_files(folder: Path, written: dict[str, str]) -> list[Path]:
    """Return the files of {name: fingerprint} that are no longer there, or other than they were."""
    paths = {folder / name: known for name, known in written.items()}
    return [path for path, known in paths.items() if not path.exists() or fingerprint_files([path]) != known]


def record_seal(record: dict) -> str:
    """Return 16 hex digits over a JSON record, its own `seal` left out."""
    rest = {key: value for key, value in record.items() if key != "seal"}
    return fingerprint_text(json.dumps(rest, sort_keys=True))


def sealed(record: dict) -> dict:
    """Return the record with its seal."""
    return {**record, "seal": record_seal(record)}


def seal_holds(record: dict) -> bool:
    """Return whether the record is, entry by entry, the one that was sealed."""
    return record.get("seal") == record_seal(record)


def changes(old: dict, new: dict) -> list[str]:
    """Return `field: from -> to` of every field in which the two stamps differ."""
    new = json.loads(
        json.dumps({**new, "code": CODE_VERSION})
    )  # as it reads back from disk: tuples become lists
    return differences({k: v for k, v in old.items() if k != CONTENT}, new)


def differences(old: dict, new: dict) -> list[str]:
    """Return `field: from -> to` of every field in which two records differ."""
    fields = [field for field in {**old, **new} if old.get(field) != new.get(field)]
    return [f"{field}: {old.get(field, 'unknown')} -> {new.get(field, 'gone')}" for field in fields]


def read_stamp(artifact) -> dict | None:
    """Return the artifact's stamp; None when the artifact or its stamp is missing or unreadable."""
    path = stamp_path(artifact)
    try:
        stamp = json.loads(path.read_text(encoding="utf-8")) if Path(artifact).exists() else None
    except (OSError, ValueError, RecursionError):
        return None
    return stamp if isinstance(stamp, dict) else None


def up_to_date(artifact, stamp: dict, log) -> bool:
    """Return whether the artifact exists and its stamp agrees with `stamp`; `say` is told why not."""
    old = read_stamp(artifact)
    if old is None:
        if Path(artifact).exists():
            log(f"{artifact}: unfinished, or without a stamp that says what made it; it is made again")
        return False
    different = changes(old, stamp)
    if different:
        log(f"{artifact}: out of date, made again ({'; '.join(different)})")
    elif CONTENT in old and old[CONTENT] != fingerprint_files([artifact]):
        log(f"{artifact}: its bytes are not those that were written; it is made again")
        return False
    return not different
