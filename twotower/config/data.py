"""Sections of the raw data: where it comes from, how it is read, how it is split."""

from __future__ import annotations

import codecs
import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from twotower.config.section import PositiveInt, Section
from twotower.registry import ModelIn, Registry

MovieLensName = Literal[
    "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m", "ml-latest-small", "ml-latest"
]


def _known_encoding(encoding: str) -> str:
    try:
        known = codecs.lookup(encoding)
        "".encode(encoding)
    except (LookupError, ValueError):
        raise ValueError(f"{encoding!r} is no text encoding; use one such as latin-1 or cp1252") from None
    return "utf-8" if known.name in ("utf-8", "utf-8-sig") else encoding


Delimiter = Annotated[str, Field(min_length=1, max_length=1)]
Encoding = Annotated[str, AfterValidator(_known_encoding)]


class SourceSection(Section):
    """Settings of one kind of source; a kind is a subclass in ``SOURCES`` with a ``kind`` of its own."""

    if TYPE_CHECKING:
        # Each kind declares it first, as Literal["..."].
        kind: str

    implementation: ClassVar[str | Callable[[Any, str, str | None], Any]]
    """What opens it, of (section, folder of downloads, mirror) a ``twotower.data.chunks.RawSource``; a text
    "module:name" is imported when data are prepared."""

    @property
    def timeless(self) -> bool:
        """Whether it is known to have no times before it is opened."""
        return False

    @property
    def without_split(self) -> bool:
        """Whether it is known to have no split before it is opened."""
        return False


class MovieLensSource(SourceSection):
    """A MovieLens data set, downloaded from GroupLens."""

    implementation: ClassVar[str | Callable[[Any, str, str | None], Any]] = (
        "twotower.data.sources:open_movielens"
    )

    kind: Literal["movielens"]
    name: MovieLensName = "ml-latest-small"
    """Official name."""


def check_time_format(text: str) -> str:
    """Return a format of times.

    Raises:
        ValueError: it is none, or leaves the day open.
    """
    moment = datetime.datetime(2001, 12, 31, 23, 59, 59, 999_999, datetime.UTC)
    try:
        found = datetime.datetime.strptime(moment.strftime(text), text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no format of times ({error}); write one such as '%m/%d/%Y'") from None
    if found.date() != moment.date():
        raise ValueError(f"{text!r} does not name year, month and day; write one such as '%m/%d/%Y %H:%M'")
    return text


class ColumnsConfig(Section):
    """Names of the columns of your interactions."""

    user: str = "user_id"
    """Column of the user's id (text or integer)."""
    item: str = "item_id"
    """Column of the item's id (text or integer)."""
    time: str | None = None
    """Column of the time: a timestamp, ISO 8601 text, or what ``time_unit`` or ``time_format`` says."""
    time_unit: Literal["s", "ms", "us", "ns"] | None = None
    """Unit of a numeric time column."""
    time_format: Annotated[str, AfterValidator(check_time_format)] | None = None
    """Format of a time column of text that is not ISO 8601, as in Python's strptime, such as "%m/%d/%Y"."""
    value: str | None = None
    """Column of a rating or another strength."""
    event: str | None = None
    """Column of the event type; ``events`` says what each type means."""
    impressions: str | None = None
    """Column of items that were shown and not chosen, each a negative: a list, or text with a separator."""
    impressions_separator: Annotated[str, Field(min_length=1)] = "|"
    """Between the ids of an impressions column of text, such as in CSV."""
    split: str | None = None
    """Column with train, validation or test, for ``split.kind: given``."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.time_unit is not None and self.time_format is not None:
            raise ValueError(
                f"time_unit ({self.time_unit}) is of numbers and time_format ({self.time_format}) of text; "
                "leave one out"
            )
        return self


class TableConfig(Section):
    """An item or user table; its other columns are there for features."""

    path: str
    """A CSV or Parquet file, a folder of them, or a glob."""
    id: str
    """Column of the id."""
    title: str | None = None
    """Column of a title for people to read (item table)."""
    delimiter: Delimiter | None = None
    """Of this table's CSV files; as in the source's when not given."""
    encoding: Encoding | None = None
    """Of this table's CSV files; as in the source's when not given."""


class FilesSource(SourceSection):
    """Your own CSV or Parquet files."""

    implementation: ClassVar[str | Callable[[Any, str, str | None], Any]] = "twotower.data.sources:open_files"

    kind: Literal["files"]
    interactions: str
    """A CSV or Parquet file, a folder of them, or a glob, read in the order of their names; CSV may be packed
    (.gz, .bz2, .xz, .zst, .lz4). Folders such as ``date=2024-01-31`` are a column of that name."""
    delimiter: Delimiter | None = None
    """Between the columns of CSV files; when not given it is what their header shows: a comma (in .tsv: a
    tab), else a semicolon, a tab or a bar."""
    encoding: Encoding = "utf-8"
    """Of CSV files, such as latin-1, cp1252 or utf-16; a byte order mark in a file stands above it."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of the interaction columns."""
    events: dict[str, float | Literal["negative", "seen_only"]] = {}
    """Per event type its weight, or ``negative``, or ``seen_only``; a type not listed is a bad row."""
    items: TableConfig | None = None
    """The item table; without one the catalogue is every item in the interactions."""
    users: TableConfig | None = None
    """The user table."""

    @property
    def timeless(self) -> bool:
        """Whether no column of times is named."""
        return self.columns.time is None

    @property
    def without_split(self) -> bool:
        """Whether no column of splits is named."""
        return self.columns.split is None

    @field_validator("events", mode="before")
    @classmethod
    def _whole_numbers(cls, events: Any) -> Any:
        if not isinstance(events, dict):
            return events
        odd = next((name for name in events if isinstance(name, bool) or name is None), "")
        if odd != "":
            raise ValueError(f"the event type {odd!r} is a word that YAML reads otherwise; put it in quotes")
        return {str(name) if isinstance(name, int) else name: meaning for name, meaning in events.items()}


class LightGCNSource(SourceSection):
    """The LightGCN text format: ``train.txt`` and ``test.txt``, a user and then his items on each line."""

    implementation: ClassVar[str | Callable[[Any, str, str | None], Any]] = (
        "twotower.data.sources:open_lightgcn"
    )

    kind: Literal["lightgcn"]
    path: str
    """Folder, or zip file, that holds ``train.txt`` and ``test.txt``."""

    @property
    def timeless(self) -> bool:
        """Return true: the format has no times."""
        return True


class GeneratedSource(SourceSection):
    """A catalogue and interactions drawn from planted tastes; the true scores are known."""

    implementation: ClassVar[str | Callable[[Any, str, str | None], Any]] = (
        "twotower.data.sources:open_generated"
    )

    kind: Literal["generated"]
    num_users: PositiveInt = 2_000
    """Users to draw."""
    num_items: Annotated[int, Field(ge=50)] = 1_500
    """Catalogue size."""
    num_interactions: PositiveInt = 100_000
    """Interactions to draw; repeats of a user and item are left out, so a few fewer come out."""
    num_tastes: Annotated[int, Field(ge=2)] = 24
    """Planted tastes; every item belongs to one, every user likes a few."""
    popularity_exponent: Annotated[float, Field(ge=0)] = 0.8
    """Zipf exponent of item popularity inside a taste; 0 is uniform."""
    seed: int = 7
    """Seed of the generator."""


SOURCES: Registry[type[SourceSection]] = Registry("a kind of source")
"""The kinds of ``data.source``."""
SOURCES.add("movielens", MovieLensSource)
SOURCES.add("files", FilesSource)
SOURCES.add("lightgcn", LightGCNSource)
SOURCES.add("generated", GeneratedSource)

Source = Annotated[SourceSection, ModelIn(SOURCES, "kind")]


class PositivesConfig(Section):
    """Which interactions are positive, and with what weight."""

    min_value: float | None = None
    """Interactions with a smaller value are negatives; all are positive when not given."""
    weight: Literal["one", "value", "scaled"] = "one"
    """1; the value; or clip((value - min) / (max - min), 0, 1) over ``value_range``. Times the weight of the
    event type it is what an interaction weighs in the loss (``train.loss.weights``) and in histories."""
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Smallest and largest value of the scale; MovieLens declares its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range {self.value_range} must be [smallest, largest]")
        return self


class WindowConfig(Section):
    """Interactions outside the window are left out."""

    start: str | None = None
    """ISO 8601 time; interactions before it are left out."""
    end: str | None = None
    """ISO 8601 time; interactions at or after it are left out."""


class MinInteractionsConfig(Section):
    """Users and items with fewer interactions are left out, again and again until none has fewer."""

    user: Annotated[int, Field(ge=0)] = 0
    """Fewest interactions of a user."""
    item: Annotated[int, Field(ge=0)] = 0
    """Fewest interactions of an item."""


@SOURCES.model
class DataConfig(Section):
    """Raw data and the rules for reading it."""

    source: Source = GeneratedSource(kind="generated")
    """Where the data comes from."""
    mirror: str | None = None
    """Folder or URL that stands in for the official download address; TWOTOWER_MIRROR when not given."""
    cache: str = "~/.cache/twotower"
    """Folder of downloads."""
    timezone: str = "UTC"
    """Zone of times that name none."""
    on_bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that can not be read; both count them by reason and show an example of each."""
    repeats: Literal["first", "last", "sum", "keep"] = "last"
    """Several interactions of a user and an item in one split: keep one, add up the weights in the last, or
    keep all."""
    window: WindowConfig = WindowConfig()
    """Time window."""
    min_interactions: MinInteractionsConfig = MinInteractionsConfig()
    """Smallest users and items."""
    positives: PositivesConfig = PositivesConfig()
    """Which interactions are positive."""
