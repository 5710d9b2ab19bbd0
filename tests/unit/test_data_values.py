"""Values that were read as something else, or accepted here and refused there: each through ``prepare``."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets import files_config, grid, write_csv
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.errors import ConfigError, DataError
from twotower.model.features import encode_columns

HEADER = ["who", "what", "when"]
NAT = -(2**63)
START = 1_700_000_000


def log(tmp_path: Path, times: pa.Array) -> Path:
    rows = grid()
    table = pa.table([[r[0] for r in rows], [r[1] for r in rows], times], names=HEADER)
    pq.write_table(table, tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def with_times(path: Path, **columns: Any) -> Config:
    return files_config(path.parent, path, data__source__columns={"user": "who", "item": "what", **columns})


def moments(dataset: Dataset) -> list[datetime.datetime]:
    epoch = datetime.datetime(1970, 1, 1)
    return [epoch + datetime.timedelta(microseconds=int(t)) for t in dataset.interactions.time]


def seconds(unit: int = 1) -> list[int]:
    return [(START + n) * unit for n in range(70)]


@pytest.mark.parametrize(
    ("kind", "unit", "factor", "bad", "reason"),
    [
        (pa.int64(), "s", 1, NAT, "without a readable time"),
        (pa.int64(), "ms", 1_000, NAT, "without a readable time"),
        (pa.int64(), "s", 1, NAT // 10**9, "without a readable time"),
        (pa.uint64(), "s", 1, 2**64 - 1, "with a time outside of the years 1 to 9999"),
        (pa.int64(), "us", 10**6, 2**63 - 1, "with a time outside of the years 1 to 9999"),
        (pa.int64(), "s", 1, -(2**62), "with a time outside of the years 1 to 9999"),
        (pa.timestamp("s"), None, 1, 2**50, "with a time outside of the years 1 to 9999"),
        (pa.timestamp("ms", "UTC"), None, 1_000, 2**62, "with a time outside of the years 1 to 9999"),
        (pa.date64(), None, 1_000, 86_400_000 * 10**10, "with a time outside of the years 1 to 9999"),
    ],
)
def test_a_time_out_of_range_is_a_bad_row(
    tmp_path: Path, kind: pa.DataType, unit: str | None, factor: int, bad: int, reason: str
) -> None:
    # Parquet has whole days of dates only.
    day = 86_400 if kind == pa.date64() else 1
    values = [(START // day + n) * day * factor for n in range(70)]
    values[3] = bad
    array = pa.array(values, pa.uint64() if kind == pa.uint64() else pa.int64())
    path = log(tmp_path, array.view(kind) if unit is None else array)
    config = with_times(path, time="when", time_unit=unit)
    with pytest.raises(
        DataError, match=rf"1 row can not be read \(1 {reason}\):\n  log.parquet row 4: {reason}"
    ):
        prepare(config)
    dropped = prepare(
        config.model_copy(update={"data": config.data.model_copy(update={"on_bad_rows": "drop"})})
    )
    assert dropped.counts["bad_rows_by_reason"] == {reason: 1}
    assert dropped.interactions.time.min() >= (START - 86_400) * 1_000_000


def test_text_of_the_missing_time_is_a_bad_row(tmp_path: Path) -> None:
    rows = [[u, i, START + t] for u, i, t in grid()]
    rows[3][2] = NAT
    with pytest.raises(DataError, match="row 5: without a readable time: '-9223372036854775808'"):
        prepare(files_config(tmp_path, write_csv(tmp_path / "log.csv", HEADER, rows)))


def test_times_of_96_bits_do_not_wrap(tmp_path: Path) -> None:
    old = [datetime.datetime(1500, 1, 1) + datetime.timedelta(days=n) for n in range(69)]
    far = [datetime.datetime(9999, 12, 31, 23), *old]
    path = log(tmp_path, pa.array(far, pa.timestamp("us")))
    pq.write_table(pq.read_table(path), path, use_deprecated_int96_timestamps=True)
    dataset = prepare(with_times(path, time="when"))
    assert set(moments(dataset)) == set(far)


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize(("factor", "unit"), [(1_000, "ms"), (10**6, "us"), (10**9, "ns")])
def test_another_unit_than_the_declared_one_is_named(
    tmp_path: Path, form: str, factor: int, unit: str
) -> None:
    values = seconds(factor)
    if form == "csv":
        rows = [[u, i, value] for (u, i, _), value in zip(grid(), values, strict=True)]
        path = write_csv(tmp_path / "log.csv", HEADER, rows)
    else:
        path = log(tmp_path, pa.array(values))
    message = (
        rf"'when' is declared in s, and the values look like .*: set data\.source\.columns.time_unit: {unit} "
    )
    with pytest.raises(ConfigError, match=message):
        prepare(with_times(path, time="when", time_unit="s"))


def test_a_smaller_unit_than_the_declared_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("twotower.progress.say", said.append)
    prepare(with_times(log(tmp_path, pa.array(seconds())), time="when", time_unit="ms"))
    assert any("declared in ms, and the values look like seconds" in line for line in said)
    said.clear()
    # Times that begin at 0, as in data without dates, look like nothing else.
    prepare(with_times(log(tmp_path, pa.array(range(70))), time="when", time_unit="s"))
    assert not any("declared" in line for line in said)


DAYS = [
    datetime.datetime(2000, 11, 1) + datetime.timedelta(days=n, hours=n % 24, minutes=7) for n in range(70)
]


@pytest.mark.parametrize(
    "written", ["%m/%d/%Y", "%d.%m.%Y %H:%M", "%Y/%m/%d %H:%M:%S", "%d-%b-%Y", "%a %b %d %H:%M:%S %Y"]
)
def test_dates_in_another_form_are_read_by_their_format(tmp_path: Path, written: str) -> None:
    texts = [day.strftime(written) for day in DAYS]
    rows = [[u, i, text] for (u, i, _), text in zip(grid(), texts, strict=True)]
    path = write_csv(tmp_path / "log.csv", HEADER, rows)
    with pytest.raises(ConfigError) as error:
        prepare(with_times(path, time="when"))
    assert f"holds text such as {texts[0]!r}, which is not ISO 8601; " in str(error.value)
    assert f"set data.source.columns.time_format, which looks like {written!r}" in str(error.value)
    dataset = prepare(with_times(path, time="when", time_format=written))
    assert set(moments(dataset)) == {datetime.datetime.strptime(text, written) for text in texts}
    # A row in another form is bad, and no more than that.
    rows[5][2] = "soon"
    write_csv(path, HEADER, rows)
    with pytest.raises(DataError, match="1 row can not be read .*\n  log.csv row 7: .*: 'soon'"):
        prepare(with_times(path, time="when", time_format=written))


def test_shops_write_a_month_before_the_day_and_zeros_before_ids(tmp_path: Path) -> None:
    """As Ta-Feng has it: M/D/YYYY, quoted, a byte order mark, ids with leading zeros."""
    lines = ['"TRANSACTION_DT","CUSTOMER_ID","PRODUCT_ID"']
    for n, day in enumerate(DAYS):
        date = f"{day.month}/{day.day}/{day.year}"
        lines.append(f'"{date}","{n % 7:08d}","{4710199010372 + n % 9}"')
    (tmp_path / "log.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    columns = {"user": "CUSTOMER_ID", "item": "PRODUCT_ID", "time": "TRANSACTION_DT"}
    dataset = prepare(
        files_config(
            tmp_path,
            tmp_path / "log.csv",
            data__source__columns={**columns, "time_format": "%m/%d/%Y"},
        )
    )
    assert dataset.user_ids.ids([0, 6]) == ["00000000", "00000006"]
    assert dataset.item_ids.id(0) == "4710199010372"
    assert dataset.interactions.time.max() % 86_400_000_000 == 0


def test_integers_such_as_20260131_are_dates(tmp_path: Path) -> None:
    values = [int(day.strftime("%Y%m%d")) for day in DAYS]
    path = log(tmp_path, pa.array(values))
    with pytest.raises(ConfigError, match="time_format, which looks like '%Y%m%d'"):
        prepare(with_times(path, time="when"))
    dataset = prepare(with_times(path, time="when", time_format="%Y%m%d"))
    assert len(np.unique(dataset.interactions.time)) == 70


def test_a_setting_that_the_times_do_not_need_is_named(tmp_path: Path) -> None:
    rows = [[u, i, day.isoformat()] for (u, i, _), day in zip(grid(), DAYS, strict=True)]
    path = write_csv(tmp_path / "log.csv", HEADER, rows)
    with pytest.raises(ConfigError, match=r"which is no number; remove data\.source\.columns\.time_unit"):
        prepare(with_times(path, time="when", time_unit="s"))
    with pytest.raises(ConfigError, match=r"does not have the format .*; remove .*columns\.time_format"):
        prepare(with_times(path, time="when", time_format="%m/%d/%Y"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"time_format": "%m/%Y"}, "does not name year, month and day"),
        ({"time_format": "%H:%M"}, "does not name year, month and day"),
        ({"time_format": "%Q"}, "is no format of times"),
        ({"time_format": "%Y%m%d", "time_unit": "s"}, "leave one out"),
    ],
)
def test_formats_that_are_none(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_times(tmp_path / "log.csv", time="when", **columns)


def prepared(tmp_path: Path, column: pa.Array, **spec: Any) -> Dataset:
    path = write_csv(tmp_path / "log.csv", HEADER, grid())
    pq.write_table(pa.table({"id": [f"i{n}" for n in range(23)], "f": column}), tmp_path / "items.parquet")
    features = [{"name": "item_id", "type": "id"}, {"name": "f", **spec}]
    return prepare(
        files_config(
            tmp_path,
            path,
            data__source__items={"path": str(tmp_path / "items.parquet"), "id": "id"},
            features__item=features,
        )
    )


def encoded(dataset: Dataset) -> Any:
    """What training reads of the items."""
    return encode_columns(dataset.schema.item, dataset.item_table())["f"]


def test_lists_of_one_length_are_trained_on(tmp_path: Path) -> None:
    lists = pa.array([[f"a{n % 2}", f"b{n % 3}"] for n in range(23)], pa.list_(pa.string(), 2))
    dataset = prepared(tmp_path, lists, type="multi_hot")
    values = dataset.schema.item[1].values
    assert values is not None
    assert encoded(dataset)[5].tolist() == sorted([values.index("a1") + 1, values.index("b2") + 1])


def test_log1p_takes_what_prepare_takes(tmp_path: Path) -> None:
    values = [-0.5, *range(1, 23)]
    found = encoded(prepared(tmp_path, pa.array(values, pa.float64()), type="numeric", transform="log1p"))
    logs = np.log1p(values)
    np.testing.assert_allclose(found[:, 0], (logs - logs.mean()) / logs.std(), rtol=1e-5)
    values[0] = -1.0
    with pytest.raises(DataError, match="log1p needs numbers above -1, and the smallest is -1"):
        prepared(tmp_path, pa.array(values, pa.float64()), type="numeric", transform="log1p")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1e300] + [1.0] * 22, r"column 'f' holds 1 values of a size above 1e\+24, such as 1e\+300 in row 1"),
        ([1.0, -1e200] + [1.0] * 21, r"such as -1e\+200 in row 2; correct them or leave them empty"),
        ([1.0, np.inf] + [1.0] * 21, "holds 1 infinite values; leave them empty"),
        (["1,5", "2,25"] + ["3,0"] * 21, "such as '1,5'; write a point where they have a comma"),
        (["1.5", "n/a!"] + ["3.0"] * 21, "1 of 23 values are no numbers, such as 'n/a!'; correct them"),
    ],
)
def test_numbers_that_no_tower_can_read(tmp_path: Path, values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, pa.array(values), type="numeric")


@pytest.mark.parametrize(
    "kind", [pa.uint64(), pa.int64(), pa.decimal128(38, 4), pa.float16(), pa.float32(), pa.bool_()]
)
def test_every_kind_of_number_is_standardised(tmp_path: Path, kind: pa.DataType) -> None:
    large = {pa.uint64(): 2**64 - 1, pa.int64(): 2**63 - 1}.get(kind, 1)
    values = [n % 2 for n in range(22)] + [large]
    column = pa.array(values).cast(kind) if large == 1 else pa.array(values, kind)
    found = encoded(prepared(tmp_path, column, type="numeric"))
    numbers = np.array(values, np.float64)
    np.testing.assert_allclose(found[:, 0], (numbers - numbers.mean()) / numbers.std(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e17, -7.0, 0.0])
def test_a_constant_column_lets_other_values_in(tmp_path: Path, value: float) -> None:
    dataset = prepared(tmp_path, pa.array([value] * 23), type="numeric")
    feature = dataset.schema.item[1]
    assert (feature.mean, feature.std) == (value, 1.0)
    assert not encoded(dataset).any()
    nearby = encode_columns([feature], pa.table({"f": [value + 0.001, value + 1]}))["f"][:, 0]
    assert np.abs(nearby).max() <= 2


@pytest.mark.parametrize(
    ("column", "asked"),
    [
        (pa.array([1.0, 2.5] * 11 + [None], pa.float32()), 1),
        (pa.array(["1.0", "2.5"] * 11 + [None]), 1),
        (pa.array([1, 2] * 11 + [None]), 1.0),
        (pa.array(["True", "False"] * 11 + [None]), True),
        (pa.array([True, False] * 11 + [None]), "True"),
        (pa.array([2.0**60, 1] * 11 + [None]), 2**60),
        (pa.array([datetime.date(2026, 1, 31), datetime.date(2026, 2, 1)] * 11 + [None]), "2026-01-31"),
        (pa.array(["1.10", "2.00"] * 11 + [None]).cast(pa.decimal128(9, 2)), 1.1),
    ],
)
def test_a_request_names_a_category_as_the_table_has_it(tmp_path: Path, column: pa.Array, asked: Any) -> None:
    from twotower.retrieval.given import encode_given

    dataset = prepared(tmp_path, column, type="categorical")
    found = encode_given([dataset.schema.item[1]], {"f": asked}, "features")
    assert found["f"][0] == encoded(dataset)[0] > 0


def test_a_wide_profile_is_refused_before_training(tmp_path: Path) -> None:
    log_path = write_csv(tmp_path / "log.csv", HEADER, grid())
    items = pd.DataFrame({"id": [f"i{n}" for n in range(2_000)], "f": [f"v{n}" for n in range(2_000)]})
    items.to_csv(tmp_path / "items.csv", index=False)
    config = files_config(
        tmp_path,
        log_path,
        data__source__items={"path": str(tmp_path / "items.csv"), "id": "id"},
        features__item=[{"name": "item_id", "type": "id"}, {"name": "f", "type": "categorical"}],
        features__query=[{"name": "taste", "type": "profile", "of": "f"}],
    )
    with pytest.raises(DataError, match="profile feature 'taste' is 2001 wide; at most 1024 is allowed"):
        prepare(parse_config(config.to_json()))
