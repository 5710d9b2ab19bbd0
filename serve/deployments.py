"""Ray Serve deployment of the fused topology: one holds the query tower and all shards."""

from __future__ import annotations

import functools
import logging

from fastapi import FastAPI
from ray import serve

from serve.api import make_api
from serve.service import FusedService
from serve.settings import serve_settings, warn_of_missing
from twotower.retrieval.follower import Follower
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.store import store_at

logger = logging.getLogger("ray.serve")


@serve.deployment(
    max_ongoing_requests=64,
    max_queued_requests=256,
    # A replica that can not open its generation will not do so at a later try either.
    max_constructor_retry_count=1,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class Retrieval:
    """Answers requests from the generation that a pointer of a store names, and follows the pointer."""

    def __init__(
        self,
        store: str,
        pointer: str,
        threads: int,
        workers: int,
        max_k: int,
        cache: str | None = None,
        poll_s: float = 1.0,
    ) -> None:
        """Open and verify the generation, and answer first queries.

        Args:
            store: path or URL of the store.
            pointer: name of the pointer.
            threads: CPU threads of the query tower and of a search.
            workers: requests worked on at the same time.
            max_k: largest k of a request.
            cache: local folder for the generations of a URL.
            poll_s: seconds between two looks at the pointer; 0 does not follow it.

        Raises:
            ArtefactError: nothing is published, or what is published is damaged or answers nonsense.
        """
        load = functools.partial(Retriever.ready, threads=threads)
        follower = Follower(store_at(store, cache), pointer, load, poll_s, log=logger)
        settings = serve_settings()
        self._service = FusedService(follower.open(), max_k, workers, settings, threads)
        if poll_s:
            self._service.follow(follower)
        warn_of_missing(settings, logger)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; called by Serve after the constructor."""
        return make_api(self._service, request_ids=False)
