"""Feature declarations to fitted features: vocabularies, means, and the column types a dataset stores."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower import progress
from twotower.config import FeaturesConfig
from twotower.data import cells
from twotower.errors import DataError
from twotower.schema import (
    MAX_PROFILE_WIDTH,
    CategoricalFeature,
    FeatureSchema,
    FittedFeature,
    HistoryFeature,
    MultiHotFeature,
    NumericFeature,
    ProfileFeature,
    TextFeature,
    VectorFeature,
)
from twotower.values import (
    MAX_NUMBER,
    as_categories,
    as_numbers,
    as_text,
    examples,
    is_list,
    is_text,
    plain,
)

MAX_VECTOR_ELEMENT = 1e15
"""Larger elements of a vector leave nothing of a tower's other inputs, or overflow its 32-bit floats."""


def fit_features(
    config: FeaturesConfig,
    items: pa.Table,
    users: pa.Table | None,
    num_users: int,
    num_items: int,
    num_catalogue_items: int,
    has_times: bool,
) -> tuple[FeatureSchema, pa.Table, pa.Table | None]:
    """Fit all features on the catalogue and the user table.

    Returns:
        The schema, and both tables with their feature columns in stored form: numeric columns as int64 or
        float64, vectors as fixed-size lists of float32, categorical columns that are not numeric as text.

    Raises:
        DataError: a column is not there, has the wrong type, or a value that its feature can not take.
    """
    raw = {"item": items, "query": users}
    items = stored_columns("item", config.item, items)
    if users is not None:
        users = stored_columns("query", config.query, users)
    specs = [s.fitted(has_times) if isinstance(s, HistoryFeature) else s for s in config.query]
    query = [_fit("query", spec, users, _precision(spec, raw["query"])) for spec in specs]
    item = [_fit("item", spec, items, _precision(spec, raw["item"])) for spec in config.item]
    check_profiles(query, item)
    schema = FeatureSchema(
        query=query,
        item=item,
        num_users=num_users,
        num_items=num_items,
        num_catalogue_items=num_catalogue_items,
    )
    return schema, items, users


def check_profiles(query: Sequence[FittedFeature], item: Sequence[FittedFeature]) -> None:
    """Check the width of profiles.

    Raises:
        DataError: the profile of a vocabulary wider than ``MAX_PROFILE_WIDTH``.
    """
    widths = {f.spec.name: f.profile_width for f in item}
    for feature in query:
        spec = feature.spec
        if isinstance(spec, ProfileFeature) and widths[spec.of] > MAX_PROFILE_WIDTH:
            raise DataError(
                f"profile feature {spec.name!r} is {widths[spec.of]} wide; at most {MAX_PROFILE_WIDTH} is "
                f"allowed. Lower max_values of {spec.of!r} or take it out"
            )


def as_lists(array: pa.Array, separator: str) -> pa.Array:
    """Return the values of a multi_hot feature as lists of text: text is split, blank pieces are dropped.

    Raises:
        DataError: the array holds neither text nor lists of text or numbers.
    """
    array = plain(array)
    kind = array.type
    if pa.types.is_null(kind):
        return array.cast(pa.list_(pa.string()))
    if is_text(kind):
        pieces = cells.split_lists(array, separator)
    elif is_list(kind):
        pieces = array
    else:
        raise DataError(f"a multi_hot feature holds separated text or lists, not {kind}")
    flat, parents = cells.flattened(pieces)
    values = as_categories(pc.utf8_trim_whitespace(as_text(flat)))
    keep = np.asarray(pc.greater(pc.utf8_length(values), 0).fill_null(False))
    counts = np.bincount(parents[keep], minlength=len(array))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), values.filter(pa.array(keep)))
    missing = np.asarray(array.is_null())
    return pc.if_else(pa.array(missing), pa.scalar(None, lists.type), lists)


def _column(table: pa.Table, name: str) -> pa.Array:
    return plain(table.column(name))


def stored_columns(side: str, specs: Sequence[Any], table: pa.Table) -> pa.Table:
    """Return a table with its feature columns in stored form, as ``fit_features`` says.

    Args:
        side: item or query.
        specs: features of that side.
        table: of items or users.

    Raises:
        DataError: a column is not there, has the wrong type, or a value that its feature can not take.
    """
    by_column: dict[str, list[Any]] = {}
    for spec in specs:
        if hasattr(spec, "source_column"):
            by_column.setdefault(spec.source_column, []).append(spec)
    for name, used_by in by_column.items():
        if name not in table.column_names:
            raise _absent(side, used_by[0], table)
        column, index = _column(table, name), table.column_names.index(name)
        if any(isinstance(s, NumericFeature) for s in used_by):
            column = _as_number(side, name, column)
        elif any(isinstance(s, VectorFeature) for s in used_by):
            widths = sorted({s.dim for s in used_by if isinstance(s, VectorFeature)})
            for width in widths:
                column = _as_vector(side, name, column, width)
        elif all(isinstance(s, (CategoricalFeature, TextFeature)) for s in used_by):
            column = _checked(side, used_by[0], lambda c=column: as_text(c))
        table = table.set_column(index, name, column)
    return table


def _absent(side: str, spec: Any, table: pa.Table | None) -> DataError:
    what = f"features.{side} {spec.name!r} needs column {spec.source_column!r}"
    where = "item" if side == "item" else "user"
    if table is None:
        return DataError(
            f"{what} of the user table, and the source has no user table; give one or remove the feature"
        )
    there = ", ".join(table.column_names)
    return DataError(f"{what}, and the {where} table does not have it; its columns are {there}")


def _checked(side: str, spec: Any, convert: Any) -> Any:
    try:
        return convert()
    except DataError as error:
        raise DataError(f"features.{side} {spec.name!r}, column {spec.source_column!r}: {error}") from None


def _as_number(side: str, name: str, column: pa.Array) -> pa.Array:
    """Return a column as int64 where all its values are such integers, else as float64; nulls stay."""
    what = f"features.{side} column {name!r}"
    found = as_numbers(column)
    if found is None:
        raise DataError(f"{what} is numeric, but has type {column.type}; it must hold numbers")
    if found.unreadable.any():
        broken = np.flatnonzero(found.unreadable)
        if not is_text(column.type):
            raise DataError(f"{what} holds {len(broken):,} infinite values; leave them empty")
        raise DataError(
            f"{what} is numeric, but {len(broken):,} of {len(column):,} values are no numbers, such as "
            f"{column[int(broken[0])].as_py()!r}; {_number_advice(column, broken)}"
        )
    large = np.flatnonzero(np.abs(np.nan_to_num(found.values)) > MAX_NUMBER)
    if len(large):
        raise DataError(
            f"{what} holds {len(large):,} values of a size above {MAX_NUMBER:g}, such as "
            f"{examples(column, large[:1])[0]} in row {int(large[0]) + 1}; correct them or leave them empty"
        )
    if is_text(column.type):
        column = pc.if_else(pa.array(found.missing), None, pc.utf8_trim_whitespace(column))
    elif pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if is_text(column.type) or pa.types.is_integer(column.type):
        with contextlib.suppress(pa.ArrowInvalid):  # fractions, or integers that int64 has not
            return column.cast(pa.int64())
    return pa.array(found.values, mask=found.missing)


def _number_advice(column: pa.Array, broken: npt.NDArray[np.int64]) -> str:
    if is_text(column.type):
        texts = column.take(pa.array(broken))
        if pc.all(pc.match_substring_regex(texts, r"^\s*[+-]?\d+,\d+\s*$")).as_py():
            return "write a point where they have a comma"
    return "correct them or leave them empty"


def _as_vector(side: str, name: str, column: pa.Array, width: int) -> pa.Array:
    kind = column.type
    target = pa.list_(pa.float32(), width)
    if pa.types.is_null(kind):
        return column.cast(target)
    if is_text(kind):  # CSV: "[0.1, 0.2]", "0.1 0.2" and the like
        column = cells.split_numbers(column)
        kind = column.type
    if not is_list(kind):
        raise DataError(
            f"features.{side} column {name!r} is a vector, but has type {kind}; it must hold lists of numbers"
        )
    flat, parents = cells.flattened(column)
    missing = np.asarray(column.is_null())
    lengths = np.where(missing, width, np.bincount(parents, minlength=len(column)))
    wrong = np.flatnonzero(lengths != width)
    if len(wrong):
        raise DataError(
            f"features.{side} column {name!r} is declared with dim {width}, but {len(wrong):,} of "
            f"{len(lengths):,} "
            f"vectors have another width, such as {int(lengths[wrong[0]])} in row {int(wrong[0]) + 1}"
        )
    try:
        flat = plain(flat).cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"features.{side} column {name!r} is a vector, but holds no numbers: {error}"
        ) from None
    if not bool(np.isfinite(np.asarray(flat.fill_null(np.nan))).all()):
        raise DataError(f"features.{side} column {name!r} holds vectors with missing or infinite elements")
    large = np.asarray(flat)[np.abs(np.asarray(flat)) > MAX_VECTOR_ELEMENT]
    if len(large):
        raise DataError(
            f"features.{side} column {name!r} holds vectors with {large[0]:g}; {MAX_VECTOR_ELEMENT:g} is the "
            "largest, so correct or scale the column"
        )
    values = np.zeros((len(column), width), dtype=np.float32)
    values[~missing] = np.asarray(flat).reshape(-1, width)
    full = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
    return pc.if_else(pa.array(missing), pa.scalar(None, full.type), full) if missing.any() else full


def _fit(side: str, spec: Any, table: pa.Table | None, precision: float) -> FittedFeature:
    if not hasattr(spec, "source_column"):
        return FittedFeature(spec=spec)
    if table is None:
        raise _absent(side, spec, None)
    column = _column(table, spec.source_column)
    if isinstance(spec, CategoricalFeature):
        texts = _checked(side, spec, lambda: as_categories(column))
        return FittedFeature(spec=spec, values=_frequent(texts, spec.max_values))
    if isinstance(spec, MultiHotFeature):
        if is_text(column.type):
            _check_separator(side, spec, column)
        lists = _checked(side, spec, lambda: as_lists(column, spec.separator))
        return FittedFeature(spec=spec, values=_frequent(pc.list_flatten(lists), spec.max_values))
    if isinstance(spec, NumericFeature):
        mean, std = _moments(side, spec, column.drop_null().to_numpy().astype(np.float64), precision)
        return FittedFeature(spec=spec, mean=mean, std=std)
    if isinstance(spec, TextFeature):
        _checked(side, spec, lambda: as_text(column))
    return FittedFeature(spec=spec)


def _check_separator(side: str, spec: MultiHotFeature, column: pa.Array) -> None:
    """Refuse, or say, that the values of a column have another separator between them than is declared."""
    other = cells.other_separator(column, spec.separator)
    if other is None:
        return
    what = (
        f"features.{side} {spec.name!r}: {other.cells:,} cells of column {spec.source_column!r} hold "
        f"{other.separator!r} and not the separator {spec.separator!r}, such as {other.example!r}"
    )
    if other.sure:
        raise DataError(
            f"{what}; set the feature's separator to the one in the file, or write one in all cells"
        )
    progress.say(f"{what}; each is one value")


def _frequent(texts: pa.StringArray, limit: int) -> list[str]:
    """Return the most frequent values, by count and then by name."""
    counts = texts.drop_null().value_counts()
    pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    ranked = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return [value for value, _ in ranked[:limit] if value.strip()]


def _precision(spec: Any, table: pa.Table | None) -> float:
    """Return the relative error of the numbers of a column, by its type."""
    if table is not None and isinstance(spec, NumericFeature):
        kind = table.column(spec.source_column).type
        if pa.types.is_float16(kind) or pa.types.is_float32(kind):
            return float(np.finfo(kind.to_pandas_dtype()).eps)
    return float(np.finfo(np.float64).eps)


def transformed(spec: NumericFeature, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return numbers after a feature's transform.

    Raises:
        ValueError: the transform does not take one of them.
    """
    if spec.transform == "none":
        return values
    if (values <= -1).any():
        smallest = float(np.nanmin(values))
        raise ValueError(f"transform log1p needs numbers above -1, and the smallest is {smallest:g}")
    return np.log1p(values)


def _moments(
    side: str, spec: NumericFeature, values: npt.NDArray[np.float64], precision: float
) -> tuple[float, float]:
    """Return the mean and the standard deviation of numbers; a constant column deviates by 1."""
    try:
        values = transformed(spec, values)
    except ValueError as error:
        raise DataError(
            f"features.{side} {spec.name!r}, column {spec.source_column!r}: {error}; correct it, or use "
            "transform: none"
        ) from None
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low, 1.0
    std = float(values.std())
    # What differs by the rounding of its numbers alone is constant too.
    noise = 16 * precision * max(abs(low), abs(high))
    return float(values.mean()), std if std > noise else 1.0
