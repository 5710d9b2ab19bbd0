"""Sweeps on Ray Tune: trainings with different settings, compared by the validation metric.

A trial is a Tune function that runs ``cluster.train``, whose workers Ray Train starts; Tune's scheduler sees
every epoch's validation. What is known of a trial is written at each of its epochs, so a sweep that is run
again trains only what is missing: an ended trial stays as it is, an interrupted one goes on from its last
checkpoint, and a failed one is tried again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from pydantic import BaseModel
from ray import tune as ray_tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from twotower.artefacts import (
    building,
    fingerprint,
    finished,
    write_json,
    write_manifest,
)
from twotower.cluster.session import session, wants_gpu
from twotower.cluster.train import train
from twotower.cluster.trial_records import Recorder, Records, run_of
from twotower.config import Config, parse_config
from twotower.config.splits import SPLIT_KINDS
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.errors import ConfigError, StoppedError, TrainingError, TwotowerError
from twotower.evaluation.page.render import NAME as PAGE
from twotower.evaluation.page.sweep import write_sweep_page
from twotower.evaluation.sweep import Trial, TrialResult, carry_over, ranked, set_line, trials_of, write_sweep
from twotower.listing import STORED, Count
from twotower.model.checkpoint import TrainedManifest
from twotower.pipeline.train import checkpoint_id, stop_file
from twotower.progress import say
from twotower.training.preflight import problems

KIND = "sweep"


class SweepBest(BaseModel):
    """The best trial."""

    model_config = STORED

    trial: str
    parameters: dict[str, Any]
    checkpoint: str | None
    recall: float | None
    ndcg: float | None
    set_line: str


class SweepManifest(BaseModel):
    """The manifest of a sweep."""

    model_config = STORED

    k: Count
    trials: dict[str, Count]
    best: SweepBest


_TRIAL_BYTES = 256 << 20
"""Memory that Ray sets aside for the process of a trial; it waits for its workers and takes no CPU."""


def tune(config: Config, dataset: Dataset) -> Path:
    """Run the sweep ``config.tune`` and return the directory of its table and picture.

    Args:
        config: the configuration that each trial changes.
        dataset: of ``config``; trials that change the data get datasets of their own.

    Returns:
        ``config.home / "sweeps" / ID``. Its manifest has ``best`` (trial, parameters, metrics, ``set_line``)
        and the number of trials by status. Where trials failed, the next call tries those again.

    Raises:
        ConfigError: the parameters are not valid, or two trials would be the same training. No trial ran.
        TrainingError: no trial was measured.
    """
    trials = trials_of(config)
    datasets = _datasets(trials, config, dataset)
    for trial in trials:
        for problem in problems(trial.config, datasets[trial.name], "train"):
            raise ConfigError(f"tune.parameters: {trial.label}: {problem}")
    checkpoints = _checkpoint_ids(trials, datasets)
    shown = config.tune.model_dump(mode="json", exclude={"max_concurrent"})
    name = fingerprint({"dataset": dataset.fingerprint, "trials": checkpoints, "tune": shown})
    directory = config.home / "sweeps" / name
    known = finished(directory, KIND, SweepManifest)
    if known and not known["trials"].get("failed"):
        say(f"sweep {name} is there already")
        return directory
    with building(directory, keep_partial=True) as partial:
        carry_over(directory, partial)
        records = Records(partial / "trials", trials, config)
        for trial in trials:
            checkpoint = config.checkpoints / checkpoints[trial.name]
            if finished(checkpoint, "checkpoint", TrainedManifest):
                records.finish(trial.name, checkpoint)
        if missing := records.missing():
            with session(config):
                _run(config, missing, datasets, records, partial / "tune")
        for result in records.results:
            if result.status == "stopped" and result.run is not None:
                shutil.rmtree(result.run, ignore_errors=True)
                stop_file(Path(result.run)).unlink(missing_ok=True)
        _write(partial, config, dataset, records.results)
    say(f"the sweep: {directory / PAGE}")
    return directory


def _datasets(trials: Sequence[Trial], config: Config, dataset: Dataset) -> dict[str, Dataset]:
    """Return the dataset of each trial, preparing those that are not that of the sweep's configuration."""
    known = {_data_key(config): dataset}
    for trial in trials:
        key = _data_key(trial.config)
        if key not in known:
            known[key] = prepare(trial.config)
    return {trial.name: known[_data_key(trial.config)] for trial in trials}


def _data_key(config: Config) -> str:
    seed = config.seed if SPLIT_KINDS[config.split.kind].uses_seed else None
    sections = [s.model_dump(mode="json") for s in (config.data, config.split, config.features)]
    return fingerprint([sections, seed])


def _checkpoint_ids(trials: Sequence[Trial], datasets: Mapping[str, Dataset]) -> dict[str, str]:
    ids: dict[str, str] = {}
    for trial in trials:
        name = checkpoint_id(trial.config, datasets[trial.name], "train", trial.config.train.epochs)
        if name in ids.values():
            twin = next(t for t in trials if ids.get(t.name) == name)
            raise ConfigError(
                f"tune.parameters: {twin.label} and {trial.label} are the same training, so they can not be "
                "compared; leave out keys that do not change the result"
            )
        ids[trial.name] = name
    return ids


def _run(
    config: Config, trials: Sequence[Trial], datasets: Mapping[str, Dataset], records: Records, folder: Path
) -> None:
    """Train the trials that are missing, as many at a time as the cluster has room for."""
    _keep_tune_quiet()
    # Only what an earlier run left behind: the records above are all that a sweep resumes from.
    shutil.rmtree(folder, ignore_errors=True)
    work = {
        trial.name: {
            "config": with_absolute_root(trial.config).to_json(),
            "dataset": str(datasets[trial.name].path.absolute()),
        }
        for trial in trials
    }
    concurrent = _room(config, trials)
    say(f"{len(trials)} trials to train, {concurrent} at a time")
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(train_trial, work=work), {"memory": _TRIAL_BYTES}),
        param_space={"trial": ray_tune.grid_search([trial.name for trial in trials])},
        tune_config=ray_tune.TuneConfig(
            scheduler=_scheduler(config, trials, records),
            max_concurrent_trials=concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=ray_tune.RunConfig(
            name=folder.name, storage_path=str(folder.parent), callbacks=[Recorder(records)], verbose=0
        ),
    )
    tuner.fit()
    shutil.rmtree(folder, ignore_errors=True)


def train_trial(config: dict[str, Any], work: dict[str, dict[str, Any]]) -> None:
    """Train one trial inside a Tune session; the last report says how it ended."""
    settings = work[config["trial"]]
    trial = parse_config(settings["config"])
    try:
        path = train(trial, Dataset.open(settings["dataset"]), callbacks=[TuneReportCallback()])
    except StoppedError:
        ray_tune.report({"stopped": True})
    except TwotowerError as error:
        # Tune would wrap it, and print it with all frames.
        ray_tune.report({"error": str(error)})
    else:
        ray_tune.report({"checkpoint": str(path)})


def with_absolute_root(config: Config) -> Config:
    """Return the configuration with an absolute storage root: a trial runs in another working directory."""
    storage = config.storage.model_copy(update={"root": str(config.storage.path)})
    return config.model_copy(update={"storage": storage})


class _Asha(ASHAScheduler):
    """ASHA that asks a trial to stop instead of killing it.

    What Ray Train has reserved for the workers of a killed trial stays reserved to the end of the job where
    Ray runs without its dashboard.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, https://arxiv.org/abs/1810.05934
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Let the trial go on in any case, with a file that its workers look for where it shall stop."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP and CHECKPOINT_PATH_KEY in result:
            stop_file(run_of(result)).touch()
        return TrialScheduler.CONTINUE


def _name(trial: RayTrial) -> str:
    return str(trial.config["trial"])


def _scheduler(config: Config, trials: Sequence[Trial], records: Records) -> TrialScheduler:
    """Return ASHA that knows the trials of earlier runs of the sweep, or a scheduler that stops none."""
    settings = config.tune
    epochs = max(trial.config.train.epochs for trial in trials)
    if settings.scheduler == "none" or settings.grace_epochs >= epochs:
        return FIFOScheduler()
    scheduler = _Asha(
        time_attr="epoch",
        metric=f"validation_{records.metric}",
        mode="max",
        grace_period=settings.grace_epochs,
        reduction_factor=settings.reduction_factor,
        # After its last epoch there is nothing left to stop.
        max_t=epochs - 1,
        stop_last_trials=False,
    )
    for result in records.ended():
        # All that it asks of a trial is its id.
        stand_in: Any = SimpleNamespace(trial_id=result.name)
        controller: Any = None
        scheduler.on_trial_add(controller, stand_in)
        for report in result.history:
            scheduler.on_trial_result(controller, stand_in, report)
    return scheduler


def _room(config: Config, trials: Sequence[Trial]) -> int:
    """Return how many trials the workers of the cluster have room for at a time, at least one."""
    use_gpu = wants_gpu(config)
    places = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            on_node = int(has.get("CPU", 0) / config.cluster.cpus_per_worker + 1e-9)
            places += min(on_node, int(has.get("GPU", 0))) if use_gpu else on_node
    workers = max(trial.config.train.num_workers for trial in trials)
    if places < workers:
        say(f"the cluster has room for {places} of {workers} training workers now; trials wait for more")
    return max(1, min(places // workers, config.tune.max_concurrent or places))


def _keep_tune_quiet() -> None:
    """Let Ray Tune write no logs of its own beside the records, and leave Ctrl-C to the job."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # The last report of a trial has no metric.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"


def _write(partial: Path, config: Config, dataset: Dataset, results: Sequence[TrialResult]) -> None:
    """Write the table, the picture and then the manifest."""
    metric, k = config.train.validation.metric, config.train.validation.k
    best = ranked(results, metric)[0]
    epoch = best.best(metric)
    if epoch is None:
        first = next((f"{r.name}: {r.error}" for r in results if r.error), "no epoch was validated")
        raise TrainingError(f"none of {len(results)} trials was measured; the first error is that of {first}")
    write_sweep(partial, results, config.tune, metric, k)
    write_sweep_page(partial, config, {"dataset": dataset.fingerprint, "seed": config.seed}, results)
    write_json(partial / "config.json", config.to_stored())
    statuses = [result.status for result in results]
    write_manifest(
        partial,
        KIND,
        {
            "dataset": dataset.fingerprint,
            "metric": metric,
            "k": k,
            "trials": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
            "best": {
                "trial": best.name,
                "parameters": best.parameters,
                "checkpoint": best.checkpoint,
                "epoch": epoch["epoch"],
                "recall": epoch["validation_recall"],
                "ndcg": epoch["validation_ndcg"],
                "set_line": set_line(best.parameters),
            },
        },
    )
