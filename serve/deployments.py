"""Ray Serve deployment of the fused topology: one holds the query tower and all shards."""

from __future__ import annotations

import functools
import logging

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig

from serve.api import make_api
from serve.arguments import BuildArgs
from serve.fused import FusedService
from serve.metrics import Metrics, RaySink
from serve.middleware import read_token
from serve.settings import MAX_ONGOING_REQUESTS, serve_settings, warn_of_missing
from twotower.generations.opening import store_at
from twotower.retrieval.follower import Follower
from twotower.retrieval.retriever import Retriever

logger = logging.getLogger("ray.serve")


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    max_queued_requests=256,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
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
    """Answers requests from the generation that a pointer of a store names, and follows the pointer."""

    def __init__(self, args: BuildArgs) -> None:
        """Open and verify the generation, and answer first queries.

        Args:
            args: of the application, with absolute paths.

        Raises:
            ArtefactError: nothing is published, or all that was is damaged or answers nonsense.
            ConfigError: the file of the token holds none.
        """
        self._args = args
        self._token = read_token(args.token_file)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        load = functools.partial(Retriever.ready, threads=args.threads, device=device)
        follower = Follower(store_at(args.store, args.cache), args.pointer, load, args.poll_s, log=logger)
        settings = serve_settings()
        self._service = FusedService(
            follower.open(),
            args.max_k,
            args.workers,
            settings,
            args.threads,
            args.limits,
            Metrics(RaySink()),
            args.probe_every,
            args.batch_window_ms,
            args.inline_ms,
        )
        self._service.follow(follower)
        warn_of_missing(settings, logger)

    def __del__(self) -> None:
        """Stop the threads; called by Serve when the last request has ended."""
        if service := getattr(self, "_service", None):
            service.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application; called by Serve after the constructor."""
        return make_api(self._service, False, self._token, self._args.log_user_ids, self._args.demo)
