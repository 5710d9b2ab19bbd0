"""Shard groups in this process, and a gateway before them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from serve.gateway import GatewayService
from serve.hedging import Replicas
from twotower.generations.generation import Generation
from twotower.retrieval.front import Front
from twotower.retrieval.groups import ShardGroup, answer

LONG_S = 30.0
SETTINGS: dict[str, dict[str, str]] = {"active": {}, "missing": {}}


def held_by(generation: Path, num_groups: int) -> list[dict[str, ShardGroup]]:
    opened = Generation.open(generation)
    return [{opened.id: ShardGroup(opened, names)} for names in opened.shard_groups(num_groups)]


def caller(held: dict[str, ShardGroup]) -> Callable[[bytes], Awaitable[bytes]]:
    async def call(message: bytes) -> bytes:
        return answer(message, held)

    return call


async def away(message: bytes) -> bytes:
    raise ConnectionResetError


def gateway(generation: Path, groups: list[Replicas]) -> GatewayService:
    front = Front(Generation.open(generation))
    return GatewayService(front, groups, 1000, 1, SETTINGS, deadline_s=5.0)


def whole(generation: Path, num_groups: int) -> GatewayService:
    groups = [Replicas(f"group-{g}", [caller(h)]) for g, h in enumerate(held_by(generation, num_groups))]
    return gateway(generation, groups)
