"""What a value of a table or a request means, whatever type it arrives in: one text, one number.

Features are fitted, rows are encoded, requests are read and filters are compared by these functions, so
that 1, 1.0 and "1.0" are one category wherever they come from.

Shapes: n rows of a column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import DataError

BoolArray = npt.NDArray[np.bool_]

MAX_NUMBER = 1e24
"""Largest size of a number in a feature: no measurement is larger, and squares of more overflow."""
_EXACT = 2.0**53
"""Integers of this size and more are not all different as floats."""
_MISSING = ["", "NA", "NaN", "nan", "null", "None"]
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
# Text that spells a whole number as a float, or a boolean as Python and spreadsheets do.
_WHOLE = r"^(-?[1-9][0-9]*|0)\.0+$"
_WHOLE_PATTERN = re.compile(_WHOLE, re.ASCII)
_TRUTH = r"^(?i:true|false)$"


def plain(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column as one array without dictionary, run-end or view encoding."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        return plain(array.dictionary_decode())
    if pa.types.is_run_end_encoded(array.type):
        return plain(pc.run_end_decode(array))
    if pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        return array.cast(pa.string())
    return array


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type holds lists."""
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def is_number(kind: pa.DataType) -> bool:
    """Return whether a type holds numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def as_text(array: pa.Array | pa.ChunkedArray) -> pa.StringArray:
    """Return each value as text, null where it is missing (null or NaN).

    Text stays as it is. Whole numbers are integers, whatever type holds them; other numbers have the fewest
    digits that tell them apart in their own precision. Booleans are true and false, dates ISO 8601.

    Raises:
        DataError: the array holds neither text, numbers, booleans nor dates.
    """
    array = plain(array)
    kind = array.type
    if pa.types.is_string(kind):
        return array
    if pa.types.is_floating(kind):
        return _floats_as_text(array)
    if pa.types.is_decimal(kind):
        return _each_distinct(array, _decimal_text)
    if pa.types.is_date(kind):
        # The two types of dates have one text.
        return array.cast(pa.date32(), safe=False).cast(pa.string())
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return array.cast(pa.string())
    raise DataError(f"a categorical feature holds text, numbers, booleans or dates, not {kind}")


def as_categories(array: pa.Array | pa.ChunkedArray) -> pa.StringArray:
    """Return each value as the name of a category.

    That is ``as_text``, where text that spells a whole number or a boolean is the name of that: "3.0" in a
    CSV file and 3 in a request are the category 3.

    Raises:
        DataError: as ``as_text``.
    """
    text = as_text(array)
    spelled = pc.match_substring_regex(text, _WHOLE)
    if pc.any(spelled).as_py():
        text = pc.replace_substring_regex(text, _WHOLE, r"\1")
    truth = pc.match_substring_regex(text, _TRUTH)
    if pc.any(truth).as_py():
        text = pc.if_else(truth, pc.utf8_lower(text), text)
    return text


def category_of(value: str | float | bool) -> str | None:
    """Return the name of the category of one plain value, as ``as_categories`` of a column; None for NaN."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        found: str | None = as_text(pa.array([value]))[0].as_py()
        return found
    if value.endswith("0") and (match := _WHOLE_PATTERN.match(value)):
        return match[1]
    return value.lower() if value.lower() in ("true", "false") else value


def _floats_as_text(array: pa.Array) -> pa.StringArray:
    value = array.cast(pa.float64())
    missing = pc.is_nan(value).fill_null(True)
    whole = pc.and_(pc.equal(pc.floor(value), value), pc.less(pc.abs(value), _EXACT)).fill_null(False)
    integers = pc.if_else(whole, value, None).cast(pa.int64()).cast(pa.string())
    other = pc.if_else(pc.or_(missing, whole), pa.scalar(None, array.type), array)
    if pa.types.is_float16(array.type):
        shortest = _each_distinct(other, lambda v: category_of(float(str(np.float16(v)))))
    else:
        shortest = other.cast(pa.string())
    large = pc.and_(pc.greater_equal(pc.abs(value), _EXACT), pc.less(pc.abs(value), 2.0**64)).fill_null(False)
    if pc.any(large).as_py():
        # Integers of other types have all digits too.
        spelled = _each_distinct(pc.if_else(large, value, None), lambda v: str(int(v)))
        shortest = pc.if_else(large, spelled, shortest)
    return pc.coalesce(integers, shortest)


def _decimal_text(value: Decimal) -> str | None:
    if value == value.to_integral_value():
        return str(int(value))
    number = float(value)
    # As a float of the same digits has it, and with all digits where no float has them.
    return category_of(number) if Decimal(repr(number)) == value else format(value.normalize(), "f")


def _each_distinct(array: pa.Array, convert: Callable[[Any], str | None]) -> pa.StringArray:
    """Return a conversion of each value, made once for each distinct one; nulls stay."""
    if pa.types.is_float16(array.type):  # which can not be encoded
        array = array.cast(pa.float32())
    encoded = array.dictionary_encode()
    texts = pa.array([None if v is None else convert(v) for v in encoded.dictionary.to_pylist()], pa.string())
    return texts.take(encoded.indices)


@dataclass(frozen=True)
class Numbers:
    """A column as numbers."""

    values: npt.NDArray[np.float64]
    """[n], NaN where there is none."""
    missing: BoolArray
    """[n] null, NaN, blank, or one of the usual words for that."""
    unreadable: BoolArray
    """[n] no number, or not a finite one."""


def as_numbers(array: pa.Array | pa.ChunkedArray) -> Numbers | None:
    """Return a column of numbers, booleans (0 and 1), or text that holds numbers; None for other types."""
    array = plain(array)
    kind = array.type
    if pa.types.is_null(kind):
        empty = np.full(len(array), np.nan)
        return Numbers(empty, np.isnan(empty), np.zeros(len(array), np.bool_))
    if is_text(kind):
        text = pc.utf8_trim_whitespace(array)
        missing = np.asarray(pc.is_in(text, value_set=pa.array([None, *_MISSING], pa.string())))
        readable = pc.and_(pc.match_substring_regex(text, _NUMBER), pa.array(~missing)).fill_null(False)
        # Arrow reads no leading plus sign.
        array = pc.if_else(readable, pc.utf8_ltrim(text, "+"), None).cast(pa.float64())
        values = np.asarray(array.fill_null(np.nan))
        unreadable = ~missing & ~np.isfinite(values)
        return Numbers(np.where(unreadable, np.nan, values), missing, unreadable)
    if pa.types.is_boolean(kind):
        array = array.cast(pa.int8())
    elif not is_number(kind):
        return None
    values = np.asarray(array.cast(pa.float64(), safe=False).fill_null(np.nan))
    infinite = np.isinf(values)
    return Numbers(np.where(infinite, np.nan, values), np.isnan(values), infinite)


def examples(array: pa.Array, places: npt.ArrayLike) -> list[Any]:
    """Return some values of a column for a message; what Python has no value for is shown in other words."""
    found = array.take(pa.array(np.asarray(places, dtype=np.int64)))
    try:
        return list(found.to_pylist())
    except (ValueError, OverflowError):
        # A time outside of Python's years, or of nanoseconds.
        return [_shown(value) for value in found]


def _shown(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return f"{value.value} ({value.type})"


def joined(names: Sequence[str], word: str = "or") -> str:
    """Return names as a sentence lists them."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last
