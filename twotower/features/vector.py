"""The feature type ``vector``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from twotower.features.base import ColumnFeature, Learned, Side, feature_type, is_number

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

MAX_VECTOR_ELEMENT = 1e15
"""Larger elements of a vector leave nothing of a tower's other inputs, or overflow its 32-bit floats."""


@feature_type
class VectorFeature(ColumnFeature):
    """A precomputed vector of fixed width, taken as it is."""

    profiled: ClassVar[bool] = True
    store_rank: ClassVar[int] = 2

    type: Literal["vector"] = "vector"
    dim: Annotated[int, Field(ge=1)]
    """Width of the vector in the column."""

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return the width of the vector."""
        return self.dim

    def profile_width(self, learned: Learned) -> int:
        """Return the width of the vector."""
        return self.dim

    @classmethod
    def store(cls, side: Side, name: str, column: pa.Array, specs: Sequence[Any]) -> pa.Array:
        """Return the column as lists of float32 of one width."""
        for width in sorted({spec.dim for spec in specs}):
            column = _vectors(f"features.{side} column {name!r}", column, width)
        return column

    def encode(self, learned: Learned, column: pa.Array) -> npt.NDArray[Any]:
        """Return [n, dim] float32, zeros where it is missing."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        from twotower.cells import flattened

        out = np.zeros((len(column), self.dim), np.float32)
        if pa.types.is_null(column.type):
            return out
        valid = pc.is_valid(column).to_numpy(zero_copy_only=False)
        flat, parents = flattened(column)
        widths = np.unique(np.bincount(parents, minlength=len(column))[valid])
        if len(widths) and (widths != self.dim).any():
            raise ValueError(f"vectors have width {widths.tolist()}, declared is dim {self.dim}")
        elements = flat.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
        out[valid] = elements.reshape(-1, self.dim)
        if not np.isfinite(out).all():
            raise ValueError("vectors hold NaN or infinity; repair the column")
        if len(large := out[np.abs(out) > MAX_VECTOR_ELEMENT]):
            raise ValueError(
                f"vectors hold {large[0]:g}; {MAX_VECTOR_ELEMENT:g} is the largest; repair the column"
            )
        return out

    def parse(self, learned: Learned, value: Any) -> Any:
        """Return a list of floats."""
        if not isinstance(value, list) or not all(is_number(v) for v in value):
            raise ValueError(f"{value!r} is no list of numbers")
        return [float(v) for v in value]

    @property
    def allowed(self) -> str:
        """What a request may hold, for people."""
        return f"a list of {self.dim} numbers, or null"


def _vectors(what: str, column: pa.Array, width: int) -> pa.Array:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from twotower import cells
    from twotower.errors import DataError
    from twotower.values import is_list, is_text, plain

    kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.list_(pa.float32(), width))
    if is_text(kind):  # CSV: "[0.1, 0.2]", "0.1 0.2" and the like
        column = cells.split_numbers(column)
        kind = column.type
    if not is_list(kind):
        raise DataError(f"{what} is a vector, but has type {kind}; it must hold lists of numbers")
    flat, parents = cells.flattened(column)
    missing = np.asarray(column.is_null())
    lengths = np.where(missing, width, np.bincount(parents, minlength=len(column)))
    wrong = np.flatnonzero(lengths != width)
    if len(wrong):
        raise DataError(
            f"{what} is declared with dim {width}, but {len(wrong):,} of {len(lengths):,} "
            f"vectors have another width, such as {int(lengths[wrong[0]])} in row {int(wrong[0]) + 1}"
        )
    try:
        flat = plain(flat).cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{what} is a vector, but holds no numbers: {error}") from None
    if not bool(np.isfinite(np.asarray(flat.fill_null(np.nan))).all()):
        raise DataError(f"{what} holds vectors with missing or infinite elements")
    large = np.asarray(flat)[np.abs(np.asarray(flat)) > MAX_VECTOR_ELEMENT]
    if len(large):
        raise DataError(
            f"{what} holds vectors with {large[0]:g}; {MAX_VECTOR_ELEMENT:g} is the "
            "largest, so correct or scale the column"
        )
    values = np.zeros((len(column), width), dtype=np.float32)
    values[~missing] = np.asarray(flat).reshape(-1, width)
    full = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
    return pc.if_else(pa.array(missing), pa.scalar(None, full.type), full) if missing.any() else full
