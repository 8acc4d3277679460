"""What stands before the endpoints: key, origin, size, number and time of requests, and callers who leave."""

import asyncio
import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from script.lib.server import LARGEST_BODY, body_bytes, is_same_origin
from torch_src.tools.batching import Call

HEALTH = "/health"  # answered without a key, and however many requests there are
RETRY_SECONDS = 1  # Retry-After of a refused request
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 408: "timeout_error",
    413: "invalid_request_error", 422: "invalid_request_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def error(status: int, reason: str, **headers: str) -> JSONResponse:
    """Return an error in OpenAI's format."""
    if status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    content = {"message": reason, "type": KINDS.get(status, "server_error"), "param": None, "code": status}
    return JSONResponse({"error": content}, status, headers)


class Guard:
    """An ASGI application around another one, whose requests it refuses, counts and times.

    The inner application finds the request's Call in scope["call"].
    """

    def __init__(self, app: ASGIApp, key: str, max_requests: int, timeout_s: float):
        """key: that requests must carry; empty: none."""
        self.app, self.key, self.max_requests, self.timeout_s = app, key, max_requests, timeout_s
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == HEALTH:
            return await self.app(scope, receive, send)
        refused = self._refuse(Headers(scope=scope), scope["method"])
        if refused is None and self.running >= self.max_requests:
            refused = error(503, f"{self.running} requests are being answered; try again")
        if refused is not None:
            return await refused(scope, receive, send)
        self.running += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.running -= 1

    def _refuse(self, headers: Headers, method: str) -> JSONResponse | None:
        """Return why a request is refused by its headers; None if it is not."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        if self.key and not (is_bearer and hmac.compare_digest(given.strip().encode(), self.key.encode())):
            challenge = {"WWW-Authenticate": "Bearer"}
            return error(401, "the header `Authorization: Bearer KEY` is missing or wrong", **challenge)
        if method == "POST" and not is_same_origin(headers):
            return error(403, "expected Content-Type: application/json, and no page of another site")
        if body_bytes(headers) > LARGEST_BODY:
            return error(413, f"the body has more than {LARGEST_BODY >> 20} MiB")
        return None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(read_body(receive), self.timeout_s)
        except asyncio.TimeoutError:
            return await error(408, "the body did not arrive in time")(scope, receive, send)
        if body is None:
            return
        if len(body) > LARGEST_BODY:
            too_large = error(413, f"the body has more than {LARGEST_BODY >> 20} MiB")
            return await too_large(scope, receive, send)
        scope["call"] = call = Call(self.timeout_s)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        watching = asyncio.create_task(leave_with_caller(receive, call))
        try:
            await self.app(scope, replay, send)
        finally:
            watching.cancel()


async def read_body(receive: Receive) -> bytes | None:
    """Return a request's body, of which more than LARGEST_BODY is not read; None if its sender has left."""
    chunks, size = [], 0
    while size <= LARGEST_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if not message.get("more_body", False):
            break
    return b"".join(chunks)


async def leave_with_caller(receive: Receive, call: Call) -> None:
    """Drop the work of a request whose sender disconnects."""
    message: Any = await receive()
    if message["type"] == "http.disconnect":
        call.leave()
