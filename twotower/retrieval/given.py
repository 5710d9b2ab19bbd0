"""Values that come with a query, of its user or of an item of its history, to static columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.errors import DataError, NotAllowedError, shown
from twotower.model.features import Columns, encode_columns
from twotower.schema import (
    CategoricalFeature,
    FittedFeature,
    HistoryFeature,
    IdFeature,
    MultiHotFeature,
    NumericFeature,
    ProfileFeature,
    VectorFeature,
)
from twotower.values import category_of


def static_features(features: Sequence[FittedFeature]) -> list[FittedFeature]:
    """Return the features that are read from a column of a table."""
    return [f for f in features if not isinstance(f.spec, (IdFeature, HistoryFeature, ProfileFeature))]


def column_of(feature: FittedFeature) -> str:
    """Return the column that a static feature is read from."""
    spec = feature.spec
    assert not isinstance(spec, (IdFeature, HistoryFeature, ProfileFeature))
    return spec.source_column


def encode_given(features: Sequence[FittedFeature], values: dict[str, Any], where: str) -> Columns:
    """Return the static columns [1, ...] of one user or item; a column without a value is missing.

    Args:
        features: static ones.
        values: by column.
        where: they stand in the query, for errors.

    Raises:
        NotAllowedError: a value can not be read as its feature's type.
    """
    columns: Columns = {}
    for feature in features:
        name = column_of(feature)
        value = _checked(feature, values.get(name), where)
        try:
            # The name of the spare column can not be that of a feature: it makes the table one row long.
            table = pa.table({name: pa.array([value]), "": pa.nulls(1)})
            columns.update(encode_columns([feature], table))
        except DataError as error:
            raise NotAllowedError(f"{where}: {error}", _allowed(feature)) from None
    return columns


def _checked(feature: FittedFeature, value: Any, where: str) -> Any:
    """Return a value in a form that Arrow reads as the feature's type.

    Raises:
        NotAllowedError: it is of another type.
    """
    spec = feature.spec
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(spec, NumericFeature):
        if number:
            return float(value)
    elif isinstance(spec, VectorFeature):
        if isinstance(value, list) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in value
        ):
            return [float(v) for v in value]
    elif isinstance(spec, MultiHotFeature) and isinstance(value, list):
        names = [category_of(v) if isinstance(v, (str, int, float)) else None for v in value]
        # A fraction is a value where the column has such, and a slip elsewhere.
        known = (n for n, v in zip(names, value, strict=True) if isinstance(v, float) and not v.is_integer())
        if None not in names and all(name in (feature.values or []) for name in known):
            return names
    elif isinstance(value, str):
        return value
    elif isinstance(spec, (CategoricalFeature, MultiHotFeature)) and isinstance(value, (int, float)):
        return category_of(value)
    raise NotAllowedError(f"{where}: {column_of(feature)!r} has the value {shown(value)}", _allowed(feature))


def _allowed(feature: FittedFeature) -> str:
    spec = feature.spec
    if isinstance(spec, NumericFeature):
        return "a number" + (" above -1" if spec.transform == "log1p" else "") + ", or null"
    if isinstance(spec, VectorFeature):
        return f"a list of {spec.dim} numbers, or null"
    if isinstance(spec, MultiHotFeature):
        return f"a list of texts, or one text separated by {spec.separator!r}, or null"
    return "a text or a number, or null" if isinstance(spec, CategoricalFeature) else "a text, or null"


def stacked(columns: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return columns [1, L] below each other, ids padded with -1 to the longest."""
    width = max(c.shape[1] for c in columns)
    out = np.full((len(columns), width), -1, columns[0].dtype)
    for i, column in enumerate(columns):
        out[i, : column.shape[1]] = column[0]
    return out
