"""Requests at a constant rate, whatever the server does: an open-loop load generator.

    python -m benchmarks.load http://127.0.0.1:8000 --rate 200 --duration 10 --users users.txt

Request number i is due i / rate seconds after the start, and its latency runs from then until its answer is
complete. It is sent at once on a connection that waits; while all are busy it queues, and that counts. So a
server that stalls is seen by all requests that were due meanwhile (no coordinated omission). A request that
got no answer in time counts with the time it waited; other failures are counted by kind, and their times are
left out, since a refusal is quick.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httptools

from benchmarks.arrivals import CONNECTION, GARBAGE, TIMEOUT, Arrival, LoadResult, percentile

OnAnswer = Callable[[int, int, bytes], str | None]
"""Called with the number of the body, the status and the content; returns a kind of error, None for none."""
PERCENTILES = (50, 90, 99, 99.9)
_MAX_CONNECTIONS = 900
"""select() takes files up to number 1,023."""
_EXPIRE_S = 0.05
_RECONNECT_S = 0.05


def run_load(
    url: str,
    bodies: Sequence[bytes],
    rate: float,
    duration: float,
    connections: int,
    on_answer: OnAnswer | None = None,
    timeout: float = 5.0,
    headers: Sequence[tuple[str, str]] = (),
    until: Callable[[], bool] | None = None,
) -> LoadResult:
    """Send requests at a constant rate, one body after the other, and wait for the last answer.

    Args:
        url: POST goes here; without a path, to ``/v1/retrieve``.
        bodies: JSON, one or more.
        rate: requests per second.
        duration: seconds in which requests are due.
        connections: open at the same time, at most 900.
        on_answer: called with each answer; it takes the generator's time, so it must be quick.
        timeout: seconds from when a request is due after which it has failed.
        headers: further headers of each request.
        until: asked before each request; once it says true, no further one is due.

    Raises:
        ValueError: the URL or a number is not allowed.
        OSError: nothing listens there.
    """
    if not (rate > 0 and duration > 0 and timeout > 0 and bodies):
        raise ValueError("rate, duration and timeout must be above 0, and there must be a body")
    if not 1 <= connections <= _MAX_CONNECTIONS:
        raise ValueError(f"connections is {connections}; give 1 to {_MAX_CONNECTIONS}")
    # Timers of select are exact to microseconds, those of epoll and of uvloop to a millisecond.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    collects = gc.isenabled()
    gc.disable()
    try:
        generator = _Generator(url, bodies, on_answer, timeout, headers)
        return loop.run_until_complete(generator.run(rate, duration, connections, until))
    finally:
        loop.close()
        if collects:
            gc.enable()


@dataclass(slots=True)
class _Request:
    """A request that waits for a connection or is on its way."""

    due: float
    """``time.monotonic()`` at which it was due."""
    body: int
    """Number of its body."""


class _Generator:
    """The schedule, the queue and the connections of one run."""

    def __init__(
        self,
        url: str,
        bodies: Sequence[bytes],
        on_answer: OnAnswer | None,
        timeout: float,
        headers: Sequence[tuple[str, str]],
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is no address to load; give one such as http://127.0.0.1:8000")
        self.address = parts.hostname, parts.port or 80
        path = parts.path if parts.path.strip("/") else "/v1/retrieve"
        more = "".join(f"{name}: {value}\r\n" for name, value in headers)
        head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n{more}"
        self.messages = [f"{head}Content-Length: {len(b)}\r\n\r\n".encode() + b for b in bodies]
        self.on_answer = on_answer
        self.timeout = timeout
        self.result = LoadResult()
        self.waiting: deque[_Request] = deque()
        # The one that has been idle longest is next, so that the server closes none for being idle.
        self.free: deque[_Connection] = deque()
        self.open: set[_Connection] = set()
        self.opening: set[asyncio.Task[None]] = set()
        self.unfinished = 0
        self.all_due = False
        self.finished = asyncio.Event()
        self.failure: Exception | None = None

    async def run(
        self, rate: float, duration: float, connections: int, until: Callable[[], bool] | None
    ) -> LoadResult:
        for _ in range(connections):
            await self._connect()
        cpu = time.thread_time()
        begin = self.result.begin = time.monotonic()
        expiring = asyncio.create_task(self._expire())
        for number in range(max(1, round(rate * duration))):
            due = begin + number / rate
            # Behind its schedule it must still read answers.
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if self.failure is not None or (until is not None and until()):
                break
            self.result.late_s.append(time.monotonic() - due)
            self.unfinished += 1
            self.waiting.append(_Request(due, number % len(self.messages)))
            self.send_next()
        self.all_due = True
        self._check_finished()
        await self.finished.wait()
        self.result.wall_s = time.monotonic() - begin
        self.result.cpu_s = time.thread_time() - cpu
        tasks = [expiring, *self.opening]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in self.open:
            connection.transport.abort()
        # Sockets are closed in the loop's next turn.
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        return self.result

    def send_next(self) -> None:
        """Send what has waited longest while a connection is free."""
        while self.waiting and self.free:
            connection = self.free.popleft()
            if not connection.transport.is_closing():
                request = self.waiting.popleft()
                connection.send(request, self.messages[request.body])

    def ended(self, request: _Request, error: str | None) -> None:
        """Note what became of a request."""
        latency = time.monotonic() - request.due
        self.result.arrivals.append(Arrival(request.due - self.result.begin, latency, error))
        self.unfinished -= 1
        self._check_finished()

    def _check_finished(self) -> None:
        if self.all_due and self.unfinished == 0:
            self.finished.set()

    def answered(self, request: _Request, status: int, content: bytes) -> None:
        """Judge an answer."""
        error = None if status == 200 else f"status {status}"
        if self.on_answer is not None:
            try:
                error = self.on_answer(request.body, status, content) or error
            except Exception as failure:
                # The parser, which calls this, would take it for its own.
                self.failure = failure
                self.finished.set()
        self.ended(request, error)

    def lost(self, connection: _Connection) -> None:
        """Open another connection for one that has closed."""
        self.open.discard(connection)
        if not self.finished.is_set():
            task = asyncio.get_running_loop().create_task(self._reconnect())
            self.opening.add(task)
            task.add_done_callback(self.opening.discard)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), *self.address)
        self.open.add(connection)
        self.free.append(connection)

    async def _reconnect(self) -> None:
        while True:
            try:
                await self._connect()
            except OSError:
                await asyncio.sleep(_RECONNECT_S)
            else:
                self.send_next()
                return

    async def _expire(self) -> None:
        """End what has waited or been on its way for too long."""
        while True:
            await asyncio.sleep(min(_EXPIRE_S, self.timeout / 4))
            oldest = time.monotonic() - self.timeout
            while self.waiting and self.waiting[0].due < oldest:
                self.ended(self.waiting.popleft(), TIMEOUT)
            for connection in list(self.open):
                if connection.request is not None and connection.request.due < oldest:
                    connection.fail(TIMEOUT)


class _Connection(asyncio.Protocol):
    """One keep-alive connection, which has at most one request on its way."""

    transport: asyncio.Transport

    def __init__(self, owner: _Generator) -> None:
        self.owner = owner
        self.request: _Request | None = None
        self.parser = httptools.HttpResponseParser(self)
        self.parts: list[bytes] = []

    def send(self, request: _Request, message: bytes) -> None:
        self.request = request
        self.transport.write(message)

    def fail(self, error: str) -> None:
        """End the request and the connection."""
        request, self.request = self.request, None
        if request is not None:
            self.owner.ended(request, error)
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(CONNECTION)
        self.owner.lost(self)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.fail(GARBAGE)

    def on_message_begin(self) -> None:
        self.parts = []

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_message_complete(self) -> None:
        request, self.request = self.request, None
        if request is None:
            self.transport.abort()
            return
        self.owner.answered(request, self.parser.get_status_code(), b"".join(self.parts))
        if self.parser.should_keep_alive():
            self.owner.free.append(self)
            self.owner.send_next()
        else:
            self.transport.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Load a service and print what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="POST goes here; without a path, to /v1/retrieve")
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second (200)")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds (10)")
    parser.add_argument("--connections", type=int, default=64, help="open at the same time (64)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds until a request has failed (5)")
    parser.add_argument("--k", type=int, default=100, help="items for each of --users (100)")
    parser.add_argument("--token-file", type=Path, help="file of the bearer token")
    bodies = parser.add_mutually_exclusive_group(required=True)
    bodies.add_argument("--users", type=Path, help="file of user ids, one a line, asked for in turn")
    bodies.add_argument("--bodies", type=Path, help="file of JSON requests, one a line, sent in turn")
    bodies.add_argument("--body", action="append", help="a JSON request; several are sent in turn")
    options = parser.parse_args(argv)
    if options.users:
        users = [line.strip() for line in options.users.read_text().splitlines() if line.strip()]
        requests = [json.dumps({"user_id": user, "k": options.k}) for user in users]
    else:
        requests = options.body or options.bodies.read_text().splitlines()
    headers = []
    if options.token_file:
        headers.append(("Authorization", f"Bearer {options.token_file.read_text().strip()}"))
    try:
        result = run_load(
            options.url,
            [request.encode() for request in requests],
            options.rate,
            options.duration,
            options.connections,
            timeout=options.timeout,
            headers=headers,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    _print(result, options.rate)


def _print(result: LoadResult, rate: float) -> None:
    figures: dict[str, object] = {"count": result.count, "errors": result.errors.total()}
    for percent in PERCENTILES:
        value = result.percentile_ms(percent)
        # JSON has no word for the percentile of nothing.
        figures[f"p{percent:g}_ms"] = None if math.isnan(value) else float(f"{value:.4g}")
    figures["rate"] = rate
    figures["achieved_rate"] = float(f"{result.achieved_rate:.4g}")
    figures["client_cpu_share"] = float(f"{result.cpu_share:.3g}")
    figures["client_late_p99_ms"] = float(f"{percentile(result.late_s, 99) * 1e3:.3g}")
    for name, value in figures.items():
        print(f"{name:<18}  {value}")
    for kind, number in result.errors.most_common():
        print(f"  {kind:<16}  {number}")
    print(json.dumps({"name": "load", "figures": figures, "errors": result.errors}))


if __name__ == "__main__":
    main()
