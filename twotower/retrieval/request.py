"""A question as plain JSON values, such as the body of an HTTP request or a row of a file, to a ``Query``.

Ids may be strings or integers. Nothing is coerced: 42.0 and true are no ids, "5" is no k.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, get_type_hints

from pydantic import BaseModel, Field, ValidationError, create_model

from twotower.errors import NotAllowedError, as_json
from twotower.retrieval.query import ALLOWED_FILTER as ALLOWED_FILTER
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.wire import ALLOWED_ENTRY, ALLOWED_ID, STRICT, HistoryEntry, Http, Id

_MAX_SHOWN = 80
_MAX_DETAILS = 20


class InvalidQueryError(NotAllowedError):
    """Plain values that are no query: everything that is wrong with them."""

    def __init__(self, details: list[dict[str, str]]) -> None:
        """Take an entry {where, message, allowed} for each thing that is wrong, one or more."""
        message = "; ".join(f"{d['where']}: {d['message']}" for d in details[:5])
        if len(details) > 5:
            message += f"; and {len(details) - 5} more"
        super().__init__(message, details[0]["allowed"])
        self.details = details


def http_fields(query: type[Query]) -> dict[str, Http]:
    """Return how each field of a query is written in a request."""
    hints = get_type_hints(query, include_extras=True)
    return {
        field.name: next(fact for fact in hints[field.name].__metadata__ if isinstance(fact, Http))
        for field in dataclasses.fields(query)
    }


class _Request(BaseModel):
    model_config = STRICT

    query_type: ClassVar[type[Query]] = Query
    """What it is made into."""
    http: ClassVar[dict[str, Http]] = {}
    """How each field of that is written."""


def request_model(query: type[Query]) -> Any:
    """Return the pydantic model of the requests that are made into queries of a class.

    Args:
        query: a dataclass, each field of which is annotated with ``Http``.
    """
    fields: dict[str, Any] = {}
    known = {field.name: field for field in dataclasses.fields(query)}
    for name, http in http_fields(query).items():
        default, factory = known[name].default, known[name].default_factory
        if factory is not dataclasses.MISSING:
            default = factory()
        given = ... if default is dataclasses.MISSING else list(default) if default == () else default
        fields[name] = (http.kind, Field(given, description=http.description))
    model: Any = create_model("Request", __base__=_Request, **fields)
    model.query_type, model.http = query, http_fields(query)
    return model


_Described: Any = request_model(Query)


class RetrieveRequest(_Described):  # type: ignore[misc]
    """Body of POST /v1/retrieve. Every key but k has a default."""


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
        request: Request = model.model_validate(values)
    except ValidationError as error:
        # A misspelled key comes first: it is also why another is missing.
        problems = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise InvalidQueryError([_detail(e, max_k, model) for e in problems[:_MAX_DETAILS]]) from None
    check_k(request.k, max_k)
    return request


def query_of(request: RetrieveRequest) -> Query:
    """Return the query of a request."""
    made: type[Query] = request.query_type
    values = {name: getattr(request, name) for name in _NAMES[made]}
    if values["history"] is not None:
        values["history"] = _items(values["history"])
    return made(**values)


class _Names(dict[type[Query], tuple[str, ...]]):
    """Names of the fields of queries, looked up once for each class."""

    def __missing__(self, query: type[Query]) -> tuple[str, ...]:
        self[query] = tuple(field.name for field in dataclasses.fields(query))
        return self[query]


_NAMES = _Names()


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


ALLOWED = {
    **ALLOWED_ENTRY,
    **{name: http.allowed for name, http in http_fields(Query).items() if name != "k"},
    "query_id": ALLOWED_ID,
}
"""What each key of a request may hold, for people; k depends on who answers."""
LIST_LIMITS = {name: http.most for name, http in http_fields(Query).items() if http.most is not None}
"""The limit of ``serve.limits`` on the entries of each key that takes a list."""


def _detail(error: Any, max_k: int, request: type[RetrieveRequest]) -> dict[str, str]:
    location = tuple(error["loc"])
    where = _path(location)
    if error["type"] == "extra_forbidden":
        model = HistoryEntry if location[0] == "history" else request
        return {"where": where, **unknown_key(str(location[-1]), tuple(model.model_fields))}
    fields = request.http
    known = {*request.model_fields, *ALLOWED}
    name = next((str(part) for part in reversed(location) if isinstance(part, str) and part in known), "")
    if name in ("exclude_items", "allow_items") and len(location) > 1:
        name = "item_id"
    words = ALLOWED[name] if name in ALLOWED else fields[name].allowed if name in fields else ""
    allowed = allowed_k(max_k) if name == "k" else words
    if error["type"] == "missing":
        return {"where": where, "message": "is missing", "allowed": allowed}
    if error["type"] == "value_error":
        problem = str(error["ctx"]["error"])
        return {"where": where, "message": f"{shown(error['input'])} {problem}", "allowed": allowed}
    return {"where": where, "message": f"{shown(error['input'])} is not allowed", "allowed": allowed}


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
