"""A replica of a shard group that can be told to be late; apart, since it imports Ray."""

from __future__ import annotations

import asyncio
import random

from serve.group import ShardSearch

LATE_S = 0.05


class LateShardSearch(ShardSearch):
    """A replica of a group that can be told to be late."""

    _late_share = 0.0

    async def be_late(self, share: float) -> None:
        """Be late in a share of all calls from now on."""
        self._late_share = share

    async def _answer(self, message: bytes) -> bytes:
        if random.random() < self._late_share:
            await asyncio.sleep(LATE_S)
        return await super()._answer(message)
