"""The feature type ``text``."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from twotower.features.base import ColumnFeature, Counts, Fit, Learned, Side, feature_type

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

_WORD = re.compile(r"\w+")


@feature_type
class TextFeature(ColumnFeature):
    """Words and character n-grams hashed into buckets, embedded and averaged; nothing is downloaded."""

    type: Literal["text"] = "text"
    dim: Annotated[int, Field(ge=1)] = 32
    """Width of the embedding."""
    buckets: Annotated[int, Field(ge=2)] = 16_384
    """Rows of the embedding table."""
    ngram: Annotated[int, Field(ge=1)] = 4
    """Length of the character n-grams taken beside whole words."""
    max_length: Annotated[int, Field(ge=1)] = 64
    """The most hashed pieces kept for one row."""

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return the width of the embedding."""
        return self.dim

    def table_rows(self, side: Side, learned: Learned, counts: Counts) -> int:
        """Return the buckets."""
        return self.buckets

    @classmethod
    def store(cls, side: Side, name: str, column: pa.Array, specs: Sequence[Any]) -> pa.Array:
        """Return the column as text."""
        from twotower.features.columns import checked
        from twotower.values import as_text

        return checked(side, specs[0], lambda: as_text(column))

    def fit(self, side: Side, column: pa.Array, given: pa.DataType) -> Fit:
        """Learn nothing, but see that the column holds text."""
        from twotower.features.columns import checked
        from twotower.values import as_text

        checked(side, self, lambda: as_text(column))
        return {}

    def encode(self, learned: Learned, column: pa.Array) -> npt.NDArray[Any]:
        """Return the buckets of words and n-grams, [n, L] int32."""
        from twotower.features.columns import padded
        from twotower.values import as_text

        rows = (text_buckets(text, self) for text in as_text(column).to_pylist())
        return padded(rows, len(column), self.max_length)

    def parse(self, learned: Learned, value: Any) -> Any:
        """Return a text."""
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no text")
        return value

    @property
    def allowed(self) -> str:
        """What a request may hold, for people."""
        return "a text, or null"


def text_buckets(text: str | None, spec: TextFeature) -> list[int]:
    """Return the hashed words and character n-grams of a text, at most ``max_length`` of them."""
    if not text:
        return []
    # No more of a long text is read than counts.
    found = itertools.islice(_WORD.finditer(text.lower()), spec.max_length)
    words = [match[0] for match in found]
    marked = (f"<{word}>" for word in words)
    grams = (m[i : i + spec.ngram] for m in marked for i in range(max(len(m) - spec.ngram + 1, 1)))
    pieces = itertools.islice(itertools.chain((f"w:{w}" for w in words), grams), spec.max_length)
    return [zlib.crc32(p.encode()) % spec.buckets for p in pieces]
