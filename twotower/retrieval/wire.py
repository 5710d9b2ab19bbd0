"""How the parts of a request are written in JSON: ids, times, histories; and what a field is for people.

Nothing is coerced: 42.0 and true are no ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from twotower.ids import CONTROL, MAX_ID_LENGTH, id_problem
from twotower.schema import MAX_WEIGHT

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_KEYS = 20

ALLOWED_ID = f"text of 1 to {MAX_ID_LENGTH} characters without control characters, or an integer"
ALLOWED_TIME = "ISO 8601 text such as 2026-01-31T10:00:00Z (without a zone: UTC)"
ALLOWED_FEATURES = "an object of feature values by column name, of the user or of an item of the history"
ALLOWED_ENTRY = {
    "item_id": ALLOWED_ID,
    "time": f"{ALLOWED_TIME}; or null",
    "weight": f"a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}; 1.0 when not given",
    "features": ALLOWED_FEATURES,
}
"""What each key of an item of a history may hold, for people."""


@dataclass(frozen=True)
class Http:
    """Annotation of a field of ``Query``: how it is written in a request. All that HTTP needs of it."""

    kind: Any
    """Its type in JSON, as pydantic takes it."""
    description: str
    """What it means, for the OpenAPI document."""
    allowed: str = ""
    """What it may hold, for people."""
    most: str | None = None
    """The limit of ``serve.limits`` on the entries of a list."""


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("is no id")
    text = str(value)
    if problem := id_problem(text):
        raise ValueError(problem)
    return text


def _time(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError("is no time")
    try:
        time = datetime.fromisoformat(value)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        return (time - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        raise ValueError("is no ISO 8601 time") from None


def _features(value: Any) -> Any:
    if value is None:
        # What a file has that describes other items only.
        return {}
    if isinstance(value, dict):
        flat = [v for each in value.values() for v in (each if isinstance(each, list) else [each])]
        if any(isinstance(v, (dict, list)) for v in flat):
            raise ValueError("is nested more than a list deep")
    return value


def _entry(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MOST_KEYS:
        raise ValueError(f"has {len(value)} keys")
    return value if isinstance(value, dict) else {"item_id": value}


# Larger integers are fractions to the parser of JSON.
_ID_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH, "pattern": f"^[^{CONTROL[1:-1]}]*$"},
        {"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 64) - 1},
    ]
}
_TIME_SCHEMA = {"type": "string", "format": "date-time"}
Id = Annotated[str, BeforeValidator(_id), WithJsonSchema(_ID_SCHEMA)]
# A list stops at its first wrong entry: it may be long, and all of it wrong in the same way.
Ids = Annotated[list[Id], Field(fail_fast=True)]
Time = Annotated[int, BeforeValidator(_time), WithJsonSchema(_TIME_SCHEMA)]


class HistoryEntry(BaseModel):
    """One item of a history."""

    model_config = STRICT

    item_id: Id
    """The item."""
    time: Time | None = None
    """When it happened; without a time it counts at every ``at``."""
    weight: Annotated[float, Field(allow_inf_nan=False, ge=-MAX_WEIGHT, le=MAX_WEIGHT)] = 1.0
    """Weight of the interaction."""
    features: Annotated[dict[str, Any], BeforeValidator(_features)] = {}
    """Values by column of the item table: what the item is read by where the model does not know it."""


_ENTRY_SCHEMA = {
    "anyOf": [
        *_ID_SCHEMA["anyOf"],
        {
            "type": "object",
            "properties": {
                "item_id": _ID_SCHEMA,
                "time": _TIME_SCHEMA,
                "weight": {
                    "type": "number",
                    "default": 1.0,
                    "minimum": -MAX_WEIGHT,
                    "maximum": MAX_WEIGHT,
                },
                "features": {"anyOf": [{"type": "object"}, {"type": "null"}]},
            },
            "required": ["item_id"],
            "additionalProperties": False,
        },
    ]
}

History = Annotated[
    list[Annotated[HistoryEntry, BeforeValidator(_entry), WithJsonSchema(_ENTRY_SCHEMA)]],
    Field(fail_fast=True),
]
