"""Text to values, by the type of the key that takes it: the same rule for a YAML file and for ``--set``.

YAML itself goes by the looks of a text: ``no`` is false, 12:30:00 a number of seconds, 2024-01-01 a date, 010
eight and 1e3 a text. Here a key that takes text gets the text, whatever it looks like. A value of ``--set``
is never a document: what looks like a comment, a tag or an anchor is part of the text, or is refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from yaml.error import YAMLError

from twotower.config.keys import Kinds, bare, below, models_of
from twotower.errors import ConfigError

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
"""A number as JSON writes it, for keys that take anything."""
_BLANKS = " \t\r\n"
_QUOTED = re.compile(r"""\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*""", re.DOTALL)


class _Refused(yaml.MarkedYAMLError):
    """YAML that is not taken here."""


class _Document(yaml.BaseLoader):
    """YAML with every scalar as its text. Tags are refused: the key says what a value is."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if tag := getattr(event, "tag", None):
            short = tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"the tag {short} is not taken; leave it out, and put quotes around what is text"
            raise _Refused(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Flow(_Document):
    """A list or mapping in flow style, without what only documents have."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            problem = "put quotes around a text that begins with & or *"
            raise _Refused(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def scan_to_next_token(self) -> None:
        while self.peek() in _BLANKS:
            self.forward()
        if self.peek() == "#":
            problem = "put quotes around a text that holds a blank and then #; a value holds no comments"
            raise _Refused(problem=problem, problem_mark=self.get_mark())


def read_document(text: str, where: str) -> yaml.Node | None:
    """Return the root of a YAML document; None where it is empty.

    Args:
        text: the document.
        where: begins the messages, such as "config file a.yaml".

    Raises:
        ConfigError: it is not YAML, or it holds tags or several documents.
    """
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Document)
    except YAMLError as error:
        raise ConfigError(f"{where}{_line_of(error)}{_reason(error)}") from None
    return node


def read_value(text: str, kinds: Kinds, where: str) -> Any:
    """Return what a text is for a key of these types.

    A key that takes text takes any text as it is, but not ``null``, and nothing in quotes, which would become
    part of it without a word. Lists and mappings are in flow style.

    Raises:
        ConfigError: the text is none of these.
    """
    plain = {bare(kind) for kind in kinds}
    nested = bool(models_of(kinds)) or any(kind is Any or get_origin(kind) in (list, dict) for kind in plain)
    if nested and (text.lstrip(_BLANKS)[:1] in ("[", "{") or (Any in plain and _QUOTED.fullmatch(text))):
        try:
            node: Any = yaml.compose(text.strip(_BLANKS), Loader=_Flow)
        except YAMLError as error:
            raise ConfigError(f"{where}{_reason(error)}") from None
        return value_of(node, kinds, where)
    return _text(text, type(None) in plain, where) if str in plain else _scalar(text, kinds)


def _text(text: str, nullable: bool, where: str) -> str | None:
    if text == "null" and nullable:
        return None
    if text == "null":
        raise ConfigError(f"{where}: the key takes text and is never null; leave it out for its default")
    if nullable and (text in _NULLS or text == "None"):
        raise ConfigError(f"{where}: write null for no value; {text!r} may mean either")
    if _QUOTED.fullmatch(text):
        raise ConfigError(
            f"{where}: the text is taken as it is, so the quotes would be part of it; leave them out"
        )
    return text


def _scalar(text: str, kinds: Kinds) -> Any:
    """Return a text that is not in quotes as the first of the types that it can be, else as it is."""
    plain = [bare(kind) for kind in kinds]
    for kind in plain:
        if get_origin(kind) is Literal:
            for value in get_args(kind):
                if str(value) == text:
                    return value
    if text in _NULLS:
        return None
    if bool in plain and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    # As Python reads numbers: 1_000 and 0x10, and not 010, which is eight for some and ten for others.
    for kind in (int, float):
        if kind in plain or (float in plain and str not in plain):
            with contextlib.suppress(ValueError):
                return int(text, 0) if kind is int else float(text)
    if Any in plain:
        if text in ("true", "false"):
            return _BOOLS[text]
        if _NUMBER.fullmatch(text):
            with contextlib.suppress(ValueError):
                return float(text) if any(c in text for c in ".eE") else int(text)
    return text


def value_of(node: yaml.Node, kinds: Kinds, where: str, parents: Sequence[yaml.Node] = ()) -> Any:
    """Return what a node of a document is for a key of these types.

    Raises:
        ConfigError: a key is given twice or is no text, or a value holds itself.
    """
    if any(node is parent for parent in parents):
        raise ConfigError(f"{where}{_line(node)}: a value holds itself (by * and &)")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.value, kinds) if node.style is None else node.value
    parents = (*parents, node)
    if isinstance(node, yaml.SequenceNode):
        return [value_of(n, below(kinds, i), where, parents) for i, n in enumerate(node.value)]
    pairs = pairs_of(node, where, parents)
    tags = {key: n.value for key, n in pairs.items() if isinstance(n, yaml.ScalarNode)}
    return {key: value_of(n, below(kinds, key, tags), where, parents) for key, n in pairs.items()}


def pairs_of(node: yaml.Node, where: str, parents: Sequence[yaml.Node] = ()) -> dict[str, yaml.Node]:
    """Return the nodes of a mapping by key; keys are always text, and those of ``<<`` come last.

    Raises:
        ConfigError: a key is given twice or is no text.
    """
    pairs: dict[str, yaml.Node] = {}
    lines: dict[str, int] = {}
    merged: list[yaml.Node] = []
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}{_line(key)}: a key must be a text, not a list or mapping")
        if key.value in lines:
            raise ConfigError(
                f"{where}{_line(key)}: the key {key.value!r} is given again (first in line "
                f"{lines[key.value]}); keep one of them"
            )
        lines[key.value] = key.start_mark.line + 1
        if key.value == "<<" and key.style is None:
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        else:
            pairs[key.value] = value
    for other in merged:
        if not isinstance(other, yaml.MappingNode) or any(other is parent for parent in parents):
            raise ConfigError(f"{where}{_line(other)}: << takes a mapping, or a list of mappings")
        for name, value in pairs_of(other, where, (*parents, other)).items():
            pairs.setdefault(name, value)
    return pairs


def _line(node: yaml.Node) -> str:
    return f", line {node.start_mark.line + 1}"


def _line_of(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"


def _reason(error: YAMLError) -> str:
    """Return what is wrong with the YAML, without pictures, on one line."""
    if isinstance(error, _Refused):
        return f": {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f" is not YAML: the character {chr(error.character)!r} is not allowed"
    parts = (getattr(error, "context", None), getattr(error, "problem", None))
    text = ", ".join(part for part in parts if part) or str(error)
    return f" is not YAML: {' '.join(text.split())}"
