"""The search page as an ASGI application: one static page, and the JSON that it asks for.

GET /status, GET /search?q=&column=&topk=, POST /feedback.
"""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from script.lib.server import allowed_hosts, body_bytes, is_same_origin
from torch_src.retrieval.hits import Hit
from torch_src.runtime.errors import UserError
from torch_src.tools.feedback import MOST_ABOVE, Feedback
from torch_src.tools.page_error import chinese
from torch_src.tools.search_service import LONGEST_QUESTION, Answer, SearchService, marks

PAGE = Path(__file__).with_name("page.html")
MAX_SHOWN = 2000  # characters of a passage
EXAMPLES, MAX_EXAMPLE = 5, 24  # example questions; characters of one
LARGEST_MARK = 1 << 20  # bytes of a request
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Column = Literal["bm25", "dense", "hybrid", "reranked"]


class Mark(BaseModel):
    """A click on "This is the answer"."""

    query: str
    row: int
    relevant: bool
    column: Column
    rank: int
    above: list[int] = Field(max_length=MOST_ABOVE)


def build_app(service: SearchService, feedback: Feedback, host: str) -> FastAPI:
    """Return the application."""
    page = PAGE.read_text(encoding="utf-8")
    examples = [query for query in service.queries if len(query) <= MAX_EXAMPLE][:EXAMPLES]
    headers = {**HEADERS, "Content-Security-Policy": policy(page)}
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(host), www_redirect=False)

    @app.middleware("http")
    async def protect(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = request.method == "POST" and not (
            is_same_origin(request.headers) and 0 < body_bytes(request.headers) <= LARGEST_MARK
        )
        reply = JSONResponse({"error": "refused"}, 403) if refused else await call_next(request)
        reply.headers.update(headers)
        return reply

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error), "zh": chinese(error)}, 400)

    @app.exception_handler(OSError)
    async def system_error(_: Request, error: OSError) -> JSONResponse:
        return JSONResponse({"error": f"{error.filename or 'system'}: {error.strerror or error}"}, 500)

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/status")
    def status() -> dict[str, Any]:
        return {**service.status(), "examples": examples, "feedback": str(feedback.path)}

    @app.get("/search")
    def search(
        q: Annotated[str, Query(max_length=2 * LONGEST_QUESTION)],
        column: Column,
        topk: Annotated[int, Query(ge=0, le=1000)] = 0,
    ) -> dict[str, Any]:
        answer = service.answer(q, column, topk)
        return {**answer_json(service, answer), "marked": feedback.marked(answer.question)}

    @app.post("/feedback")
    def mark(given: Mark) -> dict[str, Any]:
        return {
            "marked": feedback.add(
                given.query, given.row, given.relevant, given.column, given.rank, given.above
            )
        }

    return app


def answer_json(service: SearchService, answer: Answer) -> dict[str, Any]:
    """Return an answer with the places of the question's words, its passages shortened for the page."""
    wanted = service.marked_terms(answer.question)

    def hit_json(hit: Hit) -> dict[str, Any]:
        text = hit.text[:MAX_SHOWN]
        return {**vars(hit), "text": text, "more": len(hit.text) - len(text), "marks": marks(text, wanted)}

    return {**vars(answer), "hits": [hit_json(hit) for hit in answer.hits]}


def policy(page: str) -> str:
    """Return the content security policy: only the page's own style and script, and only this server."""
    hashes = []
    for element in ("style", "script"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes.append(f"{element}-src 'sha256-{digest}'")
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {'; '.join(hashes)}; {rest}"
