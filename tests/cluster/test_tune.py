"""Sweeps on a real local Ray: trials through Tune and Train, early stopping, failures, a killed driver."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from jobs import train as train_job
from jobs import tune as tune_job
from tests.report_content import Page
from twotower.artefacts import has_manifest, read_manifest
from twotower.cluster.trial_records import Records
from twotower.cluster.tune import _room, _scheduler, tune
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, TrainingError
from twotower.evaluation.sweep import trials_of

RATE, BATCH = "train.optimizer.learning_rate", "train.global_batch_size"
_DEADLINE_S = 120.0


@pytest.fixture
def write_config(tmp_path, small_values):
    """Function of (parameters, **tune) that writes a configuration of two epochs and returns its path."""

    def write(parameters: dict, epochs: int = 2, **tune: object) -> Path:
        train = {
            "epochs": epochs,
            "global_batch_size": 256,
            "num_workers": 1,
            "fit": "train",
            "validation": {"metric": "recall"},
            "early_stopping": {"patience": None},
        }
        values = small_values(tmp_path / "runs", train=train, tune={"parameters": parameters, **tune})
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def _run(file: Path, expected: int = 0) -> dict:
    result = file.with_name("result.json")
    result.unlink(missing_ok=True)
    assert tune_job.main(["--config", str(file), "--result", str(result)]) == expected
    return json.loads(result.read_text())


def _written(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.mark.slow
def test_a_sweep_ends_in_a_table_with_the_stopped_and_the_failed_in_it(ray_local, write_config, capsys):
    # One after the other, so that the good trial is what ASHA compares the hopeless one with.
    file = write_config(
        {BATCH: {"values": [256]}, RATE: {"values": [0.01, 1e-12, 1e30]}}, epochs=8, max_concurrent=1
    )
    result = _run(file, expected=2)
    path = Path(result["path"])
    assert result["trials"] == {"finished": 1, "stopped": 1, "failed": 1}
    trials = json.loads((path / "sweep.json").read_text())["trials"]
    assert [trial["status"] for trial in trials] == ["finished", "stopped", "failed"]
    good, hopeless, failed = trials
    recalls = [[report["validation_recall"] for report in trial["history"]] for trial in (good, hopeless)]
    assert len(recalls[0]) == 8
    assert 1 <= len(recalls[1]) < 8
    assert max(recalls[0]) > max(recalls[1])
    assert hopeless["parameters"] == {RATE: 1e-12, BATCH: 256}
    assert not list(Path(hopeless["run"]).parent.glob(f"{Path(hopeless['run']).name}*"))
    assert re.search(
        r"^step \d of epoch 1 has loss .* Lower train\.optimizer\.learning_rate \(1e\+30\)", failed["error"]
    )
    assert result["metrics"]["validation_recall@100"] == max(recalls[0])
    assert result["best_parameters"] == good["parameters"] == {RATE: 0.01, BATCH: 256}
    assert (path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "report.html" in {p.name for p in path.iterdir()}
    page = Page((path / "report.html").read_text())
    trials = json.loads((path / "sweep.json").read_text())["trials"]
    assert [row[0] for row in page.tables()["All trials"][1:]] == [trial["name"] for trial in trials]
    captured = capsys.readouterr()
    printed = captured.out.splitlines()
    assert printed[:4] == (path / "sweep.txt").read_text().splitlines()
    assert len([line for line in printed if "  failed: " in line]) == 1
    assert "1 trials failed; run it again to try them again" in captured.err

    before = _written(file.parent / "runs")
    # The best trial is an ordinary training: repeated by its --set line, it is found.
    trained = file.with_name("train.json")
    words = ["--config", str(file), *shlex.split(result["set"]), "--result", str(trained)]
    assert train_job.main(words) == 0
    again = json.loads(trained.read_text())
    assert again["path"] == result["best_checkpoint"]
    assert again["metrics"]["validation_recall@100"] == max(recalls[0])
    assert _written(file.parent / "runs") == before
    deadline = time.monotonic() + _DEADLINE_S
    while ray.available_resources().get("CPU") != 4:
        assert time.monotonic() < deadline, "a stopped trial still holds its workers"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_trains_nothing_twice(ray_local, write_config):
    # The second trial has eight times the steps, so that it is surely killed in the middle.
    file = write_config({BATCH: {"values": [256, 32]}}, max_concurrent=1, scheduler="none")
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", "--config", str(file)],
        env=os.environ | {"RAY_ADDRESS": "local"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    home = file.parent / "runs" / "small"
    deadline = time.monotonic() + _DEADLINE_S
    while True:
        records = [json.loads(p.read_text()) for p in sorted(home.glob("sweeps/.*.partial/trials/*.json"))]
        if len(records) == 2 and records[1]["history"]:
            break
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert [record["status"] for record in records] == ["finished", "running"]
    finished = Path(records[0]["checkpoint"])
    before = _written(finished)
    assert len(list(home.glob("checkpoints/*/manifest.json"))) == 2, "best and last of the first trial alone"

    result = _run(file)
    assert result["trials"] == {"finished": 2}
    assert _written(finished) == before
    path = Path(result["path"])
    after = [json.loads(p.read_text()) for p in sorted((path / "trials").glob("*.json"))]
    assert after[0] == records[0]
    # The second trial went on: its first epoch is the one of the killed run, to the microsecond.
    assert [report["epoch"] for report in after[1]["history"]] == [1, 2]
    assert after[1]["history"][0] == records[1]["history"][0]
    assert not list(home.glob("sweeps/.*.partial"))

    before = _written(home)
    assert _run(file) == result
    assert _written(home) == before, "a finished sweep is recognised"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"train.loss.temprature": {"values": [0.1]}}, "did you mean 'temperature'"),
        ({BATCH: {"values": []}}, "at least 1 entry"),
        (
            {BATCH: {"values": [256, 255]}, "train.num_workers": {"values": [1, 2]}},
            "global_batch_size=255 num_workers=2: ",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(write_config, capsys, parameters, message):
    file = write_config(parameters)
    assert tune_job.main(["--config", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not (file.parent / "runs").exists()


def _config(small_config: Config, parameters: dict, **sections: dict) -> Config:
    values = small_config.to_json()
    for name, section in sections.items():
        values[name] |= section
    values["tune"] |= {"parameters": parameters}
    return parse_config(values)


def test_trials_that_are_the_same_training_are_refused(small_config: Config, small_dataset: Dataset):
    config = _config(small_config, {"train.max_failures": {"values": [1, 2]}})
    with pytest.raises(ConfigError, match=r"max_failures=1 and max_failures=2 are the same training"):
        tune(config, small_dataset)
    assert not (config.home / "sweeps").exists()


def test_asha_knows_the_trials_of_an_earlier_run(small_config: Config, tmp_path: Path):
    parameters = {RATE: {"values": [0.003, 0.002]}}
    config = _config(small_config, parameters, train={"epochs": 4})
    trials = trials_of(config)
    records = Records(tmp_path / "trials", trials, config)
    for epoch in (1, 2, 3, 4):
        records.add_epoch(
            trials[0].name, {"epoch": epoch, "validation_recall": 0.5, "validation_ndcg": 0.1, "noise": 1}
        )
    records.stop(trials[0].name)
    records = Records(tmp_path / "trials", trials, config)
    assert records.missing() == trials[1:]
    new = SimpleNamespace(trial_id="new")
    for recall, stops in ((0.4, True), (0.6, False)):
        scheduler = _scheduler(config, records.missing(), records)
        scheduler.on_trial_add(None, new)
        run = tmp_path / str(recall)
        report = {"epoch": 1, "validation_recall": recall, "checkpoint_path": str(run / "checkpoint_1")}
        assert scheduler.on_trial_result(None, new, report) == TrialScheduler.CONTINUE
        assert run.with_name(f"{run.name}.stop").exists() is stops
    late = parse_config({**config.to_json(), "tune": config.tune.model_dump() | {"grace_epochs": 4}})
    assert type(_scheduler(late, trials, records)) is FIFOScheduler


def test_records_keep_what_is_known(small_config: Config, tmp_path: Path):
    config = _config(small_config, {RATE: {"values": [0.003, 0.002]}})
    trials = trials_of(config)
    first, second = (trial.name for trial in trials)
    records = Records(tmp_path / "trials", trials, config)
    records.add_epoch(first, {"epoch": 1, "validation_recall": 0.5, "checkpoint_path": "/x/run/checkpoint_1"})
    records.stop(first)
    records.add_epoch(second, {"epoch": 1, "validation_recall": 0.1})
    records.add_epoch(second, {"epoch": 2, "validation_recall": 0.2})
    records.add_epoch(second, {"epoch": 2, "validation_recall": 0.3})
    records.fail(second, "lost")
    records = Records(tmp_path / "trials", trials, config)
    assert [(r.status, r.run, r.error) for r in records.results] == [
        ("stopped", "/x/run", None),
        ("failed", None, "lost"),
    ]
    assert [e["validation_recall"] for e in records.results[1].history] == [0.1, 0.3]
    assert records.missing() == trials[1:]
    records.start(second)
    assert (records.results[1].status, records.results[1].error) == ("running", None)


def test_failed_trials_are_tried_again_and_the_others_kept(
    small_config: Config, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    config = _config(small_config, {RATE: {"values": [0.003, 0.002, 0.001]}})
    tried: list[list[str]] = []
    failing = {"001", "002", "003"}

    def run(config: Config, trials: list, datasets: dict, records: Records, folder: Path) -> None:
        tried.append([trial.name[:3] for trial in trials])
        for trial in trials:
            if trial.name[:3] in failing:
                records.fail(trial.name, f"{trial.name[:3]} is lost")
            else:
                records.start(trial.name)
                report = {"epoch": 1, "validation_recall": int(trial.name[:3]) / 10, "validation_ndcg": 0.1}
                records.add_epoch(trial.name, report)
                records.stop(trial.name)

    monkeypatch.setattr("twotower.cluster.tune._run", run)
    monkeypatch.setattr("twotower.cluster.tune.session", lambda config: contextlib.nullcontext())
    with pytest.raises(TrainingError, match=r"none of 3 trials was measured; .* 001-\w+: 001 is lost"):
        tune(config, small_dataset)
    failing.remove("002")
    path = tune(config, small_dataset)
    manifest = read_manifest(path, "sweep")
    assert manifest["trials"] == {"failed": 2, "stopped": 1}
    assert manifest["best"]["recall"] == 0.2
    failing.clear()
    assert tune(config, small_dataset) == path
    manifest = read_manifest(path, "sweep")
    assert manifest["trials"] == {"stopped": 3}
    assert manifest["best"]["parameters"] == {RATE: 0.001}
    tune(config, small_dataset)
    assert tried == [["001", "002", "003"], ["001", "002", "003"], ["001", "003"]]


def test_as_many_trials_at_a_time_as_their_workers_have_room(ray_local, small_config: Config):
    parameters = {BATCH: {"values": [128, 256]}}
    for sections, room in (
        ({"train": {"num_workers": 1}}, 4),
        ({"train": {"num_workers": 2}}, 2),
        ({"train": {"num_workers": 4}}, 1),
        ({"train": {"num_workers": 8}}, 1),
        ({"train": {"num_workers": 2}, "cluster": {"cpus_per_worker": 0.5}}, 4),
        ({"train": {"num_workers": 1}, "tune": {"max_concurrent": 3}}, 3),
        ({"train": {"num_workers": 1, "ingest": "stream"}}, 4),
    ):
        config = _config(small_config, parameters, **sections)
        assert _room(config, trials_of(config)) == room, sections


def test_trials_that_change_the_data_get_datasets_of_their_own(small_config: Config, small_dataset: Dataset):
    from twotower.cluster.tune import _datasets

    key = "features.query.1.max_length"
    trials = trials_of(_config(small_config, {key: {"values": [13, 5]}, "seed": {"values": [1, 2]}}))
    datasets = _datasets(trials, small_config, small_dataset)
    prints = [datasets[trial.name].fingerprint for trial in trials]
    assert prints[0] == prints[1] == small_dataset.fingerprint
    assert prints[2] == prints[3] != small_dataset.fingerprint
    assert has_manifest(datasets[trials[2].name].path)
    assert read_manifest(datasets[trials[2].name].path, "dataset")
