"""Who does the work of a step: this process, one thing after the other, or whoever a runner gives it to.

A step (building an index, an evaluation) is written once, over a ``Runner``. What is large passes through
files, so that a runner moves only descriptions of work and small results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import torch

from twotower.config import Config
from twotower.errors import ConfigError
from twotower.training.threads import limited_threads

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

FEWEST = 64
"""Users of a part that are not worth sharing out, where a part may be that large."""


class Started(Protocol[R_co]):
    """A call that a runner has taken on."""

    def result(self) -> R_co:
        """Wait for the call and return what it returned, or raise its error.

        Raises:
            MemoryError: the call was an ``attempt``, and was killed, most likely for want of memory.
        """

    def cancel(self) -> None:
        """End the call; nobody waits for it any more."""


class Runner(Protocol):
    """Does the work of a step."""

    @property
    def gpu(self) -> bool:
        """Whether there is a GPU to be used.

        Raises:
            ConfigError: GPUs are required and there is none.
        """

    def work_through(
        self, worker: type[Any], settings: dict[str, Any], parts: Sequence[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the facts of each part, in any order.

        Args:
            worker: importable class; called with a table of one row (a part), it returns a table of facts.
            settings: keyword arguments of its constructor; ``device`` and ``threads`` are added to them.
            parts: descriptions of the work, all with the same keys.

        Raises:
            TwotowerError: a worker raised one.
        """

    def start(self, function: Callable[..., R], *arguments: Any, gpu: bool = False) -> Started[R]:
        """Take on a call of an importable function.

        Args:
            function: what is called.
            *arguments: it is called with; small.
            gpu: let it have a GPU.
        """

    def attempt(self, function: Callable[..., R], *arguments: Any) -> Started[R]:
        """Take on a call that may need more memory than there is; one that is killed is not tried again."""

    def as_finished(self, calls: Sequence[Started[R]]) -> Generator[R, None, None]:
        """Yield what the calls return as they end. Those that nobody waits for any more are cancelled."""


Begin = Callable[[Config], AbstractContextManager[Runner]]
"""Yields who does the work of a step. A step calls it once it knows that there is something to do."""


class _Deferred(Generic[R]):
    """A call that is made when its result is wanted."""

    def __init__(self, threads: int, function: Callable[..., R], arguments: Sequence[Any]) -> None:
        self._threads = threads
        self._function = function
        self._arguments = arguments
        self._results: list[R] = []

    def result(self) -> R:
        if not self._results:
            with limited_threads(self._threads):
                self._results.append(self._function(*self._arguments))
        return self._results[0]

    def cancel(self) -> None:
        """Do nothing: it has not begun, or it has ended."""


class OneProcess:
    """Does everything in this process, with as many threads as one worker of a cluster has.

    Workers set the number of threads, so that ``one_process`` is what restores the caller's.
    """

    def __init__(self, config: Config) -> None:
        """Take the number of threads and what is said of GPUs from ``config.cluster``."""
        self._use_gpu = config.cluster.use_gpu
        self.threads = max(1, int(config.cluster.cpus_per_encoder))
        """CPU threads of torch and FAISS."""

    @property
    def gpu(self) -> bool:
        """Whether there is a GPU to be used.

        Raises:
            ConfigError: GPUs are required and this machine has none.
        """
        return uses_gpu(self._use_gpu)

    def work_through(
        self, worker: type[Any], settings: dict[str, Any], parts: Sequence[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the facts of each part in order, see ``Runner``."""
        if not parts:
            return
        device = "cuda" if self.gpu else "cpu"
        works = worker(**settings, device=device, threads=self.threads)
        for part in parts:
            yield from works(pa.table({name: [value] for name, value in part.items()})).to_pylist()

    def start(self, function: Callable[..., R], *arguments: Any, gpu: bool = False) -> Started[R]:
        """Keep the call until its result is wanted, see ``Runner``."""
        return _Deferred(self.threads, function, arguments)

    def attempt(self, function: Callable[..., R], *arguments: Any) -> Started[R]:
        """Keep the call until its result is wanted, see ``Runner``."""
        return _Deferred(self.threads, function, arguments)

    def as_finished(self, calls: Sequence[Started[R]]) -> Generator[R, None, None]:
        """Make the calls, one after the other, and yield what they return."""
        for call in calls:
            yield call.result()


@contextlib.contextmanager
def one_process(config: Config) -> Iterator[Runner]:
    """Yield a runner that does everything in this process, whose own threads are limited meanwhile."""
    runner = OneProcess(config)
    with limited_threads(runner.threads):
        yield runner


def uses_gpu(use_gpu: str) -> bool:
    """Return whether this process uses a GPU, by ``cluster.use_gpu``.

    Raises:
        ConfigError: GPUs are required and this machine has none.
    """
    there = use_gpu != "no" and torch.cuda.is_available()
    if use_gpu == "yes" and not there:
        raise ConfigError("cluster.use_gpu is yes and this machine has no GPU; use one that has, or auto")
    return there


def ranges(count: int, config: Config) -> list[dict[str, int]]:
    """Return ``start`` and ``stop`` of parts of ``count`` users: a few for each worker, none too large."""
    step = part_size(count, config)
    return [{"start": start, "stop": min(start + step, count)} for start in range(0, count, step)]


def part_size(count: int, config: Config) -> int:
    """Return the most users of a part of ``count`` users: a few parts for each worker, none too large."""
    fair = -(-count // (4 * config.cluster.num_encoders))
    return max(1, min(config.cluster.encode_batch_size, max(fair, FEWEST)))
