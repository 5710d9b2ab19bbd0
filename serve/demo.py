"""The demo page at ``/``, and what it alone asks for: users, their histories, items by title, filter values.

A user's history is personal data, and whoever can reach the service can read it here. ``demo: false`` in the
arguments of the application (``serve.demo`` of the configuration) leaves out the page and all of ``/demo/``.

No answer of the page loads anything from elsewhere: its Content-Security-Policy allows this origin only, and
no inline script or style.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from serve.admission import deadline_of
from serve.errors import json_response
from serve.schemas import BadRequest
from serve.service import Service
from twotower.generations.generation import Generation
from twotower.ids import MAX_ID_LENGTH
from twotower.retrieval.lookup import UnknownUserError, find_items, find_users, user_history
from twotower.retrieval.request import InvalidQueryError, shown, unknown_key

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/demo/page.css": ("page.css", "text/css; charset=utf-8"),
    **{
        f"/demo/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("page", "asking", "combobox", "filters")
    },
    "/demo/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_PATHS = frozenset(_FILES)
"""Paths of the page itself, which hold no data: they are answered without a token, and ask for it."""
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Kept, but asked about each time: another version of the service has another page.
    "cache-control": "no-cache",
}
_DEFAULT_LIMIT = 10
_MAX_LIMIT = 100
_NUM_VALUES = 24


def add_demo(api: FastAPI, service: Service) -> None:
    """Add the page and its endpoints to an application; the files of the page are read now.

    Raises:
        FileNotFoundError: the package was installed without its page.
    """
    for path, (name, kind) in _FILES.items():
        api.add_api_route(path, _file(name, kind), include_in_schema=False)

    @api.get("/demo/users", include_in_schema=False)
    async def users(request: Request) -> Response:
        text, limit = _text_and_limit(request, "prefix", required=False)
        return await _answer(request, lambda generation: {"users": find_users(generation, text, limit)})

    @api.get("/demo/users/{user_id:path}/history", include_in_schema=False)
    async def history(user_id: str, request: Request) -> Response:
        _parameters(request, ())
        _check_length("user_id", user_id)

        def found(generation: Generation) -> dict[str, Any]:
            return {"user_id": user_id, **asdict(user_history(generation, user_id))}

        try:
            return await _answer(request, found)
        except UnknownUserError as error:
            raise BadRequest(error.message, error.allowed, 404, "unknown_user") from None

    @api.get("/demo/items", include_in_schema=False)
    async def items(request: Request) -> Response:
        text, limit = _text_and_limit(request, "query", required=True)
        return await _answer(
            request,
            lambda generation: {"items": [asdict(item) for item in find_items(generation, text, limit)]},
        )

    @api.get("/demo/values", include_in_schema=False)
    async def values(request: Request) -> Response:
        _parameters(request, ())
        return await _answer(
            request, lambda generation: {"values": generation.attributes.frequent(_NUM_VALUES)}
        )

    async def _answer(request: Request, find: Callable[[Generation], dict[str, Any]]) -> Response:
        """Return what is found in the generation that answers now, as JSON with its id."""
        deadline = deadline_of(request, service.limits.deadline_ms)
        generation = service.front.generation

        def work() -> bytes:
            return orjson.dumps({"generation": generation.id, **find(generation)})

        with service.admission.enter():
            return json_response(await service.workers.run(work, deadline=deadline))


def _file(name: str, kind: str) -> Callable[[Request], Any]:
    """Return a route that answers with a file of the page."""
    content = (_FOLDER / name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": tag}

    async def answer(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return answer


def _text_and_limit(request: Request, name: str, required: bool) -> tuple[str, int]:
    """Return a text and ``limit`` of the query string.

    Raises:
        InvalidQueryError: an unknown parameter, one twice, or a value that is not allowed.
    """
    given = _parameters(request, (name, "limit"))
    text = given.get(name, "").strip()
    if required and not text:
        raise _refused(name, "is missing", f"text of 1 to {MAX_ID_LENGTH} characters")
    _check_length(name, text)
    limit = given.get("limit", str(_DEFAULT_LIMIT))
    number = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 10 else 0
    if not 1 <= number <= _MAX_LIMIT:
        raise _refused("limit", f"is {shown(limit)}", f"an integer from 1 to {_MAX_LIMIT}")
    return text, number


def _parameters(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    """Return the query string, in which each parameter may be once."""
    given = request.query_params.multi_items()
    found: dict[str, str] = {}
    for name, value in given:
        if name not in known:
            allowed = unknown_key(name, known) if known else _NO_PARAMETERS
            raise InvalidQueryError([{"where": name, **allowed}])
        if name in found:
            raise _refused(name, "is there twice", "once")
        found[name] = value
    return found


_NO_PARAMETERS = {"message": "there is no such key", "allowed": "no parameters"}


def _check_length(name: str, text: str) -> None:
    if len(text) > MAX_ID_LENGTH:
        raise _refused(name, f"has {len(text)} characters", f"text of at most {MAX_ID_LENGTH} characters")


def _refused(where: str, message: str, allowed: str) -> InvalidQueryError:
    return InvalidQueryError([{"where": where, "message": message, "allowed": allowed}])
