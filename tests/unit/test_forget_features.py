"""What a forgotten user alone has of each kind of feature, in datasets and in tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.datasets import files_config, grid, write_csv
from tests.generations import untrained_checkpoint
from twotower.config import Config, parse_config
from twotower.data.content import content_hash
from twotower.data.dataset import Dataset
from twotower.data.forget import Forgetting
from twotower.data.prepare import prepare
from twotower.data.vocabulary import Vocabulary
from twotower.model.checkpoint import Checkpoint
from twotower.model.features import encode_columns
from twotower.model.forget import forget_in_checkpoint, knows_users

QUERY = [
    {"name": "user_id", "type": "id", "dim": 5},
    {"name": "history", "type": "history", "dim": 7},
    {"name": "tags", "type": "multi_hot", "dim": 3},
    {"name": "town", "type": "categorical", "dim": 2},
    {"name": "about", "type": "text", "dim": 4, "buckets": 50},
    {"name": "age", "type": "numeric"},
]
TAGS = ["x|mine", "x|y", "y", "", "ours|x", "ours", "y"]
"""By user; u0 is to be forgotten."""


def prepared(root: Path, **changes: object) -> tuple[Config, Dataset]:
    raw = write_csv(root / "raw.csv", ["who", "what", "when"], grid())
    rows = [
        [f"u{u}", tags, f"town {max(u, 1)}" if u else "alone", f"words {u}", 20 + u]
        for u, tags in enumerate(TAGS)
    ]
    users = write_csv(root / "users.csv", ["who", "tags", "town", "about", "age"], rows)
    values = files_config(root, raw).to_json()
    values["data"]["source"]["users"] = {"path": str(users), "id": "who"}
    values["features"]["query"] = [{**QUERY[0], **changes}, *QUERY[1:]]
    values["features"]["item"] = [{"name": "item_id", "type": "id", "dim": 7}]
    config = parse_config(values)
    return config, prepare(config)


def forgotten(dataset: Dataset, *ids: str) -> tuple[Forgetting, Dataset]:
    forgetting = Forgetting.of(dataset, ids)
    assert forgetting is not None
    directory = dataset.path.with_name("without")
    directory.mkdir()
    forgetting.write(directory)
    return forgetting, Dataset.open(directory)


def test_every_kind_of_feature_is_missing_afterwards(tmp_path: Path) -> None:
    _, dataset = prepared(tmp_path)
    forgetting, after = forgotten(dataset, "u0", "nobody")
    assert forgetting.erasure.values == {"tags": {"mine"}, "town": {"alone"}}
    row = dataset.user_ids.row("u0")
    assert row is not None
    before, left = dataset.user_table().to_pylist(), after.user_table().to_pylist()
    assert {k: v for k, v in left[row].items() if k != "user_id"} == dict.fromkeys(
        ("tags", "town", "about", "age")
    )
    assert [r for i, r in enumerate(left) if i != row] == [r for i, r in enumerate(before) if i != row]
    columns = encode_columns(after.schema.query, after.user_table())
    unknown = encode_columns(after.schema.query, pa.table({"": pa.nulls(1)}))
    for name, column in columns.items():
        width = unknown[name].shape[1]
        np.testing.assert_array_equal(column[row, :width], unknown[name][0])
        assert (column[row, width:] == -1).all()
    # Everybody else is encoded as before: values keep their places.
    for name, column in encode_columns(dataset.schema.query, dataset.user_table()).items():
        others = np.arange(len(column)) != row
        np.testing.assert_array_equal(columns[name][others], column[others])
    assert after.schema.query[5].mean == dataset.schema.query[5].mean
    assert Forgetting.of(after, ["u0", ""]) is None


def test_the_fingerprint_is_that_of_a_dataset_of_this_content(tmp_path: Path) -> None:
    _, dataset = prepared(tmp_path)

    def counted(d: Dataset) -> str:
        users, items = d.user_table(), d.item_table()
        return content_hash(d.interactions, d.vocabulary_hash, items, users, d.schema, d.has_times)

    _, after = forgotten(dataset, "u0")
    assert counted(dataset) == dataset.fingerprint
    assert counted(after) == after.fingerprint != dataset.fingerprint
    # The same users, one after the other, come to the same.
    both = Forgetting.of(dataset, ["u0", "u4"])
    later = Forgetting.of(after, ["u4"])
    assert both is not None
    assert later is not None
    assert later.erasure.new_dataset == both.erasure.new_dataset
    assert later.erasure.new_hash == both.erasure.new_hash
    # Both had it, and only both.
    assert both.erasure.values["tags"] == {"mine"}
    assert Forgetting.of(dataset, ["u4", "u5"]).erasure.values["tags"] == {"ours"}  # type: ignore[union-attr]


@pytest.mark.parametrize("buckets", [None, 6])
def test_tables_that_users_share_stay(tmp_path: Path, buckets: int | None) -> None:
    config, dataset = prepared(tmp_path, buckets=buckets)
    checkpoint = untrained_checkpoint(config, dataset, tmp_path / "checkpoint")
    forgetting, after = forgotten(dataset, "u0")
    out = tmp_path / "out"
    out.mkdir()
    forget_in_checkpoint(checkpoint.path, out, forgetting.erasure)
    new = Checkpoint.open(out)
    new.require_dataset(after)
    assert new.dataset_fingerprint == after.fingerprint
    assert new.schema == after.schema
    assert knows_users(out) == (buckets is None)
    changed = {
        name: np.flatnonzero((old != new.model.state_dict()[name]).reshape(len(old), -1).any(1)).tolist()
        for name, old in checkpoint.model.state_dict().items()
        if name.startswith("tables.")
    }
    row = Vocabulary.open(dataset.path / "user_ids.arrow").row("u0")
    assert row is not None
    values = {f.spec.name: f.values or [] for f in dataset.schema.query}
    expected = {"tables.query_tags": [values["tags"].index("mine") + 1]}
    expected["tables.query_town"] = [values["town"].index("alone") + 1]
    if buckets is None:
        expected["tables.id_of_user"] = [row + 1]
    assert {name: rows for name, rows in changed.items() if rows} == expected
