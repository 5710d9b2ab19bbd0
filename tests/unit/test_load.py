"""The load generator against a small server on this machine whose delays are known."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest

from benchmarks.arrivals import percentile
from benchmarks.load import main, run_load

pytestmark = pytest.mark.sockets

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\nRetry-After: 1\r\n\r\nbusy"


@dataclass
class Server:
    """A server of one thread that answers each request with what ``answer`` returns; None drops it."""

    url: str = ""
    answer: Callable[[int, bytes], Awaitable[bytes | None]] | None = None
    heads: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    connections: int = 0
    served_s: list[float] = field(default_factory=list)
    """Seconds from reading each request to writing its answer."""
    loop: asyncio.AbstractEventLoop | None = None
    listener: asyncio.Server | None = None

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    int(x.split(":")[1]) for x in head.splitlines() if "content-length" in x.lower()
                )
                body = await reader.readexactly(length)
                began = time.monotonic()
                self.heads.append(head)
                self.bodies.append(body)
                assert self.answer is not None
                answer = await self.answer(len(self.bodies) - 1, body)
                if answer is None:
                    break
                writer.write(answer)
                self.served_s.append(time.monotonic() - began)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(answer=at_once)
    up = threading.Event()

    async def serve() -> None:
        state.listener = await asyncio.start_server(state.handle, "127.0.0.1", 0)
        state.url = f"http://127.0.0.1:{state.listener.sockets[0].getsockname()[1]}"
        state.loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        state.stop = lambda: state.loop.call_soon_threadsafe(stop.set)  # type: ignore[attr-defined,union-attr]
        up.set()
        await stop.wait()
        state.listener.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert up.wait(20)
    yield state
    state.stop()  # type: ignore[attr-defined]
    thread.join()


async def at_once(number: int, body: bytes) -> bytes | None:
    return OK


def test_every_request_is_sent_in_turn_on_a_few_connections(server):
    bodies = [f'{{"n":{n}}}'.encode() for n in range(7)]
    result = run_load(server.url, bodies, 400, 0.5, 3, headers=[("Authorization", "Bearer x")])
    assert (result.count, result.errors, server.connections) == (200, Counter(), 3)
    assert Counter(server.bodies) == Counter(bodies[n % 7] for n in range(200))
    assert server.heads[0].startswith("POST /v1/retrieve HTTP/1.1\r\nHost: 127.0.0.1:")
    assert "Authorization: Bearer x\r\n" in server.heads[0]
    assert sorted(a.due_s for a in result.arrivals) == pytest.approx([n / 400 for n in range(200)], abs=1e-6)
    assert result.wall_s >= 0.4975
    assert result.achieved_rate == 200 / result.wall_s
    assert 0 < result.cpu_share < 1
    assert len(result.late_s) == 200


def test_requests_do_not_wait_for_each_others_answers(server):
    async def slow(number: int, body: bytes) -> bytes:
        while len(server.bodies) < 40:
            await asyncio.sleep(0.001)
        return OK

    # A closed loop would wait for ever: no answer comes before all requests are there.
    server.answer = slow
    result = run_load(server.url, [b"{}"], 400, 0.1, 40, timeout=20)
    assert (result.count, result.errors) == (40, Counter())
    first = min(result.arrivals, key=lambda a: a.due_s)
    assert first.latency_s >= 39 / 400


def test_a_stall_is_seen_by_all_that_were_due_meanwhile(server):
    stall_s = 0.5

    async def stalls_once(number: int, body: bytes) -> bytes:
        if number == 20:
            # The one thread of the server sleeps, so that nobody is answered.
            time.sleep(stall_s)
        return OK

    server.answer = stalls_once
    result = run_load(server.url, [b"{}"], 200, 1.0, 2)
    assert (result.count, result.errors) == (200, Counter())
    # The service itself was slow once only. Without queueing the median of all would not know.
    assert sum(seconds > 0.4 for seconds in server.served_s) == 1
    stalled = min(a.due_s for a in result.arrivals if a.latency_s > 0.45)
    behind = [a for a in result.arrivals if stalled < a.due_s < stalled + stall_s - 0.05]
    assert len(behind) >= 85
    # Whoever came t seconds after its begin waited for the rest of it, less what the first was under way.
    assert all(a.latency_s > stalled + stall_s - a.due_s - 0.04 for a in behind)
    assert result.percentile_ms(99) > 450
    (first, second) = result.due_between(stalled, stalled + 0.009)
    assert {first.latency_s, second.latency_s} <= {a.latency_s for a in result.arrivals}


def test_every_kind_of_failure_is_counted_and_none_hides_an_arrival(server):
    async def mixed(number: int, body: bytes) -> bytes | None:
        kind = json.loads(body)
        if kind == "silent":
            await asyncio.sleep(30)
        if kind == "half":
            return OK[:-1]
        return {"good": OK, "busy": BUSY, "garbage": b"hello\r\n\r\n", "drop": None}[kind]

    server.answer = mixed
    kinds = ["good", "busy", "garbage", "drop", "silent", "half"]
    # Long enough that nothing but the silent ones meets it, however busy the machine.
    timeout = 3.0
    result = run_load(server.url, [json.dumps(k).encode() for k in kinds], 300, 0.4, 120, timeout=timeout)
    assert result.count == 120
    assert result.errors == {"status 503": 20, "no HTTP": 20, "connection": 20, "timeout": 40}
    assert sum(a.error is None for a in result.arrivals) == 20
    # Refusals are quick, and do not count; what timed out does.
    assert result.percentile_ms(99) >= 1000 * timeout
    waited = [a.latency_s for a in result.arrivals if a.error == "timeout"]
    assert min(waited) >= timeout
    assert percentile([a.latency_s for a in result.arrivals if a.error in (None, "timeout")], 50) >= timeout


def test_requests_that_no_connection_is_free_for_time_out_too(server):
    async def silent(number: int, body: bytes) -> bytes:
        await asyncio.sleep(30)
        return OK

    server.answer = silent
    result = run_load(server.url, [b"{}"], 200, 0.2, 2, timeout=0.1)
    assert (result.count, result.errors) == (40, {"timeout": 40})
    assert len(server.bodies) < 40


def test_connections_that_the_server_closes_are_opened_again(server):
    async def last(number: int, body: bytes) -> bytes:
        return OK.replace(b"Content-Length", b"Connection: close\r\nContent-Length")

    server.answer = last
    result = run_load(server.url, [b"{}"], 200, 0.3, 4, timeout=20)
    assert (result.count, result.errors) == (60, Counter())
    assert server.connections >= 60


def test_a_server_that_goes_away_ends_in_failures_of_all_that_follow(server):
    async def leaves(number: int, body: bytes) -> bytes | None:
        if number < 20:
            return OK
        assert server.listener is not None
        server.listener.close()
        return None

    server.answer = leaves
    result = run_load(server.url, [b"{}"], 200, 0.4, 4, timeout=0.2)
    assert result.count == 80
    assert sum(a.error is None for a in result.arrivals) == 20
    assert set(result.errors) == {"connection", "timeout"}


def test_answers_are_judged(server):
    async def echo(number: int, body: bytes) -> bytes:
        content = body * 30_000
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)

    seen: list[tuple[int, int, bytes]] = []

    def judge(number: int, status: int, content: bytes) -> str | None:
        seen.append((number, status, content))
        return "odd" if number % 2 else None

    server.answer = echo
    bodies = [b'"%d"' % n for n in range(4)]
    result = run_load(server.url, bodies, 100, 0.4, 8, on_answer=judge, timeout=20)
    assert result.errors == {"odd": 20}
    assert len(seen) == 40
    assert all((status, content) == (200, bodies[number] * 30_000) for number, status, content in seen)


def test_a_judge_that_fails_ends_the_run(server):
    def judge(number: int, status: int, content: bytes) -> Any:
        raise LookupError("no known answer")

    with pytest.raises(LookupError, match="no known answer"):
        run_load(server.url, [b"{}"], 100, 60, 2, on_answer=judge)


def test_a_run_ends_early_when_it_is_told_to(server):
    asked = []

    def until() -> bool:
        asked.append(len(server.bodies))
        return len(asked) > 25

    result = run_load(server.url, [b"{}"], 200, 3_600, 2, until=until)
    assert (result.count, result.errors, len(server.bodies)) == (25, Counter(), 25)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0}, "must be above 0"),
        ({"bodies": []}, "there must be a body"),
        ({"connections": 901}, "connections is 901; give 1 to 900"),
        ({"url": "https://127.0.0.1"}, "no address to load"),
    ],
)
def test_values_that_are_not_allowed(values, message):
    good = {"url": "http://127.0.0.1:1", "bodies": [b"{}"], "rate": 1, "duration": 1, "connections": 1}
    with pytest.raises(ValueError, match=message):
        run_load(**{**good, **values})


@pytest.mark.parametrize("size", [1, 2, 9, 100, 1_000, 41_000])
def test_percentiles(rng, size):
    values = rng.random(size).tolist()
    for percent in ("0", "1", "50", "90", "99", "99.9", "100"):
        found = percentile(values, float(percent))
        # NumPy's own inverted_cdf takes 99.9 percent of 1,000 for a little more than 999.
        share = Fraction(percent) / 100
        assert Fraction(sum(value <= found for value in values), size) >= share
        assert percent == "0" or Fraction(sum(value < found for value in values), size) < share


def test_the_command(server, tmp_path, capsys):
    (tmp_path / "users.txt").write_text("1\n\nuser two\n")
    (tmp_path / "token").write_text("secret\n")
    command = [server.url, "--rate", "100", "--duration", "0.1", "--connections", "2", "--k", "7"]
    main([*command, "--users", str(tmp_path / "users.txt"), "--token-file", str(tmp_path / "token")])
    assert [json.loads(body) for body in server.bodies[:2]] == [
        {"user_id": "1", "k": 7},
        {"user_id": "user two", "k": 7},
    ]
    assert "Authorization: Bearer secret\r\n" in server.heads[0]
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert (result["name"], result["errors"]) == ("load", {})
    assert result["figures"]["count"] == len(server.bodies) == 10
    assert result["figures"]["p50_ms"] <= result["figures"]["p99.9_ms"]
    assert result["figures"]["client_cpu_share"] > 0
    server.answer = busy
    main([*command, "--body", "{}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["errors"] == {"status 503": 10}
    assert result["figures"]["p50_ms"] is None


async def busy(number: int, body: bytes) -> bytes:
    return BUSY


def test_the_command_says_when_nobody_listens():
    command = [sys.executable, "-m", "benchmarks.load", "http://127.0.0.1:1", "--body", "{}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
