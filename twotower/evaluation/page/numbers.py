"""Numbers and names as people read them."""

from __future__ import annotations

import math
import unicodedata
from datetime import UTC, datetime
from typing import Any, TypeGuard

RANKERS = {
    "model": "Two towers",
    "popularity": "Popularity",
    "recent_popularity": "Recent popularity",
    "item_knn_cosine": "Item-kNN, cosine",
    "item_knn_tfidf": "Item-kNN, TF-IDF",
    "ease": "EASE\N{MODIFIER LETTER CAPITAL R}",
    "ials": "iALS",
    "true_model": "True model",
    "compared": "Compared model",
}
"""What is shown of each ranker, in the order in which their colours are given out."""
_METRICS = {
    "recall": "Recall",
    "ndcg": "NDCG",
    "mrr": "MRR",
    "hit_rate": "Hit rate",
    "map": "MAP",
    "precision": "Precision",
    "coverage": "Coverage",
    "gini": "Gini",
    "mean_popularity": "Mean popularity",
    "novelty": "Novelty",
    "diversity": "Diversity",
    "same_top10": "Same top 10, users",
}
NONE = "\N{EN DASH}"
APART = "\N{NO-BREAK SPACE}"
"""Between a number and its unit."""
_NO_TEXT = ("Cc", "Cs", "Co", "Cn")
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Turns of the direction of writing, which would reach beyond the title that has them."""


def ranker_name(key: str) -> str:
    """Return what a ranker is called."""
    return RANKERS.get(key, clean(key).replace("_", " ").capitalize())


def mentioned(key: str) -> str:
    """Return what a ranker is called inside a sentence: with a small letter, unless its name is letters."""
    name = ranker_name(key)
    return name if name[1:2].isupper() else name[:1].lower() + name[1:]


def metric_name(key: str) -> str:
    """Return what a metric is called, its cut-off included: ``ndcg@10`` is NDCG@10."""
    name, at, k = key.partition("@")
    return _METRICS.get(name, clean(name).replace("_", " ").capitalize()) + at + k


def parts_of(key: str) -> tuple[str, int | None]:
    """Return the metric and the cut-off of a name such as ``recall@10``."""
    name, _, k = key.partition("@")
    return name, int(k) if k.isdecimal() else None


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value of a report is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def score(value: Any) -> str:
    """Return a metric with four digits, as tables of papers have it; large ones as a count."""
    if not is_number(value):
        return NONE
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def count(value: Any) -> str:
    """Return a whole number with thousands apart."""
    return f"{value:,.0f}" if is_number(value) else NONE


def share(value: Any) -> str:
    """Return a share in percent."""
    if not is_number(value):
        return NONE
    percent = 100 * value
    return f"{percent:.0f}%" if percent >= 99.95 or percent == 0 else f"{percent:.1f}%"


def milliseconds(value: Any) -> str:
    """Return a time, with the digits that mean something."""
    if not is_number(value):
        return NONE
    return f"{value:.2f}{APART}ms" if value < 10 else f"{value:,.0f}{APART}ms"


def short(value: float) -> str:
    """Return a number of an axis."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}"


def minute(value: Any) -> str:
    """Return a time in ISO format to the minute; what is none as it is."""
    try:
        return datetime.fromisoformat(str(value)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return clean(value)


def moment(microseconds: Any) -> str:
    """Return a time in microseconds UTC as a date and a time; empty where it is none."""
    try:
        return datetime.fromtimestamp(microseconds / 1e6, UTC).strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def straight(text: str) -> str:
    """Return text of several lines without turns of the direction of writing."""
    return "".join(" " if c in _TURNS else c for c in text)


def clean(value: Any, most: int = 80) -> str:
    """Return what somebody else wrote on one line, without what is no text, and not longer than so much."""
    kept = (" " if unicodedata.category(c) in _NO_TEXT or c in _TURNS else c for c in str(value))
    line = " ".join("".join(kept).split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
