"""The generated catalogue and its interactions as a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.config import GeneratedSource
from twotower.data.chunks import CHUNK_ROWS, BadRows, Chunk, SideTable, TimeUnit
from twotower.data.generated import GENERATOR_VERSION, PlantedTastes, draw_all

_MOODS = (
    "Silent", "Crimson", "Hidden", "Golden", "Broken", "Distant", "Winter", "Electric", "Last",
    "Midnight", "Forgotten", "Velvet", "Hollow", "Burning", "Paper", "Northern", "Restless", "Emerald",
    "Second", "Wandering",
)  # fmt: skip
_THINGS = (
    "Harbour", "Garden", "Empire", "Letter", "Mirror", "Orchard", "Signal", "Bridge", "Carnival", "River",
    "Lantern", "Station", "Voyage", "Kingdom", "Summer", "Shadow", "Island", "Machine", "Promise",
    "Theatre",
)  # fmt: skip
_GENRES = (
    "Action", "Adventure", "Animation", "Biography", "Comedy", "Crime", "Documentary", "Drama", "Family",
    "Fantasy", "History", "Horror", "Music", "Mystery", "Noir", "Romance", "Satire", "Science Fiction",
    "Sport", "Superhero", "Surreal", "Thriller", "War", "Western",
)  # fmt: skip


class Generated:
    """Interactions and catalogue drawn from planted tastes; nothing is read from disk."""

    has_times = True
    time_unit: TimeUnit | None = None
    value_range: tuple[float, float] | None = None
    notice: str | None = None

    def __init__(self, source: GeneratedSource) -> None:
        """Draw the catalogue.

        Raises:
            ConfigError: the sizes contradict each other.
        """
        self.tastes = PlantedTastes(source)
        self.source = source
        self.num_rows: int | None = source.num_interactions

    def signature(self) -> dict[str, Any]:
        """Return the version of the generator; the rest is in the source section."""
        return {"generator": GENERATOR_VERSION}

    def facts(self) -> dict[str, Any]:
        """Return nothing: there is no raw data."""
        return {}

    def item_table(self, bad: BadRows) -> SideTable:
        """Return item_id, title, genres (1 to 3 joined by |, the taste's own first) and year."""
        num_items = self.source.num_items
        rng = np.random.default_rng([self.source.seed, 3])
        genres = genre_names(self.source.num_tastes)
        moods, things = rng.integers(len(_MOODS), size=num_items), rng.integers(len(_THINGS), size=num_items)
        years = rng.integers(1950, 2025, size=num_items)
        how_many = rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2], size=num_items)
        others = rng.integers(1, max(2, len(genres)), size=(num_items, 2))
        own = self.tastes.taste % len(genres)
        titles, labels = [], []
        for i in range(num_items):
            titles.append(f"The {_MOODS[moods[i]]} {_THINGS[things[i]]} ({years[i]})")
            picked = dict.fromkeys(
                [own[i], *((own[i] + o) % len(genres) for o in others[i, : how_many[i] - 1])]
            )
            labels.append("|".join(genres[g] for g in picked))
        ids = pc.binary_join_element_wise("i", pa.array(np.arange(num_items)).cast(pa.string()), "")
        columns = {
            "item_id": ids,
            "title": pa.array(titles),
            "genres": pa.array(labels),
            "year": pa.array(years),
        }
        return SideTable("generated items", pa.table(columns))

    def user_table(self, bad: BadRows) -> None:
        """Return None: generated users have no features."""
        return

    def chunks(self, bad: BadRows) -> Iterator[Chunk]:
        """Yield the interactions by user and time."""
        waiting: list[tuple[Any, Any, Any]] = []
        size = first_row = 0
        for drawn in draw_all(self.tastes):
            waiting.append(drawn)
            size += len(drawn[0])
            if size >= CHUNK_ROWS:
                yield _chunk(waiting, first_row)
                first_row += size
                waiting, size = [], 0
        if size:
            yield _chunk(waiting, first_row)


def genre_names(num_tastes: int) -> list[str]:
    """Return a genre name for each taste."""
    return [_GENRES[c] if c < len(_GENRES) else f"Genre {c + 1}" for c in range(num_tastes)]


def _chunk(drawn: list[tuple[Any, Any, Any]], first_row: int) -> Chunk:
    user, item, time = (np.concatenate(part) for part in zip(*drawn, strict=True))
    return Chunk(
        file="generated",
        rows=np.arange(first_row + 1, first_row + 1 + len(user)),
        user=_ids("u", user),
        item=_ids("i", item),
        time=pa.array(time).cast(pa.timestamp("us", "UTC")),
    )


def _ids(prefix: str, numbers: Any) -> pa.DictionaryArray:
    distinct, codes = np.unique(numbers, return_inverse=True)
    names = pc.binary_join_element_wise(prefix, pa.array(distinct).cast(pa.string()), "")
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), names)
