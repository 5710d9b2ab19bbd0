"""The HTTP routes over a service, without Ray: one application for Ray Serve and for plain uvicorn."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from starlette.routing import Route

import twotower
from serve import documentation as docs
from serve.admission import INLINE_BODY_BYTES, Bodies, deadline_of
from serve.demo import add_demo
from serve.errors import add_error_handlers, json_response
from serve.middleware import BearerToken, Failures, Heads, Measured, RequestIds
from serve.schemas import (
    BadRequest,
    BatchAnswer,
    GenerationAnswer,
    HealthAnswer,
    RetrieveAnswer,
    parse_batch,
    parse_retrieve,
    parse_similar,
)
from serve.service import Service
from twotower.config import LimitsConfig

T = TypeVar("T")


def make_api(
    service: Service[Any],
    request_ids: bool = True,
    token: str | None = None,
    log_user_ids: bool = False,
    demo: bool = True,
) -> FastAPI:
    """Return the application that answers over HTTP for a service.

    Args:
        service: answers.
        request_ids: answer with X-Request-ID; Ray Serve does so itself.
        token: bearer token that requests for data must bring; none when not given.
        log_user_ids: log the messages of failures, which may name users and items.
        demo: answer the demo page and what it asks for, users' histories among it.
    """
    api = FastAPI(
        title="twotower",
        version=twotower.__version__,
        description=docs.DESCRIPTION,
        redoc_url=None,
        # A redirect would name the host that a client made up.
        redirect_slashes=False,
    )
    limits = service.limits
    bodies = Bodies(limits)

    async def answered(
        request: Request,
        parse: Callable[[bytes, int, LimitsConfig], T],
        answer: Callable[[T, float], Awaitable[bytes]],
    ) -> Response:
        deadline = deadline_of(request, limits.deadline_ms)
        async with bodies.read(request) as body:
            with service.admission.enter() as place:
                if len(body) <= INLINE_BODY_BYTES:
                    query = parse(body, service.max_k, limits)
                else:
                    query = await service.workers.run(parse, body, service.max_k, limits, deadline=deadline)
                if isinstance(query, list):
                    place.hold(len(query))
                return json_response(await answer(query, deadline))

    @api.post(
        "/v1/retrieve",
        summary="The best items for a user",
        response_model=None,
        responses=docs.responses(RetrieveAnswer, docs.RETRIEVE_EXAMPLE, docs.RETRIEVE_ERRORS),
        openapi_extra=docs.retrieve_extra(),
    )
    async def retrieve(request: Request) -> Response:
        return await answered(request, parse_retrieve, service.retrieve)

    @api.post(
        "/v1/retrieve/batch",
        summary="The best items for each of several requests",
        response_model=None,
        responses=docs.responses(BatchAnswer, docs.BATCH_EXAMPLE, docs.RETRIEVE_ERRORS),
        openapi_extra=docs.batch_extra(),
    )
    async def retrieve_batch(request: Request) -> Response:
        return await answered(request, parse_batch, service.retrieve_batch)

    @api.get(
        "/v1/items/{item_id:path}/similar",
        summary="The items most similar to an item",
        response_model=None,
        responses=docs.responses(RetrieveAnswer, docs.SIMILAR_EXAMPLE, docs.SIMILAR_ERRORS),
        openapi_extra=docs.similar_extra(service.max_k),
    )
    async def similar(item_id: str, request: Request) -> Response:
        deadline = deadline_of(request, limits.deadline_ms)
        k, fields, predicates = parse_similar(request.query_params.multi_items(), service.max_k, limits)
        with service.admission.enter():
            return json_response(await service.similar(item_id, k, fields, predicates, deadline))

    @api.get(
        "/v1/generation",
        summary="What answers: the generation's manifest in short",
        response_model=None,
        responses=docs.responses(GenerationAnswer, docs.GENERATION_EXAMPLE),
    )
    async def generation() -> Response:
        return json_response(orjson.dumps(service.describe()))

    @api.get(
        "/healthz",
        summary="The process is alive",
        response_model=None,
        responses=docs.responses(HealthAnswer, docs.HEALTH_EXAMPLE),
    )
    async def healthz() -> Response:
        return json_response(b'{"status":"ok"}')

    @api.get(
        "/readyz",
        summary="The index is loaded and has answered a query",
        response_model=None,
        responses=docs.ready_responses(),
    )
    async def readyz() -> Response:
        if not service.ready:
            raise BadRequest(
                "the index is being loaded", "try again in a second", 503, "not_ready", {"Retry-After": "1"}
            )
        content = {
            "status": "ready",
            "generation": service.front.generation_id,
            **service.status(),
            "settings": service.settings,
        }
        return json_response(orjson.dumps(content))

    if demo:
        add_demo(api, service)
    add_error_handlers(api)
    _match_whole_paths(api)
    docs.document(api, service.max_k, limits, token is not None)
    # The last that is added sees a request first.
    api.add_middleware(Heads)
    if token is not None:
        api.add_middleware(BearerToken, token=token)
    api.add_middleware(Failures, log_messages=log_user_ids)
    if request_ids:
        api.add_middleware(RequestIds)
    api.add_middleware(Measured, metrics=service.metrics)
    return api


def _match_whole_paths(api: FastAPI) -> None:
    """Let routes match whole paths: their patterns end in ``$``, which passes over a newline at the end."""
    for route in api.routes:
        if isinstance(route, Route):
            route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")
