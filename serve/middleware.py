"""What every HTTP request passes through before its route. Outermost: request ids, failures, the token."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from pathlib import Path

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.demo import PAGE_PATHS
from serve.log import log_failure
from serve.metrics import Metrics
from serve.schemas import error_body
from twotower.errors import ConfigError

logger = logging.getLogger("ray.serve")

OPEN = frozenset({*PAGE_PATHS, "/docs", "/openapi.json", "/healthz", "/readyz"})
"""Paths that ask for no token: they hold no data. Load balancers ask for health, and a browser opens the demo
page and the documentation, which it can not send a token to. Every other path asks for one."""

MIN_TOKEN_LENGTH = 16
_REQUEST_ID = b"x-request-id"
_MAX_REQUEST_ID_LENGTH = 200


class Measured:
    """Middleware that counts each request by route and status, and measures how long it took."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap an application."""
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        # What raises before it answers is answered with 500, further out.
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            # The paths of routes are few; those of requests may be endless.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, (time.perf_counter() - start) * 1e3)


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


class Heads:
    """Middleware that answers HEAD with the headers of GET, as RFC 9110 (9.1) asks: monitors send it."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # The server must go on seeing HEAD, and who counts requests the route.
        inner = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, send_without_body)
        finally:
            if "route" in inner:
                scope["route"] = inner["route"]


class Failures:
    """Middleware that answers 500 where a route fails, and logs what failed without the request's values.

    An exception that got further would be logged by the server with its message, which may name a user.
    """

    def __init__(self, app: ASGIApp, log_messages: bool = False) -> None:
        """Wrap an application.

        Args:
            app: is wrapped.
            log_messages: also log the messages of exceptions.
        """
        self.app = app
        self.log_messages = log_messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception as error:
            log_failure("a request failed", error, self.log_messages)
            if scope["type"] == "http" and not started:
                message = "the service failed to answer; the reason is in its log"
                await _answer(send, 500, error_body("internal_error", message, "try again"))


class BearerToken:
    """Middleware that answers 401 to requests without the right bearer token, but for open paths."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        """Wrap an application.

        Args:
            app: is wrapped.
            token: what requests must bring.
        """
        self.app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or _route(scope) in OPEN or self._allows(scope):
            await self.app(scope, receive, send)
            return
        body = error_body(
            "unauthorized",
            "the request brings no valid token",
            "one header Authorization: Bearer TOKEN, with the token of this service",
        )
        await _answer(send, 401, body, [(b"www-authenticate", b'Bearer realm="twotower"')])

    def _allows(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        kind, _, token = values[0].partition(b" ")
        # Takes as long for a token that is nearly right as for any other.
        return kind.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


def read_token(path: Path | str | None) -> str | None:
    """Return the token that a file holds; None without a file.

    Raises:
        ConfigError: the file can not be read, or holds no token.
    """
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise ConfigError(f"token_file {path} can not be read ({reason}); write one line of ASCII") from None
    if len(token) < MIN_TOKEN_LENGTH or not token.isprintable() or " " in token:
        raise ConfigError(
            f"token_file {path} holds no token; write one line of at least {MIN_TOKEN_LENGTH} printable "
            "characters without blanks, such as `openssl rand -hex 32` prints"
        )
    return token


def _route(scope: Scope) -> str:
    """Return the path of a request below the prefix that the application is served at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


async def _answer(
    send: Send, status: int, body: dict[str, object], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    content = orjson.dumps(body)
    length = str(len(content)).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *(headers or [])]})
    await send({"type": "http.response.body", "body": content})
