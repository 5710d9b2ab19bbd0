"""The feature type ``history``, and the sizes of its transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from twotower.features.base import (
    STRICT,
    Counts,
    Feature,
    Learned,
    Reads,
    RowsAre,
    Side,
    feature_type,
)
from twotower.features.ids import ITEM_IDS


class TransformerSpec(BaseModel):
    """A causal transformer over the items of a history, with learned positions."""

    model_config = STRICT

    blocks: Annotated[int, Field(ge=1, le=32)] = 2
    """Blocks of attention and a feed-forward layer."""
    heads: Annotated[int, Field(ge=1)] = 1
    """Attention heads; must divide the feature's ``dim``."""
    feed_forward: Annotated[int, Field(ge=1, le=16)] = 4
    """Width of the feed-forward layers as a multiple of ``dim``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout on the embeddings and on what each layer adds."""
    time_gaps: bool = False
    """Read how long before an item the one before it came, by powers of two of seconds; needs times."""


@feature_type
class HistoryFeature(Feature):
    """Item id embeddings of the user's latest items before the query's time, pooled or encoded.

    Of items that training did not know, vectors made from their features are read.
    """

    reads: ClassVar[Reads] = "history"
    sides: ClassVar[tuple[Side, ...]] = ("query",)

    type: Literal["history"] = "history"
    max_length: Annotated[int, Field(ge=1)] = 50
    """The latest items kept."""
    dim: Annotated[int, Field(ge=1)] = 64
    """Width of the embedding; with ``share: true`` it must be that of the item id feature."""
    share: bool = True
    """Use the item tower's id embedding table (true) or a table of its own (false)."""
    pooling: Literal["auto", "mean", "weighted", "recency", "attention", "transformer"] = "auto"
    """Mean; mean weighted by interaction weight; or by ``decay ** (steps before the latest)``; mean with
    learned weights of items and of steps before the latest; or a causal transformer's output at the latest
    item. auto is recency for data with times, and mean without."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Weight of an item relative to the next later one, for ``recency``, and for ``attention`` at first."""
    transformer: TransformerSpec = TransformerSpec()
    """Sizes of the transformer."""
    item_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of a training query's items that are left out of it, drawn anew in each step, so that histories
    are not learned by heart; a mean's weights go to those that stay, an encoder reads zeros instead. 0.5 for
    means and 0 for encoders, which have dropout of their own, when not given."""

    def fitted(self, has_times: bool) -> Self:
        """Return the declaration for data with or without times."""
        if self.pooling != "auto":
            return self
        return self.model_copy(update={"pooling": "recency" if has_times else "mean"})

    @property
    def left_out(self) -> float:
        """Share of a training query's items that are left out of it."""
        if self.item_dropout is None:
            return 0.0 if self.encoded else 0.5
        return self.item_dropout

    @property
    def encoded(self) -> bool:
        """Whether its items are read as a sequence, by an encoder with weights of its own."""
        return self.pooling in ("attention", "transformer")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pooling == "transformer" and self.dim % self.transformer.heads:
            raise ValueError(
                f"history feature {self.name!r} has dim {self.dim}, which its {self.transformer.heads} "
                "attention heads do not divide; change dim or transformer.heads"
            )
        return self

    def check_with(self, query: Sequence[Feature], item: Sequence[Feature]) -> None:
        """Check that there is an item id table of the same width, where it is shared.

        Raises:
            ValueError: there is none.
        """
        if not self.share:
            return
        ids = next((f for f in item if f.reads == "id"), None)
        if ids is None:
            raise ValueError(
                f"history feature {self.name!r} shares the item id table, but features.item has no "
                "feature of type id; add one or set share: false"
            )
        if ids.width({}) != self.dim:
            raise ValueError(
                f"history feature {self.name!r} has dim {self.dim} and shares the item id table of dim "
                f"{ids.width({})}; give both the same dim or set share: false"
            )

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return the width of the embedding."""
        return self.dim

    def table_name(self, side: Side) -> str:
        """Return the name of the table of item ids, or of its own."""
        return ITEM_IDS if self.share else super().table_name(side)

    def table_rows(self, side: Side, learned: Learned, counts: Counts) -> int | None:
        """Return all items and the unknown one; None where the table is shared."""
        return None if self.share else counts.num_items + 1

    def rows_are(self, side: Side) -> RowsAre | None:
        """Return that a row of its own table is an item."""
        return None if self.share else "items"

    @property
    def history_length(self) -> int:
        """The latest items kept."""
        return self.max_length

    @property
    def sequence_length(self) -> int:
        """The same where they are read as a sequence."""
        return self.max_length if self.encoded else 0

    @property
    def time_gaps(self) -> bool:
        """Whether it reads the times of a history."""
        return self.pooling == "transformer" and self.transformer.time_gaps
