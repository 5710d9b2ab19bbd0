"""What a model has to beat, from the same data, on the same users, candidates and masks.

``popularity`` and ``truth`` rank by themselves; ``fit`` fits the others (``neighbours``, ``ease``, ``ials``)
to files, which ``rankers`` maps into memory. ``docs/evaluation.md`` says what each knows.
"""

from twotower.evaluation.baselines.popularity import (
    PopularityRanker,
    popular_order,
    popularity_counts,
    recent_order,
)
from twotower.evaluation.baselines.truth import TrueRanker

__all__ = ["PopularityRanker", "TrueRanker", "popular_order", "popularity_counts", "recent_order"]
