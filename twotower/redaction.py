"""Secrets out of what is stored or shown: passwords and tokens in URLs, connection strings and headers."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SECRET = (
    r"(?:token|password|passwd|pwd|secret|signature|sig|api[-_]?key|access[-_]?key|key[-_]?id|credential)"
)
# Up to the last @ of what stands before the path; a password may hold slashes that nobody has escaped.
_USERINFO = re.compile(
    r"([a-z][a-z0-9+.-]*://)(?:[^\s/?#\"'<>]*@|[^\s/?#@:\"'<>]*:(?!\d+(?:[/?#]|$))[^\s\"'<>]*@)",
    re.IGNORECASE,
)
_PARAMETER = re.compile(rf"([?&;][^=&;\s]*{_SECRET}=)[^&;\s\"'#<>]+", re.IGNORECASE)
_SETTING = re.compile(rf"((?<![?&;])\b{_SECRET}\s*=\s*)[^\s&;,\"'<>]+", re.IGNORECASE)
_HEADER = re.compile(r"(\bbearer\s+|\bauthorization:\s*basic\s+)[a-z0-9._~+/=-]{8,}", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return a text with every secret in it hidden; what else it says stays.

    Hidden are user and password of a URL (``https://user:password@host``), parameters and settings whose
    names say that they are secret (``?token=...``, ``password=...``), and the values of bearer headers.
    """
    if "=" in text:
        text = _SETTING.sub(rf"\1{HIDDEN}", _PARAMETER.sub(rf"\1{HIDDEN}", text))
    if "@" in text:
        text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    return _HEADER.sub(rf"\1{HIDDEN}", text)


def redacted_values(value: Any) -> Any:
    """Return plain JSON values with the secrets in all texts hidden."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: redacted_values(one) for key, one in value.items()}
    if isinstance(value, list):
        return [redacted_values(one) for one in value]
    return value
