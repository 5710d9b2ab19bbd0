"""Predicates over the attributes of items, evaluated to the set of item rows that a search may answer with.

Symbols: R item rows that there are, n items of a shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.errors import NotAllowedError, shown
from twotower.index.allowed import Allowed
from twotower.index.attribute_column import OPERATORS, SPARSE, AttributeColumn, Term
from twotower.index.kept import Kept

MAX_VALUES = 1_000
"""Most values in one filter."""


class Attributes:
    """The filterable attributes of all items; may be shared by threads."""

    def __init__(
        self,
        tables: Sequence[tuple[pa.Table, npt.ArrayLike, npt.ArrayLike]],
        num_rows: int,
        bitmap_bytes: int = 256 << 20,
        answer_bytes: int = 64 << 20,
    ) -> None:
        """Order the item rows by value, for each attribute.

        Args:
            tables: of each shard its attributes (columns as ``attribute_table`` makes them, n rows), the item
                row of each of its rows, and the item rows that are dead in it. A row is alive in one shard at
                most.
            num_rows: R.
            bitmap_bytes: bytes of bitmaps of frequent values that are kept.
            answer_bytes: bytes of evaluated filters that are kept; 0 evaluates each anew.
        """
        pieces, rows = [], []
        for table, item_rows, dead in tables:
            own = np.asarray(item_rows, dtype=np.int64)
            alive = ~np.isin(own, np.asarray(dead, dtype=np.int64))
            pieces.append(table if alive.all() else table.filter(pa.array(alive)))
            rows.append(own[alive])
        self.num_rows = num_rows
        """R."""
        item_rows = np.concatenate([np.zeros(0, np.int64), *rows])
        self._alive = Allowed.of_rows(item_rows, num_rows)
        bitmaps = Kept(bitmap_bytes)
        self._columns: dict[str, AttributeColumn] = {}
        if pieces:
            table = pa.concat_tables(pieces)
            for name in table.column_names:
                self._columns[name] = AttributeColumn(name, table.column(name), item_rows, num_rows, bitmaps)
        self._answers = Kept(answer_bytes)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return by name the type of each attribute, and the operators that it has."""
        return {
            name: {"type": column.kind, "operators": list(OPERATORS[column.kind])}
            for name, column in self._columns.items()
        }

    def frequent(self, limit: int) -> dict[str, list[Any]]:
        """Return by name at most ``limit`` values of each attribute with any_of, the most frequent first."""
        return {
            name: column.frequent(limit)
            for name, column in self._columns.items()
            if "any_of" in OPERATORS[column.kind]
        }

    def allowed(self, predicates: Mapping[str, Any]) -> Allowed:
        """Return the items that satisfy all predicates, over [0, R).

        ``{"genres": {"any_of": ["Comedy"]}, "year": {"gte": 1990}}``: by attribute, by operator, a list of
        values (any_of, all_of, none_of) or a bound (gte, gt, lte, lt). An item without a value satisfies
        none_of only; a value that no item has is allowed.

        Raises:
            NotAllowedError: an attribute, an operator or a value that there can not be.
        """
        key = _canonical(predicates)
        found: Allowed | None = self._answers.get(key)
        if found is None:
            found = self._evaluated(self._terms(predicates))
            # It may come to hold both forms.
            self._answers.put(key, found, found.count * 8 + self.num_rows // 8)
        return found

    def check(self, predicates: Mapping[str, Any]) -> None:
        """Check predicates without evaluating them.

        Raises:
            NotAllowedError: as ``allowed`` does.
        """
        self._terms(predicates)

    def drawn(self, share: float, rng: np.random.Generator) -> Allowed | None:
        """Return a set as a query on one of the attributes might ask for; None where no attribute has one.

        Args:
            share: of the items; at least half of that and at most twice as many are in the set.
            rng: of the draw of the attribute and its values.
        """
        wanted = share * self._alive.count
        columns = list(self._columns.values())
        for place in rng.permutation(len(columns)):
            found: Allowed = columns[int(place)].drawn(wanted / max(self.num_rows, 1), rng)
            if wanted / 2 <= found.count <= wanted * 2:
                return found
        return None

    def _terms(self, predicates: Mapping[str, Any]) -> list[Term]:
        if not isinstance(predicates, Mapping):
            raise NotAllowedError(
                f"filter: {shown(predicates)} is no object",
                'an object such as {"genres": {"any_of": ["Comedy"]}, "year": {"gte": 1990}}',
            )
        terms, num_values = [], 0
        for name, operators in predicates.items():
            column = self._columns.get(name)
            if column is None:
                raise NotAllowedError(
                    f"filter: items have no attribute {shown(name)}",
                    ", ".join(self._columns)
                    or "no filter: none was declared in index.attributes when the index was built",
                )
            known = OPERATORS[column.kind]
            if not isinstance(operators, Mapping) or not operators:
                raise NotAllowedError(
                    f"filter.{name}: {shown(operators)} is no object of operators",
                    f"an object with one or more of {', '.join(known)}",
                )
            for operator, operand in operators.items():
                if operator not in known:
                    raise NotAllowedError(
                        f"filter.{name}: {shown(operator)} is no operator of type {column.kind}",
                        ", ".join(known),
                    )
                num_values += len(operand) if isinstance(operand, (list, tuple)) else 1
            if num_values > MAX_VALUES:
                raise NotAllowedError(f"filter: more than {MAX_VALUES:,} values", f"{MAX_VALUES:,} in all")
            terms += column.terms(operators)
        return terms

    def _evaluated(self, terms: list[Term]) -> Allowed:
        positive = sorted((t for t in terms if not t.negated), key=lambda t: t.size)
        found = positive[0].found() if positive else self._alive
        for term in [*positive[1:], *(t for t in terms if t.negated)]:
            if found.count * SPARSE <= self.num_rows:
                rows = found.rows()
                found = Allowed(self.num_rows, rows=rows[term.satisfied(rows)])
            else:
                found &= ~term.found() if term.negated else term.found()
        return found


def _canonical(predicates: Any) -> str | None:
    """Return a text that is the same for the same predicates; None for what is no JSON."""
    try:
        return json.dumps(predicates, sort_keys=True)
    except (TypeError, ValueError):
        return None
