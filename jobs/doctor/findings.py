"""What the doctor finds: one line each, with what to do where something is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """What it belongs to, such as disk."""
    name: str
    """What was looked at."""
    state: State
    """A problem stops a job or the service; a warning makes it slow, or may stop it."""
    value: str
    """What was found."""
    remedy: str | None = None
    """What to do; None where all is well."""


def ok(area: str, name: str, value: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(area, name, "ok", value)


def warning(area: str, name: str, value: str, remedy: str) -> Finding:
    """Return a finding that may do harm."""
    return Finding(area, name, "warning", value, remedy)


def problem(area: str, name: str, value: str, remedy: str) -> Finding:
    """Return a finding that stops a job or the service."""
    return Finding(area, name, "problem", value, remedy)


def gib(num_bytes: float) -> str:
    """Return a size as people read it."""
    return f"{num_bytes / (1 << 30):,.1f} GiB"
