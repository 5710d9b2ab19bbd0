"""What an id may be, wherever ids enter: rows of tables and logs, updates, queries."""

from __future__ import annotations

import re

MAX_ID_LENGTH = 1024
"""Characters of an id."""
CONTROL = "[\\x00-\\x1f\\x7f-\\x9f\u2028\u2029]"
"""Line breaks and other control characters, as a regular expression: logs and files have an id in a line."""
_CONTROL = re.compile(CONTROL)
HAS_CONTROL = "text with a line break or another control character"
TOO_LONG = f"more than {MAX_ID_LENGTH:,} characters"


def id_problem(text: str) -> str | None:
    """Return what is wrong with an id, such as ``has more than 1,024 characters``; None where it is one."""
    if not 1 <= len(text) <= MAX_ID_LENGTH:
        return f"has {len(text)} characters"
    return "has a line break or another control character" if _CONTROL.search(text) else None
