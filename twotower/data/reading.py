"""Chunks of a source to typed arrays: what each row means, and which rows are bad.

Nothing of a chunk is kept but 22 bytes a row and the ids that were new in it; with impressions 4 bytes
more a row, and 4 for each item shown.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower import progress
from twotower.config import DataConfig, FilesSource
from twotower.data import time_hints, times
from twotower.data.chunks import BadRows, BoolArray, Chunk, IntArray, RawSource
from twotower.data.impressions import LISTED_BY, Impressions, ShownItems
from twotower.data.interactions import COLUMNS
from twotower.data.interning import IdColumn, IdForm, Interner, MixedIdsError
from twotower.errors import ConfigError, DataError
from twotower.schema import KINDS, MAX_WEIGHT, SPLITS
from twotower.values import as_categories, as_numbers, as_text, examples, is_text, plain

NO_SPLIT = -1
"""Split code of a row that has not been split yet."""
_SHOWN_COLUMNS: dict[str, Any] = {"num_shown": np.int32, "shown": np.int32}


@dataclasses.dataclass
class RawInteractions:
    """Interactions in source order, before filters, sorting and splits."""

    columns: dict[str, npt.NDArray[Any]]
    """The columns of ``Interactions``; split is ``NO_SPLIT`` unless the source gives it.

    With impressions also ``LISTED_BY``.
    """
    users: Interner
    """Users in first-appearance order."""
    items: Interner
    """Items: the item table first, then others in first-appearance order, those only ever shown last."""
    rows_read: int
    """Rows seen, bad ones included."""
    outside_window: int
    """Good rows that were left out for their time."""
    impressions: Impressions | None
    """What the interactions list; None in a source without impressions."""


@dataclasses.dataclass(frozen=True)
class _Rules:
    """The rules of the configuration, checked against what the source has."""

    data: DataConfig
    value_range: tuple[float, float] | None
    start: int | None
    end: int | None
    events: dict[str, tuple[int, float]] | None
    times: _TimeColumn
    separator: str


def read_interactions(
    source: RawSource, config: DataConfig, items: Interner, bad: BadRows
) -> RawInteractions:
    """Return all good interactions of a source inside the configured window.

    The weight of a positive interaction is that of ``data.positives.weight`` times that of its event type,
    from 0 to ``MAX_WEIGHT``; all other kinds weigh 1.

    Args:
        source: Where the chunks come from.
        config: The data section.
        items: Interner that already holds the item table's ids, in order.
        bad: Receives the rows that can not be read.

    Raises:
        ConfigError: a rule asks for times or values that the source does not have.
    """
    rules = _rules(source, config)
    forms = _Forms(IdForm("user"), IdForm("item"), IdForm("shown item"))
    before, num_listed = bad.copy(), len(items)
    while True:
        try:
            found = _read(source, config, rules, items, bad, forms)
            break
        except MixedIdsError:
            # What was read as integers has to be bad rows after all; of three columns, three times at most.
            bad.restore(before)
            items.shorten(num_listed)
    for form in forms:
        form.tell()
    return found


class _Forms(NamedTuple):
    user: IdForm
    item: IdForm
    shown: IdForm


def _read(
    source: RawSource, config: DataConfig, rules: _Rules, items: Interner, bad: BadRows, forms: _Forms
) -> RawInteractions:
    users = Interner()
    shown = Interner()
    growing = {name: _Growing(kind) for name, kind in (COLUMNS | _SHOWN_COLUMNS).items()}
    has_impressions = isinstance(config.source, FilesSource) and config.source.columns.impressions is not None
    rows_read = outside = 0
    known = bad.count  # of tables
    with progress.bar(source.num_rows, "reading", "interactions") as bar:
        for chunk in source.chunks(bad):
            rows_read += bad.count - known  # what is no row of a chunk was read too
            columns, num_outside = _read_chunk(chunk, rules, forms, users, items, shown, bad)
            for name, column in columns.items():
                growing[name].append(column)
            rows_read += len(chunk.rows)
            outside += num_outside
            bar.update(len(chunk.rows))
            known = bad.count
    rows_read += bad.count - known
    joined = {name: column.finish() for name, column in growing.items()}
    num_shown, shown_rows = (joined.pop(name) for name in _SHOWN_COLUMNS)
    impressions = None
    if has_impressions:
        impressions = Impressions.of(num_shown, shown_rows, shown, items)
        joined[LISTED_BY] = np.arange(len(num_shown))
    return RawInteractions(joined, users, items, rows_read, outside, impressions)


class _Growing:
    """One array that grows in place: joining parts at the end would hold every column twice."""

    def __init__(self, kind: Any) -> None:
        self._array: npt.NDArray[Any] = np.empty(1 << 16, dtype=kind)
        self._size = 0

    def append(self, values: npt.NDArray[Any]) -> None:
        end = self._size + len(values)
        if end > len(self._array):
            # The allocator moves the pages of a large array, not their content; unused ones cost nothing.
            self._array.resize(max(end, len(self._array) * 3 // 2), refcheck=False)
        self._array[self._size : end] = values
        self._size = end

    def finish(self) -> npt.NDArray[Any]:
        self._array.resize(self._size, refcheck=False)
        return self._array


def _rules(source: RawSource, config: DataConfig) -> _Rules:
    positives, window = config.positives, config.window
    value_range: tuple[float, float] | None = None
    if positives.weight == "scaled":
        declared = positives.value_range
        value_range = (declared[0], declared[1]) if declared else source.value_range
        if value_range is None:
            raise ConfigError(
                "data.positives.weight: scaled needs the scale of the values; set "
                "data.positives.value_range, "
                "such as [1, 5]"
            )
    bounds: list[int | None] = []
    for name, text in (("start", window.start), ("end", window.end)):
        try:
            bounds.append(None if text is None else times.parse_time(text, config.timezone))
        except ValueError:
            raise ConfigError(
                f"data.window.{name} {text!r} is no ISO 8601 time such as 2026-01-31T10:00:00Z"
            ) from None
    start, end = bounds
    if (start is not None or end is not None) and not source.has_times:
        raise ConfigError("data.window needs times, and the source has none; remove data.window")
    if start is not None and end is not None and start >= end:
        raise ConfigError(f"data.window is empty: start {window.start} is not before end {window.end}")
    column, time_format, events, separator = "time", None, None, ""
    if isinstance(config.source, FilesSource):
        column = config.source.columns.time or column
        time_format = config.source.columns.time_format
        events = _events(config.source)
        separator = config.source.columns.impressions_separator
    clock = times.Clock(column, source.time_unit, time_format, config.timezone)
    return _Rules(config, value_range, start, end, events, _TimeColumn(clock), separator)


def _events(source: FilesSource) -> dict[str, tuple[int, float]] | None:
    if source.columns.event is None:
        if source.events:
            raise ConfigError(
                "data.source.events is given without data.source.columns.event, the column it is about"
            )
        return None
    if not source.events:
        raise ConfigError(
            f"data.source.columns.event is {source.columns.event!r} without data.source.events; say "
            "what each type "
            "means, such as {purchase: 1.0, view: seen_only}"
        )
    meanings: dict[str, tuple[int, float]] = {}
    for name, meaning in source.events.items():
        if isinstance(meaning, str):
            meanings[name] = (KINDS[meaning], 1.0)
        elif 0 < meaning <= MAX_WEIGHT and np.float32(meaning) > 0:
            meanings[name] = (KINDS["positive"], float(meaning))
        else:
            raise ConfigError(
                f"data.source.events.{name} is {meaning}; a weight must be above 0 and at most "
                f"{MAX_WEIGHT:g}, and an event that is no liking is negative or seen_only"
            )
    return meanings


class _Check:
    """Which rows of a chunk are bad; each is counted once, for the first reason found."""

    def __init__(self, chunk: Chunk, bad: BadRows) -> None:
        self.chunk, self.bad = chunk, bad
        self.mask: BoolArray = np.zeros(len(chunk.rows), dtype=np.bool_)

    def refuse(self, mask: BoolArray, reason: str, values: pa.Array | None) -> None:
        new = np.flatnonzero(mask & ~self.mask)
        if len(new):
            texts = None if values is None else examples(values, new[:1])
            self.bad.add(self.chunk.file, self.chunk.rows[new], reason, texts)
            self.mask |= mask


class _TimeColumn:
    """The times of a source, and what they look like where they are not as declared."""

    def __init__(self, clock: times.Clock) -> None:
        self._clock = clock
        self._warned = False

    def read(self, array: pa.Array, check: _Check) -> IntArray:
        """Return [n] int64 microseconds UTC; rows without a time are refused.

        Raises:
            ConfigError: the column has another unit or format than the declared one.
        """
        clock, array = self._clock, plain(array)
        found = times.read_times(array, clock)
        if found.unreadable.any() and is_text(array.type):
            broken = array.filter(pa.array(found.unreadable))
            # A few broken rows are bad; where most are, the declaration is.
            if 2 * len(broken) > len(array) - int(found.missing.sum()):
                self._refuse_text(broken.unique().slice(0, time_hints.SAMPLE).to_pylist())
        if clock.unit is not None and not self._warned:
            numbers = as_numbers(array.slice(0, 1 << 14))
            advice = None if numbers is None else time_hints.unit(numbers.values, clock.unit)
            if advice is not None:
                what = f"time column {clock.column!r} is declared in {clock.unit}, and {advice}"
                if found.outside.any():
                    raise ConfigError(f"{what} (now {_some(array, found.outside)} is after the year 9999)")
                progress.say(what)
                self._warned = True
        check.refuse(found.missing | found.unreadable, "without a readable time", array)
        check.refuse(found.outside, "with a time outside of the years 1 to 9999", array)
        return found.micros

    def _refuse_text(self, texts: list[str]) -> None:
        clock, advice = self._clock, None
        if not (clock.unit is None and clock.format is None) and times.are_iso(texts):
            advice = f"remove data.source.columns.time_{'unit' if clock.unit is not None else 'format'}"
        else:
            advice = time_hints.time_format(texts)
        if advice is not None:
            form = "is not ISO 8601"
            if clock.format is not None:
                form = f"does not have the format {clock.format!r}"
            elif clock.unit is not None:
                form = "is no number"
            raise ConfigError(
                f"time column {clock.column!r} holds text such as {texts[0]!r}, which {form}; {advice}"
            )


def _some(array: pa.Array, mask: BoolArray) -> Any:
    return examples(array, np.flatnonzero(mask)[:1])[0]


def _read_chunk(
    chunk: Chunk,
    rules: _Rules,
    forms: _Forms,
    users: Interner,
    items: Interner,
    shown: Interner,
    bad: BadRows,
) -> tuple[dict[str, npt.NDArray[Any]], int]:
    n = len(chunk.rows)
    check = _Check(chunk, bad)
    user, item = IdColumn(chunk.user, forms.user), IdColumn(chunk.item, forms.item)
    for ids in (user, item):
        for mask, reason in ids.problems():
            check.refuse(mask, reason, ids.array)
    listed = None
    if chunk.impressions is not None:
        listed = ShownItems(chunk.impressions, rules.separator, forms.shown)
        for mask, reason, blamed in listed.problems():
            check.refuse(mask, reason, blamed)
    micros = np.zeros(n, dtype=np.int64)
    if chunk.time is not None:
        micros = rules.times.read(chunk.time, check)
    kind, weight = _kinds(chunk, rules, check)
    split = _given_split(chunk, check)
    good = ~check.mask
    keep = good
    if rules.start is not None:
        keep = keep & (micros >= rules.start)
    if rules.end is not None:
        keep = keep & (micros < rules.end)
    columns: dict[str, npt.NDArray[Any]] = {
        "user_row": users.intern(user, keep),
        "item_row": items.intern(item, keep),
        "time": micros[keep],
        "weight": weight[keep],
        "kind": kind[keep],
        "split": split[keep],
    }
    if listed is not None:
        columns |= listed.intern(item, keep, shown)
    return columns, int(good.sum() - keep.sum())


def _kinds(
    chunk: Chunk, rules: _Rules, check: _Check
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    n = len(chunk.rows)
    positives = rules.data.positives
    kind = np.zeros(n, dtype=np.int8)
    event_weight = np.ones(n, dtype=np.float64)
    if chunk.event is not None and rules.events is not None:
        encoded = as_categories(chunk.event).dictionary_encode()
        names = encoded.dictionary.to_pylist()
        meanings = [rules.events.get(name) for name in names] + [None]
        codes = np.asarray(encoded.indices.fill_null(len(names)))
        unknown = np.array([m is None for m in meanings], dtype=np.bool_)[codes]
        listed = ", ".join(rules.events)
        check.refuse(
            unknown, f"with an event type that data.source.events does not list ({listed})", chunk.event
        )
        kind = np.array([m[0] if m else 0 for m in meanings], dtype=np.int8)[codes]
        event_weight = np.array([m[1] if m else 1.0 for m in meanings], dtype=np.float64)[codes]
    weight = np.ones(n, dtype=np.float64)
    if chunk.value is None:
        if positives.min_value is not None or positives.weight != "one":
            setting = "min_value" if positives.min_value is not None else f"weight: {positives.weight}"
            raise ConfigError(
                f"data.positives.{setting} needs values, and the source has none; set "
                "data.source.columns.value "
                "or remove it"
            )
    else:
        numbers = as_numbers(chunk.value)
        if numbers is None:
            raise DataError(f"the value column has type {chunk.value.type}; it must hold numbers")
        check.refuse(numbers.missing | numbers.unreadable, "without a readable value", chunk.value)
        value = np.nan_to_num(numbers.values)
        if positives.min_value is not None:
            below = (value < positives.min_value) & (kind == KINDS["positive"])
            kind = np.where(below, np.int8(KINDS["negative"]), kind)
        if positives.weight == "value":
            check.refuse(
                (value < 0) & (kind == KINDS["positive"]), "with a negative value as its weight", chunk.value
            )
            weight = value
        elif rules.value_range is not None:
            low, high = rules.value_range
            weight = np.clip((value - low) / (high - low), 0, 1)
    with np.errstate(over="ignore"):
        weight = np.where(kind == KINDS["positive"], weight * event_weight, 1.0)
    usable = (weight >= 0) & (weight <= MAX_WEIGHT)
    check.refuse(~usable, f"with a weight above {MAX_WEIGHT:g}", chunk.value)
    weight = np.where(usable, weight, 0.0)
    rounded = weight.astype(np.float32)
    # Rounded to nothing it would be no example of training, and nobody would be told.
    check.refuse((rounded == 0) & (weight > 0), "with a weight that 32-bit floats round to 0", chunk.value)
    return kind, rounded


def _given_split(chunk: Chunk, check: _Check) -> npt.NDArray[np.int8]:
    if chunk.split is None:
        return np.full(len(chunk.rows), NO_SPLIT, dtype=np.int8)
    text = as_text(chunk.split)
    codes = np.full(len(chunk.rows), NO_SPLIT, dtype=np.int8)
    for name, code in SPLITS.items():
        codes[np.asarray(pc.equal(text, name).fill_null(False))] = code
    check.refuse(codes == NO_SPLIT, "with a split that is not train, validation or test", chunk.split)
    return codes
