"""Ids as the source has them to dense rows, in first-appearance order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.cells import refuse_long
from twotower.data.chunks import BoolArray
from twotower.errors import DataError
from twotower.ids import CONTROL, HAS_CONTROL, MAX_ID_LENGTH, TOO_LONG

_WHOLE_FLOAT = r"^[+-]?\d+\.0*$"


class IdColumn:
    """A column of ids: every distinct value once, and where it is.

    Ids are text, or integers that become decimal text. A number with a decimal point such as 42.0 is an
    integer that went through a float column on its way, and could equal several ids: it is refused.
    """

    def __init__(self, array: pa.Array, side: str) -> None:
        """Take ids as text, integers or floats.

        Raises:
            DataError: the column has another type.
        """
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        kind = array.type
        textual = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        self._floats = pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        if not (textual or self._floats or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise DataError(f"the {side} id column has type {kind}; ids are text or integers")
        self.array = array
        self._a = f"an {side}" if side == "item" else f"a {side}"
        if pa.types.is_null(kind):
            array = array.cast(pa.string())
        encoded = array.dictionary_encode()
        self.codes: npt.NDArray[np.int64] = np.asarray(encoded.indices.fill_null(-1)).astype(np.int64)
        self.values: pa.StringArray = encoded.dictionary.cast(pa.string())

    def problems(self) -> Iterator[tuple[BoolArray, str]]:
        """Yield [n] bool masks of bad rows, each with its reason."""
        empty = np.append(np.asarray(pc.equal(pc.utf8_trim_whitespace(self.values), "")), True)
        yield empty[self.codes], f"without {self._a} id"
        for broken, reason in _not_ids(self.values):
            yield np.append(broken, False)[self.codes], f"with {self._a} id of {reason}"
        if self._floats:
            broken = np.ones(len(self.values), dtype=np.bool_)
        else:
            broken = np.asarray(pc.match_substring_regex(self.values, _WHOLE_FLOAT))
        yield (
            np.append(broken, False)[self.codes],
            f"with {self._a} id that is a float, not text or an integer",
        )


def _not_ids(values: pa.StringArray) -> Iterator[tuple[BoolArray, str]]:
    """Yield masks of texts that are no ids by the rule of ``twotower.ids``, each with its reason."""
    yield np.asarray(pc.match_substring_regex(values, CONTROL)), HAS_CONTROL
    yield np.asarray(pc.greater(pc.utf8_length(values), MAX_ID_LENGTH)), TOO_LONG


class Interner:
    """Gives each new id the next row."""

    def __init__(self) -> None:
        """Start empty."""
        self._rows: dict[str, int] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, ids: list[str]) -> None:
        """Give each id of ``ids`` that is new the next row, in order."""
        rows = self._rows
        before = len(rows)
        for text in ids:
            rows.setdefault(text, len(rows))
        if len(rows) > before:
            self._grow(sum(len(text.encode()) for text in ids))

    def intern(self, column: IdColumn, keep: BoolArray) -> npt.NDArray[np.int32]:
        """Return the rows of the ids where ``keep`` [n] is true, int32, new ids in first-appearance order.

        Raises:
            DataError: all ids together are more text than a vocabulary can hold.
        """
        codes, values = column.codes, column.values
        if not keep.all():
            codes = codes[keep]
            used, first = np.unique(codes, return_index=True)
            used = used[np.argsort(first)]
        else:
            used = np.arange(len(values))
        rows = self._rows
        of_code = np.full(len(values) + 1, -1, dtype=np.int32)
        before = len(rows)
        texts = values.take(pa.array(used))
        of_code[used] = [rows.setdefault(text, len(rows)) for text in texts.to_pylist()]
        new = of_code[used] >= before
        self._grow(int(pc.sum(pc.binary_length(texts.filter(pa.array(new)))).as_py() or 0))
        return of_code[codes]

    def _grow(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        refuse_long(self._bytes, f"a column of {len(self._rows):,} different ids")

    def ids(self) -> pa.StringArray:
        """Return the ids in row order."""
        return pa.array(self._rows.keys(), type=pa.string(), size=len(self._rows))
