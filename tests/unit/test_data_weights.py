"""Weights of interactions from raw values: each is kept to the bit, or its row is bad for a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.datasets import files_config, grid, write_csv
from twotower.data.prepare import prepare
from twotower.errors import ConfigError, DataError
from twotower.schema import MAX_WEIGHT

HEADER = ["who", "what", "when", "amount"]
COLUMNS = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "value": "amount"}
EXTREMES = [
    *(sign * 10.0**power for power in (-320, -46, -45, -38, -1, 3, 15, 16, 38, 39, 308) for sign in (1, -1)),
    *(0.0, -0.0, 5e-324, 1.4e-45, 7e-46, 1e15, np.nextafter(1e15, 2e15), 3.4e38, 3.5e38),
]


def prepared(folder: Path, values: list[Any], **changes: Any) -> Any:
    """Return a dataset of a grid of interactions, the first of which have these values, others 1."""
    rows = [[*row, values[n] if n < len(values) else 1] for n, row in enumerate(grid(12, 10))]
    path = write_csv(folder / "log.csv", HEADER, rows)
    settings = {"data__source__columns": COLUMNS, "data__positives": {"weight": "value"}}
    return prepare(files_config(folder, path, **{"data__on_bad_rows": "drop"} | settings | changes))


def test_every_number_is_kept_as_32_bits_or_is_a_bad_row(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, EXTREMES)
    with np.errstate(over="ignore"):
        wanted = {value: np.float32(value) for value in EXTREMES}
    kept = [v for v, w in wanted.items() if v <= MAX_WEIGHT and (w > 0 or v == 0)]
    log = dataset.interactions
    rows = {(f"{u}", f"{i}"): n for n, (u, i, *_) in enumerate(grid(12, 10))}
    users, items = dataset.user_ids.ids(log.user_row), dataset.item_ids.ids(log.item_row)
    numbers = [rows[pair] for pair in zip(users, items, strict=True)]
    found = {EXTREMES[n]: w for n, w in zip(numbers, log.weight, strict=True) if n < len(EXTREMES)}
    assert found == {value: wanted[value] for value in kept}
    assert np.isfinite(log.weight).all()
    assert log.weight.min() >= 0
    bad = dataset.counts["bad_rows_by_reason"]
    assert len(log) + sum(bad.values()) == 120
    assert bad == {
        "with a negative value as its weight": sum(v < 0 for v in EXTREMES),
        "with a weight above 1e+15": sum(v > MAX_WEIGHT for v in EXTREMES),
        "with a weight that 32-bit floats round to 0": sum(0 < v < 7.1e-46 for v in EXTREMES),
    }


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "much", "", "1e400"])
def test_what_is_no_finite_number_is_a_bad_row(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without a readable value"):
        prepared(tmp_path, [text], data__on_bad_rows="error")


def test_the_product_with_the_weight_of_the_event_counts(tmp_path: Path) -> None:
    rows = [[*row, 1e10, "buy" if n % 3 else "view"] for n, row in enumerate(grid(12, 10))]
    path = write_csv(tmp_path / "log.csv", [*HEADER, "event"], rows)
    changes = {
        "data__source__columns": COLUMNS | {"event": "event"},
        "data__source__events": {"buy": 0.5, "view": 1e6},
        "data__positives": {"weight": "value"},
        "data__on_bad_rows": "drop",
    }
    dataset = prepare(files_config(tmp_path, path, **changes))
    assert dataset.counts["bad_rows_by_reason"] == {"with a weight above 1e+15": 40}
    assert (dataset.interactions.weight == np.float32(5e9)).all()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-60, 1e16, 1e300])
def test_event_weights_that_are_none_are_refused(weight: float, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", [*HEADER, "event"], [[*row, 1, "buy"] for row in grid()])
    columns = COLUMNS | {"event": "event"}
    must = (
        r"a weight must be above 0 and at most 1e\+15" if np.isfinite(weight) else "must be a finite number"
    )
    with pytest.raises(ConfigError, match=rf"data\.source\.events\.buy.* {must}"):
        prepare(
            files_config(tmp_path, path, data__source__columns=columns, data__source__events={"buy": weight})
        )


@pytest.mark.parametrize(("value", "total"), [(0.75, 2.25), (1e15, 1e15), (1e-45, 4.2e-45)])
def test_sum_adds_the_weights_of_repeats(value: float, total: float, tmp_path: Path) -> None:
    rows = [[*row[:2], row[2] + again, value] for row in grid() for again in range(3)]
    path = write_csv(tmp_path / "log.csv", HEADER, rows)
    config = files_config(
        tmp_path,
        path,
        data__source__columns=COLUMNS,
        data__positives={"weight": "value"},
        data__repeats="sum",
    )
    weights = prepare(config).interactions.weight
    assert len(weights) == len(grid())
    assert (weights == np.float32(total)).all()
