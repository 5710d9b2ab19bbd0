"""The metrics of a training, read back from where they went."""

from __future__ import annotations

import json
import math
import struct
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from tensorboardX.proto import event_pb2

from twotower.config.training import MetricsConfig, MlflowConfig
from twotower.errors import ConfigError
from twotower.training.journal import Journal, check_metrics

REPORT = {"epoch": 1, "loss": 4.5, "seconds": 2.0, "validation_recall": 0.25, "validation_ndcg": None}


def config(every_steps: int = 1, tensorboard: bool = False, **values: Any) -> MetricsConfig:
    return MetricsConfig(every_steps=every_steps, tensorboard=tensorboard, **values)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events_of(path: Path) -> list[event_pb2.Event]:
    """Return a file's events: each is its length (8 bytes), a checksum (4), its content, a checksum (4)."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    return events


def shown_by_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) by name: files in the order of their names, what a start purges left out."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("*tfevents*")):
        for event in events_of(path):
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = {n: [(s, x) for s, x in v if s < event.step] for n, v in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def run_steps(journal: Journal, first: int, last: int, loss: float) -> None:
    for step in range(first, last + 1):
        journal.step(step, 1, 8, {"loss": loss + step})


def test_lines_have_step_epoch_time_and_values(tmp_path: Path) -> None:
    with Journal(tmp_path / "logs" / "a", config(every_steps=2), "a", 0) as journal:
        for step in range(1, 6):
            journal.step(step, 1, 8, {"loss": torch.tensor(step / 2), "temperature": 0.07, "x": None})
        journal.epoch(REPORT, 5)
    lines = lines_of(tmp_path / "logs" / "a")
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line["epoch"] for line in lines] == [1, 1, 1]
    assert [line.get("loss") for line in lines] == [1.0, 2.0, None]
    assert lines[1]["temperature"] == 0.07
    assert not any("x" in line for line in lines)
    report = {name: value for name, value in lines[2].items() if name.startswith("epoch/")}
    assert report == {"epoch/loss": 4.5, "epoch/seconds": 2.0, "epoch/validation_recall": 0.25}
    for line in lines:
        age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
        assert timedelta(0) <= age < timedelta(minutes=5)


def test_lines_can_be_followed(tmp_path: Path) -> None:
    with Journal(tmp_path, config(), "a", 0) as journal:
        run_steps(journal, 1, 3, 0.0)
        assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_nan_and_infinity_are_strings(tmp_path: Path) -> None:
    with Journal(tmp_path, config(), "a", 0) as journal:
        journal.step(1, 1, 8, {"loss": math.nan, "grad_norm": math.inf, "other": -math.inf})
    (line,) = lines_of(tmp_path)
    assert (line["loss"], line["grad_norm"], line["other"]) == ("nan", "inf", "-inf")


def test_values_are_read_only_at_the_steps_that_are_written(tmp_path: Path) -> None:
    class Loss:
        reads = 0

        def __float__(self) -> float:
            Loss.reads += 1
            return 1.0

    with Journal(tmp_path, config(every_steps=5), "a", 0) as journal:
        for step in range(1, 13):
            journal.step(step, 1, 8, {"loss": Loss()})
    assert Loss.reads == 2


def test_speed_counts_the_steps_between_two_lines_but_not_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("twotower.training.journal.time.perf_counter", lambda: clock[0])
    with Journal(tmp_path, config(every_steps=2), "a", 0) as journal:
        for step in range(1, 9):
            # Two examples a second; the step after the epoch's end comes late.
            clock[0] += 1_000.0 if step in {1, 6} else 4.0
            journal.step(step, 1, 8, {"loss": 1.0})
            if step == 5:
                journal.epoch(REPORT, 5)
    rates = {line["step"]: line.get("examples_per_s") for line in lines_of(tmp_path) if "loss" in line}
    assert rates == {2: 2.0, 4: 2.0, 6: None, 8: 2.0}


def test_resumed_training_continues_the_lines(tmp_path: Path) -> None:
    with Journal(tmp_path, config(), "a", 0) as journal:
        run_steps(journal, 1, 4, 0.0)
        journal.epoch(REPORT, 4)
        run_steps(journal, 5, 7, 0.0)
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 3, "epoch": 1, "lo')
    with Journal(tmp_path, config(), "a", 4) as journal:
        run_steps(journal, 5, 6, 100.0)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6]
    assert [line["loss"] for line in lines if "loss" in line] == [1.0, 2.0, 3.0, 4.0, 105.0, 106.0]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_training_that_starts_anew_drops_all_lines(tmp_path: Path) -> None:
    for _ in range(2):
        with Journal(tmp_path, config(), "a", 0) as journal:
            run_steps(journal, 1, 2, 0.0)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_tensorboard_has_the_same_numbers_and_purges_what_is_repeated(tmp_path: Path) -> None:
    with Journal(tmp_path, config(tensorboard=True), "a", 0) as journal:
        run_steps(journal, 1, 4, 0.0)
        journal.epoch(REPORT, 4)
        run_steps(journal, 5, 7, 0.0)
        # As after SIGKILL: nothing waits in a queue.
        assert shown_by_tensorboard(tmp_path)["loss"][-1] == (7, 7.0)
    with Journal(tmp_path, config(tensorboard=True), "a", 4) as journal:
        run_steps(journal, 5, 6, 100.0)
    shown = shown_by_tensorboard(tmp_path)
    assert shown["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 105.0), (6, 106.0)]
    assert shown["epoch/validation_recall"] == [(4, 0.25)]
    first = events_of(min(tmp_path.glob("*tfevents*")))[0]
    assert first.file_version == "brain.Event:2"


def test_no_tensorboard_where_it_is_off(tmp_path: Path) -> None:
    Journal(tmp_path, config(), "a", 0).close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def mlflow_config(root: Path) -> MetricsConfig:
    return config(mlflow=MlflowConfig(tracking_uri=f"file:{root / 'mlruns'}", experiment="shop"))


def points(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, name)]


def test_mlflow_has_one_run_for_a_resumed_training(tmp_path: Path) -> None:
    metrics = mlflow_config(tmp_path)
    with suppress(RuntimeError), Journal(tmp_path / "a", metrics, "a", 0) as journal:
        run_steps(journal, 1, 2, 0.0)
        journal.epoch(REPORT, 2)
        raise RuntimeError
    assert metrics.mlflow is not None
    client = MlflowClient(metrics.mlflow.tracking_uri)
    experiment = client.get_experiment_by_name("shop")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("a", "FAILED")
    with Journal(tmp_path / "b", metrics, "b", 2) as other:
        run_steps(other, 3, 3, 50.0)
    with Journal(tmp_path / "a", metrics, "a", 2) as journal:
        run_steps(journal, 3, 3, 100.0)
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    assert points(client, run.info.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 103.0)]
    assert points(client, run.info.run_id, "epoch/validation_recall") == [(2, 0.25)]


def test_mlflow_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(ConfigError, match=r"pip install 'twotower\[mlflow\]'"):
        Journal(tmp_path / "logs", mlflow_config(tmp_path), "a", 0)
    assert not (tmp_path / "logs").exists()
    with pytest.raises(ConfigError, match=r"pip install 'twotower\[mlflow\]'"):
        check_metrics(mlflow_config(tmp_path))
    check_metrics(config())


def test_mlflow_of_another_kind_is_refused_before_the_first_step(tmp_path: Path) -> None:
    metrics = config(mlflow=MlflowConfig(tracking_uri="gopher://nowhere"))
    with pytest.raises(ConfigError, match=r"tracking_uri \(gopher://nowhere\) takes no metrics"):
        Journal(tmp_path / "logs", metrics, "a", 0)
    with pytest.raises(ConfigError, match=r"tracking_uri \(gopher://nowhere\) takes no metrics"):
        check_metrics(metrics)


def test_check_leaves_nothing_in_mlflow(tmp_path: Path) -> None:
    metrics = mlflow_config(tmp_path)
    check_metrics(metrics)
    assert metrics.mlflow is not None
    assert MlflowClient(metrics.mlflow.tracking_uri).get_experiment_by_name("shop") is None


def test_mlflow_that_stops_answering_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException

    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise MlflowException("no answer")

    with Journal(tmp_path / "a", mlflow_config(tmp_path), "a", 0) as journal:
        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        run_steps(journal, 1, 3, 0.0)
    assert len(calls) == 1
    assert len(lines_of(tmp_path / "a")) == 3
    assert capsys.readouterr().err.count("MLflow gets no more metrics of this run after step 1") == 1
