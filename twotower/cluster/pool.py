"""Workers of Ray Data that work through small descriptions of work and answer with small facts.

What is large (vectors, users, lists) is read from and written to files by the workers; only descriptions
and facts pass through the driver.

With a GPU a worker is an actor, since Ray ends the process of a task that had one. Without, it is an object
that a process of tasks keeps from one part to the next: Ray gives idle processes to the next stage, so that
a job of many small stages imports torch once and not, for seconds, at the start of each.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from twotower import errors
from twotower.cluster.priority import give_way
from twotower.cluster.session import quiet, wants_gpu
from twotower.config import Config
from twotower.errors import NotAllowedError, RequestError, TwotowerError
from twotower.faults import explain

_ERROR = "error"
_KEPT_S = 10.0
"""Seconds after its last part in which a process still keeps its worker, and the memory of it."""


def work_through(
    worker: type[Any], settings: dict[str, Any], parts: Sequence[dict[str, Any]], config: Config, gpu: bool
) -> Iterator[dict[str, Any]]:
    """Yield the facts of each part, in any order.

    Args:
        worker: importable class; called with a table of one row (a part), it returns a table.
        settings: keyword arguments of its constructor; ``device`` and ``threads`` are added to them.
        parts: descriptions of the work, all with the same keys.
        config: for the number of workers and what each reserves.
        gpu: let each worker have a GPU where the configuration and the cluster do.

    Raises:
        TwotowerError: a worker raised one, or what ``explain`` makes one of.
    """
    if not parts:
        return
    cluster = config.cluster
    use_gpu = gpu and wants_gpu(config)
    size = min(cluster.num_encoders, len(parts))
    if use_gpu:
        size = max(1, min(size, int(ray.cluster_resources()["GPU"])))
    settings = {
        **settings,
        "device": "cuda" if use_gpu else "cpu",
        "threads": max(1, int(cluster.cpus_per_encoder)),
    }
    with without_bars():
        work = ray.data.from_arrow([pa.table({k: [v] for k, v in part.items()}) for part in parts])
        if use_gpu:
            results = work.map_batches(
                Guarded,
                fn_constructor_kwargs={"worker": worker, "settings": settings},
                compute=ray.data.ActorPoolStrategy(size=size),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=cluster.cpus_per_encoder,
                num_gpus=1,
            )
        else:
            results = work.map_batches(
                _by_kept,
                fn_kwargs={"stage": uuid.uuid4().hex, "worker": worker, "settings": settings},
                compute=ray.data.TaskPoolStrategy(size=size),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=cluster.cpus_per_encoder,
            )
        batches: Iterator[Any] = iter(
            results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        )
        for batch in batches:
            for fact in batch.to_pylist():
                _raise_error(fact)
                yield fact


class Guarded:
    """A worker whose own errors come back as data: Ray adds its frames to what is raised, and logs them."""

    def __init__(self, worker: type[Any], settings: dict[str, Any]) -> None:
        """Make the worker; an error of that is told when it is called."""
        give_way()
        self._error: TwotowerError | None = None
        try:
            self._worker = worker(**settings)
        except Exception as error:
            self._error = _told(error)

    def __call__(self, part: pa.Table) -> pa.Table:
        """Return the worker's facts, or its error."""
        if self._error is None:
            try:
                return self._worker(part)
            except Exception as error:
                self._error = _told(error)
        return pa.table({_ERROR: [type(self._error).__name__], "message": [str(self._error)]})


class _Kept:
    """The worker of the stage that this process worked at last, for a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage: str | None = None
        self._worker: Guarded | None = None
        self._timer: threading.Timer | None = None

    def call(self, part: pa.Table, stage: str, worker: type[Any], settings: dict[str, Any]) -> pa.Table:
        """Return what the stage's worker makes of a part."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._worker is None or self._stage != stage:
                # The one before goes first: there need not be room for both.
                self._worker = None
                self._stage, self._worker = stage, Guarded(worker, settings)
            try:
                return self._worker(part)
            finally:
                self._timer = threading.Timer(_KEPT_S, self._drop)
                self._timer.daemon = True
                self._timer.start()

    def _drop(self) -> None:
        with self._lock:
            if self._timer is threading.current_thread():
                self._worker = None


_kept = _Kept()


def _by_kept(part: pa.Table, **stage: Any) -> pa.Table:
    return _kept.call(part, **stage)


def _told(error: Exception) -> TwotowerError:
    told = explain(error)
    if told is None:
        raise error
    return told


def _raise_error(fact: dict[str, Any]) -> None:
    if fact.get(_ERROR) is not None:
        kind = getattr(errors, fact[_ERROR], TwotowerError)
        # This one is made of two parts, and its message has both.
        raise (RequestError if kind is NotAllowedError else kind)(fact["message"])


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Run Ray Data inside the block without its own progress bars and log lines."""
    quiet()
    context = ray.data.DataContext.get_current()
    shown = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.enable_progress_bars = shown


def pin_threads(threads: int) -> None:
    """Give torch so many CPU threads in this process."""
    torch.set_num_threads(threads)
