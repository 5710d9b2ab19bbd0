"""A service with a token and tight limits, as its clients meet it: over sockets, through HAProxy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.http.conftest import Client, Reply, Shop
from tests.http.test_serve_stop import Command, check_the_end, command_line, listening
from twotower.cluster.processes import Process, descendants, free_port

TOKEN = "only-for-this-test-0123456789"
MARKER = "marker-user-4711"
ITEM_MARKER = "marker-item-4712"
LOOPBACK = "0100007F"
PROXY_PATIENCE_S = 5
AUTHORIZED = f"Authorization: Bearer {TOKEN}\r\n"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


@dataclass(frozen=True)
class Guarded:
    """The running service."""

    client: Client
    command: Command
    port: int
    folder: Path
    """Ray's temporary files."""

    def ask(self, body: Any, path: str = "/v1/retrieve", **headers: str) -> Reply:
        """Send one POST with the token."""
        return self.client.send("POST", path, body, {**HEADERS, **headers})

    def raw(self, data: bytes) -> bytes:
        """Send bytes over a connection of their own, and return all that comes back until it is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            return read_answer(connection)

    def processes(self, name: str) -> list[Process]:
        """Return the processes whose command line holds a text; HAProxy is started anew now and then."""
        self.command.started |= descendants(self.command.process.pid)
        return [p for p in self.command.started if p.alive and name in command_line(p.pid)]


def read_answer(connection: socket.socket) -> bytes:
    """Return one answer with its body."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
        head, end, body = data.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if end and lengths and len(body) >= int(lengths[0].partition(b":")[2]):
            break
    return data


@pytest.fixture(scope="module")
def guarded(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """``jobs.serve`` with a token, a short queue and little patience."""
    folder = tmp_path_factory.mktemp("guarded")
    token = folder / "token"
    token.write_text(f"{TOKEN}\n")
    values = shop.config.to_json()
    port = free_port()
    values["serve"] |= {"port": port, "token_file": str(token)}
    values["serve"]["limits"] |= {"max_queued": 2, "body_timeout_s": 1.0, "deadline_ms": 60_000}
    path = folder / "shop.yaml"
    path.write_text(yaml.safe_dump(values))
    # The names of Ray's sockets must be short.
    ray_folder = Path(tempfile.mkdtemp(prefix="tt"))
    patience = {"RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(PROXY_PATIENCE_S)}
    command = Command(folder, "--config", str(path), RAY_TMPDIR=str(ray_folder), **patience)
    try:
        command.wait_until_ready()
        yield Guarded(Client(f"http://127.0.0.1:{port}"), command, port, ray_folder)
    finally:
        command.clean_up()
        shutil.rmtree(ray_folder, ignore_errors=True)


def check_error(reply: Reply, status: int, code: str) -> None:
    assert reply.status == status, reply.content
    assert reply.json["error"]["code"] == code
    assert reply.json["error"]["allowed"]
    assert reply.headers["x-request-id"]
    assert reply.names.count("x-request-id") == 1


def test_a_token_is_asked_for(guarded: Guarded) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {TOKEN}x"}):
        reply = guarded.client.send("POST", "/v1/retrieve", {"k": 3}, headers)
        check_error(reply, 401, "unauthorized")
        assert reply.headers["www-authenticate"].startswith("Bearer")
        check_error(guarded.client.send("GET", "/v1/generation", None, headers), 401, "unauthorized")
    assert guarded.ask({"k": 3}).status == 200
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert guarded.client.get(path).status == 200


def test_a_replica_has_the_priority_of_processes_that_start(guarded: Guarded) -> None:
    """Or each of these would take its cores from it, for as long as it imports."""
    (replica,) = guarded.processes("ServeReplica")
    (raylet,) = guarded.processes("raylet/raylet")
    started_with = os.getpriority(os.PRIO_PROCESS, raylet.pid)
    assert os.getpriority(os.PRIO_PROCESS, replica.pid) == started_with
    settings = guarded.client.get("/readyz").json["settings"]
    assert settings["active"]["RAY_worker_niceness"] == "0"


def test_what_listens_where(guarded: Guarded) -> None:
    haproxy = guarded.processes("haproxy -db")
    (replica,) = guarded.processes("ServeReplica")
    (fallback,) = guarded.processes("ProxyActor")
    # The service itself: HAProxy's HTTP port, its metrics and statistics; the replica's own HTTP port; and
    # the proxy that Serve keeps beside HAProxy.
    front = listening(set(haproxy))
    assert {address for address, _ in front} == {LOOPBACK}
    assert (LOOPBACK, guarded.port) in front
    assert len(front) == 3
    http = [(address, port) for address, port in listening({replica}) if 30_000 <= port <= 31_000]
    assert [address for address, _ in http] == [LOOPBACK]
    assert LOOPBACK in {address for address, _ in listening({fallback})}
    # All else is Ray's own, which docs/serving-security.md says how to fence: only these listen elsewhere,
    # and nothing there answers as the service does.
    ray = (
        "gcs_server",
        "raylet/raylet",
        # Their metrics, unless the only address of the node is loopback.
        "dashboard/dashboard.py",
        "autoscaler/_private/monitor.py",
        "DashboardAgent",
        "RuntimeEnvAgent",
        "ServeController",
        "HAProxyManager",
        "ProxyActor",
        "ServeReplica",
        "IDLE",
    )
    seen, ports = set(), set()
    for process in guarded.processes(""):
        wide = {port for address, port in listening({process}) if address != LOOPBACK}
        if wide:
            names = [name for name in ray if name in command_line(process.pid)]
            assert len(names) == 1, command_line(process.pid)
            seen |= set(names)
            ports |= wide
    assert seen >= {"gcs_server", "raylet/raylet", "ServeReplica"}
    assert not ports & {port for _, port in front | set(http)}
    with ThreadPoolExecutor(len(ports)) as pool:
        assert not any(pool.map(answers_as_the_service, ports))
    assert answers_as_the_service(guarded.port)


def answers_as_the_service(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            return b'{"status":"ok"}' in read_answer(connection)
    except OSError:
        return False


UNREADABLE = "unreadable"
BODY = b'{"k": 2}'
POST = b"POST /v1/retrieve HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED.encode()
GET = b"GET /v1/generation HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED.encode()
LENGTH = b"Content-Length: 8\r\n"
RAW: list[tuple[str, bytes, int, str]] = [
    ("a body", POST + LENGTH + b"\r\n" + BODY, 200, ""),
    (
        "chunks",
        POST + b'Transfer-Encoding: chunked\r\n\r\n3\r\n{"k\r\n5\r\n": 2}\r\n0\r\n\r\n',
        200,
        "",
    ),
    ("wrong chunks", POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, UNREADABLE),
    ("two lengths", POST + LENGTH + b"Content-Length: 9\r\n\r\n" + BODY, 400, UNREADABLE),
    ("a length that is none", POST + b"Content-Length: -8\r\n\r\n" + BODY, 400, UNREADABLE),
    ("a declared large body", POST + b"Content-Length: 99999999999\r\n\r\n", 413, "body_too_large"),
    ("a body that stops", POST + b"Content-Length: 80\r\n\r\n" + BODY, 408, "body_timeout"),
    ("compressed", POST + LENGTH + b"Content-Encoding: gzip\r\n\r\n" + BODY, 415, "unsupported_media_type"),
    ("a form", POST + LENGTH + b"Content-Type: text/plain\r\n\r\n" + BODY, 415, "unsupported_media_type"),
    (
        "another charset",
        POST + LENGTH + b"Content-Type: application/json; charset=utf-16\r\n\r\n" + BODY,
        415,
        "unsupported_media_type",
    ),
    (
        "a time limit of Ray's own",
        POST + LENGTH + b"X-Request-Timeout-Seconds: 0.000001\r\n\r\n" + BODY,
        200,
        "",
    ),
    ("two tokens", POST + AUTHORIZED.encode() + LENGTH + b"\r\n" + BODY, 401, "unauthorized"),
    ("a deadline of 0", POST + LENGTH + b"X-Deadline-Ms: 0\r\n\r\n" + BODY, 422, "invalid_request"),
    ("a request id of bytes", GET + b"X-Request-ID: \xff\xfe\r\n\r\n", 400, "malformed_header"),
    ("a header of bytes", GET + b"serve_multiplexed_model_id: \xff\r\n\r\n", 400, "malformed_header"),
    (
        "a path of bytes",
        GET.replace(b"generation", b"items/\xff/similar") + b"\r\n",
        400,
        UNREADABLE,
    ),
    ("an encoded path", GET.replace(b"generation", b"items/%ff%00/similar") + b"\r\n", 404, "unknown_item"),
    ("a way up", GET.replace(b"generation", b"items/..%2f..%2fx/similar") + b"\r\n", 404, "unknown_item"),
    ("a slash at the end", GET.replace(b"generation", b"generation/") + b"\r\n", 404, "no_such_path"),
    ("a long path", GET.replace(b"generation", b"x" * 30_000) + b"\r\n", 400, UNREADABLE),
    ("a long header", GET + b"X-Long: " + b"x" * 30_000 + b"\r\n\r\n", 400, UNREADABLE),
    ("no HTTP", b"EHLO example.org\r\n\r\n", 400, UNREADABLE),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", 400, UNREADABLE),
    ("OPTIONS", b"OPTIONS" + POST[4:] + b"\r\n", 405, "method_not_allowed"),
    ("TRACE", b"TRACE" + POST[4:] + b"\r\n", 405, "method_not_allowed"),
]


@pytest.mark.parametrize(("data", "status", "code"), [row[1:] for row in RAW], ids=[row[0] for row in RAW])
def test_what_comes_over_a_connection(guarded: Guarded, data: bytes, status: int, code: str) -> None:
    head, _, body = guarded.raw(data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    # What HAProxy can not read is no request: it has no id, and the answer is HAProxy's own.
    assert (b"x-request-id: " in head.lower()) == (code != UNREADABLE)
    if code == UNREADABLE:
        assert b"<h1>400 Bad request</h1>" in body
        return
    assert b"content-type: application/json" in head.lower()
    if status == 200:
        assert len(json.loads(body)["items"]) == 2
    else:
        error = json.loads(body)["error"]
        assert set(error) == {"code", "message", "allowed", "details"}
        assert error["code"] == code
        assert error["message"]
        assert error["allowed"]


def test_head_is_answered_like_get_without_the_body(guarded: Guarded) -> None:
    last = b"Connection: close\r\n\r\n"
    for path, status in ((b"/healthz", 200), (b"/", 200), (b"/v1/retrieve", 405)):
        get = GET.replace(b"/v1/generation", path)
        # The connection is closed after the second answer: what comes is all of both.
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=20) as connection:
            connection.sendall(b"HEAD" + get[3:] + b"\r\n" + get + last)
            data = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        first, second, body = data.split(b"\r\n\r\n", 2)
        for head in (first, second):
            assert head.startswith(b"HTTP/1.1 %d " % status)
            assert b"\r\ncontent-length: %d\r\n" % len(body) in head.lower() + b"\r\n"


def test_a_replica_that_says_nothing_is_given_up(guarded: Guarded) -> None:
    (replica,) = guarded.processes("ServeReplica")
    os.kill(replica.pid, signal.SIGSTOP)
    try:
        reply = guarded.ask({"k": 3}, **{"X-Request-ID": "late"})
    finally:
        os.kill(replica.pid, signal.SIGCONT)
    check_error(reply, 504, "deadline_exceeded")
    assert reply.headers["x-request-id"] == "late"
    assert "retry-after" not in reply.headers
    # HAProxy may have taken it out meanwhile.
    deadline = time.monotonic() + 60
    while guarded.ask({"k": 3}).status != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_slow_clients_hold_up_nobody(guarded: Guarded) -> None:
    slow = [socket.create_connection(("127.0.0.1", guarded.port), timeout=20) for _ in range(150)]
    try:
        for place, connection in enumerate(slow):
            # Some send nothing, some half a head, some half a body.
            connection.sendall([b"", POST, POST + b"Content-Length: 80\r\n\r\n" + BODY][place % 3])
        for _ in range(20):
            assert guarded.ask({"k": 3}).status == 200
        for connection in slow[2::3]:
            answer = read_answer(connection)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"body_timeout" in answer
            assert b"x-request-id" in answer.lower()
    finally:
        for connection in slow:
            connection.close()


def test_clients_that_do_not_read_hold_up_nobody(guarded: Guarded) -> None:
    request = POST.replace(b"/v1/retrieve", b"/v1/retrieve/batch")
    body = json.dumps({"requests": [{"k": 60, "fields": ["title", "genres"]}] * 20}).encode()
    whole = request + b"Content-Length: %d\r\n\r\n" % len(body) + body
    deaf = []
    try:
        for _ in range(40):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", guarded.port))
            connection.sendall(whole)
            deaf.append(connection)
        for _ in range(20):
            assert guarded.ask({"k": 3}).status in (200, 503)
        statuses = [guarded.ask({"k": 3}).status for _ in range(20)]
        assert statuses == [200] * 20
    finally:
        for connection in deaf:
            connection.close()


def anonymous_memory(process: Process) -> int:
    """Return the bytes of a process's memory that no file backs."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) << 10


def test_overload(guarded: Guarded) -> None:
    (replica,) = guarded.processes("ServeReplica")
    requests = [{"user_id": str(user % 37), "k": 50, "fields": ["title"]} for user in range(60)]
    connections = 60
    memory = []
    with ThreadPoolExecutor(connections) as pool:
        for _ in range(3):
            replies = list(
                pool.map(lambda _: guarded.ask({"requests": requests}, "/v1/retrieve/batch"), range(200))
            )
            answered = [reply for reply in replies if reply.status == 200]
            refused = [reply for reply in replies if reply.status != 200]
            # How many of each is a matter of the machine's speed.
            assert answered
            assert refused
            for reply in answered:
                assert len(reply.json["answers"]) == len(requests)
            for reply in refused:
                check_error(reply, 503, "overloaded")
                assert int(reply.headers["retry-after"]) >= 1
            # Nothing is left behind that would keep others waiting.
            assert [guarded.ask({"k": 3}).status for _ in range(10)] == [200] * 10
            memory.append(anonymous_memory(replica))
    assert memory[-1] - memory[0] < 64 << 20


def test_deadlines_under_load(guarded: Guarded) -> None:
    requests = [{"user_id": str(user % 37), "k": 50} for user in range(60)]

    def ask(place: int) -> Reply:
        deadline = "1" if place % 2 else "30000"
        return guarded.ask({"requests": requests}, "/v1/retrieve/batch", **{"X-Deadline-Ms": deadline})

    statuses = set()
    with ThreadPoolExecutor(12) as pool:
        for place, reply in enumerate(pool.map(ask, range(240))):
            if reply.status == 504:
                assert place % 2
                check_error(reply, 504, "deadline_exceeded")
            elif reply.status == 503:
                check_error(reply, 503, "overloaded")
            statuses.add(reply.status)
    # A batch enters alone, by the number of its requests, so that few wait until their deadline.
    assert {200, 503} <= statuses <= {200, 503, 504}


def test_no_log_names_a_user_or_an_item(guarded: Guarded) -> None:
    sent = [
        guarded.ask({"k": 3, "user_id": MARKER, "history": [ITEM_MARKER], "exclude_items": [ITEM_MARKER]}),
        guarded.ask({"requests": [{"k": 3, "user_id": MARKER}]}, "/v1/retrieve/batch"),
        guarded.ask({"k": 0, "user_id": MARKER}),
        guarded.ask({"k": 3, "user_id": [MARKER]}),
        guarded.ask({"k": 3, MARKER: 1}),
        guarded.ask({"k": 3, "filter": {"year": {"gte": MARKER}}}),
        guarded.ask(b'{"k": 3, "user_id": "' + MARKER.encode()),
        guarded.client.send("GET", f"/v1/items/{ITEM_MARKER}/similar", None, HEADERS),
        guarded.client.send("GET", f"/v1/items/1003/similar?k={MARKER}", None, HEADERS),
        guarded.client.send("GET", f"/{MARKER}", None, HEADERS),
        guarded.client.send("POST", f"/v1/generation?user={MARKER}", None, HEADERS),
        guarded.client.send("GET", f"/v1/items/{ITEM_MARKER}/similar"),
    ]
    assert [reply.status for reply in sent] == [200, 200, 422, 422, 422, 422, 400, 404, 422, 404, 405, 401]
    # A client that goes in the middle of its request, and one that HAProxy does not understand.
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        connection.sendall(POST + b"Content-Length: 900\r\n\r\n" + MARKER.encode())
    guarded.raw(b"GET /" + MARKER.encode() + b" \xff\r\n\r\n")
    # So many that whatever is buffered on its way to a file is written.
    for _ in range(30):
        guarded.ask({"k": 0, "user_id": MARKER})
    haproxy = guarded.processes("haproxy -db")
    arguments = command_line(haproxy[0].pid).split()
    configuration = Path(arguments[arguments.index("-f") + 1])
    assert "option httplog" not in configuration.read_text()
    folders = [guarded.folder, configuration.parent]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    logs = [path for path in files if path.suffix in (".log", ".out", ".err")]
    assert any("replica_" in path.name for path in logs), files
    assert len(logs) > 10
    for path in [*files, guarded.command.printed]:
        content = path.read_bytes()
        assert MARKER.encode() not in content, path
        assert ITEM_MARKER.encode() not in content, path
        assert TOKEN.encode() not in content, path


def test_nothing_is_left_after_ctrl_c(guarded: Guarded) -> None:
    """The last test of this service."""
    assert TOKEN not in check_the_end(guarded.command, guarded.port, "Ctrl-C")
