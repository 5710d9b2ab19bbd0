"""Does the work on requests: what is short in the event loop itself, all else in a few fixed threads.

A thread costs a request two changes of threads, and two threads that run Python take the GIL from each other:
for work of a millisecond that is more than the work itself takes. Longer work would hold up the event loop,
and FAISS lets go of the GIL for most of it.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from serve.admission import check_deadline

T = TypeVar("T")


class Workers:
    """Does work for the coroutines of one event loop."""

    def __init__(self, count: int, torch_threads: int, waited: Callable[[float], None]) -> None:
        """Start no thread yet.

        Args:
            count: threads, fixed so that FAISS and torch keep one OpenMP pool each.
            torch_threads: CPU threads of torch in each of them.
            waited: takes the milliseconds that each work waited before it began.
        """
        prepare = functools.partial(torch.set_num_threads, torch_threads)
        self._pool = ThreadPoolExecutor(count, "retrieve", initializer=prepare)
        self._torch_threads: int | None = torch_threads
        self._waited = waited
        self._turn = asyncio.Lock()

    async def run(self, work: Callable[..., T], *arguments: Any, deadline: float = math.inf) -> T:
        """Return what ``work`` returns, run in one of the threads.

        Args:
            work: a function.
            arguments: its arguments.
            deadline: reading of ``time.monotonic`` from which on work does not begin.

        Raises:
            BadRequest: the deadline has passed (504).
        """
        asked = time.perf_counter()
        begin = functools.partial(self._begin, asked, work, arguments, deadline)
        return await asyncio.get_running_loop().run_in_executor(self._pool, begin)

    async def run_short(self, work: Callable[..., T], *arguments: Any, deadline: float = math.inf) -> T:
        """Return what ``work`` returns, run in the event loop, which nothing else can use meanwhile.

        Works begin in the order in which they were asked for. Between two of them the event loop turns, so
        that requests that have arrived are taken in or refused rather than left to wait unseen.

        Args:
            work: a function that takes a millisecond or two.
            arguments: its arguments.
            deadline: as in ``run``.

        Raises:
            BadRequest: the deadline has passed (504).
        """
        asked = time.perf_counter()
        async with self._turn:
            await asyncio.sleep(0)
            if self._torch_threads is not None:
                # A setting of each thread; here we are in that of the event loop.
                torch.set_num_threads(self._torch_threads)
                self._torch_threads = None
            return self._begin(asked, work, arguments, deadline)

    def close(self) -> None:
        """Let the threads end; work that waits is not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, asked: float, work: Callable[..., T], arguments: tuple[Any, ...], deadline: float) -> T:
        self._waited((time.perf_counter() - asked) * 1e3)
        check_deadline(deadline)
        return work(*arguments)
