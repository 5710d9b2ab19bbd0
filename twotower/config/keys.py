"""What a key of the configuration takes, read from the models: its type, the keys below it, and in words."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from twotower.registry import Accepted, annotation_of

Kinds = tuple[Any, ...]
"""The types that a key takes, each perhaps with bounds (``Annotated``); ``Any`` takes every value."""


def kinds_of(annotation: Any) -> Kinds:
    """Return the alternatives of an annotation, those of unions inside unions too."""
    origin = get_origin(annotation)
    for fact in get_args(annotation)[1:] if origin is Annotated else ():
        if isinstance(fact, Accepted):
            return kinds_of(fact.annotation())
    if origin in (Union, types.UnionType):
        return tuple(kind for part in get_args(annotation) for kind in kinds_of(part))
    if origin is Annotated and get_origin(get_args(annotation)[0]) in (Union, types.UnionType):
        return kinds_of(get_args(annotation)[0])
    return (annotation,)


def field_kinds(info: FieldInfo) -> Kinds:
    """Return the alternatives of a field; bounds that pydantic took off its annotation are put back."""
    kinds = kinds_of(annotation_of(info))
    bounds = [fact for fact in info.metadata if not isinstance(fact, Accepted)]
    if not bounds or len(kinds) > 1:
        return kinds
    return (Annotated[kinds[0], *bounds],)


def bare(kind: Any) -> Any:
    """Return an alternative without its bounds."""
    return bare(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def models_of(kinds: Kinds) -> list[type[BaseModel]]:
    """Return the sections among the alternatives."""
    found = [bare(kind) for kind in kinds]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]


def tag_of(model: type[BaseModel]) -> tuple[str, str] | None:
    """Return the key and the value that tell a section from the others of its union."""
    for name, info in model.model_fields.items():
        values = get_args(info.annotation)
        if get_origin(info.annotation) is Literal and len(values) == 1:
            return name, str(values[0])
    return None


def tagged(kinds: Kinds) -> dict[str, type[BaseModel]]:
    """Return the sections of a union by their tags; none where there is no choice."""
    models = models_of(kinds)
    tags = [tag_of(model) for model in models]
    return {} if len(models) < 2 else {t[1]: m for t, m in zip(tags, models, strict=True) if t is not None}


def sections(kinds: Kinds, values: Mapping[str, Any]) -> list[type[BaseModel]]:
    """Return the sections that these values may be of: one where they say which."""
    by_tag = tagged(kinds)
    for tag, model in by_tag.items():
        found = tag_of(model)
        if found is not None and values.get(found[0]) == tag:
            return [model]
    return list(by_tag.values()) or models_of(kinds)


def below(kinds: Kinds, part: str | int, values: Any = None) -> Kinds:
    """Return the types of what is below a key; ``Any`` where nothing is known of it.

    Args:
        kinds: of the key.
        part: a key of a section or mapping, or a position in a list.
        values: of the key, for the tag in them.
    """
    found: list[Any] = []
    for model in sections(kinds, values if isinstance(values, Mapping) else {}):
        if part in model.model_fields:
            found += [k for k in field_kinds(model.model_fields[str(part)]) if k not in found]
    for kind in map(bare, kinds):
        origin, parts = get_origin(kind), get_args(kind)
        if origin in (list, dict):
            found += kinds_of(parts[-1])
    return tuple(found) or (Any,)


def describe(kinds: Kinds) -> str:
    """Return in words what a key takes, such as "an integer of at least 1, or null"."""
    by_tag = tagged(kinds)
    words = [_words(kind) for kind in kinds if bare(kind) not in by_tag.values()]
    if by_tag:
        key = (tag_of(next(iter(by_tag.values()))) or ("kind", ""))[0]
        words.insert(0, f"a section whose {key} is one of {', '.join(by_tag)}")
    *first, last = words
    return f"{', '.join(first)}, or {last}" if first else last


def _words(kind: Any) -> str:
    plain, bounds = bare(kind), _bounds(kind)
    origin, parts = get_origin(plain), get_args(plain)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin is list:
        each = "" if parts[0] is Any else f", each {describe(kinds_of(parts[0]))}"
        return f"a list{_length(bounds, 'entry', 'entries')}{each}"
    if origin is dict:
        return f"keys with values, each {describe(kinds_of(parts[1]))}"
    if isinstance(plain, type) and issubclass(plain, BaseModel):
        return f"a section with keys such as {', '.join(list(plain.model_fields)[:3])}"
    if plain is str:
        pattern = bounds.get("pattern")
        form = f" that matches {pattern}" if pattern else ""
        return f"text{_length(bounds, 'character', 'characters')}{form}"
    if plain in (int, float):
        return f"{'an integer' if plain is int else 'a number'}{_range(bounds)}"
    return {bool: "true or false", type(None): "null"}.get(plain, "any value")


def _bounds(kind: Any) -> dict[str, Any]:
    """Return the bounds of an alternative by their names in annotated_types and pydantic."""
    found: dict[str, Any] = {}
    metadata: Sequence[Any] = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    for entry in metadata:
        for fact in entry.metadata if isinstance(entry, FieldInfo) else [entry]:
            for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern"):
                value = getattr(fact, name, None)
                if value is not None:
                    found[name] = value
    return found


def _range(bounds: Mapping[str, Any]) -> str:
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    forms = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    words = [f"{form} {bounds[name]}" for name, form in forms.items() if name in bounds]
    return "".join(f" {word}" for word in [" and ".join(words)] if word)


def _length(bounds: Mapping[str, Any], one: str, several: str) -> str:
    least, most = bounds.get("min_length"), bounds.get("max_length")
    if least is None and most is None:
        return ""
    if least == most:
        return f" of {least} {one if least == 1 else several}"
    words = [f"at least {least}"] if least is not None else []
    words += [f"at most {most}"] if most is not None else []
    return f" of {' and '.join(words)} {one if (most or least) == 1 else several}"
