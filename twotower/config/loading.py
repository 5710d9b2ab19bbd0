"""YAML and dotted overrides to a configuration, with errors that name the key and the remedy."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from twotower.config.keys import Kinds, below
from twotower.config.problems import problems, shown
from twotower.config.root import Config
from twotower.config.values import pairs_of, read_document, read_value, value_of
from twotower.errors import ArtefactError, ConfigError
from twotower.jsonfiles import parse_json

_CONFIG: Kinds = (Config,)


def load_config(
    path: Path | str | None = None,
    overrides: Sequence[str] | None = None,
    sweep: Path | str | None = None,
) -> Config:
    """Return the configuration of a YAML file, with values that replace those of the file.

    Args:
        path: the file; built-in values when not given.
        overrides: each ``a.b=value``, read by the type of its key; a later one wins.
        sweep: a YAML file of dotted keys and values that come before the overrides.

    Raises:
        ConfigError: a file is not there or not YAML, or a key or value is not allowed.

    Example:
        >>> from pathlib import Path
        >>> size = Path("shop.yaml").write_text("name: shop")
        >>> config = tt.load_config("shop.yaml", ["train.epochs=5"])
        >>> config.name, config.train.epochs
        ('shop', 5)
    """
    values: dict[str, Any] = {}
    if path is not None:
        where = f"config file {path}"
        root = _root(path, where)
        values = {} if root is None else value_of(root, _CONFIG, where)
    if sweep is not None:
        where = f"sweep file {sweep}"
        root = _root(sweep, where)
        for key, node in ({} if root is None else pairs_of(root, where)).items():
            put_value(values, key, value_of(node, _kinds_at(values, key, where), where), where)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override!r} must have the form section.key=value")
        where = f"--set {override!r}"
        if any("\ud800" <= character <= "\udfff" for character in override):
            raise ConfigError(f"{where} is not text in UTF-8")
        put_value(values, key, read_value(text, _kinds_at(values, key, where), where), where)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Return the configuration of plain values.

    Raises:
        ConfigError: a key or value is not allowed; the message lists each with the remedy.
    """
    try:
        return Config.model_validate(copy.deepcopy(values))
    except ValidationError as error:
        lines = problems(error.errors(), Config)
        if len(lines) == 1:
            raise ConfigError(f"the configuration is not valid: {lines[0]}") from None
        raise ConfigError("the configuration is not valid:\n  " + "\n  ".join(lines)) from None


def stored_config(data: bytes, place: str, remedy: str) -> Config:
    """Return the configuration in the bytes of a file beside an artefact.

    Args:
        data: the bytes.
        place: they are from, for the error.
        remedy: what to do where they are damaged, a sentence.

    Raises:
        ArtefactError: they hold none.
    """
    value = parse_json(data, place, remedy)
    try:
        return parse_config(value)
    except ConfigError as error:
        raise ArtefactError(f"{place} is damaged: {' '.join(str(error).split())}. {remedy}") from None


def text_of(value: Any) -> str:
    """Return a value as ``--set`` takes it, before a shell's quoting."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _root(path: Path | str, where: str) -> yaml.MappingNode | None:
    """Return the keys and values of a YAML file, or None where it holds none."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{where} is a folder; give a YAML file in it") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong = f"the byte 0x{data[error.start]:02x} in line {line}"
        raise ConfigError(f"{where} is not UTF-8 ({wrong}); save it as UTF-8") from None
    node = read_document(text, where)
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        return None
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "a text"
        raise ConfigError(f"{where} holds {found}; it must hold keys and values")
    return node


def _kinds_at(values: dict[str, Any], key: str, where: str) -> Kinds:
    """Return the types of a dotted key, with the help of what its sections hold."""
    kinds: Kinds = _CONFIG
    node: Any = values
    for part in key.split("."):
        kinds = below(kinds, part, node)
        if isinstance(node, list):
            node = node[_position(node, part, where)]
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return kinds


def put_value(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the value of a dotted key; sections that are not there are made.

    Raises:
        ConfigError: the key leads below a value, or past the end of a list; ``where`` begins the message.
    """
    *parents, last = key.split(".")
    node: Any = values
    default: Any = _defaults()
    for part in parents:
        default = default.get(part) if isinstance(default, dict) else None
        node = _child(node, part, where, default)
    if isinstance(node, list):
        node[_position(node, last, where)] = value
    else:
        node[last] = value


@functools.cache
def _defaults() -> dict[str, Any]:
    return Config().to_json()


def _child(node: Any, part: str, where: str, default: Any) -> Any:
    if isinstance(node, list):
        child = node[_position(node, part, where)]
    else:
        child = node.get(part)
        if child is None:
            # A key may lead into a list that is only there by default.
            child = node[part] = copy.deepcopy(default) if isinstance(default, list) else {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"{where}: {part!r} is the value {shown(child)}, it has no keys below it")
    return child


def _position(node: list[Any], part: str, where: str) -> int:
    if not (part.isascii() and part.isdigit()) or int(part) >= len(node):
        raise ConfigError(f"{where}: {part!r} is not a position in a list of {len(node)}")
    return int(part)
