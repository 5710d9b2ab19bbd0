"""The configuration that the guesses come to, as values and with the reason for each."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from jobs.init import features, names
from jobs.init.events import UNKNOWN, meaning
from jobs.init.features import Use
from jobs.init.look import Column, pairs
from jobs.init.roles import Log, Roles, Side

_MOST_PROFILES = 3
_SEVERAL = 1.05
"""Different values of a column for each id, on average, up to which it describes what the id names."""


@dataclasses.dataclass
class Plan:
    """What is written, and what is said about it."""

    name: str
    roles: Roles
    title: Column | None
    items: list[Use]
    """Columns of the item table."""
    users: list[Use]
    """Columns of the user table."""
    unsure: list[str]
    events: dict[str, Any] = dataclasses.field(default_factory=dict)
    positives: dict[str, Any] = dataclasses.field(default_factory=dict)
    value_used: bool = False
    value_why: str = ""
    split: dict[str, Any] = dataclasses.field(default_factory=dict)
    split_why: str = ""
    on_bad_rows: str = "error"
    bad_why: str = "no row looked at is bad; drop: leave bad ones out"
    num_users: int = 0
    num_items: int = 0

    @property
    def log(self) -> Log:
        """The table of interactions."""
        return self.roles.log

    @property
    def source(self) -> dict[str, Any]:
        """``data.source``."""
        log = self.log
        columns: dict[str, Any] = {"user": log.user.name, "item": log.item.name}
        if log.time is not None and log.clock is not None:
            columns["time"] = log.time.name
            columns |= {"time_unit": log.clock.unit} if log.clock.unit else {}
            columns |= {"time_format": log.clock.format} if log.clock.format else {}
        if log.event is not None:
            columns["event"] = log.event.name
        if self.value_used and log.value is not None:
            columns["value"] = log.value.name
        values: dict[str, Any] = {"kind": "files", "interactions": log.table.path}
        values |= {"encoding": log.table.encoding} if log.table.encoding != "utf-8" else {}
        values |= {"columns": columns}
        values |= {"events": self.events} if self.events else {}
        for noun, side in (("items", self.roles.items), ("users", self.roles.users)):
            if side is not None:
                values[noun] = self._side(noun, side)
        return values

    def _side(self, noun: str, side: Side) -> dict[str, Any]:
        values: dict[str, Any] = {"path": side.table.path, "id": side.key.name}
        if noun == "items" and self.title is not None:
            values["title"] = self.title.name
        if side.table.encoding != self.log.table.encoding:
            values["encoding"] = side.table.encoding
        return values

    @property
    def dim(self) -> int:
        """Width of ids and embeddings."""
        return features.id_width(self.num_items or self.log.item.distinct)

    @property
    def query(self) -> list[dict[str, Any]]:
        """``features.query``."""
        found: list[dict[str, Any]] = [
            {"name": "history", "type": "history", "dim": self.dim, "max_length": 50}
        ]
        profiled = [use.feature["name"] for use in self.items if use.feature is not None and use.profiled]
        taken = {use.feature["name"] for use in self.users if use.feature is not None}
        for name in profiled[:_MOST_PROFILES]:
            own = f"{name}_profile"
            if own not in taken:
                found.append({"name": own, "type": "profile", "of": name})
        return found + [use.feature for use in self.users if use.feature is not None]

    @property
    def item(self) -> list[dict[str, Any]]:
        """``features.item``."""
        own = [use.feature for use in self.items if use.feature is not None]
        return [{"name": "item_id", "type": "id", "dim": self.dim}, *own]

    @property
    def attributes(self) -> dict[str, dict[str, Any]]:
        """``index.attributes``."""
        return {use.column.name: use.attribute for use in self.items if use.attribute is not None}

    def values(self) -> dict[str, Any]:
        """Return the configuration as plain values."""
        data: dict[str, Any] = {"source": self.source, "on_bad_rows": self.on_bad_rows}
        data |= {"positives": self.positives} if self.positives else {}
        values: dict[str, Any] = {
            "name": self.name,
            "data": data,
            "split": self.split,
            "features": {"query": self.query, "item": self.item},
            "model": {"embedding_dim": self.dim},
        }
        if self.positives.get("weight") == "scaled":
            values["train"] = {"loss": {"weights": "none"}}
        if self.attributes:
            values["index"] = {"attributes": self.attributes}
        return values


def plan(roles: Roles, name: str | None) -> Plan:
    """Return what a person's tables come to.

    Args:
        roles: what each table is.
        name: of the scenario; that of the log when not given.
    """
    items, users = roles.items, roles.users
    title = None if items is None else features.title_of(items.table, items.key)
    reserved = {"item_id", "item_row", "title"}
    made = Plan(
        name=scenario(name or Path(roles.log.table.path).name),
        roles=roles,
        title=title,
        items=[] if items is None else features.uses(items.table, items.key, title, reserved),
        users=[] if users is None else features.uses(users.table, users.key, None, {"user_id"}),
        unsure=[*roles.unsure, *(remark for table in _tables(roles) for remark in table.remarks)],
    )
    for side in (items, users):
        if side is not None and side.known < 1:
            made.unsure.append(
                f"{side.table.path} knows {side.known:.0%} of the values of "
                f"{(roles.log.item if side is items else roles.log.user).name} in {roles.log.table.path}"
            )
    _events(made)
    _value(made)
    if roles.log.time is None:
        made.split, made.split_why = {"kind": "random"}, "there are no times to split by"
    else:
        made.split, made.split_why = {"kind": "temporal_user"}, "each user's last interactions are held out"
    _describing(made)
    return made


def _tables(roles: Roles) -> list[Any]:
    return [roles.log.table, *(side.table for side in (roles.items, roles.users) if side is not None)]


def scenario(text: str) -> str:
    """Return a text as the name of a scenario."""
    text = re.sub(r"[\d_.-]*\*.*$", "", text)
    stem = re.sub(r"(\.(csv|tsv|parquet|pq|gz|bz2|xz|zst|lz4|ya?ml))+$", "", text, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "mine"


def _events(made: Plan) -> None:
    column = made.log.event
    if column is None:
        return
    made.events = {name: UNKNOWN if (m := meaning(name)) is None else m for name in column.counts}
    unknown = [name for name in column.counts if meaning(name) is None]
    if not any(isinstance(value, float) for value in made.events.values()):
        # An interaction that nobody likes trains nothing.
        first = next(iter(made.events))
        made.events[first] = 1.0
        made.unsure.append(f"no event of {column.name} is known to mean a liking; {first!r} is taken for one")
    if unknown:
        made.unsure.append(
            f"what {', '.join(map(repr, unknown))} of {column.name} mean is not known: each has the weight "
            f"{UNKNOWN}"
        )


def _value(made: Plan) -> None:
    column = made.log.value
    if column is None or column.numbers is None:
        return
    values = column.numbers.values
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    scale = names.has(column.name, names.RATING)
    missing = len(column.values) - int((~np.isnan(values)).sum())
    if missing > 0.01 * len(values):
        made.value_why = f"{missing:,} rows have none"
    elif scale and made.log.event is None:
        made.value_used = True
        made.positives = {"weight": "scaled", "value_range": [low, high]}
        made.value_why = f"{column.distinct:,} different values from {low:g} to {high:g}"
    elif low <= 0 < high and made.log.event is None:
        made.value_used = True
        made.positives = {"min_value": float(np.nanmin(np.where(values > 0, values, np.nan)))}
        count = int((values <= 0).sum())
        made.value_why = f"{count:,} rows are not above 0: negatives, such as returns"
    else:
        made.value_why = f"from {low:g} to {high:g}; data.positives: {{weight: value}} reads it"


def _describing(made: Plan) -> None:
    """Tell of columns of the log that describe its items or users, where no table does."""
    for noun, side, key in (
        ("item", made.roles.items, made.log.item),
        ("user", made.roles.users, made.log.user),
    ):
        if side is not None:
            continue
        found = []
        for column in made.log.table.columns.values():
            if column in made.log.used or column.names is None or column.distinct < 2:
                continue
            # One that counts rows, or that says as much of everything, describes nothing.
            if column.distinct <= _SEVERAL * key.distinct and pairs(key, column) <= _SEVERAL * key.distinct:
                found.append(column.name)
        if found:
            made.unsure.append(
                f"{', '.join(found)} of {made.log.table.path} say{'s' if len(found) == 1 else ''} "
                f"something of each "
                f"{noun}: to use {'it' if len(found) == 1 else 'them'}, write a table with one row for each "
                f"{key.name}, and give it to init too"
            )
        elif noun == "item":
            made.unsure.append(
                "there is no item table: items are known by their ids alone, and nothing can be filtered by"
            )
