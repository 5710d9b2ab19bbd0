"""What a source yields: interactions in bounded chunks of Arrow arrays, with the place of each row.

Sources only find and split rows; ``reading`` decides what a row means and whether it is good.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower import progress
from twotower.errors import DataError

TimeUnit = Literal["s", "ms", "us", "ns"]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

CHUNK_ROWS = 1 << 18
"""Rows that a source aims to yield at once."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some interactions of one file, in their order; all arrays have the same length n."""

    file: str
    """Name of the file, for messages."""
    rows: IntArray
    """[n] int64, number of each row in the file counted from 1; a CSV header is row 1."""
    user: pa.Array
    """[n] ids as the source has them."""
    item: pa.Array
    """[n] ids as the source has them."""
    time: pa.Array | None = None
    """[n] timestamps, numbers or text."""
    value: pa.Array | None = None
    """[n] numbers, or text that holds numbers."""
    event: pa.Array | None = None
    """[n] event types."""
    impressions: pa.Array | None = None
    """[n] lists of item ids, or text that holds them."""
    split: pa.Array | None = None
    """[n] text: train, validation or test."""


@dataclasses.dataclass(frozen=True)
class SideTable:
    """An item or user table as its source has it, under our names for the id and the title."""

    file: str
    """Name of the table, for messages."""
    data: pa.Table
    """Columns ``item_id`` or ``user_id`` (string, unique, no nulls), ``title``, and what the source has."""
    replaced: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names of the file's own columns that are not in ``data``, because the name stands for another column:
    for which one."""


class RawSource(Protocol):
    """A place that interactions come from. Reading it twice gives the same rows in the same order."""

    has_times: bool
    """Whether chunks have times."""
    time_unit: TimeUnit | None
    """Unit of numeric times."""
    value_range: tuple[float, float] | None
    """Smallest and largest value of the scale, where the source declares one."""
    num_rows: int | None
    """Interactions to expect, where that is known before reading; for progress only."""
    notice: str | None
    """Terms of use to print when the data is read."""

    def signature(self) -> dict[str, Any]:
        """Return what changes when the raw data changes, as JSON values."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what the manifest records about the origin, as JSON values; no local paths."""
        ...

    def item_table(self, bad: BadRows) -> SideTable | None:
        """Return the catalogue, or None when the source has none."""
        ...

    def user_table(self, bad: BadRows) -> SideTable | None:
        """Return the user table, or None when the source has none."""
        ...

    def chunks(self, bad: BadRows) -> Iterator[Chunk]:
        """Yield the interactions; rows that can not even be split into columns go to ``bad``."""
        ...


class BadRows:
    """Counts rows that can not be read, by reason, and keeps the first example of each."""

    def __init__(self, policy: Literal["error", "drop"]) -> None:
        """Start with no bad rows; ``policy`` is ``data.on_bad_rows``."""
        self.policy = policy
        self.count = 0
        self.reasons: dict[str, int] = {}
        self.examples: list[str] = []

    def add(self, file: str, rows: npt.ArrayLike, reason: str, values: list[Any] | None = None) -> None:
        """Count the given rows of ``file``; ``values`` are what was wrong in the first of them."""
        numbers = np.asarray(rows, dtype=np.int64)
        if not len(numbers):
            return
        shown = "" if not values else f": {values[0]!r}"
        if reason not in self.reasons:
            self.examples.append(f"{file} row {numbers[0]}: {reason}{shown}")
        self.count += len(numbers)
        self.reasons[reason] = self.reasons.get(reason, 0) + len(numbers)

    def copy(self) -> BadRows:
        """Return what is known now, for ``restore``."""
        return copy.deepcopy(self)

    def restore(self, before: BadRows) -> None:
        """Forget what came after ``copy``: it is read again."""
        vars(self).update(vars(before.copy()))

    def settle(self) -> None:
        """Say what was dropped, or refuse.

        Raises:
            DataError: there are bad rows and the policy is "error".
        """
        if not self.count:
            return
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())
        lines = "\n  ".join(self.examples)
        noun = "row" if self.count == 1 else "rows"
        if self.policy == "error":
            raise DataError(
                f"{self.count:,} {noun} can not be read ({reasons}):\n  {lines}\nCorrect them, or set "
                "data.on_bad_rows: drop to leave them out."
            )
        progress.say(f"left out {self.count:,} bad {noun} ({reasons}), for example:")
        for line in self.examples:
            progress.say(f"  {line}")
