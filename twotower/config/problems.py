"""What is wrong with values, in words for the person who wrote them: the key, the rule, what was given."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from twotower.config.keys import Kinds, bare, below, describe, models_of, sections, tag_of, tagged

_MAX_SHOWN = 80


def problems(errors: Sequence[Any], model: type[BaseModel]) -> list[str]:
    """Return a line for each key that pydantic refused, in their order.

    Args:
        errors: of ``ValidationError.errors()``.
        model: what was validated.
    """
    lines: dict[tuple[str, str], str] = {}
    for error in errors:
        path, kinds, parent = _place(error["loc"], model)
        where = ".".join(path) or "config"
        # A union complains once for each of its types; of rules of our own several may be broken at once.
        rule = error["msg"] if error["type"] == "value_error" else ""
        if (where, rule) not in lines:
            lines[where, rule] = _line(error, where, path, kinds, parent)
    return list(lines.values())


def shown(value: Any) -> str:
    """Return a value as a person would write it, on one line and shortened."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, (list, dict)) or value is None or isinstance(value, bool):
        text = json.dumps(value, default=str, ensure_ascii=False)
    else:
        text = str(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _place(location: Sequence[Any], model: type[BaseModel]) -> tuple[list[str], Kinds, Kinds]:
    """Return the key that pydantic's location is in words of the file, its types and those it is below."""
    path: list[str] = []
    kinds: Kinds = (model,)
    parent: Kinds = kinds
    for part in location:
        if part in (by_tag := tagged(kinds)):
            # pydantic names the member of a union here; it is no key that a person wrote.
            kinds = (by_tag[part],)
        elif _takes(kinds, part):
            parent, kinds = kinds, below(kinds, part)
            path.append(str(part))
        else:
            # An unknown key of a section, or the name of a type of a union.
            if models_of(kinds):
                parent, kinds = kinds, (Any,)
                path.append(str(part))
            break
    return path, kinds, parent


def _takes(kinds: Kinds, part: Any) -> bool:
    """Return whether there is something below a key of that name or position."""
    if isinstance(part, int):
        return any(get_origin(bare(kind)) is list for kind in kinds)
    if any(part in m.model_fields for m in sections(kinds, {})):
        return True
    return any(get_origin(bare(kind)) is dict for kind in kinds)


def _line(error: Any, where: str, path: list[str], kinds: Kinds, parent: Kinds) -> str:
    given, kind = error["input"], error["type"]
    if kind == "extra_forbidden":
        known = [name for m in models_of(parent) for name in m.model_fields]
        return f"{where}: there is no such key; {_nearest(path[-1], known) or _allowed(sorted(known))}"
    if kind == "missing":
        return f"{where}: it is missing; give {describe(kinds)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_line(where, kinds, given)
    if kind in ("value_error", "assertion_error"):
        message = " ".join(error["msg"].removeprefix("Value error, ").split())
        scalar = isinstance(given, (str, int, float, bool)) or given is None
        line = message if not path else f"{where}: {message}"
        return f"{line} (got {shown(given)})" if scalar else line
    if kind == "string_unicode":
        return f"{where}: must be text in UTF-8 (got {shown(given)})"
    if kind == "finite_number":
        return f"{where}: must be a finite number (got {shown(given)})"
    line = f"{where}: must be {describe(kinds)} (got {shown(given)})"
    hint = None if kind.startswith(("greater_than", "less_than")) else _hint(given, kinds)
    return f"{line}; {hint}" if hint else line


def _tag_line(where: str, kinds: Kinds, given: Any) -> str:
    by_tag = tagged(kinds)
    key = (tag_of(next(iter(by_tag.values()))) or ("kind", ""))[0]
    if not isinstance(given, dict) or key not in given:
        return f"{where}.{key}: it is missing; give one of {', '.join(by_tag)}"
    tag = given[key]
    line = f"{where}.{key}: must be one of {', '.join(by_tag)} (got {shown(tag)})"
    near = _nearest(tag, list(by_tag))
    return f"{line}; {near}" if near else line


def _hint(given: Any, kinds: Kinds) -> str | None:
    plain = [bare(kind) for kind in kinds]
    lists = [kind for kind in plain if get_origin(kind) is list]
    if lists and isinstance(given, (str, int, float)) and not isinstance(given, bool):
        parts = [part.strip() for part in str(given)[:_MAX_SHOWN].strip("[]() ").split(",")]
        numbers = {bare(kind) for kind in below((lists[0],), 0)} <= {int, float}
        fits = all(part.replace(".", "").isdecimal() for part in parts) if numbers else all(parts)
        return f"write [{', '.join(parts)}]" if fits else None
    if isinstance(given, str):
        choices = [str(v) for kind in plain if get_origin(kind) is Literal for v in get_args(kind)]
        return _nearest(given, choices) or (_number_hint(given) if int in plain or float in plain else None)
    if isinstance(given, float) and int in plain and given.is_integer():
        return f"write {int(given)}"
    return None


def _number_hint(given: str) -> str | None:
    """Return how a number would be written that somebody wrote otherwise."""
    text = given.strip("'\" ").replace(",", "")
    try:
        value = float(text)
    except ValueError:
        return None
    if not value.is_integer() or abs(value) >= 1e15:
        return None
    return f"write {int(value)}" + (" without quotes" if given.strip("'\" ") == str(int(value)) else "")


def _nearest(name: Any, known: Sequence[str]) -> str | None:
    near = difflib.get_close_matches(str(name)[:_MAX_SHOWN], known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None


def _allowed(names: Sequence[str]) -> str:
    return f"allowed: {', '.join(names)}"
