"""A configuration built in Python, from dotted keys and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.config.loading import load_config, parse_config, put_value
from twotower.config.root import Config
from twotower.errors import ConfigError

GIVEN = "(given to prepare)"
"""Stands for the path of a table that is not in a file: ``twotower.prepare`` is given it."""


def configure(values: Mapping[str, Any] | None = None, base: Config | Path | str | None = None) -> Config:
    """Return a configuration of dotted keys and Python values; what is not given has its default.

    A ``data.source`` without a ``kind`` is of kind ``files``, and files that it does not name are tables
    that ``prepare`` is given.

    Args:
        values: by dotted key, such as ``{"train.epochs": 5}``; a value may be a whole section, and a later
            key changes what is in it.
        base: a configuration, or the YAML file of one, that the values change.

    Returns:
        the configuration; it can not be changed, and ``configure(..., base=config)`` returns another one.

    Raises:
        ConfigError: a key or a value is not allowed; the message names each with the remedy.

    Example:
        >>> import twotower as tt
        >>> config = tt.configure(
        ...     {
        ...         "name": "shop",
        ...         "data.source.columns": {"user": "customer", "item": "sku", "time": "day"},
        ...         "train.epochs": 5,
        ...     }
        ... )
        >>> config.train.epochs, config.data.source.columns.user
        (5, 'customer')
        >>> tt.configure({"seed": 7}, base=config).name
        'shop'
    """
    start = base if isinstance(base, Config) else load_config(base)
    plain: dict[str, Any] = start.to_json() if base is not None else {}
    for key, value in (values or {}).items():
        where = f"configure: {key!r}"
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{where} is no key; give a dotted one such as train.epochs")
        if key == "data.source":
            # Another source has other keys.
            plain.get("data", {}).pop("source", None)
        given = dict(value) if isinstance(value, Mapping) else value
        put_value(plain, key, given, where)
    data = plain.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    if isinstance(source, dict) and source.setdefault("kind", "files") == "files":
        source.setdefault("interactions", GIVEN)
        for name in ("items", "users"):
            if isinstance(source.get(name), dict):
                source[name].setdefault("path", GIVEN)
    return parse_config(plain)
