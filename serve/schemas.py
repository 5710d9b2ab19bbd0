"""The bodies of the HTTP interface, and one shape for every error.

What a request may hold is checked by ``twotower.retrieval.request``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict

from twotower.config import LimitsConfig
from twotower.retrieval.query import HistoryUse, Query, Strategy
from twotower.retrieval.request import (
    ALLOWED_FILTER,
    LIST_LIMITS,
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
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep what the answer says, and its headers."""
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.content = error_body(code, message, allowed)


_MAX_MESSAGE = 1_000
_MAX_DEPTH = 4
_MAX_DETAILS = 20


def error_body(
    code: str, message: str, allowed: str, details: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    """Return the JSON of an error: what was wrong, what is allowed, and an entry for each thing wrong."""
    # What was wrong may repeat a value of the request, which may be as long as a body.
    cut = [{key: _cut(text) for key, text in detail.items()} for detail in details or []]
    return {"error": {"code": code, "message": _cut(message), "allowed": allowed, "details": cut}}


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."


_DESCRIBED = ConfigDict(use_attribute_docstrings=True)
_OPEN = ConfigDict(use_attribute_docstrings=True, extra="allow")


class ScoredItem(BaseModel):
    """One item of an answer; the fields that were asked for stand beside these two."""

    model_config = _OPEN

    item_id: str
    """The item."""
    score: float
    """Inner product: a cosine, unless ``model.normalize`` is off, and what ``model.item_bias`` adds; with
    strategy popular, the share of users who have had the item."""


class RetrieveAnswer(BaseModel):
    """Answer of POST /v1/retrieve and of similar items."""

    model_config = _DESCRIBED

    generation: str
    """Id of the generation that answered."""
    items: list[ScoredItem]
    """Best first; fewer than k only where fewer allowed items exist."""
    strategy: Strategy
    """What the answer was made from; similar for similar items."""
    history: HistoryUse | None = None
    """What the items of the user's history were read by, of those that the model looks at: their ids
    (``by_id``), their features where the model was not trained with them (``by_features``), or nothing
    (``ignored``). Null for similar items."""
    partial: bool
    """Whether a part of the index did not answer."""
    missing_groups: list[str]
    """The parts of the index that did not answer."""
    timing_ms: dict[str, float]
    """Milliseconds: encode, search, total."""


class BatchAnswer(BaseModel):
    """Answer of POST /v1/retrieve/batch."""

    answers: list[RetrieveAnswer]
    """The answer to each request, in their order; timings are those of the whole batch."""


class GenerationAnswer(BaseModel):
    """Answer of GET /v1/generation."""

    model_config = _OPEN

    id: str
    """Id of the generation that answers now."""
    num_items: int
    """Items that were indexed."""
    num_users: int
    """Users that are known."""
    embedding_dim: int
    """Width of the embeddings."""
    metric: str
    """How vectors are compared."""
    item_fields: list[str]
    """Columns that ``fields`` may name."""
    user_columns: list[str]
    """Columns that ``features`` may give values for."""
    attributes: dict[str, dict[str, Any]]
    """Type and operators of each attribute that ``filter`` may name."""


class HealthAnswer(BaseModel):
    """Answer of GET /healthz."""

    status: str
    """ok"""


class ReadyAnswer(BaseModel):
    """Answer of GET /readyz."""

    model_config = _OPEN

    status: str
    """ready"""
    generation: str
    """Id of the generation that answers now."""


class ErrorDetail(BaseModel):
    """One thing that is wrong with a request."""

    model_config = _DESCRIBED

    where: str
    """Path of the value, such as history[0].time or requests[3].k."""
    message: str
    """What is wrong with it."""
    allowed: str
    """What is allowed there."""


class ErrorBody(BaseModel):
    """What was wrong, what is allowed, and each thing that is wrong."""

    model_config = _DESCRIBED

    code: str
    """A word for programs; it does not change."""
    message: str
    """What was wrong, for people."""
    allowed: str
    """What is allowed, or what to do."""
    details: list[ErrorDetail]
    """The first things that are wrong, where they are several or have a place."""


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorBody


def parse_retrieve(body: bytes, max_k: int, limits: LimitsConfig) -> Query:
    """Return the query of a request body.

    Raises:
        BadRequest: the body is not JSON (400) or no object (422).
        InvalidQueryError: it is not a request.
    """
    return _query(_body_object(body, EXAMPLE), max_k, limits)


def parse_batch(body: bytes, max_k: int, limits: LimitsConfig) -> list[Query]:
    """Return the queries of the body of a batch, one or more.

    Raises:
        BadRequest: the body is not JSON (400) or no object (422).
        InvalidQueryError: it is not a batch, or a request of it is none; one is enough to refuse all.
    """
    example = f'{{"requests": [{EXAMPLE}]}}'
    value = _body_object(body, example)
    allowed = f"a list of 1 to {limits.max_batch} requests such as {example}"
    for name in value:
        if name != "requests":
            raise InvalidQueryError([{"where": name[:80], **unknown_key(name, ("requests",))}])
    requests = value.get("requests")
    problem = ""
    if not isinstance(requests, list):
        problem = f"{shown(requests)} is not allowed" if "requests" in value else "is missing"
    elif not 1 <= len(requests) <= limits.max_batch:
        problem = f"has {len(requests)} requests"
    if problem or not isinstance(requests, list):
        raise InvalidQueryError([{"where": "requests", "message": problem, "allowed": allowed}])
    queries, details = list[Query](), list[dict[str, str]]()
    for place, request in enumerate(requests):
        where = f"requests[{place}]"
        if not isinstance(request, dict):
            message = f"{shown(request)} is not an object"
            details.append({"where": where, "message": message, "allowed": f"a request such as {EXAMPLE}"})
            continue
        try:
            queries.append(_query(request, max_k, limits))
        except InvalidQueryError as error:
            details += [{**d, "where": f"{where}.{d['where']}"} for d in error.details]
    if details:
        raise InvalidQueryError(details[:_MAX_DETAILS])
    total = sum(query.k for query in queries)
    if total > limits.max_batch_k:
        allowed = f"at most {limits.max_batch_k} items in all"
        raise InvalidQueryError(
            [{"where": "requests", "message": f"the sum of k is {total}", "allowed": allowed}]
        )
    return queries


EXAMPLE = '{"user_id": "1", "k": 10}'


def _body_object(body: bytes, example: str) -> dict[str, Any]:
    allowed = f"a JSON object such as {example}"
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}", allowed, 400, "malformed_json") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is {shown(value)}, not an object", allowed)
    return value


def _query(value: dict[str, Any], max_k: int, limits: LimitsConfig) -> Query:
    """Return the query of one request, after checking its size."""
    details = list[dict[str, str]]()
    for name, limit in LIST_LIMITS.items():
        entries, most = value.get(name), getattr(limits, limit)
        if isinstance(entries, list) and len(entries) > most:
            message = f"has {len(entries)} entries"
            details.append({"where": name, "message": message, "allowed": f"at most {most} entries"})
    details += [_too_deep(name) for name in ("features", "filter") if _depth_exceeds(value.get(name))]
    if details:
        raise InvalidQueryError(details)
    return query_of(parse(value, max_k, RetrieveRequest))


def _too_deep(name: str) -> dict[str, str]:
    message = f"is nested more than {_MAX_DEPTH} deep"
    return {"where": name, "message": message, "allowed": f"at most {_MAX_DEPTH} levels of objects and lists"}


def _depth_exceeds(value: Any) -> bool:
    """Return whether lists and objects are nested deeper than anything that is allowed."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = list[Any]()
        for each in level:
            if isinstance(each, (dict, list)):
                inner += each.values() if isinstance(each, dict) else each
        if not inner:
            return False
        level = inner
    return any(isinstance(each, (dict, list)) for each in level)


def parse_similar(
    parameters: list[tuple[str, str]], max_k: int, limits: LimitsConfig
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
            raise InvalidQueryError([{"where": name[:80], **unknown_key(name, known)}])
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
            if _depth_exceeds(predicates):
                raise InvalidQueryError([_too_deep("filter")])
        elif value.isascii() and value.isdigit() and len(value) < 10:
            k = int(value)
        else:
            raise refused
    check_k(k, max_k)
    if len(fields) > limits.max_fields:
        allowed = f"at most {limits.max_fields} entries"
        message = f"has {len(fields)} entries"
        raise InvalidQueryError([{"where": "fields", "message": message, "allowed": allowed}])
    return k, fields, predicates


def _object(text: str) -> dict[str, Any] | None:
    """Return the object of a JSON text, None where it is something else."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
