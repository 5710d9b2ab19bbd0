"""The records of CSV text, block by block, and the quotes in it that are not closed.

A quoted cell may hold line ends, so a quote too many makes one cell of all rows behind it, and a reader that
trusts quotes loses them without a word. Here the quote that closes a cell stands before a delimiter or a
line end, and not behind lines that look like rows of the table. Where that is not so, the lines of the row
down to the one with the opening quote are damaged, and reading goes on behind them as if it had not been
there. A quote inside a cell that does not begin with one is text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from twotower.data.chunks import BoolArray, IntArray
from twotower.errors import DataError

LONGEST_CELL = 4 << 20
"""Bytes behind which a quoted cell is taken as not closed; no more is held to find its end."""
LONGEST_RECORD = 64 << 20
UNCLOSED = "with a quote that opens a cell and is not closed"
INNER = "with text behind a closing quote (inside a quoted cell, a quote is written twice)"
BACKSLASH = "with a quote escaped by a backslash (it is to be written twice; Spark has option escape for it)"
SWALLOWS = "with a quote that opens a cell and is closed only behind lines that look like rows"
INSIDE = "that look like a part of a quoted cell that is not closed"


@dataclass(frozen=True)
class Damage:
    """Lines that are no rows."""

    lines: list[int]
    """Their numbers in the file, counted from 1."""
    reason: str
    text: str
    """What stands on the last of them, shortened."""
    begin: int
    """Where they begin in the text that was read."""


@dataclass(frozen=True)
class Records:
    """Whole records that follow each other in a file."""

    data: bytes
    """Their bytes, blank lines between them included, without damaged lines."""
    starts: IntArray
    """[n] int64, where each begins in ``data``."""
    lines: IntArray
    """[n] int64, number in the file of the line on which each begins, counted from 1."""
    begins: IntArray
    """[n] int64, where each begins in the text that was read."""
    damages: list[Damage]


@dataclass
class _Swallowed:
    """Text behind a damaged line that its open quote made a cell of: rows of the table, or prose."""

    start: int
    stop: int
    kind: str
    """Of the first cell of the damaged line."""


class Scanner:
    """Finds the records of one text."""

    def __init__(self, delimiter: str, width: int, judges_inside: bool = True) -> None:
        """Take the delimiter and the number of columns; both tell rows from prose.

        Args:
            delimiter: one character.
            width: number of columns.
            judges_inside: whether a record that an open quote ran over is damaged too if it begins otherwise
                than the row of the quote.
        """
        self._judges_inside = judges_inside
        self._delimiter = delimiter.encode()
        self._width = width
        d = re.escape(self._delimiter)
        # All well-formed quoted cells on one line and what is between them in one step; what is left are the
        # quotes that need a look. Possessive, so that no text is walked twice.
        opening = rb"(?:(?<=[\r\n" + d + rb'])|(?<![\s\S]))"'
        closing = rb'"(?=[\r\n' + d + rb"])"
        inside = rb'[^"\r\n]*+(?:""[^"\r\n]*+)*+'
        self._plain = re.compile(rb'(?:[^"]*+' + opening + inside + closing + rb")*+")
        self._cell = re.compile(rb'[^"]*+(?:""[^"]*+)*+')
        self._closing = re.compile(closing)
        self._quoted = re.compile(rb'"[^"]*+(?:""[^"]*+)*+"')
        self._edges = self._delimiter + b"\r\n"
        self._blanks = b" \t".replace(self._delimiter, b"")
        self._swallowed: list[_Swallowed] = []

    def records(self, blocks: Iterable[bytes], line: int = 1) -> Iterator[Records]:
        """Yield the records of a text that comes in blocks of any size, the first at the start of a record.

        Args:
            blocks: of bytes.
            line: number of the first line.
        """
        rest, place = b"", 0
        for block, final in _with_last(blocks):
            data = rest + block
            ends = line_ends(data, final)
            text = _Text(data, ends, final, [], [])
            stop = self._find_quotes(text) if b'"' in data else len(data)
            if not final:
                stop = text.record_start(stop)
                if len(data) - stop > LONGEST_RECORD:
                    raise DataError(f"line {line:,} has no end within {LONGEST_RECORD >> 20} MiB; is it CSV?")
            yield self._cut(text, stop, line, place)
            line += int(np.searchsorted(ends, stop, side="right"))
            place += stop
            rest = data[stop:]
            for part in self._swallowed:
                part.start, part.stop = max(part.start - stop, 0), part.stop - stop
            self._swallowed = [part for part in self._swallowed if part.stop > 0]

    def _find_quotes(self, text: _Text) -> int:
        """Find the cells of several lines and the damaged lines; return where more text is needed."""
        data, at, closing = text.data, 0, -1
        while True:
            plain = self._plain.match(data, at)
            assert plain is not None
            quote = data.find(b'"', plain.end())
            if quote < 0:
                return len(data)
            if quote and data[quote - 1] not in self._edges:
                at = quote + 1  # in the middle of a cell
                continue
            cell = self._cell.match(data, quote + 1)
            assert cell is not None
            closed = cell.end()
            behind = closed + 1
            while data[behind : behind + 1] and data[behind] in self._blanks:
                behind += 1
            start = text.record_start(quote)
            reason: str | None = None
            if closed - quote > LONGEST_CELL:
                reason = UNCLOSED
            elif behind >= len(data) and not text.final:
                return quote
            elif closed >= len(data):
                reason = UNCLOSED
            elif behind < len(data) and data[behind] not in self._edges:
                reason = BACKSLASH if data[closed - 1] in b"\\" else INNER
            else:
                lines = text.lines_behind(quote, closed)
                if lines and lines[-1][1] == len(data) and not text.final:
                    return quote
                if self._are_rows(data, start, quote, lines):
                    reason = SWALLOWS
                elif lines:
                    text.long_cells.append((quote, closed))
            if reason is None:
                at = closed + 1
                continue
            stop = text.line_end(quote)
            if stop == len(data) and not text.final:
                return quote
            if self._judges_inside:
                if reason in (INNER, BACKSLASH):
                    # The cell was meant to go on to a quote that can close one.
                    if closing <= closed:
                        found = self._closing.search(data, closed + 1)
                        closing = found.start() if found else len(data)
                    near = closing < len(data) and closing - quote <= LONGEST_CELL
                    if not near and not text.final and len(data) - quote <= LONGEST_CELL:
                        return quote
                    closed = closing if near else stop
                self._swallow(start, stop, closed, self._cells(data[start:stop])[0])
            text.drop(start, stop, reason)
            at = stop

    def _swallow(self, start: int, stop: int, closed: int, own: bytes) -> None:
        """Remember that the open quote of a damaged row runs over what is behind it."""
        last = self._swallowed[-1] if self._swallowed else None
        if last is not None and start < last.stop:
            # It is itself what stood in a cell maybe, and says nothing of what rows begin with.
            self._swallowed.append(_Swallowed(stop, max(closed, last.stop), last.kind))
        else:
            self._swallowed.append(_Swallowed(stop, closed, _kind(own)))

    def _are_rows(self, data: bytes, start: int, quote: int, lines: list[tuple[int, int]]) -> bool:
        """Return whether at least half of the lines that a cell runs over look like rows.

        A row has the width of the table, and up to the cell in question blanks at the same places as the row
        of the quote, and a first cell of the same kind.
        """
        if not lines:
            return False
        own = self._cells(data[start:quote])
        own[-1] = data[quote + 1 : lines[0][0]].split(self._delimiter, 1)[0]
        delimiters = self._width - 1
        alike = 0
        for a, b in lines:
            if data.count(self._delimiter, a, b) >= delimiters:
                cells = self._cells(data[a:b])
                alike += len(cells) == self._width and _alike(own, cells)
        return 2 * alike >= len(lines)

    def _cells(self, line: bytes) -> list[bytes]:
        """Return the cells of one line; quotes that close on it hide the delimiters between them."""
        if line.count(b'"') > 1:
            line = self._quoted.sub(lambda m: m[0].replace(self._delimiter, b"_"), line)
        return line.rstrip(b"\r\n").split(self._delimiter)

    def _cut(self, text: _Text, stop: int, line: int, place: int) -> Records:
        """Return the records of a text up to ``stop``, where one ends."""
        data, ends = text.data[:stop], text.ends[text.ends <= stop]
        starts = np.concatenate([np.zeros(1, np.int64), ends[~_inside(ends, text.long_cells)]])
        starts = starts[starts < stop]
        stops = np.append(starts[1:], stop)
        dropped = text.dropped
        gone = _inside(starts + 1, [d[:2] for d in dropped])
        for at in self._strange(data, starts, stops, gone):
            gone[at] = True
            dropped.append((int(starts[at]), int(stops[at]), INSIDE))
        damages = [_damage(data, ends, line, place, *d) for d in sorted(dropped)]
        lines = line + np.searchsorted(ends, starts, side="right")
        begins = starts + place
        if gone.any():
            kept = np.flatnonzero(~gone)
            data = b"".join(data[a:b] for a, b in zip(starts[kept], stops[kept], strict=True))
            sizes = (stops - starts)[kept]
            starts, lines, begins = np.cumsum(sizes) - sizes, lines[kept], begins[kept]
        filled = ~np.isin(np.frombuffer(data, np.uint8)[starts], [10, 13])
        return Records(data, starts[filled], lines[filled], begins[filled], damages)

    def _strange(self, data: bytes, starts: IntArray, stops: IntArray, gone: BoolArray) -> list[int]:
        """Return the records that an open quote ran over and that begin otherwise than its own row does."""
        found = set()
        for part in self._swallowed:
            first, last = np.searchsorted(starts, [part.start, part.stop]).tolist()
            for at in range(first, last):
                record = data[starts[at] : stops[at]]
                if not gone[at] and record.strip() and _kind(self._cells(record)[0]) != part.kind:
                    found.add(at)
        return sorted(found)


@dataclass
class _Text:
    """A text that begins with a record, and what was found in it."""

    data: bytes
    ends: IntArray
    """Where lines end, behind their line ends."""
    final: bool
    """Whether no more text follows."""
    long_cells: list[tuple[int, int]]
    """Opening and closing quote of each cell with line ends."""
    dropped: list[tuple[int, int, str]]
    """Start, stop and reason of damaged lines."""

    @cached_property
    def places(self) -> list[int]:
        """``ends`` as a list, in which one is found sooner."""
        places: list[int] = self.ends.tolist()
        return places

    def record_start(self, at: int) -> int:
        """Return where the record begins that ``at`` is in."""
        for quote, closed in reversed(self.long_cells):
            start = self._line_start(at)
            if start > closed:
                return start
            if start > quote:
                at = quote
        return self._line_start(at)

    def _line_start(self, at: int) -> int:
        before = bisect_right(self.places, at)
        return self.places[before - 1] if before else 0

    def line_end(self, at: int) -> int:
        """Return where the line of ``at`` ends."""
        following = bisect_right(self.places, at)
        return self.places[following] if following < len(self.places) else len(self.data)

    def lines_behind(self, quote: int, closed: int) -> list[tuple[int, int]]:
        """Return the lines of a cell behind the one it opens on, the last to its own end."""
        first, last = (bisect_right(self.places, at) for at in (quote, closed))
        edges = self.places[first : last + 1]
        if last >= len(self.places):
            edges.append(len(self.data))
        return list(pairwise(edges)) if first < last else []

    def drop(self, start: int, stop: int, reason: str) -> None:
        """Leave out a part; the cells in it are none."""
        while self.long_cells and self.long_cells[-1][0] >= start:
            self.long_cells.pop()
        self.dropped.append((start, stop, reason))


def line_ends(data: bytes, final: bool = True) -> IntArray:
    """Return where lines end, each behind its line feed, or its carriage return where none follows.

    Args:
        data: the lines.
        final: whether no more text follows; else a carriage return at the very end is no line end yet.
    """
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == 10)
    if b"\r" in data:
        returns = np.flatnonzero(array == 13)
        alone = np.append(array, 0 if final else 10)[returns + 1] != 10
        ends = np.union1d(ends, returns[alone])
    return (ends + 1).astype(np.int64)


def _with_last(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield blocks, and whether each is the last; at least one."""
    held = b""
    for block in blocks:
        if block:
            if held:
                yield held, False
            held = block
    yield held, True


def _inside(places: IntArray, spans: list[tuple[int, int]]) -> BoolArray:
    """Return which places are behind the start of a span and not behind its stop; spans do not overlap."""
    edges = np.asarray(spans, np.int64).reshape(-1)
    inside: BoolArray = np.searchsorted(edges, places, side="left") % 2 == 1
    return inside


def _damage(data: bytes, ends: IntArray, line: int, place: int, start: int, stop: int, reason: str) -> Damage:
    first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
    begin = int(ends[last - 1]) if last > first else start
    text = data[begin : begin + 80].split(b"\n")[0].rstrip(b"\r").decode("utf-8", "replace")
    return Damage(list(range(line + first, line + last + 1)), reason, text, place + start)


def _kind(cell: bytes) -> str:
    """Return what the first cell of a row looks like: nothing, a code, a word or a text."""
    cell = cell.strip(b' \t"')
    if not cell:
        return "nothing"
    if b" " in cell:
        return "text"
    return "code" if any(48 <= c <= 57 for c in cell) else "word"


def _alike(own: list[bytes], cells: list[bytes]) -> bool:
    if _kind(own[0]) != _kind(cells[0]):
        return False
    if len(cells) == 2:
        # One delimiter is in many a line of prose: "12,5 cm" is no row of a table whose ids are i1, i2.
        a, b = (cell.strip(b' \t"') for cell in (own[0], cells[0]))
        if a.isdigit() != b.isdigit() or (a.isdigit() and abs(len(a) - len(b)) > 1):
            return False
    return all(a[:1].isspace() == b[:1].isspace() for a, b in zip(own, cells, strict=False))
