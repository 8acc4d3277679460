"""The HTTP service as an ASGI application.

POST /search, POST /v1/embeddings (OpenAI's format), POST /v1/rerank (that of Jina and Cohere),
GET /v1/models, GET /health, GET /openapi.json.
"""

import base64
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import anyio.to_thread
import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from script.lib.serve.guard import Guard, error
from script.lib.server import allowed_hosts
from torch_src.runtime.errors import UserError, first_line
from torch_src.tools.batching import Call, Late, Left
from torch_src.tools.page_error import NotReadyError, PageError
from torch_src.tools.search_parts import OFF, READY, WORKING
from torch_src.tools.search_service import LONGEST_QUESTION, SearchService, require_ready
from torch_src.tools.serve_hparams import ServeHparams

RETRIEVER, RERANKER = "retriever", "reranker"  # names of the models
SIDES = ("query", "passage")
MODELS = (RETRIEVER, *(f"{RETRIEVER}-{side}" for side in SIDES), RERANKER)
DESCRIPTION = "Search, embeddings in OpenAI's format, re-ranking in that of Jina and Cohere."


class Problem(BaseModel):
    """Why a request failed."""

    message: str
    type: str
    param: str | None
    code: int


class Error(BaseModel):
    error: Problem


class Passage(BaseModel):
    rank: int = Field(description="from 1")
    row: int = Field(description="in the collection, from 0")
    pid: str = Field(description="empty without pids")
    text: str
    score: float = Field(description="that the list is sorted by")
    logit: float | None = Field(description="of the re-ranker; null without re-ranking")
    ranks: dict[str, int] = Field(description="in the lists that were re-ranked or fused")


class Result(BaseModel):
    query: str
    hits: list[Passage]
    truncated: bool = Field(description="whether the question was too long for the retriever")
    warning: str
    seconds: dict[str, float] = Field(description="of the steps, for all requests of the batch")


class Results(BaseModel):
    results: list[Result]
    reranked: bool


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="numbers, or base64 of little-endian float32")


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Document(BaseModel):
    text: str


class Relevance(BaseModel):
    index: int
    relevance_score: float = Field(description="the sigmoid of the logit, from 0 to 1")
    document: Document | None = None


class Reranking(BaseModel):
    model: str
    results: list[Relevance]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class State(BaseModel):
    state: str = Field(description="ready, working, missing, error or off")
    message: str
    done: int = Field(description="blocks of vectors, while they are encoded")
    total: int


class Health(BaseModel):
    status: Literal["ready", "loading", "error"]
    passages: int
    parts: dict[str, State]


def build_app(service: SearchService, hp: ServeHparams, key: str = "") -> FastAPI:
    """Return the application. key: that requests must carry; empty: none."""
    longest = min(hp.max_chars, LONGEST_QUESTION)
    Question = Annotated[str, Field(min_length=1, max_length=longest, pattern=r"[^\s\x00-\x20\x7f-\x9f]")]
    Text = Annotated[str, Field(min_length=1, max_length=hp.max_chars)]

    class SearchRequest(BaseModel):
        query: Question | Annotated[list[Question], Field(min_length=1, max_length=hp.max_texts)]
        topk: int = Field(10, ge=1, le=hp.topk, description="passages of each question")
        rerank: bool | None = Field(None, description="unset: if there is a re-ranker")

    class EmbeddingRequest(BaseModel):
        model_config = ConfigDict(extra="allow")  # `user`, and `dimensions`, which must be the model's
        model: str = Field(description=" or ".join(MODELS[:3]), examples=[RETRIEVER])
        input: Text | Annotated[list[Text], Field(min_length=1, max_length=hp.max_texts)]
        encoding_format: Literal["float", "base64"] = "float"
        input_type: Literal["query", "passage"] | None = Field(
            None, description="unset: by the end of the model's name, else passage"
        )

    class TextDocument(BaseModel):
        text: Text

    class RerankRequest(BaseModel):
        query: Text
        documents: Annotated[list[Text | TextDocument], Field(min_length=1, max_length=hp.max_texts)]
        model: str = Field(RERANKER, examples=[RERANKER])
        top_n: int | None = Field(None, ge=1, description="unset: all")
        return_documents: bool = False

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # one thread for each request that may run; they wait for the models' threads
        anyio.to_thread.current_default_thread_limiter().total_tokens = hp.max_requests + 8
        yield

    problems = {422: "a field is missing or wrong", 503: "loading, or too many requests", 504: "too late"}
    problems |= {400: "not JSON", 403: "another site", 404: "no such model", 413: "too large"}
    problems |= {401: "no key"} if key else {}
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": text} for status, text in sorted(problems.items())
    }
    dependencies = [Depends(HTTPBearer(auto_error=False))] if key else []  # the guard checks it
    app = FastAPI(
        title="Passage retrieval", description=DESCRIPTION, version="1", lifespan=lifespan,
        docs_url=None, redoc_url=None, responses=responses,
    )  # fmt: skip
    app.add_middleware(Guard, key=key, max_requests=hp.max_requests, timeout_s=hp.timeout_s)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(hp.host), www_redirect=False)
    _add_error_handlers(app)

    @app.post("/search", response_model=Results, dependencies=dependencies)
    def search(given: SearchRequest, request: Request) -> Response:
        """Return the best passages of one question or of several."""
        with_reranker = service.reranker.state != OFF and service.reranker.loaded is not None
        rerank = with_reranker if given.rerank is None else given.rerank
        if rerank and not with_reranker and service.reranker.state not in (READY, WORKING):
            raise HTTPException(422, "there is no re-ranker here; omit `rerank`")
        queries = [given.query] if isinstance(given.query, str) else given.query
        column = "reranked" if rerank else service.first_stage
        answers = service.answers(queries, column, given.topk, request.scope["call"])
        results = [
            {
                "query": answer.question, "hits": [vars(hit) for hit in answer.hits],
                "truncated": answer.cut, "warning": answer.warning, "seconds": answer.seconds,
            }
            for answer in answers
        ]  # fmt: skip
        return JSONResponse({"results": results, "reranked": rerank})

    @app.post("/v1/embeddings", response_model=Embeddings, dependencies=dependencies)
    def embeddings(given: EmbeddingRequest, request: Request) -> Response:
        """Return the vectors of texts: of questions or, by default, of passages."""
        if given.model not in MODELS[:3]:
            raise HTTPException(404, f"no such model (expected {', '.join(MODELS[:3])})")
        side = given.input_type or given.model.removeprefix(RETRIEVER).strip("-") or "passage"
        texts = [given.input] if isinstance(given.input, str) else given.input
        dense, call = require_ready(service.dense, "dense"), call_of(request)
        ((vectors, tokens),) = call.results([dense.encode(side, texts)])
        dimensions = (given.model_extra or {}).get("dimensions")
        if dimensions not in (None, vectors.shape[1]):
            raise HTTPException(422, f"dimensions: the vectors of this model have {vectors.shape[1]}")
        found = [
            {"object": "embedding", "index": index, "embedding": encoded(vector, given.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": found, "model": given.model, "usage": usage})

    @app.post("/v1/rerank", response_model=Reranking, dependencies=dependencies)
    def rerank(given: RerankRequest, request: Request) -> Response:
        """Return the documents by their relevance to a question, the most relevant first."""
        if given.model != RERANKER:
            raise HTTPException(404, f"no such model (expected {RERANKER})")
        texts = [each if isinstance(each, str) else each.text for each in given.documents]
        reranker = require_ready(service.reranker, RERANKER)
        (logits,) = call_of(request).results([reranker.submit(given.query, texts)])
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        found = [
            {"index": at, "relevance_score": float(scores[at])}
            | ({"document": {"text": texts[at]}} if given.return_documents else {})
            for at in np.argsort(-logits, kind="stable").tolist()[: given.top_n]
        ]
        return JSONResponse({"model": RERANKER, "results": found})

    @app.get("/v1/models", response_model=Models, dependencies=dependencies)
    def models() -> Response:
        """Return the names that the field `model` takes."""
        found = [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in MODELS]
        return JSONResponse({"object": "list", "data": found})

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "not ready"}})
    def health() -> Response:
        """Return whether the service is ready for all of its requests, or what it waits for."""
        states = {}
        for name, part in service.parts.items():
            states[RETRIEVER if name == "dense" else name] = part.describe()
        for state in states.values():
            del state["zh"]
        status = "ready" if states[RETRIEVER]["state"] == READY else "error"
        if any(state["state"] == WORKING for state in states.values()):
            status = "loading"
        content = {"status": status, "passages": len(service.collection), "parts": states}
        return JSONResponse(content, 200 if status == "ready" else 503)

    return app


def call_of(request: Request) -> Call:
    """Return the deadline of a request, which the guard has set."""
    return request.scope["call"]


def encoded(vector: np.ndarray, encoding_format: str) -> list[float] | str:
    """Return a vector (H,) float32 as numbers or as base64."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error with one line in OpenAI's format."""

    def handle(kind: type[Exception], status: Callable[[Any], tuple[int, str]]) -> None:
        async def handler(_: Request, problem: Exception) -> Response:
            number, reason = status(problem)
            headers = dict(getattr(problem, "headers", None) or {})
            return error(number, reason, **headers)

        app.add_exception_handler(kind, handler)

    handle(RequestValidationError, lambda problem: (422, one_line(problem.errors())))
    handle(HTTPException, lambda problem: (problem.status_code, str(problem.detail)))
    handle(NotReadyError, lambda problem: (503, str(problem)))
    handle(PageError, lambda problem: (422, str(problem)))
    handle(Late, lambda _: (504, "the answer was not ready in time"))
    handle(Left, lambda _: (504, "the caller has left"))
    handle(UserError, lambda problem: (500, first_line(problem)))
    handle(OSError, lambda problem: (500, f"{problem.filename or 'system'}: {problem.strerror or problem}"))


def one_line(problems: Sequence[Any]) -> str:
    """Return what is wrong with a request, never its content."""
    # of a union the kind that fits best
    problem = max(problems, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    field, *inside = problem["loc"][1:] or ["body"]
    place = ".".join([str(field), *(str(part) for part in inside if isinstance(part, int))])
    is_text = place.startswith("input") and problem["type"] == "string_type"
    hint = "; texts, not token ids (in LangChain check_embedding_ctx_length=False)" if is_text else ""
    return f"{place}: {problem['msg']}{hint}"
