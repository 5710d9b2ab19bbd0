"""Calls over a connection: each gets its own answer, a broken connection fails all, strangers get nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop

from serve import frames
from serve.frames import MAX_MESSAGE_BYTES, Address, Connection, serve_frames
from serve.hedging import UnansweredError

pytestmark = pytest.mark.sockets


async def echo(message: bytes) -> bytes:
    return message


async def heard_after(address: Address, data: bytes) -> bytes:
    """Return what a server says to who sends only this, until it closes the connection."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


RUNNERS = [asyncio.run, uvloop.run]


@pytest.mark.parametrize("run", RUNNERS)
def test_each_call_gets_its_own_answer(run) -> None:
    async def backwards(message: bytes) -> bytes:
        await asyncio.sleep(random.random() / 100)
        return message[::-1]

    async def main() -> None:
        server, address = await serve_frames(backwards, "127.0.0.1")
        async with server:
            connection = await Connection.connect(address)
            messages = [os.urandom(random.randrange(2000)) for _ in range(200)]
            messages += [b"", os.urandom(3_000_000), b"\0" * 8]
            answers = await asyncio.gather(*map(connection.call, messages))
            assert answers == [m[::-1] for m in messages]
            connection.close()

    run(main())


@pytest.mark.parametrize("log_messages", [False, True])
def test_a_handler_that_fails_fails_only_its_call(
    log_messages: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def picky(message: bytes) -> bytes:
        if message == b"bad":
            raise ValueError("about user 42")
        return message

    async def main() -> None:
        server, address = await serve_frames(picky, "127.0.0.1", log_messages)
        async with server:
            connection = await Connection.connect(address)
            answers = await asyncio.gather(
                *map(connection.call, [b"a", b"bad", b"b"]), return_exceptions=True
            )
            assert (answers[0], answers[2]) == (b"a", b"b")
            assert isinstance(answers[1], UnansweredError)
            assert await connection.call(b"c") == b"c"
            connection.close()

    asyncio.run(main())
    assert "ValueError" in caplog.text
    assert "in picky" in caplog.text
    assert ("about user 42" in caplog.text.replace('raise ValueError("about user 42")', "")) == log_messages


def test_a_message_that_is_too_long_ends_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def echo(message: bytes) -> bytes:
        return message

    async def main() -> None:
        server, address = await serve_frames(echo, "127.0.0.1")
        async with server:
            connection = await Connection.connect(address)
            with pytest.raises(UnansweredError, match="a message of 101 bytes; at most 100 are taken"):
                await connection.call(b"x" * 101)
            assert await connection.call(b"x" * 100) == b"x" * 100
            connection.close()

    monkeypatch.setattr("serve.frames.MAX_MESSAGE_BYTES", 100)
    asyncio.run(main())


def test_a_call_that_is_given_up_does_not_disturb_the_others() -> None:
    release: list[asyncio.Event] = []

    async def slow(message: bytes) -> bytes:
        if message == b"slow":
            await release[0].wait()
        return message

    async def main() -> None:
        release.append(asyncio.Event())
        server, address = await serve_frames(slow, "127.0.0.1")
        async with server:
            connection = await Connection.connect(address)
            task = asyncio.ensure_future(connection.call(b"slow"))
            assert await connection.call(b"a") == b"a"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            release[0].set()
            assert await connection.call(b"b") == b"b"
            connection.close()

    asyncio.run(main())


@pytest.mark.parametrize("run", RUNNERS)
def test_a_call_that_is_given_up_is_taken_back(run) -> None:
    """What waits for a thread when its caller gives up is never worked on."""
    worked_on: list[bytes] = []
    busy = threading.Event()

    def work(message: bytes) -> bytes:
        worked_on.append(message)
        if message == b"first":
            assert busy.wait(20)
        return message

    async def main() -> None:
        with ThreadPoolExecutor(1) as pool:

            async def handler(message: bytes) -> bytes:
                return await asyncio.get_running_loop().run_in_executor(pool, work, message)

            server, address = await serve_frames(handler, "127.0.0.1")
            async with server:
                connection = await Connection.connect(address)
                first = asyncio.ensure_future(connection.call(b"first"))
                late = [asyncio.ensure_future(connection.call(b"late")) for _ in range(5)]
                last = asyncio.ensure_future(connection.call(b"last"))
                while not worked_on:
                    await asyncio.sleep(0.01)
                for call in late:
                    call.cancel()
                await asyncio.gather(*late, return_exceptions=True)
                # Frames arrive in order: once this one is answered, those before it have been seen.
                again = asyncio.ensure_future(connection.call(b"again"))
                await asyncio.sleep(0.1)
                busy.set()
                assert await asyncio.gather(first, last, again) == [b"first", b"last", b"again"]
                connection.close()
        assert worked_on == [b"first", b"last", b"again"]

    run(main())


def test_a_stranger_gets_nothing() -> None:
    heard: list[bytes] = []

    async def handler(message: bytes) -> bytes:
        heard.append(message)
        return message

    async def main() -> None:
        server, address = await serve_frames(handler, "127.0.0.1")
        async with server:
            wrong = dataclasses.replace(address, secret=b"\0" * 32)
            connection = await Connection.connect(wrong)
            with pytest.raises(ConnectionError):
                await connection.call(b"x")
            assert connection.closed
            right = await Connection.connect(address)
            assert await right.call(b"y") == b"y"
            # A message that claims to be longer than any is.
            assert (
                await heard_after(address, address.secret + struct.pack("<II", MAX_MESSAGE_BYTES + 1, 0))
                == b""
            )
            right.close()
        assert heard == [b"y"]

    asyncio.run(main())


def test_who_says_nothing_is_not_listened_to_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_SECRET_TIMEOUT_S", 0.2)

    async def main() -> None:
        server, address = await serve_frames(echo, "127.0.0.1")
        async with server:
            known = await Connection.connect(address)
            assert await heard_after(address, address.secret[:-1]) == b""
            # Who said the secret has more time.
            assert await known.call(b"y") == b"y"
            known.close()

    asyncio.run(main())


@pytest.mark.parametrize("run", RUNNERS)
def test_a_connection_without_calls_stays_and_one_without_beats_does_not(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_SILENCE_S", 0.4)
    monkeypatch.setattr(frames, "_BEAT_S", 0.1)

    async def main() -> None:
        server, address = await serve_frames(echo, "127.0.0.1")
        async with server:
            idle = await Connection.connect(address)
            assert await heard_after(address, address.secret) == b""
            await asyncio.sleep(1)
            assert not idle.closed
            assert await idle.call(b"x") == b"x"
            idle.close()

    run(main())


def test_nothing_listens() -> None:
    async def main() -> None:
        server, address = await serve_frames(echo, "127.0.0.1")
        server.close()
        await server.wait_closed()
        with pytest.raises(OSError, match="onnect"):
            await Connection.connect(address)

    asyncio.run(main())


SERVER = """
    import asyncio, sys
    from serve.frames import serve_frames

    async def never(message):
        await asyncio.Event().wait()

    async def main():
        server, address = await serve_frames(never, "127.0.0.1")
        print(address.port, address.secret.hex(), flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
"""


@contextlib.contextmanager
def silent_server() -> Iterator[tuple[subprocess.Popen[str], Address]]:
    """Listen in a process of its own, and answer nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port, secret = process.stdout.readline().split()
            yield process, Address("127.0.0.1", int(port), bytes.fromhex(secret))
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("run", RUNNERS)
def test_a_killed_or_stopped_server_fails_the_calls_that_wait(
    run, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_BEAT_S", 0.2)
    with silent_server() as (process, address):

        async def main() -> None:
            connection = await Connection.connect(address)
            calls = [asyncio.ensure_future(connection.call(b"x")) for _ in range(3)]
            # Longer than a server that is well may say nothing.
            await asyncio.sleep(1.2)
            assert not any(c.done() for c in calls)
            process.send_signal(number)
            # More than the system's buffers hold: not all of it can be sent.
            calls += [asyncio.ensure_future(connection.call(bytes(16 << 20))) for _ in range(2)]
            async with asyncio.timeout(20):
                answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(a, ConnectionError) for a in answers)
            assert connection.closed
            with pytest.raises(ConnectionError):
                await connection.call(b"y")

        run(main())
