"""How long the client waits, and what it asks for again."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler

import pytest

from tests.scripted import BUSY, Server, busy, cut, drop, good, scripted_server, send, then
from twotower.client import Answer, Client, ServiceError

pytestmark = pytest.mark.sockets


@pytest.fixture
def server() -> Iterator[Server]:
    with scripted_server() as server:
        yield server


def test_a_busy_service_is_asked_again_with_the_same_id(server):
    server.script = then(busy, busy, good)
    with Client(server.url) as client:
        assert client.retrieve(k=2).generation == "g7"
    assert len(server.received) == 3
    assert len({request.headers["x-request-id"] for request in server.received}) == 1


def test_a_service_that_stays_busy_is_left_alone(server):
    server.script = busy
    with Client(server.url, retries=2) as client, pytest.raises(ServiceError) as raised:
        client.retrieve(k=2)
    assert len(server.received) == 3
    error = raised.value
    assert (error.status, error.code, error.message, error.allowed) == (
        503,
        "overloaded",
        "too busy",
        "try again",
    )
    with Client(server.url, retries=0) as client, pytest.raises(ServiceError):
        client.retrieve(k=2)
    assert len(server.received) == 4


def test_retry_after_is_waited_for(server):
    server.script = then(lambda handler, _: send(handler, BUSY, 503, Retry_After="1"), good)
    # By default there is time for it.
    with Client(server.url) as client:
        assert client.retrieve(k=2).generation == "g7"
    first, second = server.received
    assert second.at - first.at >= 1.0


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_a_wait_longer_than_the_client_has_ends_the_call_at_once(server, kind):
    value = (
        "30" if kind == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    )
    server.script = then(lambda handler, _: send(handler, BUSY, 503, Retry_After=value), good)
    began = time.monotonic()
    with Client(server.url, timeout_s=20) as client, pytest.raises(ServiceError, match="too busy"):
        client.retrieve(k=2)
    assert len(server.received) == 1
    assert time.monotonic() - began < 20


def test_nonsense_in_retry_after_changes_nothing(server):
    server.script = then(lambda handler, _: send(handler, BUSY, 503, Retry_After="soon"), good)
    with Client(server.url) as client:
        assert client.retrieve(k=2).generation == "g7"


@pytest.mark.parametrize("script", [drop, cut], ids=["before the answer", "in the middle of it"])
def test_a_broken_connection_is_tried_again(server, script):
    server.script = then(good, script, script, good)
    with Client(server.url) as client:
        client.retrieve(k=2)
        assert client.retrieve(k=2).generation == "g7"
    assert len(server.received) == 4
    server.script = script
    with Client(server.url, retries=1) as client, pytest.raises(ServiceError) as raised:
        client.retrieve(k=2)
    assert (raised.value.code, raised.value.status) == ("no_connection", None)
    assert len(server.received) == 6


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(url) as client:
            assert client.ready() is False
            with pytest.raises(
                ServiceError, match=r"no_connection: the connection to http://127.0.0.1:\d+ failed"
            ):
                client.generation()


def wait_for_the_client(handler: BaseHTTPRequestHandler) -> None:
    """Wait until the client has closed the connection."""
    handler.connection.settimeout(20)
    with contextlib.suppress(ConnectionError):
        assert handler.connection.recv(1) == b""
    handler.close_connection = True


def silent(handler: BaseHTTPRequestHandler, number: int) -> None:
    wait_for_the_client(handler)


def stuck(handler: BaseHTTPRequestHandler, number: int) -> None:
    send(handler, length=10)
    wait_for_the_client(handler)


def dripping(handler: BaseHTTPRequestHandler, number: int) -> None:
    send(handler, b"{", length=1_000_000)
    with contextlib.suppress(ConnectionError):
        for _ in range(2_000):
            handler.wfile.write(b" ")
            time.sleep(0.01)
    handler.close_connection = True


def flooding(handler: BaseHTTPRequestHandler, number: int) -> None:
    block = b" " * 100_000
    send(handler, b"{", length=10_000_000_000)
    with contextlib.suppress(ConnectionError):
        while True:
            handler.wfile.write(block)
    handler.close_connection = True


def at_last(client: Client) -> Answer:
    """Return the answer of a server that is asked until a busy machine gives it time for one."""
    for _ in range(100):
        try:
            return client.retrieve(k=2)
        except ServiceError as error:
            if error.code != "timeout":
                raise
    raise AssertionError("no answer in a hundred calls")


@pytest.mark.parametrize("script", [silent, stuck, dripping, flooding])
def test_a_slow_answer_ends_the_call_after_its_time_and_is_not_asked_for_again(server, script):
    server.script = then(script, good)
    began = time.monotonic()
    with Client(server.url, timeout_s=0.2, retries=0) as client:
        with pytest.raises(ServiceError) as raised:
            client.retrieve(k=2)
        assert (raised.value.code, raised.value.status) == ("timeout", None)
        assert "no answer within 0.2 s" in str(raised.value)
        assert time.monotonic() - began < 15
        assert len(server.received) == 1
        # The rest of the slow answer must not be read as the next one.
        assert at_last(client).generation == "g7"


def test_the_service_is_told_how_long_the_client_waits(server):
    def slowly_busy(handler: BaseHTTPRequestHandler, number: int) -> None:
        time.sleep(0.1)
        busy(handler, number)

    server.script = then(slowly_busy, good)
    with Client(server.url, timeout_s=20) as client:
        client.retrieve(k=2)
    first, second = (int(request.headers["x-deadline-ms"]) for request in server.received)
    assert 15_000 < first <= 20_000
    assert second <= first - 100


def test_a_very_patient_client_says_no_more_than_the_service_takes(server):
    server.script = good
    with Client(server.url, timeout_s=3_600) as client:
        client.retrieve(k=2)
    assert server.received[0].headers["x-deadline-ms"] == "600000"
