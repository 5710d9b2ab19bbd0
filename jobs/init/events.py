"""What types of events mean."""

from __future__ import annotations

import re
from typing import Literal

Meaning = float | Literal["negative", "seen_only"]

_KNOWN: tuple[tuple[str, Meaning], ...] = (
    (
        r"remove|delete|dislike|unlike|hide|skip|return|refund|cancel|unsubscrib|unfollow|report|reject",
        "negative",
    ),
    (r"impression|expos|shown|display|served", "seen_only"),
    (r"purchase|buy|bought|order|transaction|checkout|conversion|sale|paid|rent|subscribe|book(ed|ing)", 1.0),
    (r"cart|basket|add", 0.7),
    (r"like|fav|save|bookmark|wish|share|follow|collect|comment|upvote", 0.8),
    (r"click|view|detail|pageview|pv|play|watch|listen|read|open|visit|stream|search|scroll|hover", 0.3),
)
"""Words of event types and what they mean; the first that is found counts."""
UNKNOWN = 0.3


def meaning(name: str) -> Meaning | None:
    """Return the weight of an event type, or negative or seen_only; None where its name says nothing."""
    text = name.lower()
    return next((value for pattern, value in _KNOWN if re.search(pattern, text)), None)


def is_known(name: str) -> bool:
    """Return whether a name is that of an event."""
    return meaning(name) is not None
