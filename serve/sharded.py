"""Ray Serve deployments of the sharded topology: a gateway, and one deployment per shard group and replica.

Each replica of a group is a deployment of its own, so that the gateway can ask a certain other one when the
first is slow. Messages between them are bytes (``twotower.retrieval.groups``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.api import make_api
from serve.frames import serve_frames
from serve.gateway import GatewayService
from serve.links import Ask, GroupLinks, Holding
from serve.metrics import Metrics, RaySink
from serve.settings import serve_settings, warn_of_missing
from twotower.errors import ArtefactError
from twotower.retrieval.front import Front
from twotower.retrieval.generation import Generation
from twotower.retrieval.groups import answer
from twotower.retrieval.holder import GroupHolder
from twotower.retrieval.store import CURRENT, Store, store_at

_START_TIMEOUT_S = 120.0

logger = logging.getLogger("ray.serve")


@serve.deployment(
    max_ongoing_requests=256,
    max_constructor_retry_count=3,
    # A replica that died is noticed and started again within a few seconds.
    health_check_period_s=1,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=5,
)
class ShardReplica:
    """Searches one group of shards, in each generation that a gateway needs."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it.
        self,
        store: str,
        pointer: str,
        group: int,
        num_groups: int,
        threads: int,
        workers: int,
        cache: str | None = None,
    ) -> None:
        """Load the group of the generation that a pointer names now.

        Args:
            store: path or URL of the store.
            pointer: name of the pointer.
            group: 0 to num_groups - 1.
            num_groups: groups of each generation.
            threads: CPU threads of a search.
            workers: calls worked on at the same time.
            cache: local folder for the generations of a URL.

        Raises:
            ArtefactError: nothing is published, or what is published is damaged or has too few shards.
        """
        found = store_at(store, cache)
        self._holder = GroupHolder(found, group, num_groups, threads)
        self._holder.load(published(found, pointer))
        self._pool = ThreadPoolExecutor(workers, "search")
        self._server, self._address = await serve_frames(self._answer, ray.util.get_node_ip_address())

    async def _answer(self, message: bytes) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, answer, message, self._holder.held
        )

    async def need(self, gateway: str, generation_ids: list[str]) -> Holding:
        """Note what a gateway needs, and return what is held and where calls are answered."""
        self._holder.need(gateway, generation_ids)
        return Holding(self._address, list(self._holder.held), self._holder.refused)


@serve.deployment(
    max_ongoing_requests=64,
    max_queued_requests=256,
    max_constructor_retry_count=1,
    max_surge_percent=100,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class Gateway:
    """Answers requests from a query tower here and from shard groups elsewhere."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it.
        self,
        store: str,
        pointer: str,
        threads: int,
        workers: int,
        max_k: int,
        cache: str | None,
        deadline_ms: float,
        groups: Sequence[Sequence[DeploymentHandle]],
    ) -> None:
        """Open the generation, and wait until every replica of every group holds it.

        Args:
            store: path or URL of the store.
            pointer: name of the pointer.
            threads: CPU threads of the query tower.
            workers: requests encoded or described at the same time.
            max_k: largest k of a request.
            cache: local folder for the generations of a URL.
            deadline_ms: milliseconds after which a group is left out.
            groups: handles of the replicas of each group.

        Raises:
            ArtefactError: nothing is published, or what is published is damaged.
        """
        self._links = GroupLinks([[_ask(handle) for handle in replicas] for replicas in groups])
        found = store_at(store, cache)
        generation_id = published(found, pointer)
        front = Front(Generation.open(found.fetch(generation_id)), threads)
        settings = serve_settings()
        self._service = GatewayService(
            front,
            self._links.groups,
            max_k,
            workers,
            settings,
            threads,
            deadline_ms / 1000,
            Metrics(RaySink()),
        )
        await self._links.hold({generation_id}, _START_TIMEOUT_S)
        self._watching = asyncio.ensure_future(self._links.watch())
        warn_of_missing(settings, logger)

    def __del__(self) -> None:
        """Stop the threads; called by Serve when the last request has ended."""
        if service := getattr(self, "_service", None):
            service.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; called by Serve after the constructor."""
        return make_api(self._service, request_ids=False)


def published(store: Store, pointer: str = CURRENT) -> str:
    """Return the id of the generation that a pointer names.

    Raises:
        ArtefactError: there is none.
    """
    generation_id = store.current(pointer)
    if generation_id is None:
        raise ArtefactError(
            f"nothing is published: {store.where} has no pointer {pointer}; run jobs.pipeline first"
        )
    return generation_id


def _ask(handle: DeploymentHandle) -> Ask:
    async def ask(gateway: str, generation_ids: list[str]) -> Holding:
        holding: Holding = await handle.need.remote(gateway, generation_ids)
        return holding

    return ask
