"""What every HTTP request passes through before its route."""

from __future__ import annotations

import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import Metrics

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
