"""The HTTP routes over a retriever, without Ray: the same application runs on Ray Serve and on plain uvicorn.

Work is done in a few fixed threads, so that FAISS and torch do not hold up the event loop and keep one
OpenMP pool each.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import twotower
from serve.schemas import (
    BadRequest,
    ErrorAnswer,
    RetrieveAnswer,
    error_body,
    parse_retrieve,
    parse_similar,
)
from twotower.errors import NotAllowedError
from twotower.retrieval.query import Answer, Query, UnknownItemError
from twotower.retrieval.request import InvalidQueryError, RetrieveRequest
from twotower.retrieval.retriever import Retriever

MAX_BODY_BYTES = 1 << 20
_REQUEST_ID = b"x-request-id"
_MAX_REQUEST_ID_LENGTH = 200
_ROUTES = ", ".join(
    [
        "POST /v1/retrieve",
        "GET /v1/items/{item_id}/similar",
        "GET /v1/generation",
        "GET /healthz",
        "GET /readyz",
        "GET /docs",
    ]
)
_EXAMPLE = {"user_id": "42", "k": 10}
_EXAMPLE_HISTORY = {
    "history": ["1", {"item_id": "50", "time": "2026-01-31T10:00:00Z", "weight": 0.75}],
    "k": 10,
    "exclude_items": ["7"],
    "fields": ["title"],
}
_EXAMPLE_FILTER = {
    "user_id": "42",
    "k": 10,
    "filter": {"genres": {"any_of": ["Comedy", "Drama"]}, "year": {"gte": 1990, "lt": 2000}},
}

logger = logging.getLogger("ray.serve")


class Service:
    """A retriever and the threads that work for it."""

    def __init__(
        self, retriever: Retriever, max_k: int, workers: int, settings: dict[str, dict[str, str]]
    ) -> None:
        """Start the threads and answer one query, after which the service is ready.

        Args:
            retriever: answers.
            max_k: largest k of a request.
            workers: requests worked on at the same time.
            settings: what ``/readyz`` says about Ray's settings: those active and those missing.
        """
        self.retriever = retriever
        self.max_k = max_k
        self.settings = settings
        self._pool = ThreadPoolExecutor(workers, "retrieve", initializer=retriever.prepare_thread)
        retriever.warm_up()
        self.ready = True

    async def run(self, work: Callable[..., bytes], *arguments: Any) -> bytes:
        """Return what ``work`` returns, run in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, functools.partial(work, *arguments)
        )

    def retrieve(self, query: Query) -> bytes:
        """Return the answer to a query as JSON."""
        return to_json(self.retriever.retrieve(query))

    def similar(self, item_id: str, k: int, fields: list[str], predicates: dict[str, Any] | None) -> bytes:
        """Return the items most similar to an item, of those that satisfy predicates, as JSON."""
        return to_json(self.retriever.similar(item_id, k, fields, predicates))


def to_json(answer: Answer) -> bytes:
    """Return an answer as the bytes of its JSON."""
    return orjson.dumps(
        {
            "generation": answer.generation,
            "items": answer.items,
            "strategy": answer.strategy,
            "partial": False,
            "missing_groups": [],
            "timing_ms": answer.timing_ms,
        },
        # An item column may hold what JSON has no word for, such as a decimal.
        default=str,
    )


def make_api(service: Service, request_ids: bool = True) -> FastAPI:
    """Return the application that answers over HTTP for a service.

    Args:
        service: answers.
        request_ids: answer with X-Request-ID; Ray Serve does so itself.
    """
    api = FastAPI(
        title="twotower",
        version=twotower.__version__,
        description="Which k items for this user, now?",
        redoc_url=None,
    )
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": text}
        for status, text in (
            (400, "The body is not JSON"),
            (413, "The body is too large"),
            (422, "Not allowed"),
        )
    }
    body = {
        "required": True,
        "content": {
            "application/json": {
                "schema": RetrieveRequest.model_json_schema(),
                "examples": {
                    "user": {"summary": "A known user", "value": _EXAMPLE},
                    "history": {"summary": "A history in the request", "value": _EXAMPLE_HISTORY},
                    "filter": {"summary": "Of some items only", "value": _EXAMPLE_FILTER},
                },
            }
        },
    }

    @api.post(
        "/v1/retrieve",
        summary="The best items for a user",
        response_model=None,
        responses={200: {"model": RetrieveAnswer}, **errors},
        openapi_extra={"requestBody": body},
    )
    async def retrieve(request: Request) -> Response:
        query = parse_retrieve(await _body(request), service.max_k)
        return _json(await service.run(service.retrieve, query))

    parameters = [
        {
            "name": "k",
            "in": "query",
            "schema": {"type": "integer", "minimum": 1, "maximum": service.max_k, "default": 20},
        },
        {
            "name": "fields",
            "in": "query",
            "schema": {"type": "string"},
            "description": "Item columns, comma separated",
        },
        {
            "name": "filter",
            "in": "query",
            "schema": {"type": "string"},
            "description": "Predicates as in POST /v1/retrieve, as JSON",
        },
    ]

    @api.get(
        "/v1/items/{item_id:path}/similar",
        summary="The items most similar to an item",
        response_model=None,
        responses={
            200: {"model": RetrieveAnswer},
            404: {"model": ErrorAnswer, "description": "No such item"},
            422: errors[422],
        },
        openapi_extra={"parameters": parameters},
    )
    async def similar(item_id: str, request: Request) -> Response:
        k, fields, predicates = parse_similar(request.query_params.multi_items(), service.max_k)
        return _json(await service.run(service.similar, item_id, k, fields, predicates))

    @api.get(
        "/v1/generation", summary="What answers: the generation's manifest in short", response_model=None
    )
    async def generation() -> Response:
        return _json(orjson.dumps(service.retriever.describe()))

    @api.get("/healthz", summary="The process is alive", response_model=None)
    async def healthz() -> Response:
        return _json(b'{"status":"ok"}')

    @api.get(
        "/readyz",
        summary="The index is loaded and has answered a query",
        response_model=None,
        responses={503: {"model": ErrorAnswer, "description": "Not ready yet"}},
    )
    async def readyz() -> Response:
        if not service.ready:
            raise BadRequest("the index is being loaded", "try again in a second", 503, "not_ready")
        content = {
            "status": "ready",
            "generation": service.retriever.generation_id,
            "settings": service.settings,
        }
        return _json(orjson.dumps(content))

    _add_error_handlers(api)
    if request_ids:
        api.add_middleware(RequestIds)
    return api


def _json(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, "application/json")


async def _body(request: Request) -> bytes:
    allowed = f"at most {MAX_BODY_BYTES} bytes"
    too_large = BadRequest("the body is too large", allowed, 413, "body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(BadRequest)
    async def bad_request(request: Request, error: BadRequest) -> Response:
        return _json(orjson.dumps(error.content), error.status)

    @api.exception_handler(NotAllowedError)
    async def not_allowed(request: Request, error: NotAllowedError) -> Response:
        unknown = isinstance(error, UnknownItemError)
        details = error.details if isinstance(error, InvalidQueryError) else None
        code = "unknown_item" if unknown else "invalid_request"
        content = error_body(code, error.message, error.allowed, details)
        return _json(orjson.dumps(content), 404 if unknown else 422)

    @api.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = {404: "no_such_path", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return _json(
            orjson.dumps(error_body(code, message, _ROUTES)), error.status_code, dict(error.headers or {})
        )

    @api.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        message = "the service failed to answer; the reason is in its log"
        return _json(orjson.dumps(error_body("internal_error", message, "try again")), 500)


class RequestIds:
    """Middleware that answers with the request's X-Request-ID, or with a new one."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
        request_id = given[:_MAX_REQUEST_ID_LENGTH] or uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (_REQUEST_ID, request_id)]}
            await send(message)

        await self.app(scope, receive, send_with_id)
