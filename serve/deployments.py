"""Ray Serve deployment of the fused topology: one holds the query tower and all shards."""

from __future__ import annotations

import logging

import torch
from fastapi import FastAPI
from ray import serve

from serve.api import make_api
from serve.metrics import Metrics, RaySink
from serve.service import FusedService
from serve.settings import serve_settings, warn_of_missing
from twotower.errors import ArtefactError
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.store import store_at

logger = logging.getLogger("ray.serve")


@serve.deployment(
    max_ongoing_requests=64,
    max_queued_requests=256,
    # A replica that can not open its generation will not do so at a later try either.
    max_constructor_retry_count=1,
    # A replica that is to be replaced serves until the new one does. Where it is the only one, requests would
    # wait in between.
    max_surge_percent=100,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class Retrieval:
    """Answers requests from the generation that a pointer of a store names when the replica starts."""

    def __init__(
        self,
        store: str,
        pointer: str,
        threads: int,
        workers: int,
        max_k: int,
        cache: str | None = None,
        *,
        probe_every: int = 0,
        batch_window_ms: float | None = None,
    ) -> None:
        """Open and verify the generation, and answer a first query.

        Args:
            store: path or URL of the store.
            pointer: name of the pointer.
            threads: CPU threads of the query tower and of a search.
            workers: requests worked on at the same time.
            max_k: largest k of a request.
            cache: local folder for the generations of a URL.
            probe_every: compare one of so many answers with exact search; 0 compares none.
            batch_window_ms: how long a query waits for others; by the machine when not given.

        Raises:
            ArtefactError: nothing is published, or what is published is damaged.
        """
        found = store_at(store, cache)
        generation_id = found.current(pointer)
        if generation_id is None:
            raise ArtefactError(
                f"nothing is published: {store} has no pointer {pointer}; run jobs.pipeline first"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        retriever = Retriever.open(found.fetch(generation_id), threads=threads, device=device)
        retriever.warm_up()
        settings = serve_settings()
        metrics = Metrics(RaySink())
        self._service = FusedService(
            retriever, max_k, workers, settings, threads, metrics, probe_every, batch_window_ms
        )
        warn_of_missing(settings, logger)

    def __del__(self) -> None:
        """Stop the threads; called by Serve when the last request has ended."""
        if service := getattr(self, "_service", None):
            service.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; called by Serve after the constructor."""
        return make_api(self._service, request_ids=False)
