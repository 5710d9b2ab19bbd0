"""The bodies of the HTTP interface, and one shape for every error.

What a request may hold is checked by ``twotower.retrieval.request``.
"""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict

from twotower.retrieval.query import Query
from twotower.retrieval.request import (
    ALLOWED_FILTER,
    InvalidQueryError,
    RetrieveRequest,
    allowed_k,
    check_k,
    parse,
    query_of,
    shown,
    unknown_key,
)


class BadRequest(Exception):
    """A request that is answered with an error of the one shape."""

    def __init__(
        self,
        message: str,
        allowed: str,
        status: int = 422,
        code: str = "invalid_request",
    ) -> None:
        """Keep what the answer says."""
        super().__init__(message)
        self.status = status
        self.content = error_body(code, message, allowed)


def error_body(
    code: str, message: str, allowed: str, details: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    """Return the JSON of an error: what was wrong, what is allowed, and an entry for each thing wrong."""
    return {"error": {"code": code, "message": message, "allowed": allowed, "details": details or []}}


class ScoredItem(BaseModel):
    """One item of an answer; the fields that were asked for stand beside these two."""

    model_config = ConfigDict(extra="allow")

    item_id: str
    """The item."""
    score: float
    """Inner product, a cosine unless ``model.normalize`` is off; with strategy popular, the share of users
    who have had the item."""


class RetrieveAnswer(BaseModel):
    """Answer of POST /v1/retrieve."""

    generation: str
    """Id of the generation that answered."""
    items: list[ScoredItem]
    """Best first; fewer than k only where fewer allowed items exist."""
    strategy: str
    """personal, history, features or popular; similar for similar items."""
    partial: bool
    """Whether a part of the index did not answer."""
    missing_groups: list[str]
    """The parts of the index that did not answer."""
    timing_ms: dict[str, float]
    """Milliseconds: encode, search, total."""


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 or more."""

    error: dict[str, Any]
    """code, message, allowed, and details: a list of {where, message, allowed}."""


def parse_retrieve(body: bytes, max_k: int) -> Query:
    """Return the query of a request body.

    Raises:
        BadRequest: the body is not JSON (400) or no object (422).
        InvalidQueryError: it is not a request.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(
            f"the body is not JSON: {error}",
            'a JSON object such as {"user_id": "1", "k": 10}',
            400,
            "malformed_json",
        ) from None
    if not isinstance(value, dict):
        raise BadRequest(
            f"the body is {shown(value)}, not an object", 'a JSON object such as {"user_id": "1", "k": 10}'
        )
    return query_of(parse(value, max_k, RetrieveRequest))


def parse_similar(
    parameters: list[tuple[str, str]], max_k: int
) -> tuple[int, list[str], dict[str, Any] | None]:
    """Return k, the fields and the filter of the query string of GET /v1/items/{item_id}/similar.

    Raises:
        InvalidQueryError: an unknown parameter, one twice, or a value that is not allowed.
    """
    known = ("k", "fields", "filter")
    k, fields, predicates = 20, list[str](), None
    names = [name for name, _ in parameters]
    for name, value in parameters:
        if name not in known:
            raise InvalidQueryError([{"where": name, **unknown_key(name, known)}])
        if name == "fields":
            fields += [f for f in value.split(",") if f]
            continue
        allowed = allowed_k(max_k) if name == "k" else ALLOWED_FILTER
        refused = InvalidQueryError([{"where": name, "message": f"is {shown(value)}", "allowed": allowed}])
        if names.count(name) > 1:
            raise refused
        if name == "filter":
            predicates = _object(value)
            if predicates is None:
                raise refused
        elif value.isascii() and value.isdigit() and len(value) < 10:
            k = int(value)
        else:
            raise refused
    check_k(k, max_k)
    return k, fields, predicates


def _object(text: str) -> dict[str, Any] | None:
    """Return the object of a JSON text, None where it is something else."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
