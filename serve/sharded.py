"""Ray Serve deployment of the gateway, in the sharded topology: encodes here, has shard groups search."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from serve.api import make_api
from serve.arguments import BuildArgs
from serve.gateway import GatewayService
from serve.links import GroupLinks, ask_through, part_of
from serve.metrics import Metrics, RaySink
from serve.middleware import read_token
from serve.settings import MAX_ONGOING_REQUESTS, serve_settings, warn_of_missing
from twotower.generations.generation import Generation
from twotower.generations.opening import store_at
from twotower.retrieval.follower import Follower
from twotower.retrieval.front import Front

T = TypeVar("T")
_LOAD_TIMEOUT_S = 600.0
"""How long the replicas of the groups may take to load a generation."""
_START_AWAY_S = 60.0
"""How long a gateway that starts waits for replicas after the latest of the others answered."""

logger = logging.getLogger("ray.serve")


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    max_queued_requests=256,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
    max_constructor_retry_count=1,
    # A replica that is to be replaced serves until the new one does, also where it is the only one.
    max_surge_percent=100,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class Gateway:
    """Answers requests from a query tower here and from shard groups elsewhere, and follows the pointer."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it.
        self, args: BuildArgs, groups: Sequence[Sequence[DeploymentHandle]]
    ) -> None:
        """Open the generation, wait until every replica of every group holds it, and answer first queries.

        Where replicas stay away it answers from the others, and no first query is asked.

        Args:
            args: of the application, with absolute paths.
            groups: handles of the replicas of each group.

        Raises:
            ArtefactError: nothing is published, or all that was is damaged or answers nonsense.
            ConfigError: the file of the token holds none.
        """
        self._args = args
        self._token = read_token(args.token_file)
        self._loop = asyncio.get_running_loop()
        self._links = GroupLinks(
            [
                [ask_through(handle, part_of(args, group)) for handle in replicas]
                for group, replicas in enumerate(groups)
            ]
        )
        settings = serve_settings()
        self._service = GatewayService(
            None,
            self._links.groups,
            args.max_k,
            args.workers,
            settings,
            args.threads,
            args.group_deadline_ms / 1000,
            args.limits,
            Metrics(RaySink()),
            args.inline_ms,
            args.probe_every,
        )
        follower = Follower(
            store_at(args.store, args.cache), args.pointer, self._load, args.poll_s, self._gone, logger
        )
        self._service.front = await self._loop.run_in_executor(None, follower.open)
        self._watching = asyncio.ensure_future(self._links.watch())
        self._service.follow(follower)
        warn_of_missing(settings, logger)

    def __del__(self) -> None:
        """Stop the threads; called by Serve when the last request has ended."""
        if service := getattr(self, "_service", None):
            service.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; called by Serve after the constructor."""
        return make_api(self._service, False, self._token, self._args.log_user_ids, self._args.demo)

    def _load(self, generation: Generation) -> Front:
        """Return the front of a generation that every group holds, after its canary queries.

        The follower calls it in a thread of its own.

        Raises:
            ArtefactError: a group can not hold it, or it answers nonsense.
            OSError: a replica is away, or can not load it now.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        front = Front(generation, self._args.threads, device)
        front.warm_up()
        used = self._used()
        try:
            away_s = math.inf if used else _START_AWAY_S
            self._wait(self._links.hold(generation.id, _LOAD_TIMEOUT_S, away_s, keep=used))
            self._service.check_canaries(front, self._wait)
        except BaseException as error:
            if isinstance(error, OSError) and not used:
                # A gateway that is started again while a group is down answers from the others.
                logger.warning("starting without every group: %s", error)
                return front
            self._loop.call_soon_threadsafe(self._links.need, used)
            raise
        return front

    def _used(self) -> set[str]:
        """Return the id of the generation that answers; nothing before the first does."""
        name = self._service.generation_id
        return set() if name is None else {name}

    def _gone(self, generation_id: str) -> None:
        """Let the groups free a generation that no request here needs any more."""
        self._loop.call_soon_threadsafe(self._links.need, self._used())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what a coroutine returns, run in the event loop; from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
