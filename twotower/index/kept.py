"""What was used last, as much of it as fits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any


class Kept:
    """The things used last, as many as some bytes hold; may be shared by threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._things: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable | None) -> Any:
        """Return what is kept under a key, else None."""
        with self._lock:
            if key not in self._things:
                return None
            self._things.move_to_end(key)
            return self._things[key][0]

    def put(self, key: Hashable | None, thing: Any, size: int) -> None:
        """Keep a thing of ``size`` bytes and let go of those used longest ago; without a key do nothing."""
        if key is None or size > self._max_bytes:
            return
        with self._lock:
            if key in self._things:
                return
            self._things[key] = thing, size
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= self._things.popitem(last=False)[1][1]
