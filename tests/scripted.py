"""A server of HTTP that answers as a script says: well, late, in drops, in half, or not at all."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {
    "generation": "g7",
    "items": [
        {"item_id": "5", "score": 0.5, "title": "Heat"},
        {"item_id": "a/b", "score": 0.25, "title": None},
    ],
    "strategy": "personal",
    "partial": True,
    "missing_groups": ["1"],
    "timing_ms": {"encode": 0.1, "search": 0.2, "total": 0.3},
}
BUSY = {"error": {"code": "overloaded", "message": "too busy", "allowed": "try again", "details": []}}


@dataclass
class Received:
    """One request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    peer: tuple[str, int]
    at: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Script = Callable[[BaseHTTPRequestHandler, int], None]


@dataclass
class Server:
    """A server that answers as a script of (handler, number of the request) says."""

    url: str
    script: Script | None = None
    received: list[Received] = field(default_factory=list)


@contextlib.contextmanager
def scripted_server() -> Iterator[Server]:
    """Listen on a free port until the block ends."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            # The client breaks connections on purpose.
            with contextlib.suppress(ConnectionError, TimeoutError):
                super().handle_one_request()
                return
            self.close_connection = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with lock:
                number = len(state.received)
                state.received.append(
                    Received(self.command, self.path, headers, body, self.client_address, time.monotonic())
                )
            assert state.script is not None
            state.script(self, number)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        http_server.daemon_threads = False
        state = Server(f"http://127.0.0.1:{http_server.server_port}")
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            http_server.shutdown()
            thread.join()


def send(
    handler: BaseHTTPRequestHandler, content: Any = GOOD, status: int = 200, length: int = 0, **headers: str
) -> None:
    """Send an answer; ``length`` is how many bytes more than there are its header promises."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) + length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def then(*scripts: Script) -> Script:
    """Answer each request by the next script, and the rest by the last."""
    return lambda handler, number: scripts[min(number, len(scripts) - 1)](handler, number)


def good(handler: BaseHTTPRequestHandler, number: int) -> None:
    send(handler)


def busy(handler: BaseHTTPRequestHandler, number: int) -> None:
    send(handler, BUSY, 503)


def drop(handler: BaseHTTPRequestHandler, number: int) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut(handler: BaseHTTPRequestHandler, number: int) -> None:
    send(handler, length=10)
    drop(handler, number)
