"""What stands in a cell of a table, whichever kind of file it comes from: text, and lists as text.

There is one rule for each, for ids, titles, categories, texts, vectors, attributes and impressions. Text is
UTF-8, of a text or of a binary column; what is not is told to the caller, never made into a missing value.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import DataError
from twotower.values import is_text

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
MAX_BYTES = 2**31 - 1
"""Of the text of one column, which is addressed with 32 bits."""
_BRACKETED = r"(?s)^\s*(\[.*\]|\(.*\)|\{.*\})\s*$"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_SEPARATORS = ("|", ";", ",", "\t")
_SHOWN = 60


def joined(column: pa.Array | pa.ChunkedArray, what: str) -> pa.Array:
    """Return a column as one array, dictionaries decoded, text as string.

    Args:
        column: of any type.
        what: the column, for messages.

    Raises:
        DataError: it holds more text than one column can.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    refuse_long(sum(map(text_bytes, chunks)), what)
    chunks = [_simple(chunk) for chunk in chunks]
    if len(chunks) == 1:
        return chunks[0]
    return pa.concat_arrays(chunks) if chunks else _simple(pa.array([], column.type))


def text_bytes(array: pa.Array) -> int:
    """Return how many bytes of text a column holds; of the other types none."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        if not (is_text(kind.value_type) or is_bytes(kind.value_type)):
            return 0
        lengths = pc.binary_length(_wide(array.dictionary))
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if not (is_text(kind) or is_bytes(kind)):
        return 0
    return int(pc.sum(pc.binary_length(_wide(array)).cast(pa.int64())).as_py() or 0)


def refuse_long(num_bytes: int, what: str) -> None:
    """Refuse more text than one column can hold.

    Raises:
        DataError: with the size.
    """
    if num_bytes > MAX_BYTES:
        raise DataError(
            f"{what} holds {num_bytes:,} bytes of text and maybe more; one column can hold {MAX_BYTES:,}: "
            "leave the column out, shorten its values, or use shorter ids"
        )


def text_of(array: pa.Array) -> tuple[pa.Array, BoolArray | None]:
    """Return bytes and text as string, and [n] bool true where they are no UTF-8 (null there), or None.

    Other types are returned as they are.
    """
    array = _simple(array)
    if is_text(array.type):
        # Files may hold anything: Arrow does not look at what it reads from Parquet.
        try:
            array.validate(full=True)
            return array, None
        except pa.ArrowInvalid:
            array = array.cast(pa.binary())
    if not is_bytes(array.type):
        return array, None
    try:
        return array.cast(pa.string()), None
    except pa.ArrowInvalid:
        texts = [_utf8(value) for value in array.to_pylist()]
        broken = np.array([text is False for text in texts], np.bool_)
        return pa.array([text or (None if text is False else text) for text in texts], pa.string()), broken


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether a column holds bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def flattened(lists: pa.Array) -> tuple[pa.Array, IntArray]:
    """Return the elements of lists of any type, and [m] int64 the row of each; a null has none."""
    # Behind a null there may be elements, and views of lists lose theirs in a cast (Arrow 26).
    rows = np.flatnonzero(np.asarray(lists.is_valid()))
    lists = lists.take(pa.array(rows)) if lists.null_count else lists
    lengths = np.asarray(pc.list_value_length(lists)).astype(np.int64)
    return lists.flatten(), np.repeat(rows, lengths)


def split_lists(text: pa.Array, separator: str) -> pa.Array:
    """Return cells of text as lists of text, [n] list<string>: pieces are trimmed, blank ones dropped.

    A cell is a list as JSON, Python, numpy or Postgres write it (``["a", "b"]``, ``['a' 'b']``, ``[1 2]``,
    ``{a,b}``), or values with the separator between them.

    Args:
        text: string, nulls stay null.
        separator: of cells without brackets.

    Raises:
        DataError: a list in brackets can not be read, or numpy has left out values of it.
    """
    bracketed = np.asarray(pc.match_substring_regex(text, _BRACKETED).fill_null(False))
    lists = pc.split_pattern(text, separator)
    if bracketed.any():
        found = [
            _bracketed(cell, separator) if is_list else parts
            for cell, is_list, parts in zip(
                text.to_pylist(), bracketed.tolist(), lists.to_pylist(), strict=True
            )
        ]
        lists = pa.array(found, pa.list_(pa.string()))
    return _without_blanks(lists)


def split_numbers(text: pa.Array) -> pa.Array:
    """Return cells of text as lists of the numbers in them, as text; any usual brackets and separators."""
    text = pc.utf8_trim_whitespace(pc.utf8_trim(text, " \t\r\n[](){}"))
    lists = pc.split_pattern_regex(text, r"[\s,;|]+")
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, lists.type), lists)


@dataclasses.dataclass(frozen=True)
class OtherSeparator:
    """Another separator than the declared one, in cells of text."""

    separator: str
    example: str
    """A cell with it."""
    cells: int
    """How many of those looked at have it and not the declared one."""
    sure: bool
    """Whether it is no part of values: the values on its sides stand alone in other cells, or no cell has the
    declared separator and most have this."""


def other_separator(text: pa.Array, separator: str, limit: int = 10_000) -> OtherSeparator | None:
    """Return what looks like another separator than the declared one in cells of text.

    Args:
        text: string.
        separator: the declared one.
        limit: most cells that are looked at.

    Returns:
        What is found; None where the declared separator fits.
    """
    cells = text.drop_null().slice(0, limit).to_pylist()
    plain = [cell for cell in cells if cell.strip() and not re.match(_BRACKETED, cell)]
    if not plain:
        return None
    for other in _SEPARATORS:
        if other in separator:
            continue
        odd = [cell for cell in plain if other in cell and separator not in cell]
        if not odd:
            continue
        rest = [cell for cell in plain if other not in cell or separator in cell]
        values = {piece.strip() for cell in rest for piece in cell.split(separator)}
        known = sum(any(piece.strip() in values for piece in cell.split(other)) for cell in odd)
        used = any(separator in cell for cell in plain)
        most = 2 * len(odd) > len(plain)
        if (most and not used) or (2 * known > len(odd) and 20 * len(odd) > len(plain)):
            return OtherSeparator(other, odd[0], len(odd), True)
        if most:
            return OtherSeparator(other, odd[0], len(odd), False)
    return None


def _bracketed(cell: str, separator: str) -> list[str] | None:
    text = cell.strip()
    inner = text[1:-1].strip()
    if not inner:
        return []
    parsers: list[Callable[[str], Any]] = [orjson.loads, ast.literal_eval]
    for parse in parsers:
        try:
            values = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(values, dict):
            raise DataError(f"{_short(cell)} is a mapping; values of a list are to be text or numbers")
        # 'a' 'b' is one string to Python, and two values to numpy.
        if isinstance(values, (list, tuple, set)) and not re.search(r"""['"]\s+['"]""", inner):
            return [piece for value in values if (piece := _piece(value, cell)) is not None]
    if text[0] == "(" or any(bracket in inner for bracket in "[]{}"):
        return cell.split(separator)
    if "..." in inner.split() or inner.endswith("..."):
        raise DataError(
            f"a list is abbreviated in {_short(cell)}: numpy left out values of it as it was written; write "
            "all of them"
        )
    if re.match(r"""^['"]""", inner) and not re.search(r"""['"]\s*,""", inner):
        quoted = re.findall(r"""'([^']*)'|"([^"]*)\"""", inner)
        return [a or b for a, b in quoted]
    if "," in inner:
        return next(csv.reader([inner], skipinitialspace=True))
    if separator in inner:
        return inner.split(separator)
    # Numbers as numpy writes them; words with blanks between them are one value.
    pieces = inner.split()
    if not all(re.match(_NUMBER, piece) for piece in pieces):
        return [inner]
    return [piece if re.match(r"^[+-]?\d+$", piece) else str(_piece(float(piece), cell)) for piece in pieces]


def _piece(value: Any, cell: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value != value:
            return None
        return str(int(value)) if value.is_integer() and abs(value) < 2.0**53 else repr(value)
    if isinstance(value, (str, int)):
        return str(value)
    raise DataError(
        f"a list holds a {type(value).__name__} in {_short(cell)}; its values are to be text or numbers"
    )


def _without_blanks(lists: pa.Array) -> pa.Array:
    values = pc.utf8_trim_whitespace(pc.list_flatten(lists).cast(pa.string()))
    parents = np.asarray(pc.list_parent_indices(lists)).astype(np.int64)
    keep = np.asarray(pc.greater(pc.utf8_length(values), 0).fill_null(False))
    counts = np.bincount(parents[keep], minlength=len(lists))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    result = pa.ListArray.from_arrays(pa.array(offsets), values.filter(pa.array(keep)))
    missing = np.asarray(lists.is_null())
    return pc.if_else(pa.array(missing), pa.scalar(None, result.type), result) if missing.any() else result


def _simple(array: pa.Array) -> pa.Array:
    """Return an array without dictionary, and text and bytes with 32-bit offsets."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.string())
    return array.cast(pa.binary()) if is_bytes(kind) and not pa.types.is_binary(kind) else array


def _wide(array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return array.cast(pa.large_binary())
    return array


def _utf8(value: bytes | None) -> str | bool | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return False


def _short(cell: str) -> str:
    return repr(cell if len(cell) <= _SHOWN else cell[:_SHOWN] + "...")
