"""Ids as the source has them to dense rows, in first-appearance order.

Ids are text, or integers that become decimal text. pandas makes a column of integers with gaps one of floats
(17850.0), and writes such text: where all ids of a column are whole numbers they are taken as the integers
that they were, and elsewhere a float is a bad row. Nothing is guessed back from what a float can not hold:
integers of 2^53 and more, and text in scientific notation, as spreadsheets write long numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower import progress
from twotower.cells import refuse_long
from twotower.data.chunks import BoolArray
from twotower.errors import DataError
from twotower.ids import CONTROL, HAS_CONTROL, MAX_ID_LENGTH, TOO_LONG
from twotower.values import as_text, is_text, plain

_INTEGER = r"^[+-]?\d+$"
_WHOLE_FLOAT = r"^[+-]?\d+\.0*$"
_INTEGER_PART = r"^\+?(-?\d+)\.0*$"
_SCIENTIFIC = r"^[+-]?\d([.,]\d+)?[eE]\+\d{2,3}$"
_EXACT = {16: 2**11, 32: 2**24, 64: 2**53}
"""From here on not all integers are different, by bits of a float."""


class MixedIdsError(Exception):
    """A column that was read as floats of whole numbers has ids that are none: read it again, strictly."""


class IdForm:
    """How the ids of one column are written, over all of its chunks."""

    def __init__(self, side: str) -> None:
        """Start with nothing known; ``side`` says whose ids they are, for messages."""
        self.side = side
        self.strict = False
        """Whether floats of whole numbers are bad rows, because other ids are there."""
        self._float: str | None = None
        self._others = False

    def note(self, example: str | None, others: bool) -> None:
        """Remember what a chunk has: a float of a whole number, and ids that are no whole numbers.

        Raises:
            MixedIdsError: the column has both, and chunks of it were read as integers.
        """
        self._float = self._float or example
        self._others |= others
        if self._float is not None and self._others and not self.strict:
            self.strict = True
            raise MixedIdsError

    def tell(self) -> None:
        """Say that floats were taken as integers, where they were."""
        if self._float is not None and not self.strict:
            progress.say(
                f"the {self.side} ids are whole numbers written as floats, such as {self._float}: they are "
                f"taken as integers, such as {self._float.partition('.')[0]}"
            )


class IdColumn:
    """A column of ids: every distinct id once, and where it is."""

    def __init__(self, array: pa.Array, form: IdForm | str) -> None:
        """Take ids as text, integers, or floats of whole numbers; a column of one chunk needs its side only.

        Raises:
            DataError: the column has another type.
            MixedIdsError: as ``IdForm.note``; the form is strict then.
        """
        self.array = array
        form = IdForm(form) if isinstance(form, str) else form
        array = plain(array)
        kind = array.type
        if pa.types.is_decimal(kind) and kind.scale == 0:
            array = array.cast(pa.string())  # an exact integer
        elif pa.types.is_float16(kind):  # which can not be encoded
            array = array.cast(pa.float32())
        elif pa.types.is_null(kind):
            array = array.cast(pa.string())
        elif not (
            is_text(kind)
            or pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_decimal(kind)
        ):
            raise DataError(f"the {form.side} id column has type {kind}; ids are text or integers")
        encoded = array.dictionary_encode()
        # Without an id: the place behind the distinct values.
        self._places = np.asarray(encoded.indices.fill_null(len(encoded.dictionary))).astype(np.int64)
        texts = as_text(encoded.dictionary)
        self._problems = _problems(encoded.dictionary, texts, kind, form)
        if not form.strict:
            texts = pc.replace_substring_regex(texts, _INTEGER_PART, r"\1")
        # Two ways to write an id are one id.
        again = texts.dictionary_encode()
        self.values: pa.StringArray = again.dictionary
        of_place = np.append(np.asarray(again.indices.fill_null(-1)).astype(np.int64), -1)
        self.codes: npt.NDArray[np.int64] = of_place[self._places]

    def problems(self) -> Iterator[tuple[BoolArray, str]]:
        """Yield [n] bool masks of bad rows, each with its reason."""
        for mask, reason in self._problems:
            yield mask[self._places], reason


def _problems(
    distinct: pa.Array, texts: pa.StringArray, kind: pa.DataType, form: IdForm
) -> list[tuple[BoolArray, str]]:
    """Return which distinct values are no ids, each mask with an element more, for null."""
    a = f"an {form.side}" if form.side == "item" else f"a {form.side}"
    empty = np.asarray(pc.equal(pc.utf8_trim_whitespace(texts), "").fill_null(True))
    found = [(empty, True, f"without {a} id")]
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0):
        return [(np.append(mask, for_null), reason) for mask, for_null, reason in found]

    def matches(pattern: str) -> BoolArray:
        return np.asarray(pc.match_substring_regex(texts, pattern).fill_null(False))

    found += [(mask, False, f"with {a} id of {reason}") for mask, reason in _not_ids(texts)]
    if is_text(kind) or pa.types.is_null(kind):
        spelled, whole = matches(_WHOLE_FLOAT), matches(_INTEGER)
        scientific = matches(_SCIENTIFIC)
        large = np.zeros(len(texts), np.bool_)
        at = np.flatnonzero(spelled)
        numbers = [abs(int(t.partition(".")[0])) for t in texts.take(pa.array(at)).to_pylist()]
        large[at] = [number >= _EXACT[64] for number in numbers]
        others = ~(spelled | whole | scientific | empty)
        fraction = np.zeros(len(texts), np.bool_)
        found.append(
            (
                scientific,
                False,
                f"with {a} id in scientific notation, as spreadsheets write long numbers, where several ids "
                "have become one: export the column as text",
            )
        )
    else:
        value = np.asarray(distinct.cast(pa.float64()))
        # Decimals are exact.
        limit = math.inf if pa.types.is_decimal(kind) else _EXACT[kind.bit_width]
        fraction = ~empty & ~(np.floor(value) == value) | np.isinf(value)
        spelled = ~empty & ~fraction
        large = spelled & (np.abs(np.where(spelled, value, 0)) >= limit)
        others = fraction
    examples = texts.filter(pa.array(spelled & ~large))
    example = None
    if len(examples):
        example = examples[0].as_py() + ("" if is_text(kind) else ".0")
    form.note(example, bool(others.any()))
    found += [
        (fraction, False, f"with {a} id that is a fraction"),
        (
            large,
            False,
            f"with {a} id that is a float too large to tell integers apart: export the column as integers or "
            "text",
        ),
    ]
    if form.strict:
        found.append((spelled, False, f"with {a} id that is a float, not text or an integer"))
    return [(np.append(mask, for_null), reason) for mask, for_null, reason in found]


def as_id(value: Any) -> Any:
    """Return one id of a file of queries as ids of a column are read; what is no float stays as it is.

    Raises:
        DataError: it is a float, or spells one, that is no id.
    """
    if isinstance(value, float):
        if not value.is_integer() or abs(value) >= _EXACT[64]:
            raise DataError(f"{value!r} is no id; ids are text or integers")
        return int(value)
    if isinstance(value, str):
        if re.match(_SCIENTIFIC, value):
            raise DataError(f"{value!r} is no id: export the column as text")
        return re.sub(_INTEGER_PART, r"\1", value)
    return value


def _not_ids(values: pa.StringArray) -> Iterator[tuple[BoolArray, str]]:
    """Yield masks of texts that are no ids by the rule of ``twotower.ids``, each with its reason."""
    yield np.asarray(pc.match_substring_regex(values, CONTROL).fill_null(False)), HAS_CONTROL
    yield np.asarray(pc.greater(pc.utf8_length(values), MAX_ID_LENGTH).fill_null(False)), TOO_LONG


class Interner:
    """Gives each new id the next row."""

    def __init__(self) -> None:
        """Start empty."""
        self._rows: dict[str, int] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def shorten(self, num_rows: int) -> None:
        """Forget the ids of later rows."""
        for text in list(self._rows)[num_rows:]:
            del self._rows[text]
            self._bytes -= len(text.encode())

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
