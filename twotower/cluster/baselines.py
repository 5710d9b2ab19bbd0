"""Baselines are fitted in Ray tasks, each once for an evaluation, while the catalogue is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from twotower.cluster.priority import give_way
from twotower.config import Config
from twotower.config.evaluation import EvaluationConfig
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Holdout
from twotower.errors import TwotowerError
from twotower.evaluation.baselines.fit import (
    BASELINES,
    FITTED,
    Fitted,
    fit,
    wanted,
    write_known,
    write_orders,
)
from twotower.faults import explain
from twotower.progress import bar

_KILLED = "its task was killed, most likely for want of memory"


class Fits:
    """The fits of an evaluation, under way; those that nobody waited for end with the block."""

    def __init__(self, config: Config, dataset: Dataset, held: Holdout, folder: Path) -> None:
        """Write what all of them read into ``folder``, and start them."""
        names = wanted(config.evaluation.baselines)
        write_known(folder, dataset, held.user_rows)
        self._found = write_orders(folder, dataset, names)
        # A fit that was killed would be killed again.
        task = ray.remote(num_cpus=config.cluster.cpus_per_worker, max_retries=0)(_fit)
        path, threads = str(dataset.path.absolute()), config.train.threads_per_worker
        self._tasks: dict[str, Any] = {
            name: task.remote(name, str(folder), path, config.evaluation, threads, config.seed)
            for name in FITTED
            if name in names
        }

    def __enter__(self) -> Fits:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        for task in self._tasks.values():
            ray.cancel(task, force=True)

    def finish(self) -> dict[str, Fitted]:
        """Wait for all, and return what became of each, in the order of a report.

        Raises:
            TwotowerError: one could not be fitted for another reason than its size.
        """
        with bar(len(self._tasks), "fit baselines", unit="baselines") as progress:
            while self._tasks:
                name = next(iter(self._tasks))
                self._found[name] = _result(self._tasks[name])
                del self._tasks[name]
                progress.update()
        return {name: self._found[name] for name in BASELINES if name in self._found}


def _result(task: Any) -> Fitted:
    try:
        outcome = ray.get(task)
    except (OutOfMemoryError, WorkerCrashedError):
        return Fitted(_KILLED)
    if isinstance(outcome, TwotowerError):
        raise outcome
    assert isinstance(outcome, Fitted), outcome
    return outcome


def _fit(
    name: str, folder: str, dataset: str, config: EvaluationConfig, threads: int, seed: int
) -> Fitted | TwotowerError:
    give_way()
    try:
        return fit(name, Path(folder), Dataset.open(dataset), config, threads, seed)
    except MemoryError:
        return Fitted("there was not enough memory for it")
    except Exception as error:
        # Ray adds its frames to what is raised.
        told = explain(error)
        if told is None:
            raise
        return told
