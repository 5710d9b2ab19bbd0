"""JSON that may be damaged, or come from a shared bucket: read strictly, whatever is wrong with it.

What Python would pass over is refused: keys that are there twice, NaN and infinity, halves of surrogate
pairs, nesting that later readers would stumble over.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from twotower.errors import ArtefactError
from twotower.registry import of_registries

_MAX_DEPTH = 40


def parse_json(data: bytes, place: str, remedy: str) -> Any:
    """Return the value of JSON bytes.

    Args:
        data: the bytes.
        place: path or URL they are from, for the error.
        remedy: what to do where they are damaged, a sentence.

    Raises:
        ArtefactError: they are no JSON, or none that this project writes.
    """
    try:
        text = data.decode()
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
        )
        _check_depth(value)
        if "\\u" in text:
            # Half of a surrogate pair can be neither printed nor written.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{place} is damaged ({error}). {remedy}") from None
    return value


def read_json(path: Path, remedy: str) -> Any:
    """Return the value of a JSON file.

    Raises:
        ArtefactError: it is not there, can not be read, or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{path} can not be read ({error.strerror}). {remedy}") from None
    return parse_json(data, str(path), remedy)


def check_shape(value: Any, shape: Any, place: str, remedy: str) -> Any:
    """Check a value of JSON against a type that pydantic understands; returns what that makes of it.

    Raises:
        ArtefactError: naming the first thing that does not fit.
    """
    try:
        return _adapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise ArtefactError(f"{place} is damaged ({reason[:300]}). {remedy}") from None


@of_registries
@functools.lru_cache(maxsize=64)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, one in pairs:
        if key in value:
            raise ValueError(f"the key {key[:60]!r} is there twice")
        value[key] = one
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is too large")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        containers = [v for v in level if isinstance(v, (dict, list))]
        level = [one for v in containers for one in (v.values() if isinstance(v, dict) else v)]
