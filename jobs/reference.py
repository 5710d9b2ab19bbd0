"""The configuration as help text and as a page: every key with its type, default and docstring.

``python -m jobs.reference > docs/configuration.md`` writes the page.
"""

from __future__ import annotations

import json
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from twotower.config import Config
from twotower.registry import Accepted, annotation_of

_WIDTH = 110
_NAMES = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "any value",
}


def config_reference() -> str:
    """Return one entry for each key of the configuration, then one for each key of a feature."""
    lines = ["configuration (keys of the YAML file, or --set KEY=VALUE):"]
    features: dict[str, type[BaseModel]] = {}
    for key, info in _walk(Config, "", features):
        lines += _entry(key, info)
    lines += ["", "features (entries of features.query and features.item, by type):"]
    for tag, model in features.items():
        lines.append(f"  type: {tag}    {_first_line(model)}")
        lines += [
            line
            for name, info in model.model_fields.items()
            if name != "type"
            for line in _entry(f"  {name}", info)
        ]
    return "\n".join(lines)


def config_page() -> str:
    """Return the same as a page of the documentation, in Markdown, a table for each section."""
    features: dict[str, type[BaseModel]] = {}
    sections: dict[str, list[str]] = {}
    for key, info in _walk(Config, "", features):
        # A section of its own for each kind of a source, such as data.source[files].
        section = key.partition("]")[0] + "]" if "[" in key else key.partition(".")[0]
        sections.setdefault(section if "." in key else "", []).append(_row(key, info))
    lines = [_PAGE_HEAD]
    for section, rows in sections.items():
        title = f"`{section}`" if section else "Top level"
        about = _first_line(_model_of(section)) if section in Config.model_fields else ""
        lines += [f"## {title}", "", *([about, ""] if about else []), *_TABLE, *rows, ""]
    lines += ["## Features", "", "Entries of `features.query` and `features.item`, by `type`.", ""]
    for tag, model in features.items():
        rows = [_row(name, info) for name, info in model.model_fields.items() if name != "type"]
        lines += [f"### `type: {tag}`", "", _first_line(model), "", *_TABLE, *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


_PAGE_HEAD = """# Configuration

Every key of the YAML file, and of `--set KEY=VALUE`, with its type, default and meaning. `KEY[kind].NAME` is
a key that only one kind has, and `NAME` in a key stands for a name that you choose. [Own data](own-data.md)
has examples, and says how values are written.

`python -m jobs.reference > docs/configuration.md` makes this page from the models in `twotower/config/`.
`--help` of every job shows the same.
"""
_TABLE = ("| key | type | default | meaning |", "|---|---|---|---|")


def _model_of(section: str) -> type[BaseModel]:
    """Return the model of a section of the configuration, or of what stands in its place."""
    models = _models(Config.model_fields[section].annotation)
    return models[0] if len(models) == 1 else BaseModel


def _row(key: str, info: FieldInfo) -> str:
    """Return a key as a row of a table in Markdown."""
    cells = [f"`{key}`", _type_name(info), _default(info), " ".join((info.description or "").split())]
    # Double backquotes are those of docstrings; what looks like a tag would be one.
    texts = [cell.replace("``", "`").replace("|", "\\|").replace("<", "&lt;") for cell in cells]
    return f"| {' | '.join(texts)} |"


def _default(info: FieldInfo) -> str:
    """Return a key's default in words; empty for a section."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    return "" if _models(info.annotation) else f"`{_plain(value)}`" if _plain(value) else "empty"


def config_keys() -> list[str]:
    """Return the dotted keys that ``--set`` takes, without those of only one kind of source or feature."""
    keys = [key for key, _ in _walk(Config, "", {})]
    return [key for key in keys if "[" not in key and "NAME" not in key]


def _walk(
    model: type[BaseModel], prefix: str, features: dict[str, type[BaseModel]]
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the keys below a model; members of tagged lists are collected instead."""
    for name, info in model.model_fields.items():
        if name == "kind" and "[" in prefix:
            continue  # the tag, already in the key
        key = f"{prefix}{name}"
        members = _models(annotation_of(info))
        if get_origin(info.annotation) is list and members:
            features.update((_tag(member), member) for member in members)
            yield key, info
        elif get_origin(info.annotation) is dict and members:
            yield key, info
            for member in members:
                yield from _walk(member, f"{key}.NAME.", features)
        elif members and len(members) == 1:
            yield from _walk(members[0], f"{key}.", features)
        elif members:
            yield f"{key}.kind", _tag_field(members, info)
            for member in members:
                yield from _walk(member, f"{key}[{_tag(member)}].", features)
        else:
            yield key, info


def _entry(key: str, info: FieldInfo) -> list[str]:
    if info.is_required():
        default = "required"
    else:
        value = info.get_default(call_default_factory=True, validated_data={})
        default = "" if _models(annotation_of(info)) else f"default {_plain(value)}"
    facts = "; ".join(part for part in (_type_name(info), default) if part)
    text = textwrap.wrap(f"{info.description or ''} [{facts}]", _WIDTH - 6)
    return [f"  {key}", *(f"      {line}" for line in text)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models inside an annotation: itself, the members of a union, or those of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Literal:
        return []
    for fact in get_args(annotation)[1:] if get_origin(annotation) is Annotated else ():
        if isinstance(fact, Accepted):
            return _models(fact.annotation())
    return [model for part in get_args(annotation) for model in _models(part)]


def _tag(model: type[BaseModel]) -> str:
    field = model.model_fields.get("kind") or model.model_fields["type"]
    return str(get_args(field.annotation)[0])


def _tag_field(members: list[type[BaseModel]], info: FieldInfo) -> FieldInfo:
    """Return a field for the tag that tells the members of a union apart."""
    tags = tuple(_tag(member) for member in members)
    default = _tag(type(info.default)) if isinstance(info.default, BaseModel) else ...
    annotation: Any = Literal[tags]
    return FieldInfo(annotation=annotation, default=default, description=info.description)


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n")[0]


def _type_name(value: Any) -> str:
    annotation: Any = annotation_of(value) if isinstance(value, FieldInfo) else value
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in parts)
    if origin is list:
        return "list of features" if _models(annotation) else f"list of {_type_name(parts[0])}"
    if origin is dict:
        return (
            f"map of {_type_name(parts[0])} to {'a section' if _models(parts[1]) else _type_name(parts[1])}"
        )
    return _NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _plain(value: Any) -> str:
    if value is PydanticUndefined:
        return "none"
    if isinstance(value, str):
        return value
    return json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)


if __name__ == "__main__":
    sys.stdout.write(config_page())
