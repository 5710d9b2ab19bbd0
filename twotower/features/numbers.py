"""Columns of numbers, read once for every type of feature that is made from them.

Shapes: n rows of a column.
"""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import DataError
from twotower.values import MAX_NUMBER, as_numbers, examples, is_text


def as_number_column(what: str, column: pa.Array) -> pa.Array:
    """Return a column as int64 where all its values are such integers, else as float64; nulls stay.

    Args:
        what: the column, for errors.
        column: numbers, booleans or text that holds numbers.

    Raises:
        DataError: a value is no finite number, or too large.
    """
    found = as_numbers(column)
    if found is None:
        raise DataError(f"{what} is numeric, but has type {column.type}; it must hold numbers")
    if found.unreadable.any():
        broken = np.flatnonzero(found.unreadable)
        if not is_text(column.type):
            raise DataError(f"{what} holds {len(broken):,} infinite values; leave them empty")
        raise DataError(
            f"{what} is numeric, but {len(broken):,} of {len(column):,} values are no numbers, such as "
            f"{column[int(broken[0])].as_py()!r}; {_advice(column, broken)}"
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


def _advice(column: pa.Array, broken: npt.NDArray[np.int64]) -> str:
    if is_text(column.type):
        texts = column.take(pa.array(broken))
        if pc.all(pc.match_substring_regex(texts, r"^\s*[+-]?\d+,\d+\s*$")).as_py():
            return "write a point where they have a comma"
    return "correct them or leave them empty"


def precision(kind: pa.DataType) -> float:
    """Return the relative error of the numbers of a column, by its type."""
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return float(np.finfo(kind.to_pandas_dtype()).eps)
    return float(np.finfo(np.float64).eps)


def finite_numbers(column: pa.Array) -> npt.NDArray[np.float64]:
    """Return a column of numbers as [n] float64, NaN where it is missing.

    Raises:
        ValueError: it holds something else.
    """
    found = as_numbers(column)
    if found is None:
        raise ValueError("it holds no numbers")
    if found.unreadable.any():
        raise ValueError(f"{examples(column, np.flatnonzero(found.unreadable)[:1])[0]!r} is no finite number")
    return found.values
