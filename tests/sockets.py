"""Keeps sockets out of the inner loop: a unit or property test that has one needs the marker ``sockets``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest


class NoSockets:
    """A plugin that refuses sockets of the internet to tests without the marker, in their own thread."""

    def __init__(self) -> None:
        self._test: str | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._test is None or event not in ("socket.bind", "socket.connect"):
            return
        if isinstance(arguments[1], tuple) and threading.current_thread() is threading.main_thread():
            raise RuntimeError(f"{self._test} has a socket: give it the marker sockets")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        fast = any(item.get_closest_marker(name) for name in ("unit", "property"))
        self._test = item.nodeid if fast and not item.get_closest_marker("sockets") else None
        try:
            return (yield)
        finally:
            self._test = None
