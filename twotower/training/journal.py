"""The metrics of a training, written by rank 0: JSON lines always, TensorBoard events and MLflow on request.

A resumed training continues what is there: whatever lies behind the step that it resumes from is repeated,
so it is dropped from the lines and hidden in TensorBoard. MLflow takes nothing back: there a repeated step
has two points. A step's metrics are named loss, temperature and so on, an epoch's epoch/loss and so on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, SupportsFloat

from twotower.artefacts import write_bytes
from twotower.config.training import MetricsConfig, MlflowConfig
from twotower.errors import ArtefactError, ConfigError
from twotower.jsonfiles import parse_json
from twotower.progress import say

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from tensorboardX.proto import event_pb2

LINES = "metrics.jsonl"


def check_metrics(config: MetricsConfig) -> None:
    """Check, before any worker starts, that metrics can go where the configuration sends them.

    Raises:
        ConfigError: MLflow is configured and is not installed, or does not answer.
    """
    if config.mlflow is not None:
        with _mlflow_client(config.mlflow) as client:
            client.get_experiment_by_name(config.mlflow.experiment)


class Journal:
    """Writes the metrics of one training; a context manager, which closes it."""

    def __init__(self, folder: Path, config: MetricsConfig, run_name: str, resume_step: int) -> None:
        """Open the files, and drop what was written behind ``resume_step``.

        Args:
            folder: made where it is missing.
            config: where metrics go, and how often.
            run_name: name of the run in MLflow.
            resume_step: optimiser steps behind the training already; 0 for a new one.

        Raises:
            ConfigError: MLflow is configured and is not installed, or does not answer.
        """
        # First, since it alone can fail.
        mlflow = [_Mlflow(config.mlflow, run_name, resume_step)] if config.mlflow is not None else []
        folder.mkdir(parents=True, exist_ok=True)
        self._every_steps = config.every_steps
        self._sinks: list[_Sink] = [_Lines(folder / LINES, resume_step), *mlflow]
        if config.tensorboard:
            self._sinks.append(_TensorBoard(folder, resume_step))
        self._rate_since: float | None = None
        self._rate_examples = 0

    def step(self, global_step: int, epoch: int, examples: int, values: Mapping[str, SupportsFloat]) -> None:
        """Take in a step that has just been made, and write it where ``global_step`` is one to be written.

        Adds examples_per_s, the mean since the step written before. Time from an epoch's end to the end of
        the next one's first step is not part of it: there lie validation and the checkpoint.

        Args:
            global_step: optimiser steps of the whole training so far, this one too.
            epoch: from 1.
            examples: examples of this step over all ranks.
            values: such as loss and temperature, what is None left out; read only where they are written,
                so that scalars on a GPU are not waited for at every step.
        """
        now = time.perf_counter()
        if self._rate_since is None:
            self._rate_since = now
        else:
            self._rate_examples += examples
        if global_step % self._every_steps:
            return
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        # Those scalars may have taken the GPU a while.
        now = time.perf_counter()
        if self._rate_examples:
            numbers["examples_per_s"] = self._rate_examples / (now - self._rate_since)
            self._rate_since, self._rate_examples = now, 0
        self._write(global_step, epoch, numbers)

    def epoch(self, report: Mapping[str, float | None], global_step: int) -> None:
        """Write the report of a finished epoch, what is None left out.

        Args:
            report: its number, from 1, as ``epoch``, and its metrics.
            global_step: optimiser steps of the whole training so far.
        """
        numbers = {
            f"epoch/{name}": float(value)
            for name, value in report.items()
            if value is not None and name != "epoch"
        }
        self._write(global_step, int(report["epoch"] or 0), numbers)
        self._rate_since, self._rate_examples = None, 0

    def close(self, failed: bool = False) -> None:
        """Close the files; MLflow is told whether the training failed."""
        for sink in self._sinks:
            sink.close(failed)
        self._sinks = []

    def __enter__(self) -> Self:
        """Return the journal."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the files; an exception counts as a failed training."""
        self.close(failed=kind is not None)

    def _write(self, global_step: int, epoch: int, numbers: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.write(global_step, epoch, numbers)


class _Sink(Protocol):
    """One place that metrics go to."""

    def write(self, global_step: int, epoch: int, numbers: dict[str, float]) -> None:
        """Write the numbers of a step."""

    def close(self, failed: bool) -> None:
        """Write no more."""


class _Lines:
    """One JSON object a line, each flushed, so that ``tail -f`` follows a training."""

    def __init__(self, path: Path, resume_step: int) -> None:
        for cut_short in path.parent.glob(f".{path.name}.*.tmp"):
            cut_short.unlink()
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines() if _is_until(line, resume_step)]
            write_bytes(path, b"".join(line + b"\n" for line in kept))
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in close()

    def write(self, global_step: int, epoch: int, numbers: dict[str, float]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        # JSON has no NaN and no infinity.
        values = {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}
        line = {"step": global_step, "epoch": epoch, "time": now, **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self, failed: bool) -> None:
        self._file.close()


def _is_until(line: bytes, step: int) -> bool:
    """Return whether a line is whole and of a step up to ``step``; a killed writer leaves half a line."""
    try:
        content = parse_json(line, "a line", "")
    except ArtefactError:
        return False
    number = content.get("step") if isinstance(content, dict) else None
    return isinstance(number, int) and number <= step


class _TensorBoard:
    """TensorBoard events in a file of their own for every start of the training.

    Written without SummaryWriter, which has a thread and a queue between itself and the file: what they
    hold is lost when a worker is killed.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        # It imports the clients of clouds where they are there, for every worker of every training.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        # Names have the second in them. Two starts within one second, from the same step: the second file
        # replaces one of which nothing was kept anyway.
        self._writer = EventsWriter(str(folder / "events"), f".{resume_step}")
        # TensorBoard hides what other files have from this step on (purge_step of SummaryWriter).
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=resume_step + 1, session_log=start))

    def write(self, global_step: int, epoch: int, numbers: dict[str, float]) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        values = [summary_pb2.Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        self._add(event_pb2.Event(step=global_step, summary=summary_pb2.Summary(value=values)))

    def close(self, failed: bool) -> None:
        self._writer.close()

    def _add(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()


class _Mlflow:
    """One MLflow run; a resumed training finds it again by its name.

    A tracking server that stops answering ends the sending, not the training.
    """

    def __init__(self, config: MlflowConfig, run_name: str, resume_step: int) -> None:
        with _mlflow_client(config) as client:
            self._client = client
            self._run_id = self._open(config.experiment, run_name, resume_step)
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        self._metric, self._error = Metric, MlflowException
        self._sending = True

    def write(self, global_step: int, epoch: int, numbers: dict[str, float]) -> None:
        if not self._sending:
            return
        now = int(time.time() * 1000)
        metrics = [self._metric(name, x, now, global_step) for name, x in numbers.items()]
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except self._error as error:
            self._sending = False
            say(f"MLflow gets no more metrics of this run after step {global_step}: {error}")

    def close(self, failed: bool) -> None:
        if not self._sending:
            return
        try:
            self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")
        except self._error as error:
            say(f"MLflow was not told that the training ended: {error}")

    def _open(self, experiment: str, run_name: str, resume_step: int) -> str:
        """Return the id of the resumed training's run, else of a new one."""
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if known is None else known.experiment_id
        if resume_step > 0:
            runs = self._client.search_runs(
                [experiment_id],
                f"attributes.run_name = '{run_name}'",
                max_results=1,
                order_by=["attributes.start_time DESC"],
            )
            if runs:
                run_id: str = runs[0].info.run_id
                self._client.update_run(run_id, status="RUNNING")
                return run_id
        run_id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        return run_id


@contextmanager
def _mlflow_client(config: MlflowConfig) -> Iterator[MlflowClient]:
    """Give MLflow's client; what goes wrong inside the block, importing MLflow too, is a ConfigError."""
    # A training does not wait minutes for its tracking server (MLflow's own: 7 retries, 120 s each), nor
    # report its use to others. MLflow 3 refuses folders, which still work, without the third.
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        os.environ.setdefault(name, value)
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise ConfigError(
            f"train.metrics.mlflow is set and MLflow can not be imported ({error}); "
            "pip install 'twotower[mlflow]', or set train.metrics.mlflow to null"
        ) from error
    try:
        yield MlflowClient(tracking_uri=config.tracking_uri)
    except MlflowException as error:
        raise ConfigError(
            f"train.metrics.mlflow.tracking_uri ({config.tracking_uri}) takes no metrics: {error}; "
            "start the server, correct the address, or set train.metrics.mlflow to null"
        ) from None
