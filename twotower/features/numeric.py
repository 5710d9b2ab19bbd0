"""The feature type ``numeric``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from twotower.features.base import ColumnFeature, Fit, Learned, Side, feature_type, is_number

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

_MAX_SCALED = 1e15
"""Numbers further away than this leave nothing of a tower's other inputs, or overflow its 32-bit floats."""


@feature_type
class NumericFeature(ColumnFeature):
    """A number, standardised with its table's mean and deviation; a missing value is 0 with a flag of 1."""

    profiled: ClassVar[bool] = True
    labels_are: ClassVar[Literal["value", "values", "number"] | None] = "number"
    store_rank: ClassVar[int] = 3

    type: Literal["numeric"] = "numeric"
    transform: Literal["none", "log1p"] = "none"
    """Applied before standardising."""

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return 2: the value, and whether it is missing."""
        return 2

    def profile_width(self, learned: Learned) -> int:
        """Return 1: the value."""
        return 1

    @classmethod
    def store(cls, side: Side, name: str, column: pa.Array, specs: Sequence[Any]) -> pa.Array:
        """Return the column as int64 where all its values are such integers, else as float64; nulls stay."""
        from twotower.features.numbers import as_number_column

        return as_number_column(f"features.{side} column {name!r}", column)

    def fit(self, side: Side, column: pa.Array, given: pa.DataType) -> Fit:
        """Return the mean and the standard deviation; a constant column deviates by 1."""
        import numpy as np

        from twotower.errors import DataError
        from twotower.features.numbers import precision

        try:
            values = self._transformed(column.drop_null().to_numpy().astype(np.float64))
        except ValueError as error:
            raise DataError(
                f"features.{side} {self.name!r}, column {self.source_column!r}: {error}; correct it, or use "
                "transform: none"
            ) from None
        if not len(values):
            return {"mean": 0.0, "std": 1.0}
        low, high = float(values.min()), float(values.max())
        if low == high:
            return {"mean": low, "std": 1.0}
        std = float(values.std())
        # What differs by the rounding of its numbers alone is constant too.
        noise = 16 * precision(given) * max(abs(low), abs(high))
        return {"mean": float(values.mean()), "std": std if std > noise else 1.0}

    def encode(self, learned: Learned, column: pa.Array) -> npt.NDArray[Any]:
        """Return [n, 2] float32, the standardised value and a flag of 1 where it is missing."""
        import numpy as np

        from twotower.features.numbers import finite_numbers

        values = self._transformed(finite_numbers(column))
        missing = ~np.isfinite(values)
        with np.errstate(over="ignore"):
            scaled = np.where(missing, 0.0, (np.where(missing, 0.0, values) - learned.mean) / learned.std)
        if len(large := values[np.abs(scaled) > _MAX_SCALED]):
            raise ValueError(
                f"{large[0]} is over {_MAX_SCALED:g} standard deviations away; repair the column"
            )
        return np.stack([scaled, missing], axis=1).astype(np.float32)

    def _transformed(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return numbers after the transform.

        Raises:
            ValueError: the transform does not take one of them.
        """
        import numpy as np

        if self.transform == "none":
            return values
        if (values <= -1).any():
            smallest = float(np.nanmin(values))
            raise ValueError(f"transform log1p needs numbers above -1, and the smallest is {smallest:g}")
        return np.log1p(values)

    def labels(self, column: pa.Array) -> pa.Array:
        """Return the numbers, without the transform."""
        import pyarrow as pa

        from twotower.values import as_numbers

        found = as_numbers(column)
        if found is None:
            return pa.nulls(len(column), pa.float64())
        return pa.array(found.values, mask=found.missing | found.unreadable)

    def parse(self, learned: Learned, value: Any) -> Any:
        """Return a float."""
        if not is_number(value):
            raise ValueError(f"{value!r} is no number")
        return float(value)

    @property
    def allowed(self) -> str:
        """What a request may hold, for people."""
        return "a number" + (" above -1" if self.transform == "log1p" else "") + ", or null"
