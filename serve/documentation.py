"""The OpenAPI document: what each route takes and answers, with an example of each.

Bodies and query strings are read by ``serve.schemas``, not by FastAPI, so the routes say here what they take.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serve.admission import DEADLINE_HEADER, MAX_DEADLINE_MS
from serve.schemas import ErrorAnswer, ReadyAnswer, error_body
from twotower.config import LimitsConfig
from twotower.retrieval.request import ALLOWED_FILTER, LIST_LIMITS, RetrieveRequest, allowed_k

DESCRIPTION = """Which k items for this user, now?

Every answer has a header X-Request-ID: that of the request, or a new one. Every answer of the service itself
with a status of 400 or more has the body {"error": {"code", "message", "allowed", "details"}}; a proxy in
front of it may refuse in its own words."""

Responses = dict[int | str, dict[str, Any]]

_REF = "#/components/schemas/{model}"
_ITEM = {"item_id": "50", "score": 0.83, "title": "Star Wars (1977)"}
_TIMING = {"encode": 0.4, "search": 1.9, "total": 2.4}
_ANSWER = {
    "generation": "2026-01-31T10-00-00Z-1a2b3c",
    "items": [_ITEM],
    "strategy": "personal",
    "history": {"by_id": 12, "by_features": 0, "ignored": 0},
    "partial": False,
    "missing_groups": [],
    "timing_ms": _TIMING,
}
_REQUEST_EXAMPLES: dict[str, dict[str, Any]] = {
    "user": {"summary": "A known user", "value": {"user_id": "42", "k": 10}},
    "history": {
        "summary": "A history in the request",
        "value": {
            "history": ["1", {"item_id": "50", "time": "2026-01-31T10:00:00Z", "weight": 0.75}],
            "k": 10,
            "exclude_items": ["7"],
            "fields": ["title"],
        },
    },
    "described": {
        "summary": "A history with an item that is newer than the model",
        "value": {
            "history": ["1", {"item_id": "n1", "features": {"genres": ["Comedy"], "year": 2026}}],
            "k": 10,
        },
    },
    "filter": {
        "summary": "Of some items only",
        "value": {
            "user_id": "42",
            "k": 10,
            "filter": {"genres": {"any_of": ["Comedy", "Drama"]}, "year": {"gte": 1990, "lt": 2000}},
        },
    },
}

_Error = tuple[str, str, str, str]
"""What a status means, and code, message and allowed of an example."""
_ERRORS: dict[int, _Error] = {
    400: (
        "The body is not JSON",
        "malformed_json",
        "the body is not JSON: unexpected end of data: line 1 column 1 (char 0)",
        'a JSON object such as {"user_id": "1", "k": 10}',
    ),
    401: (
        "The service asks for a token",
        "unauthorized",
        "the request brings no valid token",
        "one header Authorization: Bearer TOKEN, with the token of this service",
    ),
    404: ("No such item", "unknown_item", "item '7x' is not known", "the id of an item of the catalogue"),
    408: (
        "The body was sent too slowly",
        "body_timeout",
        "the body did not arrive within 5 s",
        "send the whole body at once",
    ),
    413: ("The body is too large", "body_too_large", "the body is too large", "at most 1048576 bytes"),
    415: (
        "The body is of another type or compressed",
        "unsupported_media_type",
        'Content-Type is "text/csv"',
        "application/json, in UTF-8 (with curl: -H 'Content-Type: application/json')",
    ),
    422: ("A value is not allowed", "invalid_request", "k: 0 is out of range", allowed_k(1000)),
    500: (
        "The service failed",
        "internal_error",
        "the service failed to answer; the reason is in its log",
        "try again",
    ),
    503: (
        "Overloaded, not ready yet, or without the shard group that is needed",
        "overloaded",
        "the service is overloaded: too many requests wait",
        "try again after 1 s, or send fewer requests at a time",
    ),
    504: (
        "The deadline passed before there was an answer",
        "deadline_exceeded",
        "the deadline passed before the request could be answered",
        "a larger X-Deadline-Ms, or fewer requests at a time",
    ),
}
_NOT_READY: _Error = ("Not ready yet", "not_ready", "the index is being loaded", "try again in a second")
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "Bearer"}},
    503: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait"}},
}
_BODY_ERRORS = (400, 408, 413, 415, 422, 503, 504)

RETRIEVE_ERRORS = _BODY_ERRORS
SIMILAR_ERRORS = (404, 422, 503, 504)


def responses(model: Any, example: Any, errors: tuple[int, ...] = ()) -> Responses:
    """Return the answers of a route: its own, and those of errors."""
    found: Responses = {200: {"model": model, "content": {"application/json": {"example": example}}}}
    return found | {status: _error(status, _ERRORS[status]) for status in (*errors, 500)}


def ready_responses() -> Responses:
    """Return the answers of GET /readyz."""
    return responses(ReadyAnswer, READY_EXAMPLE) | {503: _error(503, _NOT_READY)}


def _error(status: int, error: _Error) -> dict[str, Any]:
    text, code, message, allowed = error
    where = message.partition(":")[0]
    details = [{"where": where, "message": message.partition(": ")[2], "allowed": allowed}]
    body = error_body(code, message, allowed, details if status == 422 else None)
    found = {"model": ErrorAnswer, "description": text, "content": {"application/json": {"example": body}}}
    return found | ({"headers": dict(_HEADERS[status])} if status in _HEADERS else {})


RETRIEVE_EXAMPLE = _ANSWER
SIMILAR_EXAMPLE = {**_ANSWER, "strategy": "similar", "history": None}
BATCH_EXAMPLE = {"answers": [_ANSWER, {**_ANSWER, "strategy": "history"}]}
GENERATION_EXAMPLE = {
    "id": _ANSWER["generation"],
    "created": "2026-01-31T10:00:00Z",
    "num_items": 1682,
    "num_users": 943,
    "embedding_dim": 64,
    "metric": "inner_product",
    "item_fields": ["title", "genres", "year"],
    "user_columns": ["age"],
    "attributes": {"year": {"type": "integer", "operators": ["any_of", "none_of", "gte", "gt", "lte", "lt"]}},
}
HEALTH_EXAMPLE = {"status": "ok"}
READY_EXAMPLE = {"status": "ready", "generation": _ANSWER["generation"]}


def retrieve_extra() -> dict[str, Any]:
    """Return what POST /v1/retrieve takes."""
    return {"requestBody": _body("RetrieveRequest", _REQUEST_EXAMPLES), "parameters": [_deadline()]}


def batch_extra() -> dict[str, Any]:
    """Return what POST /v1/retrieve/batch takes."""
    value = {"requests": [example["value"] for example in _REQUEST_EXAMPLES.values()]}
    examples = {"three": {"summary": "Three requests", "value": value}}
    return {"requestBody": _body("BatchRequest", examples), "parameters": [_deadline()]}


def similar_extra(max_k: int) -> dict[str, Any]:
    """Return what GET /v1/items/{item_id}/similar takes."""
    return {
        "parameters": [
            {
                "name": "k",
                "in": "query",
                "schema": {"type": "integer", "minimum": 1, "maximum": max_k, "default": 20},
                "description": "Number of items wanted",
            },
            {
                "name": "fields",
                "in": "query",
                "schema": {"type": "string"},
                "description": "Item columns, comma separated",
                "example": "title,year",
            },
            {
                "name": "filter",
                "in": "query",
                "content": {
                    "application/json": {
                        "schema": {"type": "object"},
                        "example": {"genres": {"any_of": ["Comedy"]}},
                    }
                },
                "description": f"Predicates as in POST /v1/retrieve, as JSON: {ALLOWED_FILTER}",
            },
            _deadline(),
        ]
    }


def document(api: FastAPI, max_k: int, limits: LimitsConfig, token: bool) -> None:
    """Have an application answer with this document at ``/openapi.json``.

    Args:
        api: has all its routes.
        max_k: largest k of a request.
        limits: of requests.
        token: whether requests must bring a bearer token.
    """
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(_document(api, max_k, limits, token))
        return made

    api.openapi = openapi  # type: ignore[method-assign]


def _document(api: FastAPI, max_k: int, limits: LimitsConfig, token: bool) -> dict[str, Any]:
    made = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    # FastAPI adds these for routes with parameters; errors have another shape here.
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    schemas["RetrieveRequest"] = _request_schema(max_k, limits)
    schemas["BatchRequest"] = {
        "type": "object",
        "title": "BatchRequest",
        "description": f"Several requests that are answered together; the sum of k is {limits.max_batch_k} "
        "at most. One wrong request refuses all.",
        "properties": {
            "requests": {
                "type": "array",
                "items": {"$ref": _REF.format(model="RetrieveRequest")},
                "minItems": 1,
                "maxItems": limits.max_batch,
            }
        },
        "required": ["requests"],
        "additionalProperties": False,
    }
    request_id = {"schema": {"type": "string"}, "description": "That of the request, or a new one"}
    for path, operations in made["paths"].items():
        for operation in operations.values():
            if token and path.startswith("/v1/"):
                operation["security"] = [{"token": []}]
                operation["responses"]["401"] = _unauthorized()
            for answer in operation["responses"].values():
                answer.setdefault("headers", {})["X-Request-ID"] = request_id
    if token:
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return made


def _request_schema(max_k: int, limits: LimitsConfig) -> dict[str, Any]:
    schema = RetrieveRequest.model_json_schema(ref_template=_REF)
    properties = schema["properties"]
    properties["k"] |= {"minimum": 1, "maximum": max_k}
    for name, limit in LIST_LIMITS.items():
        found = properties[name]
        array = next(kind for kind in [found, *found.get("anyOf", [])] if kind.get("type") == "array")
        array["maxItems"] = getattr(limits, limit)
    return dict(schema)


def _unauthorized() -> dict[str, Any]:
    found = responses(ErrorAnswer, {}, (401,))[401]
    del found["model"]
    found["content"]["application/json"]["schema"] = {"$ref": _REF.format(model="ErrorAnswer")}
    return found


def _body(model: str, examples: dict[str, Any]) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=model)}
    return {"required": True, "content": {"application/json": {"schema": schema, "examples": examples}}}


def _deadline() -> dict[str, Any]:
    return {
        "name": DEADLINE_HEADER,
        "in": "header",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS},
        "description": "Milliseconds that the client still waits; later, work on the request does not begin",
    }
