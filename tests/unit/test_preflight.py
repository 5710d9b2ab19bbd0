"""What the configuration asks of the prepared data is refused by ``prepare``, and before any other stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs import pipeline as pipeline_job
from jobs import prepare as prepare_job
from jobs import train as train_job
from jobs import tune as tune_job
from tests.datasets import files_config, grid, write_csv
from twotower.config import Config, parse_config
from twotower.data.prepare import prepare
from twotower.errors import ConfigError
from twotower.index.build import check_buildable
from twotower.training.preflight import Step, problems, require

ALL: tuple[Step, ...] = ("train", "index", "recommend", "evaluate")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    log = write_csv(tmp_path / "log.csv", ["who", "what", "when"], grid())
    items = pd.DataFrame({"id": [f"i{n}" for n in range(23)], "name": [f"Item {n}" for n in range(23)]})
    items["brand"] = ["x", "y"] * 11 + ["x"]
    items["price"] = [f"{n}.5" for n in range(22)] + ["free"]
    items["left_out"] = "?"
    items.to_csv(tmp_path / "items.csv", index=False)
    return files_config(
        tmp_path,
        log,
        data__source__items={"path": str(tmp_path / "items.csv"), "id": "id", "title": "name"},
        train__global_batch_size=8,
        train__num_workers=2,
        index__attributes={"brand": {}},
    )


def changed(config: Config, key: str, value: Any) -> Config:
    values = config.to_json()
    node = values
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    return parse_config(values)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.global_batch_size", 64, r"global_batch_size \(64\) is above the \d+ training interactions"),
        ("train.negatives.explicit", 2, "train.negatives.explicit is 2, .* has no negative"),
        ("train.negatives.mined", {"per_query": 1}, "train.negatives.mined looks at ranks up to skip"),
        ("train.init_from", "/nowhere", "/nowhere"),
        ("index.attributes", {"colour": {}}, "index.attributes.colour: the item table has no column"),
        ("index.attributes", {"a": {"column": "price", "type": "number"}}, "no numbers, such as 'free'"),
        ("index.attributes", {"brand": {"type": "integer"}}, "index.attributes.brand: column .* integer"),
        ("index.kind", "ivf_pq", "can not be built from 23 vectors of 64 dimensions"),
        ("index.factory", "IVF50,Flat", "has 50 centroids, but there are only 23 vectors"),
        ("index.factory", "Banana", "is no index for inner products"),
        ("index.kind", "cagra", "cagra needs more than"),
        ("index.max_memory_gib", 1e-9, "index.max_memory_gib allows"),
        ("evaluation.slices", ["brand", "colour"], "evaluation.slices: 'colour' is no .* allowed: brand"),
        ("recommend.fields", ["title", "shade"], "recommend.fields: 'shade' is no column .* title, brand"),
        ("recommend.fields", ["left_out"], "recommend.fields: 'left_out' is no column of items"),
        ("recommend.fields", ["title", "title"], "or is there twice"),
        ("recommend.filter", {"colour": {"any_of": ["red"]}}, "recommend.filter: items have no attribute"),
        ("recommend.filter", {"brand": {"gte": 1}}, "recommend.filter.brand: 'gte' is no operator"),
        ("recommend.filter", {"brand": {"any_of": ["z"]}}, "recommend.filter leaves none of the 23 items"),
    ],
)  # fmt: skip
def test_what_a_step_would_refuse(config: Config, key: str, value: Any, message: str) -> None:
    dataset = prepare(config)
    require(config, dataset, ALL)
    with pytest.raises(ConfigError, match=f"(?s)nothing was started:.*{message}"):
        require(changed(config, key, value), dataset, ALL)


def test_everything_is_told_at_once(config: Config) -> None:
    dataset = prepare(config)
    for key, value in (
        ("train.global_batch_size", 64),
        ("recommend.fields", ["shade"]),
        ("index.kind", "ivf_pq"),
    ):
        config = changed(config, key, value)
    with pytest.raises(ConfigError) as error:
        require(config, dataset, ALL)
    assert len(str(error.value).splitlines()) == 4
    # A step is asked for by itself.
    assert not list(problems(config, dataset, "evaluate"))
    assert len(list(problems(config, dataset, "index"))) == 1


def test_a_filter_is_not_judged_where_its_attributes_are_wrong(config: Config) -> None:
    config = changed(config, "index.attributes", {"colour": {}})
    config = changed(config, "recommend.filter", {"colour": {"any_of": ["red"]}})
    dataset = prepare(config)
    assert not list(problems(config, dataset, "recommend"))
    assert len(list(problems(config, dataset, "index"))) == 1


def test_a_test_split_without_catalogue_items_is_not_put_through_the_pipeline(config: Config) -> None:
    source = config.data.source
    rows = [[u, f"new{n}" if n % 10 > 7 else i, t] for n, (u, i, t) in enumerate(grid())]
    write_csv(Path(source.interactions), ["who", "what", "when"], rows)  # type: ignore[union-attr]
    dataset = prepare(config)
    require(config, dataset, ("train", "index", "recommend"))
    with pytest.raises(ConfigError, match="no user has a positive test interaction on a catalogue item"):
        require(config, dataset, ALL)


def test_a_validation_that_could_not_be_measured_is_refused_before_training(config: Config) -> None:
    source = config.data.source
    rows = [[u, f"new{n}" if n % 10 == 7 else i, t] for n, (u, i, t) in enumerate(grid())]
    write_csv(Path(source.interactions), ["who", "what", "when"], rows)  # type: ignore[union-attr]
    found = list(problems(config, prepare(config), "train"))
    assert ["no user has a positive validation interaction" in str(p) for p in found] == [True]


@pytest.mark.parametrize("job", [prepare_job, train_job, pipeline_job])
def test_jobs_refuse_before_ray_starts(
    job: Any,
    config: Config,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_ray(config: Config) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("jobs.stages.on_ray", no_ray)
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(changed(config, "index.attributes", {"colour": {}}).to_json()))
    assert job.main(["--config", str(path)]) == 2
    printed = capfd.readouterr().err
    assert (
        "index.attributes.colour: the item table has no column 'colour'; its columns are item_id" in printed
    )
    assert "Traceback" not in printed


def test_a_sweep_refuses_before_its_first_trial(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    monkeypatch.setattr("jobs.stages.on_ray", lambda config: contextlib.nullcontext())
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(config.to_json()))
    sizes = "tune.parameters={train.global_batch_size: {values: [8, 64]}}"
    assert tune_job.main(["--config", str(path), "--set", sizes]) == 2
    printed = capfd.readouterr().err
    assert "tune.parameters: global_batch_size=64: train.global_batch_size (64) is above" in printed


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,Flat", "IVF4,Flat", "IVF4,SQ8", "PCA4,Flat", "SQ8"])
@pytest.mark.parametrize("num_items", [50, 100_000])
def test_an_index_is_tried_before_there_are_vectors(factory: str, num_items: int) -> None:
    check_buildable(factory, 8, num_items, 2)
