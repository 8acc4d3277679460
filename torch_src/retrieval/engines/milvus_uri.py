"""Addresses of Milvus: a local file or a server."""

from urllib.parse import urlsplit

from torch_src.runtime.errors import UserError


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
