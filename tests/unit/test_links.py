"""What a gateway makes of what the replicas of its groups say of themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve import links as links_module
from serve.arguments import BuildArgs
from serve.frames import Address, Connection, serve_frames
from serve.links import GroupLinks, Holding, ask_through, part_of
from twotower.errors import ArtefactError

pytestmark = pytest.mark.sockets

Says = dict[str, dict[str, str]]
"""By name of the field of a ``Holding``."""
LOADING: Says = {}
HOLDS: Says = {"held": {"g1": ""}}
FAILED: Says = {"failed": {"g1": "a disk failed"}}
REFUSED: Says = {"refused": {"g1": "it is damaged"}}
TIMEOUT_S = 5


class Replica:
    """Says one thing after the other, and then the last again and again."""

    def __init__(self, *says: Says | None) -> None:
        self.says = list(says)
        self.address: Address | None = None
        self.needed: list[list[str]] = []

    async def ask(self, gateway: str, generation_ids: list[str]) -> Holding:
        self.needed.append(generation_ids)
        now = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if now is None:
            raise ConnectionError
        assert self.address is not None
        return Holding(self.address, list(now.get("held", {})), now.get("refused", {}), now.get("failed", {}))


def run(replicas: list[Replica], work: Callable[[GroupLinks], Awaitable[None]]) -> None:
    """Do something with links to replicas, each of a group of its own."""

    async def never(message: bytes) -> bytes:
        raise AssertionError

    async def main() -> None:
        server, address = await serve_frames(never, "127.0.0.1")
        async with server:
            for replica in replicas:
                replica.address = address
            links = GroupLinks([[replica.ask] for replica in replicas])
            try:
                await work(links)
            finally:
                for link in (link for group in links._links for link in group):
                    link.close()
                await asyncio.sleep(0.01)

    asyncio.run(main())


def hold(links: GroupLinks) -> Awaitable[None]:
    return links.hold("g1", TIMEOUT_S)


def test_holding_waits_for_every_replica() -> None:
    replicas = [Replica(HOLDS), Replica(None, LOADING, LOADING, HOLDS)]
    run(replicas, hold)
    assert replicas[1].says == [HOLDS]


def test_who_is_away_is_not_waited_for_as_long_as_who_is_loading() -> None:
    def started(links: GroupLinks) -> Awaitable[None]:
        return links.hold("g1", TIMEOUT_S, away_s=0.25)

    # In steps of a tenth of a second: three times what a replica may be away.
    run([Replica(HOLDS), Replica(None, *[LOADING] * 8, HOLDS)], started)
    # Away again and again, and never for long.
    run([Replica(HOLDS), Replica(*[None, LOADING] * 4, HOLDS)], started)
    gone = Replica(HOLDS, None)
    with pytest.raises(TimeoutError, match="not every replica holds g1"):
        run([Replica(*[LOADING] * 40, HOLDS), gone], started)
    assert gone.says == [None]


def test_the_log_says_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(links_module, "_PATIENCE_S", 0.25)
    # Ray's loggers pass nothing on to the root's, where pytest listens.
    monkeypatch.setattr(links_module, "logger", logging.getLogger("links"))
    with caplog.at_level(logging.WARNING, "links"):
        run([Replica(HOLDS), Replica(*[LOADING] * 2, HOLDS)], hold)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING, "links"):
        run([Replica(HOLDS), Replica(*[None] * 5, HOLDS)], hold)
    assert caplog.messages == [
        "g1: waiting for every replica to hold it; of 2 replicas 1 do not answer",
    ]


def test_what_is_refused_is_refused_at_once() -> None:
    with pytest.raises(ArtefactError, match="it is damaged"):
        run([Replica(LOADING), Replica(REFUSED)], hold)
    # Also beside a failure that may pass.
    with pytest.raises(ArtefactError, match="it is damaged"):
        run([Replica(FAILED), Replica(REFUSED)], hold)


@pytest.mark.parametrize("why", ["refused", "failed"])
def test_what_answers_now_is_no_hindrance_where_it_can_not_be_held_any_more(why: str) -> None:
    """A replica that was started again finds that a prune has removed it: the next one is all it needs."""
    back = Replica({why: {"g0": "it is gone"}}, {"held": {"g1": ""}, why: {"g0": "it is gone"}})
    run(
        [Replica({"held": {"g0": "", "g1": ""}}), back],
        lambda links: links.hold("g1", TIMEOUT_S, keep=["g0"]),
    )
    assert back.needed[-1] == ["g0", "g1"]
    assert len(back.says) == 1


def test_a_failure_is_told_when_nothing_else_is_loading() -> None:
    replicas = [Replica(FAILED), Replica(None, LOADING, HOLDS)]
    with pytest.raises(OSError, match="a disk failed") as caught:
        run(replicas, hold)
    # A follower tries again after it, and it is no replica that is away.
    assert not isinstance(caught.value, TimeoutError)
    assert replicas[1].says == [HOLDS]


def test_a_failure_that_passes_meanwhile_is_none() -> None:
    run([Replica(FAILED, LOADING, HOLDS), Replica(None, LOADING, LOADING, HOLDS)], hold)


def test_a_successor_is_called_once_it_holds_what_is_needed_and_nobody_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.links._LINGER_S", 0.1)
    release: list[asyncio.Event] = []

    async def old(message: bytes) -> bytes:
        if message == b"slow":
            await release[0].wait()
        return b"old"

    async def new(message: bytes) -> bytes:
        return b"new"

    async def main() -> None:
        release.append(asyncio.Event())
        first, second = await serve_frames(old, "127.0.0.1"), await serve_frames(new, "127.0.0.1")
        now = Holding(first[1], ["g1"], {}, {})

        async def ask(gateway: str, generation_ids: list[str]) -> Holding:
            return now

        links = GroupLinks([[ask]])
        (link,) = links._links[0]
        await links.hold("g1", TIMEOUT_S)
        before = link._connection
        slow = asyncio.ensure_future(link.call(b"slow"))
        # Serve has started another, which answers what is asked in turn with the first.
        now = Holding(second[1], [], {}, {})
        await links._refresh("g1")
        assert await link.call(b"x") == b"old"
        now = Holding(second[1], ["g1"], {}, {})
        # Two that ask at the same time connect once.
        connects = 0
        connect = Connection.connect

        async def counted(address: Address) -> Connection:
            nonlocal connects
            connects += 1
            return await connect(address)

        monkeypatch.setattr(Connection, "connect", counted)
        await asyncio.gather(links._refresh("g1"), links._refresh("g1"))
        assert connects == 1
        assert await link.call(b"x") == b"new"
        release[0].set()
        assert await slow == b"old"
        await asyncio.sleep(0.3)
        assert before is not None
        assert before.closed
        assert await link.call(b"x") == b"new"
        link.close()
        for server, _ in (first, second):
            server.close()
        await asyncio.sleep(0.05)

    asyncio.run(main())


def test_watching_goes_on_whatever_a_replica_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve.links._PERIOD_S", 0.01)

    class Hangs(Replica):
        async def ask(self, gateway: str, generation_ids: list[str]) -> Holding:
            if self.needed:
                await asyncio.Event().wait()
            return await super().ask(gateway, generation_ids)

    class Cancelled(Replica):
        async def ask(self, gateway: str, generation_ids: list[str]) -> Holding:
            holding = await super().ask(gateway, generation_ids)
            if len(self.needed) == 2:
                # Ray says so of a call that it cancelled itself.
                raise asyncio.CancelledError
            return holding

    hangs, cancelled = Hangs(HOLDS), Cancelled(HOLDS)
    speaks = Replica(HOLDS, FAILED, FAILED, REFUSED, REFUSED, HOLDS)

    async def watched(links: GroupLinks) -> None:
        await hold(links)
        watch = asyncio.ensure_future(links.watch())
        async with asyncio.timeout(TIMEOUT_S):
            while len(speaks.says) > 1 or len(cancelled.needed) < 4:
                await asyncio.sleep(0.01)
        assert not watch.done()
        watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watch

    run([hangs, cancelled, speaks], watched)
    assert len(hangs.needed) == 1
    # Each reason once, with its group.
    assert [record.getMessage() for record in caplog.records if record.name == "ray.serve"] == [
        "a replica of group-2 does not hold what is needed: a disk failed",
        "a replica of group-2 does not hold what is needed: it is damaged",
    ]


def test_what_was_needed_before_is_not_asked_for_after_what_is_needed_now() -> None:
    told: list[list[str]] = []
    release: list[asyncio.Event] = []

    class Slow(Replica):
        async def ask(self, gateway: str, generation_ids: list[str]) -> Holding:
            await release[0].wait()
            told.append(generation_ids)
            return await super().ask(gateway, generation_ids)

    async def changed(links: GroupLinks) -> None:
        release.append(asyncio.Event())
        links.need(["g0"])
        (link,) = links._links[0]
        asked = [asyncio.ensure_future(link.refresh()) for _ in range(2)]
        await asyncio.sleep(0.01)
        links.need(["g0", "g1"])
        release[0].set()
        await asyncio.gather(*asked)
        assert told == [["g0"], ["g0", "g1"]]

    run([Slow(HOLDS)], changed)


def test_a_replica_of_an_earlier_deployment_with_other_groups_is_away() -> None:
    before, now = (part_of(BuildArgs(store="/store", topology="sharded", groups=n), 0) for n in (1, 2))

    class Handle:
        """As much of a handle of Serve as is asked."""

        part = before

        @property
        def need(self) -> Handle:
            return self

        async def remote(self, gateway: str, generation_ids: list[str]) -> Holding:
            return Holding(Address("127.0.0.1", 1, b""), ["g1"], {}, {}, self.part)

    handle: Any = Handle()
    ask = ask_through(handle, now)
    with pytest.raises(ConnectionError, match="holds group 0 of 1 of /store, not group 0 of 2 of /store"):
        asyncio.run(ask("gateway", ["g1"]))
    handle.part = now
    assert asyncio.run(ask("gateway", ["g1"])).held == ["g1"]
