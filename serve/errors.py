"""One shape for every error: which exception becomes which status and body."""

from __future__ import annotations

from urllib.parse import quote

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serve.gateway import NoGroupError
from serve.schemas import BadRequest, error_body
from twotower.errors import NotAllowedError
from twotower.retrieval.query import UnknownItemError
from twotower.retrieval.request import InvalidQueryError

_ROUTES = ", ".join(
    [
        "POST /v1/retrieve",
        "POST /v1/retrieve/batch",
        "GET /v1/items/{item_id}/similar",
        "GET /v1/generation",
        "GET /healthz",
        "GET /readyz",
        "GET /docs",
    ]
)

_MAX_PATH = 200


def json_response(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response whose body is JSON."""
    return Response(content, status, headers, "application/json")


def add_error_handlers(api: FastAPI) -> None:
    """Answer every error of an application in the one shape."""

    @api.exception_handler(BadRequest)
    async def bad_request(request: Request, error: BadRequest) -> Response:
        return json_response(orjson.dumps(error.content), error.status, error.headers)

    @api.exception_handler(NotAllowedError)
    async def not_allowed(request: Request, error: NotAllowedError) -> Response:
        unknown = isinstance(error, UnknownItemError)
        details = error.details if isinstance(error, InvalidQueryError) else None
        code = "unknown_item" if unknown else "invalid_request"
        content = error_body(code, error.message, error.allowed, details)
        return json_response(orjson.dumps(content), 404 if unknown else 422)

    @api.exception_handler(NoGroupError)
    async def no_group(request: Request, error: NoGroupError) -> Response:
        content = error_body("index_unavailable", str(error), "try again in a second")
        return json_response(orjson.dumps(content), 503, {"Retry-After": "1"})

    @api.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        path = path if path.isprintable() else quote(path)
        path = path if len(path) <= _MAX_PATH else path[:_MAX_PATH] + "..."
        message = f"{request.method} {path}: {error.detail}"
        code = {404: "no_such_path", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return json_response(
            orjson.dumps(error_body(code, message, _ROUTES)), error.status_code, dict(error.headers or {})
        )
