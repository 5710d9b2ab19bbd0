"""What a person sees while a job runs: stage headings, lines and progress bars, all on stderr.

On a terminal a bar moves in place. Everywhere else (a log, ``ray job submit``) it is a line now and then.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

from twotower.redaction import redacted

_LOG_INTERVAL_S = 5.0
_TERMINAL_INTERVAL_S = 0.1
_TERMINAL = "{l_bar}{bar}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}{postfix}, {remaining} left"
_LINE = (
    "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}{postfix}, time left {remaining}"
)
_NO_TOTAL = "{desc}: {n_fmt}{unit}, {rate_noinv_fmt}{postfix}"


class _Switch:
    """Whether this process shows anything, in all of its threads."""

    quiet = False


@contextlib.contextmanager
def quieted(quiet: bool = True) -> Iterator[None]:
    """Show no headings, lines and bars inside the block, where ``quiet`` says so; ``note`` still writes."""
    before = _Switch.quiet
    _Switch.quiet = quiet or before
    try:
        yield
    finally:
        _Switch.quiet = before


def stage(title: str) -> None:
    """Print the heading of a stage."""
    if not _Switch.quiet:
        note(f"\n== {title}\n")


def say(message: str) -> None:
    """Print one line."""
    if _Switch.quiet:
        return
    with tqdm.external_write_mode(file=sys.stderr):
        note(f"   {message}\n")


def note(text: str) -> None:
    """Write to stderr, without passwords and tokens; that nobody reads it ends no job."""
    try:
        sys.stderr.write(redacted(text))
        sys.stderr.flush()
    except OSError:
        vanish(sys.stderr)


def vanish(stream: TextIO) -> None:
    """Let what is written to a stream be lost: Python writes the rest at its end, and would complain."""
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)


def bar(
    total: int | None, description: str, unit: str = "rows", initial: int = 0, leave: bool = True
) -> tqdm[Any]:
    """Return a progress bar, a context manager; off a terminal it prints a line now and then.

    Args:
        total: how many there are, where that is known.
        description: what is counted, a few words.
        unit: the things counted, in the plural.
        initial: how many were done before; they do not count in the speed.
        leave: let the bar stay, or its last line be printed, when it is closed.
    """
    terminal = sys.stderr.isatty()
    line = _TERMINAL if terminal else _LINE
    return tqdm(
        total=total,
        desc=f"   {description}",
        unit=f" {unit}",
        unit_scale=True,
        bar_format=line if total else _NO_TOTAL,
        file=sys.stderr if terminal else _Lines(),
        mininterval=_TERMINAL_INTERVAL_S if terminal else _LOG_INTERVAL_S,
        # By itself tqdm waits for as many things as came before the last line: late where they slow down.
        miniters=0,
        dynamic_ncols=terminal,
        initial=initial,
        leave=leave,
        disable=_Switch.quiet,
    )


class _Lines:
    """A stream that turns a bar's carriage returns into whole lines, for logs."""

    def __init__(self) -> None:
        self._pending = ""
        self._shown = ""
        self._last = time.monotonic()

    def write(self, text: str) -> None:
        """Print a bar's text as a line when the last one is old enough, or at its end."""
        line = text.strip("\r\n").rstrip()
        if line:
            self._pending = line
        final = text.endswith("\n")
        if self._pending and (final or time.monotonic() - self._last >= _LOG_INTERVAL_S):
            if self._pending != self._shown:
                note(f"{self._pending}\n")
            self._shown, self._pending, self._last = self._pending, "", time.monotonic()

    def flush(self) -> None:
        """Do nothing: lines are flushed as they are printed."""
