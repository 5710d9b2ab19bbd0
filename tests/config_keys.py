"""Every key of the configuration, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from twotower.config import Config
from twotower.config.keys import Kinds, bare, field_kinds, kinds_of, models_of, tag_of
from twotower.config.tune import ParameterConfig

BASE = (
    "split.kind=random",
    "features.query=[{name: a, type: vector, dim: 3}]",
    "features.item=[{name: some, type: numeric}]",
)
"""Overrides with which the sections depend less on each other."""


def every_key(
    model: type[BaseModel] = Config, path: str = "", before: tuple[str, ...] | None = None
) -> Iterator[tuple[str, Kinds, tuple[str, ...]]]:
    """Yield the dotted key of each field that is no section, its types, and the overrides that it needs."""
    before = BASE if before is None else before
    for name, info in model.model_fields.items():
        key, kinds = f"{path}{name}", field_kinds(info)
        nested = models_of(kinds)
        inner = [bare(kind) for kind in kinds if get_origin(bare(kind)) in (list, dict)]
        below = [(k, m) for k in inner for m in models_of(kinds_of(get_args(k)[-1]))]
        for member in nested:
            whole = _least(member)
            needs = before if whole == "{}" else (*before, f"{key}={whole}")
            yield from every_key(member, f"{key}.", needs)
        for kind, member in below:
            is_list = get_origin(kind) is list
            entry = _least(member)
            whole = f"{key}=[{entry}]" if is_list else f"{key}={{entry: {entry}}}"
            yield from every_key(member, f"{key}.{'0' if is_list else 'entry'}.", (*before, whole))
        if not nested and not below:
            yield key, kinds, before


def _least(model: type[BaseModel]) -> str:
    """Return the fewest keys that a section needs, in flow style."""
    values: dict[str, Any] = {}
    if (tag := tag_of(model)) is not None:
        values[tag[0]] = tag[1]
    for name, info in model.model_fields.items():
        if info.is_required() and name not in values:
            values[name] = "7" if int in kinds_of(info.annotation) else "some"
    if "share" in model.model_fields:
        values["share"] = "false"
    if model is ParameterConfig:
        values["values"] = "[1]"
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"
