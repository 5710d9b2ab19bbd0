"""What a prepared dataset holds and what was left out of it, in lines for a person."""

from __future__ import annotations

from twotower.data.dataset import Dataset

_MANY_TIES = 0.01
"""A smaller share of positives with equal times is not worth a line."""
_TIES = {
    "together": "no split by time parts them, and none of them knows another (split.ties: order takes the "
    "order of the rows for that of time)",
    "order": "split.ties: order takes the order of the rows for that of time",
}


def summary(dataset: Dataset) -> list[str]:
    """Return the counts of a dataset's manifest as lines, those that matter."""
    counts = dataset.counts
    splits, kinds = counts["splits"], counts["kinds"]
    lines = [
        f"{counts['users']:,} users, {counts['catalogue_items']:,} items, {counts['interactions']:,} "
        "interactions "
        f"(train {splits['train']:,}, validation {splits['validation']:,}, test {splits['test']:,})"
    ]
    impressions = counts.get("impressions", 0)  # not counted in a source without them
    others = {
        "negative": kinds["negative"] - impressions,
        "impressions": impressions,
        "seen only": kinds["seen_only"],
    }
    others |= {
        "repeats reduced": counts["repeats"],
        "bad rows left out": counts["bad_rows"],
        "outside the window": counts["outside_window"],
        "below min_interactions": counts["below_min_interactions"],
        "impressions left out with their interactions or items": counts.get("impressions_left_out", 0),
    }
    shown = ", ".join(f"{name} {count:,}" for name, count in others.items() if count)
    if shown:
        lines.append(shown)
    ties, positive = counts.get("ties", {"positives": 0, "users": 0}), kinds["positive"]
    if ties["positives"] > _MANY_TIES * positive:
        lines.append(
            f"{ties['positives']:,} positives of {ties['users']:,} users share their time with another of "
            f"the same user, as in a basket or a day; {_TIES[dataset.ties]}"
        )
    if counts["outside_items"]:
        lines.append(
            f"{counts['outside_items']:,} items are not in the item table: their "
            f"{counts['interactions_outside_catalogue']:,} interactions count in histories, they are "
            "never recommended"
        )
    return lines
