"""The HTTP routes over a service, without Ray: one application for Ray Serve and for plain uvicorn."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

import twotower
from serve.errors import add_error_handlers, json_response
from serve.middleware import RequestIds
from serve.schemas import BadRequest, ErrorAnswer, RetrieveAnswer, parse_retrieve, parse_similar
from serve.service import Service
from twotower.retrieval.request import RetrieveRequest

MAX_BODY_BYTES = 1 << 20
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
        return json_response(await service.retrieve(query))

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
        return json_response(await service.similar(item_id, k, fields, predicates))

    @api.get(
        "/v1/generation", summary="What answers: the generation's manifest in short", response_model=None
    )
    async def generation() -> Response:
        return json_response(orjson.dumps(service.describe()))

    @api.get("/healthz", summary="The process is alive", response_model=None)
    async def healthz() -> Response:
        return json_response(b'{"status":"ok"}')

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
            "generation": service.front.generation_id,
            **service.status(),
            "settings": service.settings,
        }
        return json_response(orjson.dumps(content))

    add_error_handlers(api)
    if request_ids:
        api.add_middleware(RequestIds)
    return api


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
