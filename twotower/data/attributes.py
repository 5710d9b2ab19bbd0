"""Columns of the item table as filterable attributes: the types that filters know."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.config import AttributeConfig
from twotower.data.times import to_micros
from twotower.errors import ConfigError, DataError
from twotower.features.columns import as_lists
from twotower.values import as_categories, as_numbers, as_text, examples, is_list, is_text, plain

TIME = pa.timestamp("us", "UTC")
_TYPES = {
    "text": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "time": TIME,
}


def attribute_columns(attributes: Mapping[str, AttributeConfig]) -> dict[str, str]:
    """Return the column of the item table that each attribute is read from."""
    return {name: attribute.column or name for name, attribute in attributes.items()}


def attribute_table(items: pa.Table, attributes: Mapping[str, AttributeConfig]) -> pa.Table:
    """Return the attributes of items, one column each, in the order of the items.

    Columns are string, list<string> (of lists, and of text with a separator), int64, double, bool or
    timestamp[us, UTC]. NaN and infinities are missing values; times without a zone are UTC.

    Args:
        items: of the catalogue, with their source columns.
        attributes: declared ones, by name.

    Raises:
        ConfigError: an attribute's column is not there, or holds what the attribute's type can not.
    """
    columns = {}
    for name, column in attribute_columns(attributes).items():
        where = f"index.attributes.{name}"
        if column not in items.column_names:
            raise ConfigError(
                f"{where}: the item table has no column {column!r}; its columns are "
                f"{', '.join(items.column_names)}"
            )
        values = plain(items.column(column))
        try:
            columns[name] = _typed(values, attributes[name])
        except (DataError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            kind = attributes[name].type
            raise ConfigError(
                f"{where}: column {column!r} of type {values.type} can not be "
                f"{'filtered by' if kind == 'auto' else f'read as {kind}'} ({error}); correct its values or "
                "declare a type that they have"
            ) from None
    return pa.table(columns)


def _typed(values: pa.Array, attribute: AttributeConfig) -> pa.Array:
    kind = values.type
    if is_list(kind):
        if attribute.type not in ("auto", "text") or not _is_name(kind.value_type):
            raise DataError("lists must be of text or integers, which are compared as text")
        return as_lists(values, "")
    if attribute.separator is not None:
        return as_lists(as_text(values), attribute.separator)
    target = _own_type(kind) if attribute.type == "auto" else _TYPES[attribute.type]
    if target == pa.string():
        return as_categories(values)
    if target == TIME:
        return _times(values)
    if target == pa.float64():
        return _numbers(values)
    if is_text(kind):
        values = pc.utf8_trim_whitespace(as_categories(values))
    return values.cast(target)


def _numbers(values: pa.Array) -> pa.Array:
    found = as_numbers(values)
    if found is None:
        raise DataError("these are no numbers")
    broken = np.flatnonzero(found.unreadable)
    if len(broken) and is_text(values.type):
        raise DataError(f"{len(broken):,} values are no numbers, such as {values[int(broken[0])].as_py()!r}")
    return pa.array(found.values, mask=found.missing | found.unreadable)


def _own_type(kind: pa.DataType) -> pa.DataType:
    if is_text(kind) or pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_boolean(kind):
        return pa.bool_()
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return TIME
    raise DataError("no filter reads this type")


def _times(values: pa.Array) -> pa.Array:
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        raise DataError("numbers are no times; declare them as integer or number")
    micros, missing = to_micros(values, None, "UTC", "")
    unreadable = np.flatnonzero(missing & ~np.asarray(values.is_null()))
    if len(unreadable):
        example = examples(values, unreadable[:1])[0]
        raise DataError(f"{len(unreadable)} values are no times, such as {example!r}")
    return pa.array(micros, pa.int64(), mask=missing).cast(TIME)


def _is_name(kind: pa.DataType) -> bool:
    return is_text(kind) or bool(pa.types.is_integer(kind) or pa.types.is_null(kind))
