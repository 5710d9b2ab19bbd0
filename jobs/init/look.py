"""A person's files as tables: what rows and columns they have, as the readers of ``prepare`` see them."""

from __future__ import annotations

import codecs
import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower import cells
from twotower.data.chunks import BadRows
from twotower.data.sources import tables
from twotower.data.sources.tables import TableFile
from twotower.errors import DataError
from twotower.values import Numbers, as_categories, as_numbers, is_list, is_text, plain

_HEAD_BYTES = 1 << 20


class Column:
    """A column of a table, and what its values look like."""

    def __init__(self, name: str, values: pa.Array, in_csv: bool) -> None:
        """Take the values that were looked at; blank text is null."""
        self.name = name
        self.values = values
        self.in_csv = in_csv
        """Whether it is of a CSV file, where everything is text."""

    def __repr__(self) -> str:
        """Return what it is, for a failing test."""
        return f"Column({self.name!r}, {self.values.type}, {len(self.values)} rows)"

    @cached_property
    def present(self) -> int:
        """Rows with a value."""
        return len(self.values) - self.values.null_count

    @cached_property
    def is_list(self) -> bool:
        """Whether it holds lists, as only Parquet has them."""
        return is_list(self.values.type)

    @cached_property
    def is_text(self) -> bool:
        """Whether it holds text."""
        return is_text(self.values.type)

    @cached_property
    def is_time(self) -> bool:
        """Whether it holds timestamps or dates."""
        kind = self.values.type
        return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))

    @cached_property
    def names(self) -> pa.StringArray | None:
        """Each value as the name of a category, or None where it has none, as lists."""
        try:
            found: pa.StringArray = as_categories(self.values)
        except (DataError, pa.ArrowInvalid):
            return self.values.cast(pa.string()) if self.is_time else None
        return found

    @cached_property
    def codes(self) -> np.ndarray:
        """[n] int64: which distinct value each row has, -1 where it has none."""
        if self.names is None:
            return np.full(len(self.values), -1, np.int64)
        encoded = self.names.dictionary_encode()
        return np.asarray(encoded.indices.fill_null(-1)).astype(np.int64)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by distinct value, the most frequent first."""
        if self.names is None:
            return {}
        found = self.names.drop_null().value_counts()
        pairs = zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))

    @property
    def distinct(self) -> int:
        """Different values."""
        return len(self.counts)

    @cached_property
    def numbers(self) -> Numbers | None:
        """Its values as numbers, where it may hold any."""
        return as_numbers(self.values)

    @cached_property
    def numeric_share(self) -> float:
        """Share of the values that are numbers, of those that are no word for a missing one, such as NA."""
        if self.numbers is None:
            return 0.0
        readable = int((~np.isnan(self.numbers.values)).sum())
        return readable / max(int((~self.numbers.missing).sum()), 1)

    @cached_property
    def whole(self) -> bool:
        """Whether all its values are whole numbers."""
        if self.numbers is None or self.numeric_share < 1:
            return False
        values = self.numbers.values[~np.isnan(self.numbers.values)]
        return bool(len(values)) and bool((values == np.floor(values)).all())

    @cached_property
    def boolean(self) -> bool:
        """Whether it holds true and false."""
        return bool(pa.types.is_boolean(self.values.type)) or set(self.counts) == {"true", "false"}

    @property
    def unique(self) -> bool:
        """Whether no value comes twice."""
        return self.distinct == self.present > 0

    def describe(self) -> str:
        """Return how many different values there are, for a comment."""
        missing = len(self.values) - self.present
        gaps = f", {missing:,} empty" if missing else ""
        if self.names is None:
            return f"{self.present:,} values{gaps}"
        return f"{self.distinct:,} different values in {self.present:,} rows{gaps}"


@dataclasses.dataclass
class Table:
    """One table of a person's, in one file or several."""

    path: str
    """How the configuration names it: a file, a folder or a glob."""
    files: list[TableFile]
    columns: dict[str, Column]
    num_rows: int
    """Rows looked at."""
    whole: bool
    """Whether these are all."""
    delimiter: str | None
    """Of its CSV files, where the header alone does not show it."""
    encoding: str
    """Of its CSV files."""
    remarks: list[str]
    """What is odd about it, each a sentence."""

    @property
    def size(self) -> str:
        """How many rows, for a comment."""
        return f"{self.num_rows:,} rows" if self.whole else f"the first {self.num_rows:,} rows"


def look(paths: Sequence[str], max_rows: int) -> list[Table]:
    """Return the tables that paths name.

    Args:
        paths: files, folders or globs. Files of the same columns whose names differ in digits only are one
            table; so are those of a folder or a glob.
        max_rows: rows of a table that are looked at.

    Raises:
        DataError: a path names no file, or one that can not be read.
    """
    return [read(path, max_rows) for path in _grouped(paths)]


def read(path: str, max_rows: int) -> Table:
    """Return one table.

    Raises:
        DataError: a file can not be read, or has no rows.
    """
    files = tables.find_tables(path, "init")
    encoding = next((e for f in files if (e := _encoding(f)) is not None), "utf-8")
    remarks = []
    if encoding != "utf-8":
        files = [dataclasses.replace(file, encoding=encoding) for file in files]
        remarks.append(f"{path} is not UTF-8: it is read as {encoding}, and may be of another encoding")
    names = _names(files, remarks)
    parts: dict[str, list[pa.Array]] = {name: [] for name in names}
    num_rows, whole, bad = 0, True, BadRows("drop")
    for file in files:
        for batch, _ in file.batches(names, bad):
            whole = num_rows + batch.num_rows <= max_rows
            batch = batch.slice(0, max_rows - num_rows)
            num_rows += batch.num_rows
            for name, array in zip(names, batch.columns, strict=True):
                parts[name].append(cells.text_of(array)[0])
            if not whole:
                break
        if not whole:
            break
    if not num_rows:
        raise DataError(f"{path} has no rows; give a file with data")
    in_csv = not all(file.is_parquet for file in files)
    columns = {name: Column(name, _joined(name, arrays), in_csv) for name, arrays in parts.items()}
    return Table(path, files, columns, num_rows, whole, None, encoding, remarks)


def _joined(name: str, arrays: list[pa.Array]) -> pa.Array:
    arrays = [plain(array) for array in arrays]
    kinds = {array.type for array in arrays}
    if len(kinds) > 1:
        # Files of one table may hold a column in different types, such as integers and, with gaps, floats.
        target = pa.float64() if all(map(_is_number, kinds)) else pa.string()
        arrays = [array.cast(target, safe=False) for array in arrays]
    return tables.non_empty(cells.joined(pa.chunked_array(arrays), f"column {name!r}"))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _names(files: list[TableFile], remarks: list[str]) -> list[str]:
    """Return the columns that all files have, each once."""
    names = [name for name in files[0].columns if name]
    twice = sorted({name for file in files for name in file.columns if name and file.columns.count(name) > 1})
    if twice:
        remarks.append(
            f"{files[0].name} has more than one column {', '.join(twice)}: rename them to use them"
        )
    some = sorted({name for name in names if not all(name in file.columns for file in files)})
    if some:
        remarks.append(f"not every file has the columns {', '.join(some)}: they are left alone")
    return [name for name in names if name not in twice and name not in some]


def _encoding(file: TableFile) -> str | None:
    """Return what a CSV file seems to be encoded in, where that is not UTF-8 and no mark says so."""
    if file.is_parquet:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")()
    seen = 0
    for block in file.text.blocks():
        try:
            decoder.decode(block)
        except UnicodeDecodeError:
            return "latin-1" if any(byte in block for byte in b"\x81\x8d\x8f\x90\x9d") else "cp1252"
        seen += len(block)
        if seen >= 16 * _HEAD_BYTES:
            break
    return None


def _grouped(paths: Sequence[str]) -> list[str]:
    """Return paths with those that are parts of one table replaced by a glob."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in dict.fromkeys(paths):
        key: tuple[str, ...] = (path,)
        if os.path.isfile(path):
            [file] = tables.find_tables(path, "init")
            stem = re.sub(r"\d+", "#", file.name)
            if "#" in stem:
                key = (str(Path(path).parent), stem, *file.columns)
        groups.setdefault(key, []).append(path)
    return [found for members in groups.values() for found in _as_glob(members)]


def _as_glob(members: list[str]) -> list[str]:
    if len(members) == 1:
        return members
    begin = _beginning(members)
    end = _beginning([member[::-1] for member in members])[::-1]
    end = end[max(0, len(begin) + len(end) - min(map(len, members))) :]
    pattern = f"{begin}*{end}"
    return [pattern] if sorted(glob.glob(pattern)) == sorted(members) else members


def _beginning(texts: list[str]) -> str:
    """Return what all texts begin with."""
    columns = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in columns)


def shared(one: Column, other: Column) -> float:
    """Return the share of one column's different values that another has too."""
    if one.names is None or other.names is None or not one.distinct:
        return 0.0
    mine = pa.array(list(one.counts), pa.string())
    return (
        float(pc.sum(pc.is_in(mine, value_set=pa.array(list(other.counts), pa.string()))).as_py())
        / one.distinct
    )


def pairs(one: Column, other: Column) -> int:
    """Return how many different pairs two columns of a table have, among rows with both."""
    both = (one.codes >= 0) & (other.codes >= 0)
    return len(np.unique(one.codes[both] * (other.distinct + 1) + other.codes[both]))
