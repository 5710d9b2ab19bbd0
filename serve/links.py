"""What the gateway knows of the replicas of its shard groups: where each listens and what it holds.

It asks each of them again a second after it answered, through a handle of Serve, and no longer than five for
an answer. So a replica that was started again is found at its new address, and loads what is needed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.arguments import BuildArgs
from serve.frames import Address, Connection
from serve.hedging import Replicas
from twotower.errors import ArtefactError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_ASK_TIMEOUT_S = 5.0
_PERIOD_S = 1.0
_STARTING_PERIOD_S = 0.1
_LINGER_S = 5.0
"""How long calls to a replica that is replaced may take; longer than any group's deadline should be."""
_PATIENCE_S = 10.0
"""How long replicas may take to hold a generation before the log says that it is waited for."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Holding:
    """What a replica of a group says of itself."""

    address: Address
    """Where it answers."""
    held: list[str]
    """Ids of the generations in memory."""
    refused: dict[str, str]
    """Why a generation that is needed can not be held, by its id."""
    failed: dict[str, str]
    """Why one could not be loaded a moment ago, by its id; the replica tries again."""
    part: str = ""
    """Which part of the generations it holds."""


Ask = Callable[[str, list[str]], Awaitable[Holding]]
"""Tells a replica which generations a gateway needs."""


def part_of(args: BuildArgs, group: int) -> str:
    """Return which part of the store's generations a replica of a group holds, as text."""
    return f"group {group} of {args.groups} of {args.store}"


def ask_through(handle: DeploymentHandle, part: str) -> Ask:
    """Return how to ask a replica through its handle of Serve; one that holds another part is away."""

    async def ask(gateway: str, generation_ids: list[str]) -> Holding:
        holding: Holding = await handle.need.remote(gateway, generation_ids)
        if holding.part != part:
            raise ConnectionError(f"a replica that is to be replaced holds {holding.part}, not {part}")
        return holding

    return ask


class GroupLinks:
    """Connections to every replica of every group; belongs to one event loop."""

    def __init__(self, groups: Sequence[Sequence[Ask]]) -> None:
        """Take the ways to ask each replica of each group.

        Args:
            groups: of each group its replicas.
        """
        self._name = uuid.uuid4().hex
        self._needed: frozenset[str] = frozenset()
        self._links = [[_Link(ask, self._asked) for ask in replicas] for replicas in groups]
        self.groups = [
            Replicas(f"group-{g}", [link.call for link in links]) for g, links in enumerate(self._links)
        ]
        """The groups, to be called."""

    def need(self, generation_ids: Collection[str]) -> None:
        """Note which generations are needed; replicas are told within a second, and free all others."""
        self._needed = frozenset(generation_ids)

    async def hold(
        self,
        generation_id: str,
        timeout_s: float,
        away_s: float = math.inf,
        keep: Collection[str] = (),
    ) -> None:
        """Have every replica of every group hold a generation, and free all but that and those to be kept.

        Args:
            generation_id: of the generation.
            timeout_s: seconds.
            away_s: seconds for which replicas may not answer after the latest of the others began to.
            keep: ids of generations that are needed too; a replica that can not hold them is no hindrance.

        Raises:
            ArtefactError: a replica can not hold it, with the reason.
            TimeoutError: a replica is away, or does not hold it in time.
            OSError: a replica could not load it now, with the reason, and no other is still loading.
        """
        self.need({*keep, generation_id})
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        num_links = sum(map(len, self._links))
        # Replicas that start load before Serve lets them answer: the time runs from when the latest did.
        num_away, waits_until = num_links, math.inf
        say_at = loop.time() + _PATIENCE_S
        while True:
            holds, now_away = await self._refresh(generation_id)
            if holds:
                return
            if now_away < num_away or not now_away:
                waits_until = loop.time() + away_s
            num_away = now_away
            if loop.time() >= say_at:
                say_at = math.inf
                logger.warning(
                    "%s: waiting for every replica to hold it; of %d replicas %d do not answer",
                    generation_id,
                    num_links,
                    num_away,
                )
            if loop.time() >= min(deadline, waits_until):
                raise TimeoutError(f"not every replica holds {generation_id}")
            await asyncio.sleep(_STARTING_PERIOD_S)

    async def watch(self) -> None:
        """Ask all replicas again and again, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for group, links in zip(self.groups, self._links, strict=True):
                for link in links:
                    tasks.create_task(self._watch(group.name, link))

    async def _watch(self, group: str, link: _Link) -> None:
        """Ask one replica again and again; one that is away holds no other up."""
        said = ""
        while True:
            await asyncio.sleep(_PERIOD_S)
            holding = await link.refresh()
            if holding is None:
                continue
            why = {**holding.failed, **holding.refused}
            reasons = "; ".join(why[i] for i in sorted(why.keys() & self._needed))
            if reasons and reasons != said:
                logger.error("a replica of %s does not hold what is needed: %s", group, reasons)
            said = reasons

    def _asked(self) -> tuple[str, list[str]]:
        """Return what replicas are told: who asks, and which generations it needs now."""
        return self._name, sorted(self._needed)

    async def _refresh(self, generation_id: str) -> tuple[bool, int]:
        """Ask every replica once; return whether each holds a generation, and how many are away.

        Raises:
            ArtefactError: a replica can not hold it.
            OSError: a replica could not load it, and there is nothing else to wait for.
        """
        links = [link for links in self._links for link in links]
        holdings = await asyncio.gather(*(link.refresh() for link in links))
        there = [holding for holding in holdings if holding is not None]
        num_away = len(links) - len(there)
        if refused := [h.refused[generation_id] for h in there if generation_id in h.refused]:
            raise ArtefactError("; ".join(refused))
        failed = [h.failed[generation_id] for h in there if generation_id in h.failed]
        num_held = sum(generation_id in h.held for h in there)
        if num_away or num_held + len(failed) < len(links):
            return False, num_away
        if failed:
            raise OSError("; ".join(failed))
        return True, 0


class _Link:
    """One replica: how to ask it, and the connection to where it listens now.

    While Serve replaces a replica there are two for a while, and either may answer what is asked. The new one
    is called once it holds what is needed; calls that wait for the one before are not cut off.
    """

    def __init__(self, ask: Ask, asked: Callable[[], tuple[str, list[str]]]) -> None:
        self._ask = ask
        self._asked = asked
        self._address: Address | None = None
        self._connection: Connection | None = None
        self._refreshing = asyncio.Lock()

    async def refresh(self) -> Holding | None:
        """Return what the replica says of itself, None where it does not answer; connect to it anew."""
        # Not twice at once: what the watch asked before a change must not arrive after what is asked then.
        async with self._refreshing:
            try:
                name, generation_ids = self._asked()
                async with asyncio.timeout(_ASK_TIMEOUT_S):
                    holding = await self._ask(name, generation_ids)
                await self._connect(holding, generation_ids)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Ray's word for a call that it cancelled itself.
                return None
            except Exception:
                # It is being started, or started again: it is asked again in a second.
                return None
        return holding

    async def _connect(self, holding: Holding, generation_ids: list[str]) -> None:
        """Connect to where a replica answers now, if there is no connection or that one can take over."""
        lost = self._connection is None or self._connection.closed
        ready = set(generation_ids) <= set(holding.held)
        if lost or (ready and holding.address != self._address):
            before = self._connection
            self._connection = await Connection.connect(holding.address)
            self._address = holding.address
            if before is not None:
                asyncio.get_running_loop().call_later(_LINGER_S, before.close)

    async def call(self, message: bytes) -> bytes:
        """Return the answer to a message.

        Raises:
            ConnectionError: there is no connection, or it ended.
        """
        if self._connection is None:
            raise ConnectionResetError("the replica is not there")
        return await self._connection.call(message)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
