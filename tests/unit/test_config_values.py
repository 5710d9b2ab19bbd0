"""Values by the type of their key: what YAML makes of a text by its looks does not count."""

from __future__ import annotations

from typing import Any

import pytest

from twotower.config import Config, load_config, text_of
from twotower.errors import ConfigError

FILES = "data.source={kind: files, interactions: a.csv, columns: {time: t}}"


def read(text: str, tmp_path) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path)


def at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def test_a_value_keeps_what_looks_like_a_comment():
    config = load_config(None, ["storage.root=/data/run #2", "recommend.filter.title.any_of=Run #2"])
    assert config.storage.root == "/data/run #2"
    assert config.recommend.filter == {"title": {"any_of": "Run #2"}}


@pytest.mark.parametrize(
    "text",
    [
        *[
            "yes",
            "off",
            "~x",
            "1e3",
            "0x10",
            "010",
            "1_000",
            "12:30:00",
            "2024-01-01",
            "a: b",
            "*a",
            "&a",
            "!a",
        ],
        *[
            "%a",
            "@a",
            "`a",
            " a ",
            "---",
            "a\tb",
            "[a",
            "{a",
            "- a",
            "? a",
            "| a",
            "#",
            "",
            "'",
            "x''y",
            "é✓",
        ],
    ],
)
def test_a_key_of_text_takes_any_text(text):
    assert load_config(None, [f"data.cache={text}"]).data.cache == text
    assert load_config(None, [FILES, f"data.source.columns.user={text}"]).data.source.columns.user == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("storage.root=null", "is never null; leave it out"),
        ("data.mirror=", "write null for no value"),
        ("data.mirror=~", "write null for no value"),
        ("data.mirror=None", "write null for no value"),
        ("storage.root='/data/run'", "quotes would be part of it"),
        ('storage.root="/data/run"', "quotes would be part of it"),
        ("storage.root=\udcff", "is not text in UTF-8"),
        ("recommend.fields=[title] # all", "a value holds no comments"),
        ("recommend.fields=[a #b]", "put quotes around"),
        ("recommend.fields=[&a b]", "begins with & or *"),
        ("recommend.fields=[*a]", "begins with & or *|undefined alias"),
        ("recommend.fields=[!!str a]", "the tag !!str is not taken"),
        ("recommend.fields=!!python/name:os.system", "must be a list"),
        ("recommend.fields=[a]\n---\n[b]", "is not YAML"),
        ("recommend.fields=[a] [b]", "is not YAML"),
        ("recommend.fields=[a", "is not YAML"),
        ("recommend.fields=[\x07]", "is not YAML: the character"),
        ("recommend.filter={a: {gte: 1}, a: {lt: 2}}", "the key 'a' is given again"),
        ("recommend.filter={[a]: 1}", "a key must be a text"),
        ("train.epochs=010", r"\(got '010'\); write 10"),
        ("train.epochs=1e3", r"\(got '1e3'\); write 1000"),
        ("train.epochs=1,000", r"\(got '1,000'\); write 1000"),
        ("train.epochs=12:30", r"an integer of at least 1 \(got '12:30'\)"),
        ("train.epochs=2024-01-01", r"\(got '2024-01-01'\)"),
        ("train.epochs=yes", r"\(got 'yes'\)"),
        ("train.epochs=", r"\(got null\)"),
        ("train.epochs=3 # three", r"\(got '3 # three'\)"),
        ("train.compile=1", r"must be true or false \(got '1'\)"),
        ("train.loss.temperature=1e999", "must be a finite number"),
        ("train.loss.temperature=.nan", r"a number above 0 \(got '.nan'\)"),
        ("model.item_tower.hidden=64, 32", r"write \[64, 32\]"),
        ("recommend.fields=title", r"write \[title\]"),
    ],
)
def test_what_a_value_can_not_be_is_refused_in_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value).replace(repr(override), "")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=1_000", 1000),
        ("train.epochs=0x10", 16),
        ("train.compile=yes", True),
        ("train.compile=OFF", False),
        ("cluster.use_gpu=yes", "yes"),
        ("cluster.use_gpu=no", "no"),
        ("train.loss.temperature=1e-2", 0.01),
        ("train.loss.temperature=1", 1.0),
        ("train.tower_chunk_size=", None),
        ("train.tower_chunk_size=~", None),
        ("data.mirror=null", None),
        ("model.item_tower.hidden=[64,32]", [64, 32]),
        ("recommend.fields=[title]", ["title"]),
        ("recommend.fields=[no, 1e3, 2024-01-01, '#', \"a #b\"]", ["no", "1e3", "2024-01-01", "#", "a #b"]),
        ("recommend.fields=[\n\ta,\n\tb\n]", ["a", "b"]),
        ("recommend.filter={genres: {any_of: [Comedy]}}", {"genres": {"any_of": ["Comedy"]}}),
        (
            "recommend.filter={a: {any_of: [no, 007, 1, 2.5, 1e3, true, null, 12:30, 2024-01-01, 0x1, '1']}}",
            {
                "a": {
                    "any_of": ["no", "007", 1, 2.5, 1000.0, True, None, "12:30", "2024-01-01", "0x1", "1"],
                }
            },
        ),
        ("recommend.filter.year.gte=1990", {"year": {"gte": 1990}}),
        ("recommend.filter.zip.eq='01990'", {"zip": {"eq": "01990"}}),
    ],
)
def test_other_values_are_read_by_the_type_of_their_key(override, value):
    key = override.partition("=")[0]
    key = "recommend.filter" if key.startswith("recommend.filter") else key
    found = at(load_config(None, [override]), key)
    assert found == value
    assert type(found) is type(value)


def test_an_override_reaches_into_a_list_that_is_only_there_by_default():
    config = load_config(None, ["features.query.0.max_length=7", "seed=1"])
    assert config.features.query[0].max_length == 7


def test_a_file_is_read_by_the_types_of_its_keys(tmp_path):
    config = read(
        "name: 123\n"
        "data:\n"
        "  source:\n"
        "    kind: files\n"
        "    interactions: 2024-01-01\n"
        "    columns: {user: on, item: 1e3, time: t, event: no}\n"
        "    events: {1: 1.0, no: 0.3, on: negative, 2024-01-01: seen_only, 1.0: 2, ~: 1}\n"
        "  window: {start: 2024-01-01, end: 2024-02-01 10:00:00}\n"
        "cluster: {use_gpu: no}\n"
        "train: {compile: off, tower_chunk_size: ~}\n",
        tmp_path,
    )
    source = config.data.source
    assert (config.name, source.interactions) == ("123", "2024-01-01")
    assert (source.columns.user, source.columns.item, source.columns.event) == ("on", "1e3", "no")
    assert source.events == {
        "1": 1.0,
        "no": 0.3,
        "on": "negative",
        "2024-01-01": "seen_only",
        "1.0": 2,
        "~": 1,
    }
    assert (config.data.window.start, config.data.window.end) == ("2024-01-01", "2024-02-01 10:00:00")
    assert config.cluster.use_gpu == "no"
    assert (config.train.compile, config.train.tower_chunk_size) == (False, None)


def test_a_file_may_name_and_merge_what_it_says_twice(tmp_path):
    config = read(
        "model:\n"
        "  query_tower: &tower {hidden: [32], dropout: 0.2}\n"
        "  item_tower: {<<: *tower, dropout: 0.3}\n",
        tmp_path,
    )
    assert config.model.item_tower.hidden == [32]
    assert config.model.item_tower.dropout == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\nname: a\nseed: 2\n",
            r"c\.yaml, line 3: the key 'seed' is given again \(first in line 1\)",
        ),
        ("train:\n  epochs: 1\n  'epochs': 2\n", "line 3: the key 'epochs' is given again"),
        ("data:\n  source: {kind: files, events: {a: 1, a: 2}}\n", "line 2: the key 'a' is given again"),
        ("recommend: {filter: {a: {gte: 1, gte: 2}}}\n", "the key 'gte' is given again"),
        ("a: &x [*x]\n", "a value holds itself"),
        ("train: &x\n  <<: *x\n", "takes a mapping|undefined alias|holds itself"),
        ("seed: 1\n---\nseed: 2\n", "line 2 is not YAML: expected a single document"),
        ("train:\n\tepochs: 3\n", "line 2 is not YAML: .*cannot start any token"),
        ("train: !!python/object/apply:os.system [ls]\n", "the tag !!python.* is not taken"),
        ("name: !!str 1\n", "the tag !!str is not taken"),
        ("? [a]\n: 1\n", "a key must be a text"),
        ("train: {epochs: '3'}\n", r"an integer of at least 1 \(got '3'\); write 3 without quotes"),
        ("storage: {root: }\n", r"storage\.root: must be text \(got null\)"),
        ("seed: 1 2: 3\n", "is not YAML"),
        ("just text", "holds a text"),
    ],
)
def test_what_a_file_can_not_hold_is_refused_in_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(text, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"name: a\nseed: \xff\n", "is not UTF-8 .the byte 0xff in line 2.; save it as UTF-8"),
        ("name: a\n".encode("utf-16"), "is not UTF-8"),
        (b"name: a\x00\n", "is not YAML: the character"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, data, message):
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfname: a\n")
    assert load_config(tmp_path / "c.yaml").name == "a"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "value", ["a b", "1e3", 3, 1e-05, True, None, [64, 32], ["a", "1e3"], {"a": {"b": ["no"]}}]
)
def test_values_as_text_are_read_back(value):
    key = {str: "data.cache", int: "train.epochs", bool: "train.compile"}.get(type(value))
    key = key or {float: "train.loss.temperature", dict: "recommend.filter"}.get(type(value))
    key = key or ("train.tower_chunk_size" if value is None else "recommend.fields")
    if value == [64, 32]:
        key = "model.item_tower.hidden"
    overrides = ["train.loss.min_temperature=1e-6", f"{key}={text_of(value)}"]
    assert at(load_config(None, overrides), key) == value
