"""Which table is the log of interactions, what its columns are, and which tables describe items and users.

Names of columns count together with values: how often they come again, whether one column decides another,
and whether the ids of a table are those of the log.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.init import clocks, names
from jobs.init.clocks import Written
from jobs.init.events import is_known
from jobs.init.look import Column, Table, pairs, shared
from twotower.errors import DataError

_NEAR = 0.75
"""Difference of scores within which a second candidate is told of."""
_LEAST = 1.0
"""Score from which on another table may be a log too."""
_MOST_EVENTS = 30
_MOST_CANDIDATES = 6
_KNOWN_SHARE = 0.5
"""Share of the log's ids that a table has to know to be the one that describes them."""
_LONG_TEXT = 60


@dataclasses.dataclass
class Log:
    """A table as a log of interactions."""

    table: Table
    user: Column
    item: Column
    score: float
    time: Column | None = None
    clock: Written | None = None
    event: Column | None = None
    value: Column | None = None
    unsure: list[str] = dataclasses.field(default_factory=list)
    """What could be otherwise, each a sentence."""

    @property
    def used(self) -> list[Column]:
        """The columns that have a role."""
        return [c for c in (self.user, self.item, self.time, self.event, self.value) if c is not None]


@dataclasses.dataclass
class Side:
    """A table that describes items or users."""

    table: Table
    key: Column
    known: float
    """Share of the log's ids that it has."""


@dataclasses.dataclass
class Roles:
    """What each table is."""

    log: Log
    items: Side | None
    users: Side | None
    unsure: list[str]


def roles(tables: Sequence[Table]) -> Roles:
    """Return what each table is.

    Raises:
        DataError: none of them can be a log of interactions.
    """
    for table in tables:
        _refuse_headless(table)
    found = [log for table in tables if (log := _log(table, tables)) is not None]
    if not found:
        shown = "; ".join(f"{t.path}: {', '.join(t.columns)}" for t in tables)
        raise DataError(
            f"no file looks like a log of interactions, which has an id of a user and one of an item in "
            f"each row "
            f"({shown}); give the file that says who had what"
        )
    found.sort(key=lambda log: -log.score)
    log = found[0]
    unsure = list(log.unsure)
    others = [table for table in tables if table is not log.table]
    items = _side(log.item, log.user, names.ITEM, others, "item", unsure)
    users = _side(
        log.user,
        log.item,
        names.USER,
        [t for t in others if items is None or t is not items.table],
        "user",
        unsure,
    )
    taken = [side.table for side in (items, users) if side is not None]
    for table in others:
        if table in taken:
            continue
        rival = next((one for one in found if one.table is table and one.score >= _LEAST), None)
        if rival is None and not any(table.path in sentence for sentence in unsure):
            unsure.append(
                f"{table.path} is not used: it is neither the log nor a table of its items or users"
            )
        if rival is not None:
            unsure.append(
                f"{table.path} ({table.size}) could be a log of interactions as well, of {rival.user.name} "
                f"and "
                f"{rival.item.name}; {log.table.path} is taken"
            )
    return Roles(log, items, users, unsure)


def _refuse_headless(table: Table) -> None:
    numeric = [name for name in table.columns if name.replace(".", "").replace("-", "").isdigit()]
    if len(numeric) * 2 > len(table.columns):
        raise DataError(
            f"the first line of {table.path} looks like data ({', '.join(list(table.columns)[:4])}); put a "
            f"line of "
            "column names above it"
        )


def _log(table: Table, tables: Sequence[Table]) -> Log | None:
    """Return a table as a log, with the likeliest columns; None where it has no two columns of ids."""
    times = {name: found for name, column in table.columns.items() if (found := clocks.written(column))}
    candidates = [column for column in table.columns.values() if _may_be_id(column, times.get(column.name))]
    others = [other for other in tables if other is not table]
    as_user = {c.name: _id_score(c, names.USER, names.ITEM, others) for c in candidates}
    as_item = {c.name: _id_score(c, names.ITEM, names.USER, others) for c in candidates}
    users = sorted(candidates, key=lambda c: -as_user[c.name])[:_MOST_CANDIDATES]
    items = sorted(candidates, key=lambda c: -as_item[c.name])[:_MOST_CANDIDATES]
    order = list(table.columns)
    scored = []
    for user, item in itertools.product(users, items):
        if user is not item:
            first = 0.2 if order.index(user.name) < order.index(item.name) else 0.0
            scored.append(
                (as_user[user.name] + as_item[item.name] + _pair_score(user, item) + first, user, item)
            )
    if not scored:
        return None
    scored.sort(key=lambda entry: -entry[0])
    score, user, item = scored[0]
    log = Log(table, user, item, score + 0.7 * math.log10(table.num_rows + 1))
    _tell_ids(log, scored)
    _find_time(log, times)
    _find_event(log)
    _find_value(log)
    log.score += 1.5 * (log.time is not None) + 0.5 * (log.event is not None or log.value is not None)
    return log


def _may_be_id(column: Column, clock: Written | None) -> bool:
    if column.names is None or column.is_time or column.boolean or column.distinct < 2:
        return False
    if column.numeric_share == 1 and not column.whole:
        return False
    if clock is not None and names.hint(column.name, names.TIME) > 0:
        return False
    if names.has(column.name, names.RATING | names.AMOUNT) and not names.has(column.name, names.ID):
        return False
    first = list(column.counts)[:200]
    return sum(map(len, first)) / len(first) <= _LONG_TEXT


def _id_score(
    column: Column, mine: dict[str, float], others: dict[str, float], tables: Sequence[Table]
) -> float:
    """Return how much speaks for a column to hold one side's ids."""
    score = names.hint(column.name, mine) - 0.7 * names.hint(column.name, others)
    score += 0.5 * names.has(column.name, names.ID)
    score -= 1.0 * (names.hint(column.name, names.TITLE) > 0) + 0.5 * (
        names.hint(column.name, names.TIME) > 0
    )
    repeats = column.present / max(column.distinct, 1)
    score += 1.0 if repeats >= 1.5 else (-3.0 if column.unique else 0.0)
    # A handful of values is a class, not a catalogue.
    score -= 2.0 if column.distinct <= 5 else 0.0
    score -= 1.5 * (column.present < 0.5 * len(column.values))
    links = [_link(column, key, mine, others) for table in tables for key in _keys(table)]
    return score + max(links, default=0.0)


def _link(column: Column, key: Column, mine: dict[str, float], others: dict[str, float]) -> float:
    """Return what it says that a column of another table, which has each value once, knows a column's ids."""
    if names.hint(key.name, others) > names.hint(key.name, mine):
        return 0.0
    same = key.name.lower() == column.name.lower()
    speaks = names.hint(key.name, mine) > 0
    if not (same or speaks) or shared(column, key) < _KNOWN_SHARE:
        return 0.0
    return 2.0 if speaks else 0.5


def _keys(table: Table) -> Iterator[Column]:
    """Yield the columns of a table that may be its ids: no value, or hardly one, comes twice."""
    for column in table.columns.values():
        named = column.names is not None and not column.is_time and column.present > 1
        if named and column.distinct >= 0.98 * column.present >= 0.88 * len(column.values):
            yield column


def _pair_score(user: Column, item: Column) -> float:
    """Return what it says how two columns go together: users have several items, and items several users."""
    together = pairs(user, item)
    of_user, of_item = together / max(user.distinct, 1), together / max(item.distinct, 1)
    return (1.0 if of_user > 1.2 else -3.0) + (1.0 if of_item > 1.05 else -3.0)


def _tell_ids(log: Log, scored: list[tuple[float, Column, Column]]) -> None:
    best = scored[0][0]
    near = [(user, item) for score, user, item in scored if best - score < _NEAR]
    users, items = [user for user, _ in near], [item for _, item in near]
    for role, chosen, columns, hints in (
        ("user", log.user, users, names.USER),
        ("item", log.item, items, names.ITEM),
    ):
        rivals = dict.fromkeys(column.name for column in columns if column not in (log.user, log.item))
        if rivals:
            log.unsure.append(
                f"the {role} could be {' or '.join(rivals)} of {log.table.path} as well; {chosen.name} is "
                f"taken"
            )
        elif not names.hint(chosen.name, hints):
            log.unsure.append(
                f"no name in {log.table.path} says which column is the {role}; {chosen.name} is taken for "
                f"its values "
                f"({chosen.describe()})"
            )


def _find_time(log: Log, times: dict[str, Written]) -> None:
    taken = {log.user.name, log.item.name}
    found = sorted(
        ((name, w) for name, w in times.items() if name not in taken), key=lambda pair: -pair[1].score
    )
    found = [(name, w) for name, w in found if w.score > 0]
    if not found:
        log.unsure.append(
            f"no column of {log.table.path} holds times: the split is random, and nothing is recent to the "
            f"model"
        )
        return
    name, log.clock = found[0]
    log.time = log.table.columns[name]
    rivals = [other for other, w in found[1:] if log.clock.score - w.score < _NEAR]
    if rivals:
        log.unsure.append(f"the time could be {' or '.join(rivals)} as well; {name} is taken")
    if log.clock.others:
        shown = " or ".join(repr(text) for text in log.clock.others)
        log.unsure.append(
            f"the times of {name} could be written {shown} as well; {log.clock.format!r} is taken"
        )


def _find_event(log: Log) -> None:
    best, best_score = None, 0.0
    for column in log.table.columns.values():
        if column in log.used or column.names is None or not 2 <= column.distinct <= _MOST_EVENTS:
            continue
        if column.distinct > max(0.05 * column.present, 4) or column.present < 0.9 * len(column.values):
            continue
        known = sum(is_known(name) for name in column.counts) / column.distinct
        score = names.hint(column.name, names.EVENT) + 3 * known
        if column.numeric_share == 1 and names.hint(column.name, names.EVENT) < 2.5:
            continue
        if score > max(best_score, 1.6):
            best, best_score = column, score
    log.event = best


def _find_value(log: Log) -> None:
    for wanted in (names.RATING, names.AMOUNT):
        for column in log.table.columns.values():
            if column in log.used or column.numeric_share < 1 or column.distinct < 2:
                continue
            if names.has(column.name, wanted) and not names.has(column.name, names.ID):
                log.value = column
                return


def _side(
    column: Column,
    opposite: Column,
    hints: dict[str, float],
    tables: Sequence[Table],
    noun: str,
    unsure: list[str],
) -> Side | None:
    """Return the table that describes what a column of the log names."""
    found = []
    for table in tables:
        for key in _keys(table):
            known = shared(column, key)
            same = key.name.lower() == column.name.lower()
            opposed = key.name.lower() == opposite.name.lower() and not same
            named = names.hint(key.name, hints) + names.hint(Path(table.path).stem, hints)
            if opposed or known < _KNOWN_SHARE or not (same or named):
                continue
            useful = sum(_useful(other, key) for other in table.columns.values())
            found.append((2.0 * same + named / 3 + known + 0.3 * min(useful, 6), Side(table, key, known)))
    found.sort(key=lambda pair: -pair[0])
    if not found:
        return None
    side = found[0][1]
    repeated = side.key.present - side.key.distinct
    if repeated:
        unsure.append(
            f"{side.table.path} describes {noun}s, but {repeated:,} of its rows have a {side.key.name} "
            f"that was there "
            f"before, such as {next(iter(side.key.counts))!r}: leave one row for each {noun}, and run init "
            f"again"
        )
        return None
    rivals = list(dict.fromkeys(s.table.path for _, s in found[1:] if s.table is not side.table))
    if rivals:
        unsure.append(
            f"{' and '.join(rivals)} describe{'s' if len(rivals) == 1 else ''} {noun}s as well; "
            f"{side.table.path} is "
            f"taken, and columns of others would have to be joined to it"
        )
    return side


def _useful(column: Column, key: Column) -> bool:
    """Return whether a column may say something of what its table describes."""
    if column is key or column.present == 0 or (column.names is not None and column.distinct < 2):
        return False
    return not (names.has(column.name, names.ID) and column.unique)
