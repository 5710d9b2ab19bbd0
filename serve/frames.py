"""Calls between gateway and shard groups: bytes there, bytes back, over one TCP connection for each pair.

Ray Serve starts the replicas, restarts them and tells the gateway where they listen; what is asked and
answered goes past its handles, which take several times as long as the message itself. A connection begins
with a secret that only Serve hands out. Then each frame is its length and the number of its call (uint32
each, little endian) and the message; two lengths that no message has say something else. A call that nobody
waits for any more is taken back, so that a replica does not work on what is late. A connection that breaks
fails all its calls at once, so that a killed replica is noticed within the time of one message. One that
falls silent, as that of a stopped process or of a network that drops packets does, is noticed by beats, which
the listening end sends back.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from serve.hedging import UnansweredError
from serve.log import log_failure

Handler = Callable[[bytes], Awaitable[bytes]]

MAX_MESSAGE_BYTES = 64 << 20
_HEAD = struct.Struct("<II")
_SECRET_BYTES = 32
_NONE = 0xFFFF_FFFF
"""Instead of a length: the call failed; from who called: it is taken back."""
_BEAT = 0xFFFF_FFFE
"""Instead of a length: a beat, which says that somebody is there."""
_BEAT_S = 1.0
_MOST_UNANSWERED = 3
"""Beats without a word back, after which the calling end gives a connection up."""
_SILENCE_S = 30.0
"""How long the listening end waits for a word of a caller, who sends beats."""
_CONNECT_TIMEOUT_S = 2.0
_SECRET_TIMEOUT_S = 10.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Address:
    """Where a server listens, and what it wants to hear first."""

    host: str
    port: int
    secret: bytes


async def serve_frames(
    handler: Handler, host: str, log_messages: bool = False
) -> tuple[asyncio.Server, Address]:
    """Listen on a free port, and answer every message with what a handler returns.

    Args:
        handler: gets a message and returns the answer; what it raises is logged, and fails the call.
        host: address to listen on.
        log_messages: also log the messages of what it raises.
    """
    secret = secrets.token_bytes(_SECRET_BYTES)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _ServerSide(handler, secret, log_messages), host, 0)
    return server, Address(host, server.sockets[0].getsockname()[1], secret)


class Connection:
    """The calling end of one connection; belongs to one event loop."""

    def __init__(self, protocol: _ClientSide) -> None:
        """Take what ``connect`` made."""
        self._protocol = protocol
        self._numbers = itertools.count()

    @classmethod
    async def connect(cls, address: Address) -> Connection:
        """Connect to a server.

        Raises:
            OSError: nothing listens there, or not within some seconds.
        """
        loop = asyncio.get_running_loop()
        making = loop.create_connection(lambda: _ClientSide(address.secret), address.host, address.port)
        _, protocol = await asyncio.wait_for(making, _CONNECT_TIMEOUT_S)
        return cls(protocol)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._protocol.closed

    async def call(self, message: bytes) -> bytes:
        """Return the answer to a message.

        Raises:
            ConnectionError: the connection ended first.
            UnansweredError: the handler failed, or the message is longer than any that is taken.
        """
        if len(message) > MAX_MESSAGE_BYTES:
            raise UnansweredError(f"a message of {len(message)} bytes; at most {MAX_MESSAGE_BYTES} are taken")
        number = next(self._numbers) & 0xFFFF_FFFF
        waiting = self._protocol.waiting
        future = asyncio.get_running_loop().create_future()
        waiting[number] = future
        try:
            self._protocol.send(number, message)
            answer: bytes = await future
            return answer
        except asyncio.CancelledError:
            if not self.closed:
                self._protocol.send(number, None)
            raise
        finally:
            waiting.pop(number, None)

    def close(self) -> None:
        """End the connection; calls that wait fail."""
        self._protocol.close()


class _Frames(asyncio.Protocol):
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self.closed = False
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            word, number = _HEAD.unpack_from(self._buffer, at)
            length = 0 if word in (_NONE, _BEAT) else word
            if length > MAX_MESSAGE_BYTES:
                logger.error(
                    "a frame of %d bytes was refused; at most %d are taken", length, MAX_MESSAGE_BYTES
                )
                self.close()
                return
            end = at + _HEAD.size + length
            if len(self._buffer) < end:
                break
            if word == _BEAT:
                self.beat()
            else:
                self.received(number, None if word == _NONE else bytes(self._buffer[at + _HEAD.size : end]))
            at = end
        del self._buffer[:at]

    def received(self, number: int, message: bytes | None) -> None:
        """Take a message; None means that the call failed, or is taken back."""
        raise NotImplementedError

    def beat(self) -> None:
        """Take a beat."""

    def send(self, number: int, message: bytes | None) -> None:
        """Send a message; None means that the call failed, or is taken back."""
        length = _NONE if message is None else len(message)
        self._write(_HEAD.pack(length, number) + (message or b""))

    def send_beat(self) -> None:
        self._write(_HEAD.pack(_BEAT, 0))

    def _write(self, data: bytes) -> None:
        if self.closed or self._transport is None:
            raise ConnectionResetError("the connection has ended")
        self._transport.write(data)

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection without waiting for what is still to be sent."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


class _ClientSide(_Frames):
    def __init__(self, secret: bytes) -> None:
        super().__init__()
        self._secret = secret
        self.waiting: dict[int, asyncio.Future[bytes]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._write(self._secret)
        self._unanswered = 0
        self._next_beat = asyncio.get_running_loop().call_later(_BEAT_S, self._ask)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._next_beat.cancel()
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the connection has ended"))

    def data_received(self, data: bytes) -> None:
        self._unanswered = 0
        super().data_received(data)

    def _ask(self) -> None:
        """Send a beat, or end the connection where nothing has come back for too long."""
        if self.closed:
            return
        if self._unanswered >= _MOST_UNANSWERED:
            logger.warning("a replica of a shard group has fallen silent: its connection is given up")
            self.abort()
            return
        self._unanswered += 1
        self.send_beat()
        self._next_beat = asyncio.get_running_loop().call_later(_BEAT_S, self._ask)

    def received(self, number: int, message: bytes | None) -> None:
        future = self.waiting.get(number)
        # A call that was given up has no future any more.
        if future is None or future.done():
            return
        if message is None:
            future.set_exception(UnansweredError("the replica failed to answer; the reason is in its log"))
        else:
            future.set_result(message)


class _ServerSide(_Frames):
    def __init__(self, handler: Handler, secret: bytes, log_messages: bool) -> None:
        super().__init__()
        self._handler = handler
        self._secret = secret
        self._log_messages = log_messages
        self._greeted = False
        self._heard = False
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._patience = asyncio.get_running_loop().call_later(_SECRET_TIMEOUT_S, self.close)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._patience.cancel()
        for task in self._tasks.values():
            task.cancel()

    def data_received(self, data: bytes) -> None:
        if not self._greeted:
            self._buffer += data
            if len(self._buffer) < _SECRET_BYTES:
                return
            if not hmac.compare_digest(bytes(self._buffer[:_SECRET_BYTES]), self._secret):
                self.close()
                return
            self._greeted = True
            self._expect()
            data = bytes(self._buffer[_SECRET_BYTES:])
            self._buffer.clear()
        self._heard = True
        super().data_received(data)

    def _expect(self) -> None:
        """End the connection if nothing comes in a while."""
        self._patience.cancel()
        self._heard = False
        self._patience = asyncio.get_running_loop().call_later(_SILENCE_S, self._look)

    def _look(self) -> None:
        if self._heard:
            self._expect()
        else:
            self.abort()

    def beat(self) -> None:
        if not self.closed:
            self.send_beat()

    def received(self, number: int, message: bytes | None) -> None:
        if message is None:
            if (given_up := self._tasks.get(number)) is not None:
                given_up.cancel()
            return
        task = asyncio.ensure_future(self._answer(number, message))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _answer(self, number: int, message: bytes) -> None:
        answer: bytes | None
        try:
            answer = await self._handler(message)
        except Exception as error:
            log_failure("a call of a shard group failed", error, self._log_messages)
            answer = None
        if not self.closed:
            self.send(number, answer)
