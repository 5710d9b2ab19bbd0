"""One request to an application, message by message, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI


@dataclass(frozen=True)
class Answer:
    """What an application sent."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error that it holds."""
        error: dict[str, Any] = json.loads(self.content)["error"]
        return error


async def ask(
    api: FastAPI,
    method: str,
    path: str,
    parts: Iterable[bytes] = (b"",),
    headers: Iterable[tuple[str, str]] = (),
    query: str = "",
    root_path: str = "",
    whole: bool = True,
) -> Answer:
    """Send one request, and return the answer.

    Args:
        api: answers.
        method: of the request.
        path: decoded.
        parts: of the body.
        headers: of the request, in any number.
        query: the query string.
        root_path: prefix of the path that the application is served at.
        whole: whether the body ends after its parts; otherwise nothing more comes.
    """
    sent = list(parts)
    messages = [
        {"type": "http.request", "body": part, "more_body": not whole or place < len(sent) - 1}
        for place, part in enumerate(sent)
    ]
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": root_path,
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
        "server": ("test", 80),
        "client": ("test", 1),
        "scheme": "http",
        "http_version": "1.1",
    }
    await api(scope, receive, send)
    start, *bodies = answers
    assert start["type"] == "http.response.start"
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], found, b"".join(body.get("body", b"") for body in bodies))
