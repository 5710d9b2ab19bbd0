"""What is known of a sweep's trials: one file each, written at every epoch that Ray Tune reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune as ray_tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from twotower.artefacts import read_manifest, write_json
from twotower.config import Config
from twotower.evaluation.sweep import Trial, TrialResult
from twotower.progress import say

_EPOCH_KEYS = ("epoch", "loss", "temperature", "seconds", "validation_recall", "validation_ndcg")
_ENDED = ("finished", "stopped")


class Records:
    """What is known of each trial, in memory and as one file each."""

    def __init__(self, folder: Path, trials: Sequence[Trial], config: Config) -> None:
        """Read what an earlier run of the sweep has written."""
        self.metric = config.train.validation.metric
        self._folder = folder
        self._trials = {trial.name: trial for trial in trials}
        self._results = {}
        folder.mkdir(exist_ok=True)
        for trial in trials:
            path = folder / f"{trial.name}.json"
            known = TrialResult.read(path)
            self._results[trial.name] = known or TrialResult(trial.name, trial.parameters)

    @property
    def results(self) -> list[TrialResult]:
        """All trials, in their order."""
        return list(self._results.values())

    def missing(self) -> list[Trial]:
        """Return the trials that have not ended, or failed."""
        return [self._trials[r.name] for r in self.results if r.status not in _ENDED]

    def ended(self) -> list[TrialResult]:
        """Return the trials that have ended without an error."""
        return [result for result in self.results if result.status in _ENDED]

    def start(self, name: str) -> None:
        """Forget the error of an earlier run."""
        result = self._results[name]
        result.status, result.error = "running", None

    def add_epoch(self, name: str, report: Mapping[str, Any]) -> None:
        """Add what an epoch came to; one that was trained again replaces the first."""
        result = self._results[name]
        epoch = {key: report[key] for key in _EPOCH_KEYS if key in report}
        kept = [earlier for earlier in result.history if earlier["epoch"] < epoch["epoch"]]
        result.history = [*kept, epoch]
        if CHECKPOINT_PATH_KEY in report:
            result.run = str(run_of(report))
        self._write(name)
        trial = self._trials[name]
        say(
            f"trial {name} {trial.label}: epoch {epoch['epoch']} of {trial.config.train.epochs}, "
            f"validation {self.metric} {epoch[f'validation_{self.metric}']:.4f}"
        )

    def finish(self, name: str, checkpoint: Path) -> None:
        """Take the history of a finished checkpoint."""
        result = self._results[name]
        result.history = [
            {key: epoch[key] for key in _EPOCH_KEYS if key in epoch}
            for epoch in read_manifest(checkpoint, "checkpoint")["history"]
        ]
        result.status, result.checkpoint, result.run, result.error = "finished", str(checkpoint), None, None
        self._end(name)

    def stop(self, name: str) -> None:
        """Take the trial as given up by the scheduler."""
        self._results[name].status = "stopped"
        self._end(name)

    def fail(self, name: str, error: str) -> None:
        """Take the trial as ended by an error."""
        result = self._results[name]
        result.status, result.error = "failed", error
        self._end(name)

    def _end(self, name: str) -> None:
        self._write(name)
        result = self._results[name]
        counted = sum(r.status != "running" for r in self.results)
        suffix = f": {result.error}" if result.error else ""
        ended = f"{result.status} ({counted} of {len(self.results)}){suffix}"
        say(f"trial {name} {self._trials[name].label} {ended}")

    def _write(self, name: str) -> None:
        write_json(self._folder / f"{name}.json", self._results[name].to_json())


class Recorder(ray_tune.Callback):
    """Writes down what Ray Tune hears of trials; runs in the driver."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Forget an earlier error."""
        self._records.start(trial.config["trial"])

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Take an epoch, or what the trial ended with."""
        name = trial.config["trial"]
        if "checkpoint" in result:
            self._records.finish(name, Path(result["checkpoint"]))
        elif "stopped" in result:
            self._records.stop(name)
        elif "error" in result:
            self._records.fail(name, result["error"])
        elif f"validation_{self._records.metric}" in result:
            self._records.add_epoch(name, result)

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Take an error that is no TwotowerError, such as a lost actor."""
        error = trial.get_pickled_error() or trial.get_error()
        self._records.fail(trial.config["trial"], str(error).strip().splitlines()[-1])


def run_of(report: Mapping[str, Any]) -> Path:
    """Return Ray Train's folder of a trial, which holds the checkpoint of one of its reports."""
    return Path(report[CHECKPOINT_PATH_KEY]).parent
