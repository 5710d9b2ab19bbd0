"""A set of item rows that a search may answer with: sorted rows or a bit for each row, whichever is at hand.

Symbols: R rows that there are, m rows in the set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BitArray = npt.NDArray[np.uint8]

_BITS_PER_ROW = 64
"""A sorted row takes as much memory as this many bits: sets with a smaller share are kept as rows."""


class Allowed:
    """A set of item rows in [0, R). It never changes, so that threads can share it.

    Each form is made from the other when it is first asked for, and then kept.
    """

    __slots__ = ("_bits", "_count", "_rows", "num_rows")

    def __init__(
        self,
        num_rows: int,
        rows: IntArray | None = None,
        bits: BitArray | None = None,
        count: int | None = None,
    ) -> None:
        """Take one form or both; ``of_rows``, ``of_mask`` and ``of_bits`` check what they are given."""
        self.num_rows = num_rows
        """R."""
        self._rows = rows
        self._bits = bits
        self._count = count

    @classmethod
    def of_rows(cls, rows: npt.ArrayLike, num_rows: int) -> Allowed:
        """Return the set of item rows in any order; those outside of [0, R) are passed over."""
        given = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(given) and not (np.diff(given) > 0).all():
            # np.unique of integers holds on to the interpreter for a second with ten million of them.
            given = np.sort(given)
            given = given[np.concatenate([[True], given[1:] != given[:-1]])]
        if len(given) and (given[0] < 0 or given[-1] >= num_rows):
            given = given[(given >= 0) & (given < num_rows)]
        return cls(num_rows, rows=given)

    @classmethod
    def all_but(cls, rows: npt.ArrayLike, num_rows: int) -> Allowed:
        """Return all rows but some, given in any order; those outside of [0, R) are passed over."""
        out = cls.of_rows(rows, num_rows).rows()
        mask = np.ones(num_rows, np.bool_)
        mask[out] = False
        bits = np.packbits(mask, bitorder="little")
        return cls(num_rows, bits=bits, count=num_rows - len(out))

    @classmethod
    def of_mask(cls, mask: npt.NDArray[np.bool_]) -> Allowed:
        """Return the set of the rows where ``mask`` [R] is true."""
        return cls(len(mask), bits=np.packbits(mask, bitorder="little"))

    @classmethod
    def of_bits(cls, bits: BitArray, num_rows: int) -> Allowed:
        """Return the set of packed bits, [ceil(R / 8)] uint8 in little bit order; bits past R must be 0."""
        return cls(num_rows, bits=bits)

    @classmethod
    def none(cls, num_rows: int) -> Allowed:
        """Return the empty set."""
        return cls(num_rows, rows=np.zeros(0, np.int64))

    @property
    def count(self) -> int:
        """Rows in the set, m."""
        if self._count is None:
            if self._rows is not None:
                self._count = len(self._rows)
            else:
                assert self._bits is not None
                self._count = int(np.bitwise_count(_words(self._bits)).sum())
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(a.nbytes for a in (self._rows, self._bits) if a is not None)

    def rows(self) -> IntArray:
        """Return the rows in the set, ascending [m] int64."""
        if self._rows is None:
            assert self._bits is not None
            self._rows = np.flatnonzero(np.unpackbits(self._bits, count=self.num_rows, bitorder="little"))
        return self._rows

    def bits(self) -> BitArray:
        """Return a bit for each row, [ceil(R / 8)] uint8 in little bit order."""
        if self._bits is None:
            assert self._rows is not None
            mask = np.zeros(self.num_rows, np.bool_)
            mask[self._rows] = True
            self._bits = np.packbits(mask, bitorder="little")
        return self._bits

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return whether each row is in the set, [R] bool."""
        if self._bits is not None:
            return np.unpackbits(self._bits, count=self.num_rows, bitorder="little").view(np.bool_)
        mask = np.zeros(self.num_rows, np.bool_)
        mask[self.rows()] = True
        return mask

    def contains(self, item_rows: IntArray) -> npt.NDArray[np.bool_]:
        """Return whether each item row, of any shape, is in the set; rows outside of [0, R) are not."""
        if self._bits is None:
            own = self.rows()
            if len(own) == 0:
                return np.zeros(item_rows.shape, np.bool_)
            at = np.minimum(np.searchsorted(own, item_rows), len(own) - 1)
            return np.asarray(own[at] == item_rows)
        if self.num_rows == 0:
            return np.zeros(item_rows.shape, np.bool_)
        inside = (item_rows >= 0) & (item_rows < self.num_rows)
        safe = np.where(inside, item_rows, 0)
        return np.asarray(inside & ((self._bits[safe >> 3] >> (safe & 7).astype(np.uint8) & 1) != 0))

    def __and__(self, other: Allowed) -> Allowed:
        """Return the rows in both sets."""
        self._check(other)
        for few, many in ((self, other), (other, self)):
            if few._sparse:
                rows = few.rows()
                return Allowed(self.num_rows, rows=rows[many.contains(rows)])
        return Allowed(self.num_rows, bits=self.bits() & other.bits())

    def __or__(self, other: Allowed) -> Allowed:
        """Return the rows in one of the sets or in both."""
        self._check(other)
        if self._sparse and other._sparse:
            return Allowed(self.num_rows, rows=np.union1d(self.rows(), other.rows()))
        return Allowed(self.num_rows, bits=self.bits() | other.bits())

    def __invert__(self) -> Allowed:
        """Return the rows that are not in the set."""
        bits = ~self.bits()
        if spare := self.num_rows % 8:
            bits[-1] &= (1 << spare) - 1
        return Allowed(self.num_rows, bits=bits)

    def __repr__(self) -> str:
        return f"Allowed({self.count} of {self.num_rows} item rows)"

    @property
    def _sparse(self) -> bool:
        return self._rows is not None and len(self._rows) * _BITS_PER_ROW <= self.num_rows

    def _check(self, other: Allowed) -> None:
        if other.num_rows != self.num_rows:
            raise ValueError(f"sets over {self.num_rows} and {other.num_rows} item rows do not go together")


def _words(bits: BitArray) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint64]:
    """Return bits in words of 64 where their number allows: counting them is then eight times as fast."""
    return bits.view(np.uint64) if len(bits) % 8 == 0 and bits.flags.c_contiguous else bits
