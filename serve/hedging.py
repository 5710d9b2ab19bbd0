"""Calls to the replicas of a shard group, so that a slow or a dead one costs little.

A call goes to one replica. If it fails, another is asked at once; if it takes longer than nineteen in twenty
calls do, another is asked too and the first answer counts (a hedged request, Dean and Barroso, "The tail at
scale", 2013). A replica that failed is left alone for a while, and so is one that says nothing at all while
others are asked in its place again and again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

Call = Callable[[bytes], Awaitable[bytes]]
"""Asks one replica; empty bytes mean that it does not hold the generation that it was asked for."""

_WINDOW = 500
"""Calls whose times decide when to hedge."""
_QUANTILE = 0.95
_BURST = 20.0
"""Hedges that may come at once after a quiet time."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 1.0
_SILENT_CALLS = 2
"""Calls in a row that a replica has been outrun at without a word before it is left alone."""


class GroupUnavailableError(Exception):
    """No replica of a shard group answered in time."""


class CutShortError(GroupUnavailableError):
    """No replica had answered when the caller's time was over, which is less than a group is given."""


class UnansweredError(Exception):
    """A replica that is well could not answer this message."""


@dataclass
class Counts:
    """What was done so far."""

    calls: int = 0
    """Calls of the group."""
    hedges: int = 0
    """Second calls because the first took long."""
    retries: int = 0
    """Second calls because the first failed, or was to a replica without the generation."""
    failures: int = 0
    """Calls that no replica answered in time, but for those that were cut short."""


class Replicas:
    """The replicas of one shard group; belongs to one event loop."""

    def __init__(self, name: str, calls: Sequence[Call], hedge_share: float = 0.07) -> None:
        """Take the ways to call each replica.

        Args:
            name: of the group.
            calls: of each replica.
            hedge_share: hedges in all calls, at most; 0 never hedges.
        """
        self.name = name
        self.counts = Counts()
        self._replicas = [_Replica(call) for call in calls]
        self._share = hedge_share
        self._credit = 1.0
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._delay_s = float("inf")
        self._turn = 0

    async def call(self, message: bytes, timeout_s: float, blame: bool = True, num_queries: int = 1) -> bytes:
        """Return the first answer of a replica.

        Args:
            message: for the replica.
            timeout_s: seconds after which none is waited for.
            blame: leave a replica alone for a while that has answered nothing in that time. False: the caller
                has less time than a group is given, so that one who is late has not failed.
            num_queries: in the message; a replica answers them one after the other.

        Raises:
            GroupUnavailableError: none answered in time; a ``CutShortError`` where that is not to be blamed.
        """
        now = asyncio.get_running_loop().time
        began = now()
        end = began + timeout_s
        self.counts.calls += 1
        self._credit = min(self._credit + self._share, _BURST)
        waiting = self._order(began)
        running: dict[asyncio.Future[bytes], tuple[_Replica, float]] = {}
        hedge_at = began + self._delay_s * num_queries

        def ask_next() -> None:
            replica = waiting.pop(0)
            running[replica.start(message)] = replica, now()

        try:
            while waiting or running:
                if not running:
                    ask_next()
                may_hedge = bool(waiting) and len(running) == 1 and self._credit >= 1
                until = min(end, hedge_at) if may_hedge else end
                done, _ = await asyncio.wait(
                    running, timeout=max(until - now(), 0), return_when=asyncio.FIRST_COMPLETED
                )
                for future in done:
                    replica, asked = running.pop(future)
                    answer = replica.finish(future, now())
                    if answer:
                        # The time of one query is what decides: a few batches must not raise it for all.
                        if num_queries == 1:
                            self._note(now() - began)
                        for waited, (other, since) in running.items():
                            if since < asked and not waited.done() and other.answered_at < since:
                                other.outrun(now())
                        return answer
                    self.counts.retries += bool(waiting and not running)
                if done:
                    continue
                if now() >= end:
                    break
                if may_hedge:
                    self._credit -= 1
                    self.counts.hedges += 1
                    ask_next()
            # Those that failed, or do not hold the generation, run no more.
            if running and not blame:
                raise CutShortError(self.name)
            for replica, _ in running.values():
                if replica.answered_at < began:
                    replica.failed(now())
        finally:
            for future, (replica, _) in running.items():
                replica.drop(future)
        self.counts.failures += 1
        raise GroupUnavailableError(self.name)

    async def call_aside(self, message: bytes, timeout_s: float) -> bytes:
        """Return the answer of one replica to what takes longer than a query; nothing is learned from it.

        Raises:
            GroupUnavailableError: it did not answer in time, or not at all.
        """
        order = self._order(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(timeout_s):
                answer = await order[0].ask(message) if order else b""
        except (OSError, UnansweredError) as error:
            raise GroupUnavailableError(self.name) from error
        if not answer:
            raise GroupUnavailableError(self.name)
        return answer

    def _order(self, now: float) -> list[_Replica]:
        """Return the replicas to ask, in order: those with the fewest calls first, in turn where equal.

        Those that failed lately come last; where all did, none is asked.
        """
        self._turn = (self._turn + 1) % len(self._replicas)
        turned = self._replicas[self._turn :] + self._replicas[: self._turn]
        able = sorted((r for r in turned if r.paused_until <= now), key=lambda r: r.num_running)
        return able + [r for r in turned if r.paused_until > now] if able else []

    def _note(self, took_s: float) -> None:
        self._times.append(took_s)
        if len(self._times) >= 50 and self.counts.calls % 25 == 0:
            self._delay_s = sorted(self._times)[int(len(self._times) * _QUANTILE)]


class _Replica:
    """One replica, and how it has done lately."""

    def __init__(self, call: Call) -> None:
        self.ask = call
        self._failures = 0
        self._outrun = 0
        self.num_running = 0
        self.paused_until = 0.0
        self.answered_at = 0.0

    def start(self, message: bytes) -> asyncio.Future[bytes]:
        self.num_running += 1
        return asyncio.ensure_future(self.ask(message))

    def finish(self, future: asyncio.Future[bytes], now: float) -> bytes:
        """Return the answer of a call that has ended, empty bytes where it failed."""
        self.num_running -= 1
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, UnansweredError):
            self.failed(now)
            return b""
        self._failures = 0
        self._outrun = 0
        self.paused_until = 0.0
        self.answered_at = now
        return b"" if error is not None else future.result()

    def drop(self, future: asyncio.Future[bytes]) -> None:
        """End a call that nobody waits for any more."""
        self.num_running -= 1
        if not future.done():
            future.cancel()
        elif not future.cancelled():
            # Asked for, so that asyncio does not report it as one that nobody looked at.
            future.exception()

    def outrun(self, now: float) -> None:
        """Note that one that was asked later answered first, and that this one has said nothing meanwhile."""
        self._outrun += 1
        # Calls that are outrun together make one pause, not longer and longer ones.
        if self._outrun >= _SILENT_CALLS and self.paused_until <= now:
            self.failed(now)

    def failed(self, now: float) -> None:
        """Leave the replica alone for a while, longer each time."""
        self._failures += 1
        self.paused_until = now + min(_FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10), _LAST_PAUSE_S)
