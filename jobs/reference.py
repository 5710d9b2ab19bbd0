"""The configuration as help text: every key with its type, default and docstring, read from the models."""

from __future__ import annotations

import json
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
