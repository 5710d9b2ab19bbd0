"""Ray Serve deployment of one replica of a shard group, in the sharded topology.

Each replica of a group is a deployment of its own, so that the gateway can ask a certain other one when the
first is slow. Messages between them are bytes (``twotower.retrieval.groups``). Nothing here imports torch: a
replica that only searches starts sooner and takes less memory without.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import ray
from ray import serve

from serve.arguments import BuildArgs
from serve.frames import serve_frames
from serve.links import Holding, part_of
from serve.probe import lowest_priority
from twotower.generations.opening import store_at
from twotower.retrieval.groups import answer, is_exact
from twotower.retrieval.holder import GroupHolder

_DRAIN_S = 3.0
"""How long a replica of a group that is to go answers on; gateways look for its successor every second."""


class ShardSearch:
    """Searches one group of shards, in each generation that a gateway needs."""

    async def __init__(self, args: BuildArgs, group: int) -> None:  # type: ignore[misc]  # Serve awaits it.
        """Hold what is published, if that can be held, and listen for the gateways, which say what they need.

        A replica that takes the place of another must answer at once. What gateways answer from may be
        another generation than the one that is published, if that is damaged.

        Args:
            args: of the application, with absolute paths.
            group: 0 to ``args.groups`` - 1.
        """
        store = store_at(args.store, args.cache)
        self._holder = GroupHolder(store, group, args.groups, args.threads)
        self._part = part_of(args, group)
        self._pool = ThreadPoolExecutor(args.workers, "search")
        self._aside = ThreadPoolExecutor(1, "exact", lowest_priority)
        await asyncio.get_running_loop().run_in_executor(self._pool, self._holder.begin, args.pointer)
        self._server, self._address = await serve_frames(
            self._answer, ray.util.get_node_ip_address(), args.log_user_ids
        )

    async def need(self, gateway: str, generation_ids: list[str]) -> Holding:
        """Note what a gateway needs, and return what is held and where calls are answered."""
        holder = self._holder
        # Freeing a generation takes long, and calls have to be answered meanwhile.
        await asyncio.get_running_loop().run_in_executor(None, holder.need, gateway, generation_ids)
        return Holding(self._address, list(holder.held), holder.refused, holder.failed, self._part)

    async def _answer(self, message: bytes) -> bytes:
        """Return the answer to a message of the gateway.

        One that is taken back before a thread is free for it is not worked on.
        """
        # Exact search, for the probe of index recall, holds up no query.
        pool = self._aside if is_exact(message) else self._pool
        return await asyncio.get_running_loop().run_in_executor(pool, answer, message, self._holder.held)


ShardReplica = serve.deployment(
    max_ongoing_requests=256,
    max_constructor_retry_count=3,
    # A replica that died is noticed and started again within a few seconds.
    health_check_period_s=1,
    # A replica that is to be replaced answers until the new one holds what is published, and then for as long
    # as it takes gateways to find that one.
    max_surge_percent=100,
    graceful_shutdown_wait_loop_s=_DRAIN_S,
    graceful_shutdown_timeout_s=_DRAIN_S + 5,
)(ShardSearch)
