"""The feature type ``profile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from twotower.features.base import FEATURES, Feature, Learned, Reads, Side, feature_type

MAX_PROFILE_WIDTH = 1024


@feature_type
class ProfileFeature(Feature):
    """sum(w x) / max(count, 1) of an item feature x over the history, w clipped to [0, 1]."""

    reads: ClassVar[Reads] = "profile"
    sides: ClassVar[tuple[Side, ...]] = ("query",)

    type: Literal["profile"] = "profile"
    of: str
    """Name of the categorical, multi_hot, numeric or vector item feature that is averaged."""
    max_length: Annotated[int, Field(ge=1)] = 50
    """The latest items kept."""

    def check_with(self, query: Sequence[Feature], item: Sequence[Feature]) -> None:
        """Check that there is an item feature to average.

        Raises:
            ValueError: there is none of that name, or its type has no profile.
        """
        target = next((f for f in item if f.name == self.of), None)
        allowed = [name for name in FEATURES.names if FEATURES[name].profiled]
        if target is None or not target.profiled:
            raise ValueError(
                f"profile feature {self.name!r} is of {self.of!r}, which is no item feature of type "
                f"{', '.join(allowed)}"
            )

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return the width of what is averaged."""
        return items[self.of].profile_width

    @property
    def history_length(self) -> int:
        """The latest items kept."""
        return self.max_length
