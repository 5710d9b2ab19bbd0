"""The configuration: files, overrides, messages for people, round trips."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from twotower.config import Config, load_config, parse_config
from twotower.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "golden"


def test_every_scenario_has_a_file():
    named = {"beauty", "generated", "movielens", "gowalla", "own-data", "gpu-cluster", "tafeng"}
    assert {f.stem for f in FILES} == named


@pytest.mark.golden
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_resolved_files_are_the_golden_ones(file, update_golden):
    resolved = json.dumps(load_config(file).to_json(), indent=2) + "\n"
    golden = GOLDEN / f"config-{file.stem}.json"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(resolved)
    assert resolved == golden.read_text(), (
        "if the change is meant: pytest tests/unit/test_config.py --update-golden"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_resolved_files_round_trip_through_json(file):
    config = load_config(file)
    assert parse_config(json.loads(json.dumps(config.to_json()))) == config


def test_defaults_are_a_valid_configuration():
    assert load_config() == Config()


def test_overrides_replace_values_of_the_file():
    config = load_config(
        ROOT / "configs" / "movielens.yaml",
        [
            "train.epochs=3",
            "train.loss.temperature=0.5",
            "name=other",
            "evaluation.ks=[5, 7]",
            "data.mirror=null",
        ],
    )
    assert (config.train.epochs, config.train.loss.temperature, config.name) == (3, 0.5, "other")
    assert config.evaluation.ks == [5, 7]
    assert config.data.mirror is None


def test_overrides_reach_into_lists_and_replace_a_whole_source():
    config = load_config(
        ROOT / "configs" / "movielens.yaml",
        ["features.query.1.max_length=7", "data.source={kind: generated, num_users: 60}"],
    )
    assert config.features.query[1].max_length == 7
    assert config.data.source.num_users == 60


def test_later_overrides_win():
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "did you mean 'epochs'"),
        ("tain.epochs=3", "did you mean 'train'"),
        ("train.loss.temprature=1.0", "did you mean 'temperature'"),
        ("data.source.nam=ml-1m", "did you mean 'name'"),
        ("features.query.0.dims=3", "did you mean 'dim'"),
        ("zzz=1", "allowed: "),
        ("train.epochs=many", "train.epochs: .*got 'many'"),
        ("train.epochs=0", "train.epochs: .*got 0"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.epochs", "must have the form section.key=value"),
        ("=3", "must have the form section.key=value"),
        ("train.epochs.x=3", "has no keys below it"),
        ("features.query.9.dim=3", "not a position in a list of"),
        ("evaluation.ks=[", "not YAML"),
        ("data.source.name=ml-2m", "ml-latest-small"),
        ("name=../up", "name"),
        ("data.source.kind=movielense", "kind"),
    ],
)
def test_a_wrong_override_is_explained(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs" / "movielens.yaml", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- 1\n", "holds a list"), ("trian: {}\n", "did you mean 'train'")],
)
def test_a_wrong_file_is_explained(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")


def test_an_empty_file_gives_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == Config()


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["train.epochs=0", "model.embedding_dim=0", "sed=1"])
    message = str(caught.value)
    assert "train.epochs" in message
    assert "model.embedding_dim" in message
    assert "did you mean 'seed'" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.global_batch_size=1000", "train.num_workers=3"],
            r"\(1000\).*num_workers \(3\); use 999 or 1002",
        ),
        (["train.loss.min_temperature=0.5"], "min_temperature"),
        (["train.loss.temperature=0"], r"train\.loss\.temperature: .* a number above 0 \(got 0\)"),
        (["train.loss.temperature=-0.1"], r"a number above 0 \(got -0\.1\)"),
        (["train.tower_chunk_size=0"], r"train\.tower_chunk_size: .* at least 1, or null \(got 0\)"),
        (["train.num_workers=0"], r"train\.num_workers: .* at least 1 \(got 0\)"),
        (["model.item_tower.norm=batch", "train.tower_chunk_size=64"], r"tower_chunk_size \(64\)"),
        (["train.ingest=stream", "train.negatives.mined.per_query=2"], r"per_query \(2\) needs"),
        (["data.source={kind: lightgcn, path: x}"], "needs times"),
        (["data.source={kind: files, interactions: x.csv}", "split.kind=given"], r"columns\.split"),
        (["data.positives.value_range=[5, 1]"], "value_range"),
        (["features.query=[]"], r"features\.query is empty"),
        (["features.item=[{name: year, type: numeric}]"], "shares the item id table"),
        (["features.query=[{name: h, type: history, dim: 3}]"], "dim 3"),
        (["features.query=[{name: p, type: profile, of: title}]"], "is of 'title'"),
        (["features.item=[{name: a, type: id}, {name: a, type: numeric}]"], "more than once"),
    ],
)
def test_combinations_that_can_not_work_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_parsing_does_not_change_the_values_given():
    values = {"train": {"epochs": 3}}
    parse_config(values)
    assert values == {"train": {"epochs": 3}}


def test_a_configuration_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load_config().seed = 3


def test_paths_are_absolute_and_below_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["name=a", "storage.root=here"])
    assert config.store == tmp_path / "here" / "a" / "store"
    assert config.datasets.is_absolute()


def test_the_mirror_comes_from_the_config_or_the_environment(monkeypatch):
    monkeypatch.setenv("TWOTOWER_MIRROR", "/from/environment")
    assert load_config().mirror == "/from/environment"
    assert load_config(None, ["data.mirror=/from/config"]).mirror == "/from/config"
    monkeypatch.setenv("TWOTOWER_MIRROR", "")
    assert load_config().mirror is None


def test_the_words_load_without_torch_ray_and_faiss():

    code = (
        "import sys\n"
        "from twotower import artefacts, config, errors, progress, schema\n"
        "sys.exit(','.join(m for m in ('torch', 'ray', 'faiss') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
