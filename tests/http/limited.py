"""The application without a server, with a short queue and narrow limits."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serve.fused import FusedService, Service
from tests.http.asgi import ask
from twotower.config import LimitsConfig
from twotower.retrieval.retriever import Retriever

WORKERS, MAX_QUEUED = 2, 3
LIMITS = LimitsConfig(
    max_batch=4,
    max_batch_k=50,
    max_history=5,
    max_ids=6,
    max_fields=3,
    max_body_bytes=40_000,
    max_held_bytes=90_000,
    body_timeout_s=0.2,
    max_queued=MAX_QUEUED,
)


def make_service(library: Retriever) -> Service:
    return FusedService(library, 40, WORKERS, {"active": {}, "missing": {}}, limits=LIMITS)


def retrieve(api: FastAPI, **arguments: Any) -> Any:
    return ask(api, "POST", "/v1/retrieve", **{"parts": [b'{"k": 3}'], **arguments})
