"""YAML and dotted overrides to a configuration, with errors that name the key and the remedy."""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from twotower.config.root import Config
from twotower.errors import ConfigError


def load_config(path: Path | str | None = None, overrides: list[str] | None = None) -> Config:
    """Return the configuration of a YAML file with ``a.b=value`` overrides, each value read as YAML.

    Raises:
        ConfigError: the file is not there or not YAML, or a key or value is not allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path} is not YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                f"config file {path} holds a {type(loaded).__name__}; it must hold keys and values"
            )
        values = loaded or {}
    for override in overrides or []:
        _apply(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Return the configuration of plain values.

    Raises:
        ConfigError: a key or value is not allowed; the message lists each with the remedy.
    """
    try:
        return Config.model_validate(copy.deepcopy(values))
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError("the configuration is not valid:\n  " + "\n  ".join(lines)) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} must have the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of --set {override!r} is not YAML: {error}") from None
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        node = _child(node, part, override, create=True)
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str, create: bool) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, override)]
    child = node.get(part)
    if child is None and create:
        child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"--set {override!r}: {part!r} is the value {child!r}, it has no keys below it")
    return child


def _position(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {override!r}: {part!r} is not a position in a list of {len(node)}")
    return int(part)


def _explain(error: Any) -> str:
    # pydantic puts the tag of a union into the location; it is no key that a person wrote.
    tags = {"movielens", "files", "lightgcn", "generated"}
    location = [str(p) for p in error["loc"] if str(p) not in tags]
    where = ".".join(location) or "config"
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(known))}"
        return f"{where}: there is no such key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], (str, int, float, bool)) or error["input"] is None:
        return f"{where}: {message} (got {error['input']!r})"
    return f"{where}: {message}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        model = _step(model, part)
    models = [m for m in _members(model) if isinstance(m, type) and issubclass(m, BaseModel)]
    return [name for m in models for name in m.model_fields]


def _step(model: Any, part: Any) -> Any:
    if isinstance(part, int):
        return next((a for m in _members(model) for a in getattr(m, "__args__", ())), model)
    for member in _members(model):
        if isinstance(member, type) and issubclass(member, BaseModel):
            if part in member.model_fields:
                return member.model_fields[part].annotation
            kind = member.model_fields.get("kind") or member.model_fields.get("type")
            if kind is not None and part in getattr(kind.annotation, "__args__", ()):
                return member
    return model


def _members(model: Any) -> list[Any]:
    """The alternatives of a union (through Annotated), or the type itself."""
    if hasattr(model, "__metadata__"):
        return _members(model.__origin__)
    if (
        hasattr(model, "__args__")
        and not isinstance(model, type)
        and getattr(model, "__origin__", None) is not list
    ):
        return [m for a in model.__args__ for m in _members(a)]
    return [model]
