"""What the search page and the HTTP service share: socket, end of the process, who may send requests."""

import re
import signal
import socket
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch_src.runtime.errors import UserError
from torch_src.runtime.log import log

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ALL_ADDRESSES = ("0.0.0.0", "::")  # with these --host values any host name is answered
LARGEST_BODY = 4 << 20  # bytes of a request


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; UserError if the address is in use or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # asyncio does not set it for our socket: each answer would wait 40 ms for an acknowledgment
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # now: a second server fails at once
    except OSError as error:
        listening.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; pass another --port") from None
    return listening


def address(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: Any, listening: socket.socket, seconds: int = 1) -> None:
    """Serve until Ctrl-C or SIGTERM; open requests get `seconds` to finish, a second signal ends them."""
    import uvicorn

    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=seconds, server_header=False)
    server = uvicorn.Server(config)

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    # A signal is the normal end of this program: exit status 0, not that of an interrupted job.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    thread.join()
    log("stopped")


def allowed_hosts(host: str) -> list[str]:
    """Return the accepted values of the Host header for a server on --host, without ports.

    Others are refused: otherwise a foreign page whose name resolves to 127.0.0.1 (DNS rebinding) could read
    the answers.
    """
    if host in ALL_ADDRESSES:
        return ["*"]
    names = dict.fromkeys((host.lower(), *LOOPBACK))
    return [f"[{name}]" if ":" in name else name for name in names]


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Return whether a POST is JSON that no page of another site can have sent."""
    is_json = headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
    own = origin is None or origin.partition("://")[2] == headers.get("host")
    return is_json and own and site == "same-origin"


def body_bytes(headers: Mapping[str, str]) -> int:
    """Return the length of the body that a request states, 0 if none."""
    length = headers.get("content-length", "")
    return int(length) if re.fullmatch(r"[0-9]{1,12}", length) else 0
