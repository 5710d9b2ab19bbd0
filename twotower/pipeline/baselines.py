"""Baselines are fitted once for an evaluation; a runner may have it done while the catalogue is encoded."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config
from twotower.config.evaluation import BASELINES, EvaluationConfig
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Holdout
from twotower.errors import TwotowerError
from twotower.evaluation.baselines.fit import (
    Fitted,
    fit,
    wanted,
    write_known,
    write_orders,
)
from twotower.evaluation.baselines.protocol import fitted_names
from twotower.faults import explain
from twotower.pipeline.runner import Runner, Started
from twotower.progress import bar

_KILLED = "its task was killed, most likely for want of memory"


class Fits:
    """The fits of an evaluation, under way; those that nobody waited for end with the block."""

    def __init__(self, config: Config, dataset: Dataset, held: Holdout, folder: Path, runner: Runner) -> None:
        """Write what all of them read into ``folder``, and start them."""
        names = wanted(config.evaluation.baselines)
        write_known(folder, dataset, held.user_rows)
        self._found = write_orders(folder, dataset, names)
        path, threads = str(dataset.path.absolute()), config.train.threads_per_worker
        self._fits: dict[str, Started[Fitted | TwotowerError]] = {
            # A fit that was killed would be killed again.
            name: runner.attempt(_fit, name, str(folder), path, config.evaluation, threads, config.seed)
            for name in fitted_names()
            if name in names
        }

    def __enter__(self) -> Fits:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        for started in self._fits.values():
            started.cancel()

    def finish(self) -> dict[str, Fitted]:
        """Wait for all, and return what became of each, in the order of a report.

        Raises:
            TwotowerError: one could not be fitted for another reason than its size.
        """
        with bar(len(self._fits), "fit baselines", unit="baselines") as progress:
            while self._fits:
                name = next(iter(self._fits))
                self._found[name] = _result(self._fits[name])
                del self._fits[name]
                progress.update()
        return {name: self._found[name] for name in BASELINES.names if name in self._found}


def _result(started: Started[Fitted | TwotowerError]) -> Fitted:
    try:
        outcome = started.result()
    except MemoryError:
        return Fitted(_KILLED)
    if isinstance(outcome, TwotowerError):
        raise outcome
    return outcome


def _fit(
    name: str, folder: str, dataset: str, config: EvaluationConfig, threads: int, seed: int
) -> Fitted | TwotowerError:
    try:
        return fit(name, Path(folder), Dataset.open(dataset), config, threads, seed)
    except MemoryError:
        return Fitted("there was not enough memory for it")
    except Exception as error:
        # A runner may add frames of its own to what is raised.
        told = explain(error)
        if told is None:
            raise
        return told
