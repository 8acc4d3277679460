"""Options of Milvus, checked before the client sees them: address, index, parameters.

Milvus Lite takes any index name and parameter as they are; with some it crashes, others it ignores.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from torch_src.runtime.errors import UserError
from torch_src.runtime.options import in_range, limit_text

Params = dict[str, int | float | str]
LITE_INDEXES = {  # of Milvus Lite, with their parameters for building and for searching
    "FLAT": ((), ()), "AUTOINDEX": ((), ("ef",)),
    "HNSW": (("M", "efConstruction"), ("ef",)), "HNSW_SQ": (("M", "efConstruction"), ("ef",)),
    "IVF_FLAT": (("nlist",), ("nprobe",)), "IVF_SQ8": (("nlist",), ("nprobe",)),
}  # fmt: skip
RANGES = {
    "M": (2, 2048), "efConstruction": (1, 10**6), "nlist": (1, 65536), "m": (1, 32768), "nbits": (1, 64),
    "ef": (1, 10**6), "nprobe": (1, 65536),
}  # fmt: skip


def is_milvus_file(uri: str) -> bool:
    """Return whether a uri of Milvus is a local file (Milvus Lite), not a server."""
    return "://" not in uri


def check_milvus_uri(uri: str) -> None:
    """UserError unless it is a file NAME.db or http(s)://host:port, without credentials or a path."""
    # Messages omit the uri, which may contain credentials.
    if "@" in uri and (":" in uri or not uri.endswith(".db")):
        raise UserError("--milvus_uri: credentials go into the variable MILVUS_TOKEN, not here")
    try:
        parts = urlsplit(uri)
        server = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        server = server and parts.path in ("", "/") and not (parts.query or parts.fragment)
    except ValueError:
        server = False
    if not (uri.endswith(".db") if is_milvus_file(uri) else server):
        raise UserError("--milvus_uri: expected NAME.db or http(s)://host:port, without a path or a query")


def check_milvus_file(uri: str) -> None:
    """UserError when the path of a Milvus Lite file, which is a folder, is taken by something else."""
    path = Path(uri)
    if not is_milvus_file(uri) or not path.exists():
        return
    own = path.is_dir() and (not any(path.iterdir()) or (path / "collections").is_dir())
    if not own:
        raise UserError(f"{uri}: exists and was not written by Milvus Lite; name another --milvus_uri")


def parse_params(option: str, text: str) -> Params:
    """Return `M=16,efConstruction=200` as a dictionary; UserError when it is malformed."""
    params: Params = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise UserError(f"--{option} {text}: expected name=value,name=value")
        number = re.fullmatch(r"-?\d+(\.\d+)?", value)
        params[name] = (float(value) if "." in value else int(value)) if number else value
    return params


def check_index(uri: str, kind: str, params: str) -> None:
    """UserError for an index or a parameter that Milvus Lite does not have, or a number out of range."""
    known = None
    if is_milvus_file(uri):
        if kind not in LITE_INDEXES:
            names = ", ".join(LITE_INDEXES)
            raise UserError(f"--milvus_index {kind}: not an index of Milvus Lite (expected one of {names})")
        known = LITE_INDEXES[kind][0]
    elif not re.fullmatch("[A-Z][A-Z0-9_]*", kind):
        raise UserError(f"--milvus_index {kind}: expected a name such as FLAT, HNSW or IVF_FLAT")
    _check_params("milvus_params", params, known)


def check_search_params(uri: str, params: str) -> None:
    """UserError for a search parameter that Milvus Lite does not have, or that is out of range."""
    known = sorted({name for _, names in LITE_INDEXES.values() for name in names})
    _check_params("search_params", params, known if is_milvus_file(uri) else None)


def _check_params(option: str, text: str, known: Iterable[str] | None) -> None:
    """Check the names, if `known` is given, and the numbers of name=value,name=value."""
    for name, value in parse_params(option, text).items():
        if known is not None and name not in known:
            names = ", ".join(known) or "none"
            raise UserError(f"--{option} {name}={value}: unknown parameter (expected {names})")
        limits = RANGES.get(name)
        if limits and not (isinstance(value, int) and in_range(value, *limits)):
            raise UserError(f"--{option} {name}={value}: expected an integer, {limit_text(*limits)}")
