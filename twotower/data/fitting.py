"""Feature declarations to fitted features: vocabularies, means, and the column types a dataset stores."""

from __future__ import annotations

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
    CategoricalFeature,
    FeatureSchema,
    FittedFeature,
    MultiHotFeature,
    NumericFeature,
    TextFeature,
    VectorFeature,
)


def fit_features(
    config: FeaturesConfig,
    items: pa.Table,
    users: pa.Table | None,
    num_users: int,
    num_items: int,
    num_catalogue_items: int,
) -> tuple[FeatureSchema, pa.Table, pa.Table | None]:
    """Fit all features on the catalogue and the user table.

    Returns:
        The schema, and both tables with their feature columns in stored form: numeric columns as int64 or
        float64, vectors as fixed-size lists of float32, categorical columns that are not numeric as text.

    Raises:
        DataError: a column is not there, has the wrong type, or a value that its feature can not take.
    """
    items = stored_columns("item", config.item, items)
    if users is not None:
        users = stored_columns("query", config.query, users)
    query = [_fit("query", spec, users) for spec in config.query]
    item = [_fit("item", spec, items) for spec in config.item]
    schema = FeatureSchema(
        query=query,
        item=item,
        num_users=num_users,
        num_items=num_items,
        num_catalogue_items=num_catalogue_items,
    )
    return schema, items, users


def as_categories(array: pa.Array) -> pa.StringArray:
    """Return the values of a categorical feature as text: integers and whole floats in decimal, nulls kept.

    Raises:
        DataError: the array holds neither text, numbers nor booleans.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        return as_categories(array.dictionary_decode())
    if pa.types.is_floating(kind):
        # An integer column with gaps often arrives as floats: 3.0 is the category 3.
        value = array.cast(pa.float64())
        value = pc.if_else(pc.is_nan(value).fill_null(True), None, value)
        whole = pc.and_(pc.equal(pc.floor(value), value), pc.less(pc.abs(value), 2.0**53))
        integers = pc.if_else(whole, value, None).cast(pa.int64()).cast(pa.string())
        return pc.coalesce(integers, value.cast(pa.string()))
    if not (
        _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):
        raise DataError(f"a categorical feature holds text, numbers or booleans, not {kind}")
    return array.cast(pa.string())


def as_lists(array: pa.Array, separator: str) -> pa.Array:
    """Return the values of a multi_hot feature as lists of text: text is split, blank pieces are dropped.

    Raises:
        DataError: the array holds neither text nor lists of text or numbers.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        return as_lists(array.dictionary_decode(), separator)
    if pa.types.is_null(kind):
        return array.cast(pa.list_(pa.string()))
    if _is_text(kind):
        return cells.split_lists(array.cast(pa.string()), separator)
    if not _is_list(kind):
        raise DataError(f"a multi_hot feature holds separated text or lists, not {kind}")
    pieces = array
    values = pc.utf8_trim_whitespace(as_categories(pc.list_flatten(pieces)))
    parents = np.asarray(pc.list_parent_indices(pieces)).astype(np.int64)
    keep = np.asarray(pc.greater(pc.utf8_length(values), 0).fill_null(False))
    counts = np.bincount(parents[keep], minlength=len(array))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), values.filter(pa.array(keep)))
    missing = np.asarray(array.is_null())
    return pc.if_else(pa.array(missing), pa.scalar(None, lists.type), lists)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


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
            column = _checked(side, used_by[0], lambda c=column: as_categories(c))
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
    kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.float64())
    if _is_text(kind):
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
        text = pc.if_else(
            pc.is_in(text, value_set=pa.array(["", "NA", "NaN", "nan", "null", "None"])), None, text
        )
        for target in (pa.int64(), pa.float64()):
            try:
                return _finite(side, name, text.cast(target))
            except pa.ArrowInvalid:
                continue
        readable = pc.match_substring_regex(text, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$").fill_null(True)
        broken = np.flatnonzero(~np.asarray(readable))
        example = text[int(broken[0])].as_py() if len(broken) else text.drop_null()[0].as_py()
        raise DataError(
            f"features.{side} column {name!r} is numeric, but {max(1, len(broken)):,} of {len(text):,} "
            "values are "
            f"no numbers, such as {example!r}; correct them or leave them empty"
        )
    if pa.types.is_boolean(kind):
        return column.cast(pa.int8()).cast(pa.int64())
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _finite(side, name, column.cast(pa.float64()))
    raise DataError(f"features.{side} column {name!r} is numeric, but has type {kind}; it must hold numbers")


def _finite(side: str, name: str, column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column).fill_null(True), None, column)
        infinite = int(pc.sum(pc.is_inf(column)).as_py() or 0)
        if infinite:
            raise DataError(
                f"features.{side} column {name!r} holds {infinite:,} infinite values; leave them empty"
            )
    return column


def _as_vector(side: str, name: str, column: pa.Array, width: int) -> pa.Array:
    kind = column.type
    target = pa.list_(pa.float32(), width)
    if pa.types.is_null(kind):
        return column.cast(target)
    if _is_text(kind):  # CSV: "[0.1, 0.2]", "0.1 0.2" and the like
        column = cells.split_numbers(column.cast(pa.string()))
        kind = column.type
    if not _is_list(kind):
        raise DataError(
            f"features.{side} column {name!r} is a vector, but has type {kind}; it must hold lists of numbers"
        )
    lengths = np.asarray(pc.list_value_length(column).fill_null(width))
    wrong = np.flatnonzero(lengths != width)
    if len(wrong):
        raise DataError(
            f"features.{side} column {name!r} is declared with dim {width}, but {len(wrong):,} of "
            f"{len(lengths):,} "
            f"vectors have another width, such as {int(lengths[wrong[0]])} in row {int(wrong[0]) + 1}"
        )
    try:
        flat = pc.list_flatten(column).cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"features.{side} column {name!r} is a vector, but holds no numbers: {error}"
        ) from None
    if not bool(np.isfinite(np.asarray(flat.fill_null(np.nan))).all()):
        raise DataError(f"features.{side} column {name!r} holds vectors with missing or infinite elements")
    missing = np.asarray(column.is_null())
    values = np.zeros((len(column), width), dtype=np.float32)
    values[~missing] = np.asarray(flat).reshape(-1, width)
    full = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
    return pc.if_else(pa.array(missing), pa.scalar(None, full.type), full) if missing.any() else full


def _fit(side: str, spec: Any, table: pa.Table | None) -> FittedFeature:
    if not hasattr(spec, "source_column"):
        return FittedFeature(spec=spec)
    if table is None:
        raise _absent(side, spec, None)
    column = _column(table, spec.source_column)
    if isinstance(spec, CategoricalFeature):
        texts = _checked(side, spec, lambda: as_categories(column))
        return FittedFeature(spec=spec, values=_frequent(texts, spec.max_values))
    if isinstance(spec, MultiHotFeature):
        if _is_text(column.type):
            _check_separator(side, spec, column)
        lists = _checked(side, spec, lambda: as_lists(column, spec.separator))
        return FittedFeature(spec=spec, values=_frequent(pc.list_flatten(lists), spec.max_values))
    if isinstance(spec, NumericFeature):
        mean, std = _moments(side, spec, np.asarray(column.drop_null()).astype(np.float64))
        return FittedFeature(spec=spec, mean=mean, std=std)
    if isinstance(spec, TextFeature) and not _is_text(column.type):
        _checked(side, spec, lambda: as_categories(column))
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


def _moments(side: str, spec: NumericFeature, values: npt.NDArray[np.float64]) -> tuple[float, float]:
    if spec.transform == "log1p":
        if (values <= -1).any():
            raise DataError(
                f"features.{side} {spec.name!r} has transform log1p, which needs values above -1, but column "
                f"{spec.source_column!r} holds {float(values.min())}; use transform: none"
            )
        values = np.log1p(values)
    if not len(values):
        return 0.0, 1.0
    std = float(values.std())
    return float(values.mean()), std if std > 0 else 1.0
