"""Tables that a program gives are read as files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import twotower as tt
from tests.datasets import grid
from twotower.config import Config
from twotower.config.building import GIVEN, configure
from twotower.data.given import arrow_table, as_file
from twotower.errors import ConfigError, DataError


def frame(**columns: Any) -> pd.DataFrame:
    who, what, seconds = zip(*grid(), strict=True)
    when = pd.to_datetime(np.array(seconds), unit="s").tz_localize("Asia/Tokyo")
    return pd.DataFrame({"who": who, "what": pd.Categorical(what), "when": when} | columns)


def catalogue() -> pd.DataFrame:
    ids = [f"i{n}" for n in range(25)]
    kinds = pd.Categorical(["a" if n % 2 else None for n in range(25)])
    return pd.DataFrame({"what": ids, "kind": kinds, "price": [None, *range(24)]})


def config_of(root: Path, **values: Any) -> Config:
    return configure(
        {
            "storage.root": str(root),
            "data.source.columns": {"user": "who", "item": "what", "time": "when"},
            "features.item": [
                {"name": "item_id", "type": "id"},
                {"name": "kind", "type": "categorical"},
                {"name": "price", "type": "numeric"},
            ],
            **values,
        }
    )


def test_a_data_frame_is_read_as_the_file_of_it(tmp_path: Path) -> None:
    log, items = frame(), catalogue()
    users = pd.DataFrame({"who": ["u0", "u9"], "age": [7, 8]})
    log.to_parquet(tmp_path / "log.parquet")
    items.to_parquet(tmp_path / "items.parquet")
    users.to_parquet(tmp_path / "users.parquet")
    given = tt.prepare(config_of(tmp_path / "given"), log, items, users)
    filed = tt.prepare(
        config_of(tmp_path / "filed"),
        interactions=tmp_path / "log.parquet",
        items=str(tmp_path / "items.parquet"),
        users=tmp_path / "users.parquet",
    )
    assert given.fingerprint == filed.fingerprint
    assert given.num_users == 8  # one of them in the table of users alone
    assert given.num_catalogue_items == 25
    # The zone of the times counts.
    first = pd.Timestamp("1970-01-01", tz="Asia/Tokyo").value // 1000
    assert given.interactions.time.min() == first


@pytest.mark.parametrize("kind", ["arrow", "batch", "mapping", "stream", "string dtype", "arrow dtype"])
def test_whatever_arrow_can_read_gives_the_same_dataset(kind: str, tmp_path: Path) -> None:
    log = frame()
    table = pa.Table.from_pandas(log, preserve_index=False)

    class Stream:
        def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
            return table.__arrow_c_stream__(requested_schema)

    given: Any = {
        "arrow": table,
        "batch": table.combine_chunks().to_batches()[0],
        "mapping": {name: log[name] for name in log},
        "stream": Stream(),
        "string dtype": log.astype({"who": "string", "what": "string"}),
        "arrow dtype": log.astype({"who": pd.ArrowDtype(pa.large_string())}),
    }[kind]
    values = {"features.item": [{"name": "item_id", "type": "id"}]}
    found = tt.prepare(config_of(tmp_path / "a", **values), given)
    wanted = tt.prepare(config_of(tmp_path / "b", **values), log)
    assert found.fingerprint == wanted.fingerprint


def test_the_rules_for_files_hold(tmp_path: Path) -> None:
    def refused(match: str, log: Any, items: Any = None, **values: Any) -> None:
        with pytest.raises(DataError, match=match):
            tt.prepare(config_of(tmp_path, **values), log, items)

    numbers = np.arange(len(frame()), dtype=np.float64)
    refused(r"interactions.parquet row 1: with a user id that is a fraction: 0.5", frame(who=numbers + 0.5))
    refused(r"interactions.parquet has no column 'when'", frame().drop(columns="when"))
    twice = pd.concat([frame(), frame()[["who"]]], axis=1)
    refused(r"interactions.parquet has more than one column 'who'", twice)
    refused(r"items.parquet has 25 item ids more than once", frame(), pd.concat([catalogue()] * 2))
    missing = frame()
    missing.loc[3, "what"] = None
    refused(r"1 .*row", missing)
    dropped = tt.prepare(config_of(tmp_path, **{"data.on_bad_rows": "drop"}), missing, catalogue())
    assert dropped.counts["bad_rows"] == 1
    # Nothing is left of what was given, whatever became of it.
    assert [p.name for p in (tmp_path / "twotower" / "tables").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (
            {"who": [1, "a"], "what": [1, 2], "when": [1, 2]},
            DataError,
            "column 'who' of interactions is of no",
        ),
        ({"who": ["a"], "what": ["b", "c"], "when": [1]}, DataError, "columns of interactions do not make"),
        ([("a", "b", 1)], ConfigError, "interactions is a list; give a pandas DataFrame, an Arrow table"),
        (None, ConfigError, r"data.source.interactions names no files .*call prepare with interactions="),
    ],
)
def test_what_is_no_table_is_named(given: Any, error: type[Exception], match: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=match):
        tt.prepare(config_of(tmp_path), given)


def test_a_table_without_a_mapping_and_a_mapping_without_a_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"interactions given to prepare, and data.source is of kind gener"):
        tt.prepare(configure({"storage.root": str(tmp_path)}), frame())
    config = config_of(tmp_path, **{"data.source.items": {"id": "what"}})
    with pytest.raises(ConfigError, match=r"data.source.items names no files .*items="):
        tt.prepare(config, frame())


def test_the_same_content_has_the_same_place_and_time(tmp_path: Path) -> None:
    table = arrow_table(frame(), "log")
    halves = pa.concat_tables([table.slice(0, 9), table.slice(9)])
    stamps = []
    for given in (table, halves, table.slice(1)):
        with as_file(given, tmp_path, "log") as path:
            assert pq.read_table(path).num_rows == given.num_rows
            stamps.append((path, path.stat().st_mtime_ns))
        assert not path.exists()
    assert stamps[0] == stamps[1]
    assert stamps[2] != stamps[1]


def test_a_configuration_is_built_of_dotted_keys(tmp_path: Path) -> None:
    config = config_of(tmp_path, **{"train.epochs": 3, "data.source.items": {"id": "what"}})
    source = config.data.source
    assert source.kind == "files"
    assert source.interactions == GIVEN
    assert source.items is not None
    assert source.items.path == GIVEN
    later = configure({"train.loss": {"temperature": 0.2}, "train.epochs": 4}, base=config)
    assert (later.train.epochs, later.train.loss.temperature, later.name) == (4, 0.2, config.name)
    assert config.train.epochs == 3
    other = configure({"data.source": {"kind": "movielens"}}, base=later)
    assert other.data.source.kind == "movielens"
    assert other.train == later.train
    (tmp_path / "base.yaml").write_text("name: mine\ntrain: {epochs: 9}\n")
    filed = configure({"seed": 5}, base=tmp_path / "base.yaml")
    assert (filed.name, filed.train.epochs, filed.seed) == ("mine", 9, 5)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"train.epoch": 5}, "epochs"),
        ({"train.epochs": "many"}, "train.epochs"),
        ({"": 1}, "is no key"),
        ({"seed.x": 1}, "configure: 'seed.x'|seed"),
    ],
)
def test_a_wrong_key_or_value_is_named(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        configure(values)
