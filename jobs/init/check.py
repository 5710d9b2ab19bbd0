"""The guesses, read by the code that ``prepare`` reads with: what it refuses is taken out and said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jobs.init.features import Use
from jobs.init.plan import Plan
from twotower.config import AttributeConfig, Config, FeaturesConfig, FilesSource, SplitConfig, parse_config
from twotower.data import filters
from twotower.data.attributes import attribute_table
from twotower.data.chunks import BadRows, Chunk, SideTable
from twotower.data.fitting import fit_features
from twotower.data.interning import Interner
from twotower.data.prepare import refuse_duplicates, with_title
from twotower.data.reading import RawInteractions, read_interactions
from twotower.data.sources.files import Files
from twotower.data.splits import assign_splits
from twotower.errors import ConfigError, DataError, TwotowerError

_SPLITS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"kind": "temporal_user", "ties": "order"}, "too few users have interactions at three times"),
    ({"kind": "temporal_global"}, "too few users have three interactions"),
    ({"kind": "random"}, "times leave a split empty"),
)
_MANY = 0.2
"""Share of bad rows that asks for a person's attention."""


class _First:
    """A source whose first rows alone are read."""

    def __init__(self, source: Files, max_rows: int) -> None:
        self._source, self._max_rows = source, max_rows
        self.num_rows: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def chunks(self, bad: BadRows) -> Iterator[Chunk]:
        """Yield chunks until there were enough rows."""
        seen = 0
        for chunk in self._source.chunks(bad):
            yield chunk
            seen += len(chunk.rows)
            if seen >= self._max_rows:
                return


def check(made: Plan, max_rows: int) -> None:
    """Read what a plan names, and take out of it what can not be read, with the reason.

    Args:
        made: changed in place.
        max_rows: rows of the log that are read.

    Raises:
        DataError: the log can not be read as guessed.
    """
    while True:
        config = parse_config(made.values())
        source = _files(config)
        bad = BadRows("drop")
        try:
            items = _side(made, "items", source, bad)
            users = _side(made, "users", source, bad)
        except _TakenOut:
            continue
        break
    interner = Interner()
    if items is not None:
        interner.add(items.data.column("item_id").to_pylist())
    raw = read_interactions(_First(source, max_rows), config.data, interner, bad)
    if not len(raw.columns["user_row"]):
        raise DataError(
            f"no row of {made.log.table.path} can be read ({', '.join(bad.reasons)}); the first: "
            f"{bad.examples[0]}"
        )
    made.num_users = len(raw.users)
    made.num_items = len(raw.items) if items is None else items.data.num_rows
    _bad(made, bad, raw.rows_read)
    _split(made, raw, config)
    if items is not None:
        table = with_title(items.data)
        made.items = [_checked(use, table, "item") for use in made.items]
    if users is not None:
        made.users = [_checked(use, users.data, "query") for use in made.users]
    parse_config(made.values())


class _TakenOut(Exception):
    """A table was taken out of the plan."""


def _files(config: Config) -> Files:
    assert isinstance(config.data.source, FilesSource)
    return Files(config.data.source)


def _side(made: Plan, noun: str, source: Files, bad: BadRows) -> SideTable | None:
    try:
        found = source.item_table(bad) if noun == "items" else source.user_table(bad)
        if found is not None:
            refuse_duplicates(found, f"{noun[:-1]}_id")
        return found
    except DataError as error:
        if noun == "items" and made.title is not None and "is no title" in str(error):
            made.title = None
            made.unsure.append(str(error))
        elif noun == "items":
            made.roles.items, made.items = None, []
            made.unsure.append(f"the item table is left out: {error}")
        else:
            made.roles.users, made.users = None, []
            made.unsure.append(f"the user table is left out: {error}")
        raise _TakenOut from None


def _bad(made: Plan, bad: BadRows, rows_read: int) -> None:
    if not bad.count:
        return
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad.reasons.items())
    made.on_bad_rows = "drop"
    made.bad_why = f"bad among {rows_read:,} rows: {reasons}; error: refuse them"
    if bad.count > _MANY * rows_read:
        made.unsure.append(f"{bad.count:,} of {rows_read:,} rows can not be used ({reasons})")


def _split(made: Plan, raw: RawInteractions, config: Config) -> None:
    """Choose the first split that leaves nothing empty."""
    has_times = made.log.time is not None
    columns = {name: column.copy() for name, column in raw.columns.items() if isinstance(column, np.ndarray)}
    filters.sort(columns)
    tries = [(made.split, made.split_why), *(_SPLITS if has_times else _SPLITS[2:])]
    for split, why in tries:
        try:
            assign_splits(dict(columns), SplitConfig(**split), has_times, config.seed)
        except (DataError, ConfigError):
            continue
        if split != made.split:
            made.unsure.append(f"split.kind is {split['kind']}, since {why}")
        made.split, made.split_why = split, why
        return
    made.unsure.append(
        "no split leaves train, validation and test with interactions: there are too few for a model"
    )


def _checked(use: Use, table: Any, side: str) -> Use:
    """Return a use without what the project refuses of it."""
    if use.feature is not None:
        query = [use.feature] if side == "query" else [{"name": "history", "type": "history", "share": False}]
        item = [use.feature] if side == "item" else [{"name": "item_id", "type": "id"}]
        try:
            features = FeaturesConfig.model_validate({"query": query, "item": item})
            fit_features(
                features,
                table if side == "item" else table.select([]),
                table if side == "query" else None,
                num_users=1,
                num_items=1,
                num_catalogue_items=1,
                has_times=True,
            )
        except (TwotowerError, ValueError) as error:
            use = Use(
                use.column, None, use.attribute, f"it can be no feature: {' '.join(str(error).split())}"
            )
    if use.attribute is not None:
        attribute = AttributeConfig.model_validate(use.attribute)
        try:
            attribute_table(table, {use.column.name: attribute})
        except TwotowerError:
            use.attribute = None
    return use
