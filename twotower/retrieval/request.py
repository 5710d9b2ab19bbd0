"""A question as plain JSON values, such as the body of an HTTP request or a row of a file, to a ``Query``.

Ids may be strings or integers. Nothing is coerced: 42.0 and true are no ids, "5" is no k.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from twotower.errors import NotAllowedError, as_json
from twotower.ids import CONTROL, MAX_ID_LENGTH, id_problem
from twotower.retrieval.query import HistoryItem, Query
from twotower.schema import MAX_WEIGHT

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_SHOWN = 80
_MAX_DETAILS = 20

_ID = f"text of 1 to {MAX_ID_LENGTH} characters without control characters, or an integer"
_TIME = "ISO 8601 text such as 2026-01-31T10:00:00Z (without a zone: UTC)"
ALLOWED_FILTER = 'an object such as {"genres": {"any_of": ["Comedy"]}, "year": {"gte": 1990}}'
ALLOWED = {
    "user_id": f"{_ID}; or null",
    "history": (
        'a list, oldest first, of item ids or {"item_id": ..., "time": ..., "weight": ..., "features": ...}; '
        "or null"
    ),
    "item_id": _ID,
    "time": f"{_TIME}; or null",
    "weight": f"a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}; 1.0 when not given",
    "features": "an object of feature values by column name, of the user or of an item of the history",
    "at": f"{_TIME}; or null, which is now",
    "exclude_seen": "true or false",
    "exclude_items": "a list of item ids",
    "allow_items": "a list of item ids; or null, which allows every item",
    "filter": f"{ALLOWED_FILTER}; or null",
    "fields": "a list of names of item columns",
    "query_id": _ID,
}
"""What each key of a request may hold, for people; k depends on who answers."""


class InvalidQueryError(NotAllowedError):
    """Plain values that are no query: everything that is wrong with them."""

    def __init__(self, details: list[dict[str, str]]) -> None:
        """Take an entry {where, message, allowed} for each thing that is wrong, one or more."""
        message = "; ".join(f"{d['where']}: {d['message']}" for d in details[:5])
        if len(details) > 5:
            message += f"; and {len(details) - 5} more"
        super().__init__(message, details[0]["allowed"])
        self.details = details


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("is no id")
    text = str(value)
    if problem := id_problem(text):
        raise ValueError(problem)
    return text


def _time(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError("is no time")
    try:
        time = datetime.fromisoformat(value)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        return (time - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        raise ValueError("is no ISO 8601 time") from None


def _features(value: Any) -> Any:
    if value is None:
        # What a file has that describes other items only.
        return {}
    if isinstance(value, dict):
        flat = [v for each in value.values() for v in (each if isinstance(each, list) else [each])]
        if any(isinstance(v, (dict, list)) for v in flat):
            raise ValueError("is nested more than a list deep")
    return value


def _entry(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MAX_DETAILS:
        raise ValueError(f"has {len(value)} keys")
    return value if isinstance(value, dict) else {"item_id": value}


# Larger integers are fractions to the parser of JSON.
_ID_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH, "pattern": f"^[^{CONTROL[1:-1]}]*$"},
        {"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 64) - 1},
    ]
}
_TIME_SCHEMA = {"type": "string", "format": "date-time"}
Id = Annotated[str, BeforeValidator(_id), WithJsonSchema(_ID_SCHEMA)]
# A list stops at its first wrong entry: it may be long, and all of it wrong in the same way.
Ids = Annotated[list[Id], Field(fail_fast=True)]
Time = Annotated[int, BeforeValidator(_time), WithJsonSchema(_TIME_SCHEMA)]


class HistoryEntry(BaseModel):
    """One item of a history."""

    model_config = _STRICT

    item_id: Id
    """The item."""
    time: Time | None = None
    """When it happened; without a time it counts at every ``at``."""
    weight: Annotated[float, Field(allow_inf_nan=False, ge=-MAX_WEIGHT, le=MAX_WEIGHT)] = 1.0
    """Weight of the interaction."""
    features: Annotated[dict[str, Any], BeforeValidator(_features)] = {}
    """Values by column of the item table: what the item is read by where the model does not know it."""


_ENTRY_SCHEMA = {
    "anyOf": [
        *_ID_SCHEMA["anyOf"],
        {
            "type": "object",
            "properties": {
                "item_id": _ID_SCHEMA,
                "time": _TIME_SCHEMA,
                "weight": {
                    "type": "number",
                    "default": 1.0,
                    "minimum": -MAX_WEIGHT,
                    "maximum": MAX_WEIGHT,
                },
                "features": {"anyOf": [{"type": "object"}, {"type": "null"}]},
            },
            "required": ["item_id"],
            "additionalProperties": False,
        },
    ]
}


class RetrieveRequest(BaseModel):
    """Body of POST /v1/retrieve. Every key but k has a default."""

    model_config = _STRICT

    k: int
    """Number of items wanted."""
    user_id: Id | None = None
    """The user; an unknown one is served from history or features, and with neither from popularity."""
    history: (
        Annotated[
            list[Annotated[HistoryEntry, BeforeValidator(_entry), WithJsonSchema(_ENTRY_SCHEMA)]],
            Field(fail_fast=True),
        ]
        | None
    ) = None
    """The user's items, oldest first; replaces the stored history."""
    features: dict[str, Any] = {}
    """Values of user feature columns; each replaces the stored value."""
    at: Time | None = None
    """What of the user's history counts: what happened strictly before this moment; now when not given. A
    moment so far back that the generation does not keep all that counts is refused: send ``history`` then.
    The user's columns, what has been seen, and what is popular, are as of the generation all the same."""
    exclude_seen: bool = True
    """Leave out what the user has already had, and the items of ``history``."""
    exclude_items: Ids = []
    """Further items to leave out."""
    allow_items: Ids | None = None
    """Items that alone may be answered; all when not given."""
    filter: dict[str, Any] | None = None
    """Predicates by attribute, all of which an item must satisfy: any_of, all_of and none_of take lists of
    values, gte, gt, lte and lt a bound. GET /v1/generation lists the attributes and their operators."""
    fields: Annotated[list[str], Field(fail_fast=True)] = []
    """Columns of the item table to return with each item."""


class QueryRow(RetrieveRequest):
    """A row of a file of queries: a request with a name of its own."""

    query_id: Id | None = None
    """Carried into the output."""


Request = TypeVar("Request", bound=RetrieveRequest)


def parse(values: Mapping[str, Any], max_k: int, model: type[Request]) -> Request:
    """Return the request that plain JSON values are.

    Args:
        values: by key.
        max_k: largest k.
        model: the kind of request.

    Raises:
        InvalidQueryError: they are none.
    """
    unknown = [name for name in values if name not in model.model_fields]
    if len(unknown) > _MAX_DETAILS:
        # So many that looking at each would take longer than anything else about a request.
        known = tuple(model.model_fields)
        raise InvalidQueryError(
            [{"where": _path((name,)), **unknown_key(name, known)} for name in unknown[:_MAX_DETAILS]]
        )
    try:
        request = model.model_validate(values)
    except ValidationError as error:
        # A misspelled key comes first: it is also why another is missing.
        problems = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise InvalidQueryError([_detail(e, max_k, model) for e in problems[:_MAX_DETAILS]]) from None
    check_k(request.k, max_k)
    return request


def query_of(request: RetrieveRequest) -> Query:
    """Return the query of a request."""
    history = request.history
    return Query(
        k=request.k,
        user_id=request.user_id,
        history=None if history is None else _items(history),
        features=request.features,
        at=request.at,
        exclude_seen=request.exclude_seen,
        exclude_items=request.exclude_items,
        allow_items=request.allow_items,
        filter=request.filter,
        fields=request.fields,
    )


def _items(history: list[HistoryEntry]) -> list[HistoryItem]:
    return [HistoryItem(h.item_id, h.time, h.weight, h.features) for h in history]


def check_k(k: int, max_k: int) -> None:
    """Check that k is in a range.

    Raises:
        InvalidQueryError: it is not.
    """
    if not 1 <= k <= max_k:
        raise InvalidQueryError(
            [{"where": "k", "message": f"{k} is out of range", "allowed": allowed_k(max_k)}]
        )


def allowed_k(max_k: int) -> str:
    """Return what k may be."""
    return f"an integer from 1 to {max_k}"


def _detail(error: Any, max_k: int, request: type[RetrieveRequest]) -> dict[str, str]:
    location = tuple(error["loc"])
    where = _path(location)
    if error["type"] == "extra_forbidden":
        model = HistoryEntry if location[0] == "history" else request
        return {"where": where, **unknown_key(str(location[-1]), tuple(model.model_fields))}
    name = next((str(part) for part in reversed(location) if isinstance(part, str) and part in _KEYS), "")
    if name in ("exclude_items", "allow_items") and len(location) > 1:
        name = "item_id"
    allowed = allowed_k(max_k) if name == "k" else ALLOWED[name]
    if error["type"] == "missing":
        return {"where": where, "message": "is missing", "allowed": allowed}
    if error["type"] == "value_error":
        problem = str(error["ctx"]["error"])
        return {"where": where, "message": f"{shown(error['input'])} {problem}", "allowed": allowed}
    return {"where": where, "message": f"{shown(error['input'])} is not allowed", "allowed": allowed}


_KEYS = {*QueryRow.model_fields, *HistoryEntry.model_fields}


def unknown_key(name: str, known: tuple[str, ...]) -> dict[str, str]:
    """Return what is wrong with a key that there is not, and what is allowed."""
    near = difflib.get_close_matches(name[:_MAX_SHOWN], known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return {"message": f"there is no such key{hint}", "allowed": f"the keys {', '.join(known)}"}


def _path(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:_MAX_SHOWN] or "body"


def shown(value: Any) -> str:
    """Return a value as JSON, shortened."""
    text = as_json(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
