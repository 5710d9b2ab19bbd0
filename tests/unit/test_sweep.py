"""Sweeps without Ray: which trials there are, what is refused, the table, the effects and the picture."""

from __future__ import annotations

import csv
import json
import math
import shlex
from pathlib import Path

import pytest
import yaml

from twotower.artefacts import fingerprint
from twotower.config import Config, load_config, parse_config
from twotower.errors import ConfigError
from twotower.evaluation.sweep import (
    TrialResult,
    effects,
    label,
    ranked,
    set_line,
    short_names,
    table,
    text_table,
    trials_of,
    with_parameters,
    write_sweep,
)

ROOT = Path(__file__).parents[2]
TEMPERATURE, BATCH = "train.loss.temperature", "train.global_batch_size"


def config_of(parameters: dict, **tune: object) -> Config:
    return parse_config({"tune": {"parameters": parameters, **tune}})


def result_of(name: str, parameters: dict, recalls: list[float], **facts: object) -> TrialResult:
    history = [
        {"epoch": n + 1, "validation_recall": r, "validation_ndcg": r / 3, "seconds": 1.5}
        for n, r in enumerate(recalls)
    ]
    return TrialResult(name, parameters, **{"status": "finished", "history": history, **facts})


def test_a_grid_has_every_combination_in_a_fixed_order():
    config = config_of({TEMPERATURE: {"values": [0.1, 0.5]}, BATCH: {"values": [64, 128, 256]}})
    trials = trials_of(config)
    assert [tuple(t.parameters.values()) for t in trials] == [
        (0.1, 64), (0.1, 128), (0.1, 256), (0.5, 64), (0.5, 128), (0.5, 256),
    ]  # fmt: skip
    assert [t.name for t in trials] == [t.name for t in trials_of(config)]
    assert [t.name.split("-")[0] for t in trials] == ["001", "002", "003", "004", "005", "006"]
    assert trials[4].config.train.loss.temperature == 0.5
    assert trials[4].config.train.global_batch_size == 128
    assert trials[4].config.train.loss.min_temperature == config.train.loss.min_temperature
    assert trials[4].label == "temperature=0.5 global_batch_size=128"


def test_draws_follow_the_seed_and_stay_in_their_range():
    parameters = {
        "train.optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]},
        "model.query_tower.dropout": {"uniform": [0.1, 0.3]},
        BATCH: {"log_uniform": [100, 1000], "multiple_of": 64},
        "train.optimizer.schedule": {"choice": ["constant", "cosine"]},
        "seed": {"values": [1, 2]},
    }
    config = config_of(parameters, samples=40)
    trials = trials_of(config)
    assert [t.parameters for t in trials] == [t.parameters for t in trials_of(config)]
    other = parse_config({**config.to_json(), "seed": 7})
    assert [t.parameters for t in trials] != [t.parameters for t in trials_of(other)]
    assert len(trials) == 80
    rates = [t.parameters["train.optimizer.learning_rate"] for t in trials]
    assert 1e-4 <= min(rates) < 4e-4
    assert 2.5e-2 < max(rates) <= 1e-1
    # Log-uniform: half of the draws lie below the geometric mean.
    assert 0.3 < sum(r < math.sqrt(1e-5) for r in rates) / 80 < 0.7
    assert all(0.1 <= t.parameters["model.query_tower.dropout"] <= 0.3 for t in trials)
    batches = {t.parameters[BATCH] for t in trials}
    assert batches <= set(range(128, 961, 64))
    assert len(batches) > 5
    assert {t.parameters["train.optimizer.schedule"] for t in trials} == {"constant", "cosine"}
    assert [t.parameters["seed"] for t in trials] == [1] * 40 + [2] * 40


def test_equal_draws_are_one_trial():
    trials = trials_of(config_of({BATCH: {"choice": [64, 128]}}, samples=30))
    assert sorted(t.parameters[BATCH] for t in trials) == [64, 128]


def test_values_may_be_lists_and_reach_into_lists():
    config = config_of(
        {
            "model.query_tower.hidden": {"values": [[32], [64, 32]]},
            "features.query.0.decay": {"values": [0.5]},
        }
    )
    trials = trials_of(config)
    assert [t.config.model.query_tower.hidden for t in trials] == [[32], [64, 32]]
    assert trials[0].config.features.query[0].decay == 0.5


@pytest.mark.parametrize(
    ("parameters", "tune", "message"),
    [
        ({}, {}, "tune.parameters is empty; name what to try"),
        ({"train.loss.temprature": {"values": [1.0]}}, {}, "temprature: .*did you mean 'temperature'"),
        ({"tain.epochs": {"values": [1]}}, {}, "did you mean 'train'"),
        ({"train.epochs.x": {"values": [1]}}, {}, "'epochs' is the value 10, it has no keys below it"),
        ({"features.query.9.dim": {"values": [1]}}, {}, "'9' is not a position in a list of 1"),
        ({"index.factory": {"values": ["Flat"]}}, {}, "index.factory does not change a training; .* seed"),
        ({"train.validation.k": {"values": [5, 10]}}, {}, "train.validation.k is no single setting"),
        ({"train": {"values": [{}]}}, {}, "train is no single setting"),
        ({TEMPERATURE: {"values": [0.1, -1.0]}}, {}, r"temperature=-1.0: .*a number above 0 \(got -1.0\)"),
        (
            {BATCH: {"values": [64, 100]}, "train.num_workers": {"values": [2, 3]}},
            {},
            r"global_batch_size=64 num_workers=3: .*\(64\) must be divisible by num_workers \(3\); use 63 or"
            r".*global_batch_size=100 num_workers=3: .*use 99 or 102",
        ),
        ({BATCH: {"values": [64]}}, {"samples": 3}, r"tune.samples \(3\) has no effect"),
        ({BATCH: {"values": [64]}}, {"grace_epochs": 11}, r"grace_epochs \(11\) is above train.epochs"),
    ],
)  # fmt: skip
def test_what_can_not_be_tried_is_refused(parameters, tune, message):
    with pytest.raises(ConfigError, match=r"(?s)" + message):
        trials_of(config_of(parameters, **tune))


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"values": []}, "values: must be a list of at least 1 entry"),
        ({"choice": []}, "choice: must be a list of at least 1 entry"),
        ({}, "exactly one of values, choice, uniform and log_uniform, and this one has none"),
        ({"values": [1], "choice": [1]}, "this one has values and choice"),
        ({"values": [64, 128, 64]}, "values names 64 more than once"),
        ({"uniform": [2.0, 1.0]}, r"uniform \[2.0, 1.0\] must be \[smallest, largest\]"),
        ({"log_uniform": [0.0, 1.0]}, "must begin above 0; use uniform"),
        ({"values": [1], "multiple_of": 2}, r"multiple_of \(2\) has no effect on values"),
        ({"uniform": [65.0, 127.0], "multiple_of": 64}, r"holds no multiple of multiple_of \(64\)"),
        ({"valeus": [1]}, "did you mean 'values'"),
    ],
)
def test_a_wrong_parameter_is_explained(parameter, message):
    with pytest.raises(ConfigError, match=message):
        config_of({BATCH: parameter})


def test_many_refused_combinations_are_counted():
    with pytest.raises(ConfigError, match=r"(?s)global_batch_size=1: .*global_batch_size=9: .*and 2 more$"):
        trials_of(config_of({BATCH: {"values": [1, 3, 5, 7, 9, 11, 13]}}))


def test_the_set_line_repeats_a_trial():
    parameters = {
        "train.optimizer.learning_rate": 1e-05,
        "model.query_tower.hidden": [64, 32],
        "train.optimizer.schedule": "linear",
        "train.optimizer.max_grad_norm": None,
        "train.loss.symmetric": True,
    }
    words = shlex.split(set_line(parameters))
    assert words[0] == "--set"
    assert load_config(None, words[1:]) == with_parameters(load_config(), parameters)
    assert label({"a.on": "true"}) == "on=true"


def test_short_names_tell_keys_apart():
    keys = ["model.query_tower.dropout", "model.item_tower.dropout", "seed", "train.seed"]
    assert list(short_names(keys).values()) == [
        "query_tower.dropout",
        "item_tower.dropout",
        "seed",
        "train.seed",
    ]


def four_results() -> list[TrialResult]:
    return [
        result_of("001", {TEMPERATURE: 0.1, BATCH: 64}, [0.2, 0.4, 0.3]),
        result_of("002", {TEMPERATURE: 0.1, BATCH: 128}, [0.1, 0.2, 0.2]),
        result_of("003", {TEMPERATURE: 0.5, BATCH: 64}, [0.45], status="stopped"),
        TrialResult("004", {TEMPERATURE: 0.5, BATCH: 128}, "failed", error="the loss is nan;\nlower it"),
    ]


def test_the_table_has_the_best_first_and_the_failed_last():
    rows = table(four_results(), "recall", 7)
    assert rows[0][:5] == [
        "trial",
        "temperature",
        "global_batch_size",
        "validation recall@7",
        "validation ndcg@7",
    ]
    assert [row[0] for row in rows[1:]] == ["003", "001", "002", "004"]
    assert rows[2] == ["001", "0.1", "64", "0.4000", "0.1333", "2", "3", "4.5", "finished"]
    assert rows[1][-1] == "stopped"
    assert rows[4][3:] == ["-", "-", "-", "0", "0.0", "failed: the loss is nan;\nlower it"]
    lines = text_table(rows)
    assert len(lines) == 5
    assert lines[4].endswith("failed: the loss is nan; lower it")
    assert len(text_table([["x"], ["word " * 100]])[1]) <= 90
    assert lines[0].index("status") == lines[1].index("stopped") == lines[2].index("finished")


def test_the_other_metric_may_rank():
    results = four_results()
    results[1].history[0]["validation_ndcg"] = 0.9
    assert [r.name for r in ranked(results, "ndcg")][:2] == ["002", "003"]
    assert table(results, "ndcg", 7)[0][3:5] == ["validation ndcg@7", "validation recall@7"]


def test_effects_are_means_of_finished_trials_and_the_best_of_all():
    tune = config_of({TEMPERATURE: {"values": [0.1, 0.5]}, BATCH: {"values": [64, 128]}}).tune
    found = effects(four_results(), tune.parameters, "recall")
    assert found[TEMPERATURE] == [
        {"value": 0.1, "finished": 2, "mean": pytest.approx(0.3), "best": 0.4},
        {"value": 0.5, "finished": 0, "mean": None, "best": 0.45},
    ]
    assert [row["mean"] for row in found[BATCH]] == [0.4, 0.2]


def test_the_files_hold_every_trial(tmp_path):
    tune = config_of({TEMPERATURE: {"values": [0.1, 0.5]}, BATCH: {"values": [64, 128]}}).tune
    write_sweep(tmp_path, four_results(), tune, "recall", 7)
    value = json.loads((tmp_path / "sweep.json").read_text())
    assert [TrialResult(**trial) for trial in value["trials"]] == ranked(four_results(), "recall")
    assert value["metric"] == "validation_recall@7"
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row[BATCH] for row in rows] == ["64", "64", "128", "128"]
    text = (tmp_path / "sweep.md").read_text()
    assert "| 004 | 0.5 | 128 | - | - | - | 0 | 0.0 | failed: the loss is nan; lower it |" in text
    assert "| 0.5 | - | 0.4500 | 0 |" in text
    assert set_line({TEMPERATURE: 0.5, BATCH: 64}) in text
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sweep.txt").read_text().splitlines() == text_table(table(four_results(), "recall", 7))


@pytest.mark.parametrize(
    ("key", "parameter", "values"),
    [
        ("train.optimizer.schedule", {"values": ["constant", "linear"]}, ["constant", "linear"]),
        ("train.optimizer.learning_rate", {"log_uniform": [1e-4, 1.0]}, [3e-4, 0.2]),
        ("model.query_tower.hidden", {"values": [[8], [16, 8]]}, [[8], [16, 8]]),
        ("train.loss.symmetric", {"values": [True, False]}, [True, False]),
        ("train.optimizer.max_grad_norm", {"values": [None, 1.0]}, [None, 1.0]),
    ],
)
def test_the_picture_takes_values_of_any_kind(tmp_path, key, parameter, values):
    results = [result_of(f"00{i}", {key: value}, [0.1 * (i + 1)]) for i, value in enumerate(values)]
    write_sweep(tmp_path, results, config_of({key: parameter}).tune, "recall", 7)
    assert (tmp_path / "sweep.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", ["temperature", "batch-size"])
def test_the_ready_sweeps_fit_every_scenario_with_times(name):
    path = ROOT / "configs" / "sweeps" / f"{name}.yaml"
    for scenario in ("movielens", "generated", "gowalla"):
        config = load_config(ROOT / "configs" / f"{scenario}.yaml", None, path)
        trials = trials_of(config)
        values = [value for trial in trials for value in trial.parameters.values()]
        assert (min(values), max(values)) == {"temperature": (0.01, 0.5), "batch-size": (64, 8192)}[name]
        assert len({fingerprint(trial.config.train.model_dump(mode="json")) for trial in trials}) == len(
            trials
        )


def test_a_sweep_file_must_hold_keys(tmp_path):
    with pytest.raises(ConfigError, match="absent.yaml does not exist"):
        load_config(None, None, tmp_path / "absent.yaml")
    for text, message in (("- 1", "must hold keys and values"), ("a: [", "is not YAML")):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(None, None, tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"train.epochs": 3, "name": "x"}))
    config = load_config(None, ["name=y"], tmp_path / "s.yaml")
    assert (config.train.epochs, config.name) == (3, "y")
