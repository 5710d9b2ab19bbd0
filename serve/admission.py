"""Which requests are taken in: as many as there is room for, in time, with bodies within limits.

What can not be taken in is refused at once, so that a replica under more load than it can bear answers as
many requests as it can, and holds a bounded amount of memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from serve.schemas import BadRequest
from twotower.config import LimitsConfig
from twotower.retrieval.request import InvalidQueryError, shown

DEADLINE_HEADER = "X-Deadline-Ms"
MAX_DEADLINE_MS = 600_000
INLINE_BODY_BYTES = 1 << 14
"""Bodies of up to this size are parsed in the event loop: that takes less time than a thread to begin."""

_RETRY_AFTER_S = 1
_CLOSE = {"Connection": "close"}
_DISCARD_S = 1.0
"""How long the rest of a body that is somewhat too large is read before it is refused."""


def overloaded(what: str) -> BadRequest:
    """Return the answer to a request that there is no room for."""
    return BadRequest(
        f"the service is overloaded: {what}",
        f"try again after {_RETRY_AFTER_S} s, or send fewer requests at a time",
        503,
        "overloaded",
        {"Retry-After": str(_RETRY_AFTER_S)},
    )


class Admission:
    """Counts the queries that are worked on or wait, and takes in no more requests than there is room for.

    A batch counts as many queries as it has. It is taken in where there is room for one, since it may have
    more than there is room for at all, and then keeps others out until it is answered.
    """

    def __init__(self, room: int) -> None:
        """Hold nothing yet.

        Args:
            room: queries from which on no request is taken in.
        """
        self._room = room
        self._count = 0

    @contextlib.contextmanager
    def enter(self) -> Iterator[Place]:
        """Count a request as one query, or as many as its place is told, while the block runs.

        Only the event loop may call this.

        Raises:
            BadRequest: there is no room (503).
        """
        place = Place(self)
        place.hold(1)
        try:
            yield place
        finally:
            place.leave()

    def take(self, count: int, held: int) -> None:
        """Count more queries of a request that holds some already.

        Raises:
            BadRequest: others left no room (503).
        """
        if self._count - held >= self._room:
            raise overloaded("too many requests wait")
        self._count += count

    def give_back(self, count: int) -> None:
        """Count queries no longer."""
        self._count -= count


class Place:
    """What one request holds of the room."""

    def __init__(self, admission: Admission) -> None:
        """Hold nothing yet."""
        self._admission = admission
        self._held = 0

    def hold(self, count: int) -> None:
        """Hold so many queries, at least as many as before.

        Raises:
            BadRequest: others left no room (503).
        """
        self._admission.take(count - self._held, self._held)
        self._held = count

    def leave(self) -> None:
        """Hold nothing."""
        self._admission.give_back(self._held)
        self._held = 0


def deadline_exceeded() -> BadRequest:
    """Return the answer to a request that its client waits for no longer than it could be answered in."""
    return BadRequest(
        "the deadline passed before the request could be answered",
        f"a larger {DEADLINE_HEADER}, or fewer requests at a time",
        504,
        "deadline_exceeded",
    )


def check_deadline(deadline: float) -> None:
    """Check that a reading of ``time.monotonic`` is not there yet.

    Raises:
        BadRequest: it has passed (504).
    """
    if time.monotonic() >= deadline:
        raise deadline_exceeded()


def deadline_of(request: Request, default_ms: int) -> float:
    """Return the reading of ``time.monotonic`` until which the client of a request waits.

    Raises:
        InvalidQueryError: its X-Deadline-Ms is not allowed.
    """
    values = request.headers.getlist(DEADLINE_HEADER)
    milliseconds = default_ms
    if values:
        text = values[0]
        valid = len(values) == 1 and text.isascii() and text.isdigit() and len(text) < 10
        if not valid or not 1 <= (milliseconds := int(text)) <= MAX_DEADLINE_MS:
            message = f"is {shown(text)}" + (" and more" if len(values) > 1 else "")
            allowed = f"one integer from 1 to {MAX_DEADLINE_MS}"
            raise InvalidQueryError([{"where": DEADLINE_HEADER, "message": message, "allowed": allowed}])
    return time.monotonic() + milliseconds / 1000


class Bodies:
    """Reads the bodies of requests, within limits of each and of all together."""

    def __init__(self, limits: LimitsConfig) -> None:
        """Hold nothing yet."""
        self._limits = limits
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body of a request; it counts as held until the block ends.

        Raises:
            BadRequest: it is of another type (415), too large (413), sent too slowly (408), or too much is
                held already (503).
        """
        _check_headers(request)
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            if int(length) <= 2 * self._limits.max_body_bytes and "expect" not in request.headers:
                await _discard(request)
            raise self._too_large()
        parts: list[bytes] = []
        try:
            await self._receive(request, parts)
            yield b"".join(parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _receive(self, request: Request, parts: list[bytes]) -> None:
        """Append the parts of a body, which count as held from then on."""
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > self._limits.max_body_bytes:
                        raise self._too_large()
                    if self._held + len(part) > self._limits.max_held_bytes:
                        raise overloaded("too many large bodies wait")
                    self._held += len(part)
                    parts.append(part)
        except TimeoutError:
            raise BadRequest(
                f"the body did not arrive within {self._limits.body_timeout_s:g} s",
                "send the whole body at once",
                408,
                "body_timeout",
                _CLOSE,
            ) from None
        except ClientDisconnect:
            raise BadRequest("the connection was closed", "a whole body", 400, "incomplete_body") from None

    def _too_large(self) -> BadRequest:
        allowed = f"at most {self._limits.max_body_bytes} bytes"
        return BadRequest("the body is too large", allowed, 413, "body_too_large", _CLOSE)


async def _discard(request: Request) -> None:
    """Read a body and keep nothing of it.

    Whose connection is closed while he still sends may lose the answer that was on its way to him.
    """
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DISCARD_S):
            async for _ in request.stream():
                pass


def _check_headers(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise _unsupported(f"Content-Encoding is {shown(encoding)}", "identity: a body is not compressed")
    given = request.headers.get("content-type")
    if given is None:
        return
    kind, *parameters = (part.strip() for part in given.lower().split(";"))
    charsets = [p.removeprefix("charset=").strip('"') for p in parameters if p.startswith("charset=")]
    if kind != "application/json" or any(charset != "utf-8" for charset in charsets):
        raise _unsupported(
            f"Content-Type is {shown(given)}",
            "application/json, in UTF-8 (with curl: -H 'Content-Type: application/json')",
        )


def _unsupported(message: str, allowed: str) -> BadRequest:
    return BadRequest(message, allowed, 415, "unsupported_media_type")
