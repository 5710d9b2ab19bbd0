"""A runner of Ray: the workers of a pool and tasks, see ``pipeline.runner``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from twotower.cluster.failures import plain_errors
from twotower.cluster.native_log import without_native_log
from twotower.cluster.pool import work_through
from twotower.cluster.priority import giving_way
from twotower.cluster.session import session, wants_gpu
from twotower.config import Config
from twotower.errors import TwotowerError
from twotower.pipeline.runner import Begin, Runner, Started

R = TypeVar("R")


class _Task(Generic[R]):
    """A task of Ray."""

    def __init__(self, reference: Any, attempt: bool = False) -> None:
        self.reference = reference
        self._attempt = attempt

    def result(self) -> R:
        try:
            with plain_errors():
                found: R = ray.get(self.reference)
        except TwotowerError as error:
            killed = isinstance(error.__cause__, OutOfMemoryError | WorkerCrashedError)
            if not (self._attempt and killed):
                raise
            raise MemoryError("the task was killed") from error
        return found

    def cancel(self) -> None:
        ray.cancel(self.reference, force=self._attempt)


class OnRay:
    """Does the work of a step in workers and tasks of Ray, which must be initialised."""

    def __init__(self, config: Config) -> None:
        """Take what each worker and task reserves from ``config.cluster``."""
        self._config = config

    @property
    def gpu(self) -> bool:
        """Whether the cluster has a GPU to be used.

        Raises:
            ConfigError: GPUs are required and the cluster has none.
        """
        return wants_gpu(self._config)

    def work_through(
        self, worker: type[Any], settings: dict[str, Any], parts: Sequence[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the facts of each part, see ``Runner``."""
        with plain_errors():
            yield from work_through(worker, settings, parts, self._config, gpu=True)

    def start(self, function: Callable[..., R], *arguments: Any, gpu: bool = False) -> Started[R]:
        """Start a task, see ``Runner``."""
        task: Any = ray.remote(num_cpus=self._config.cluster.cpus_per_encoder, num_gpus=int(gpu))
        return _Task(task(giving_way(function)).remote(*arguments))

    def attempt(self, function: Callable[..., R], *arguments: Any) -> Started[R]:
        """Start a task with the CPUs of a training worker, see ``Runner``."""
        task: Any = ray.remote(num_cpus=self._config.cluster.cpus_per_worker, max_retries=0)
        return _Task(task(giving_way(function)).remote(*arguments), attempt=True)

    def as_finished(self, calls: Sequence[Started[R]]) -> Generator[R, None, None]:
        """Yield what tasks return as they end, see ``Runner``."""
        tasks = {call.reference: call for call in calls if isinstance(call, _Task)}
        pending = list(tasks)
        try:
            while pending:
                done, pending = ray.wait(pending)
                for reference in done:
                    yield tasks[reference].result()
        finally:
            _end(pending)


@contextlib.contextmanager
def _begin(config: Config, address: str | None) -> Iterator[Runner]:
    with without_native_log(), session(config, address):
        yield OnRay(config)


def on_ray(address: str | None = None) -> Begin:
    """Return what has Ray for a step, and yields its runner.

    Args:
        address: of a cluster, as ``session`` takes it.
    """
    return lambda config: _begin(config, address)


def _end(tasks: list[Any]) -> None:
    """Cancel tasks and wait until they are over, so that none writes into a folder that is being removed."""
    for task in tasks:
        ray.cancel(task)
    for task in tasks:
        with contextlib.suppress(ray.exceptions.RayError, TwotowerError):
            ray.get(task)
