"""What a person sees while a job runs: stage headings, lines and progress bars, all on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

_LOG_INTERVAL_S = 5.0


def stage(title: str) -> None:
    """Print the heading of a stage."""
    print(f"\n== {title}", file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Print one line."""
    tqdm.write(f"   {message}", file=sys.stderr)
    sys.stderr.flush()


def bar(total: int | None, description: str, unit: str = "rows") -> tqdm[Any]:
    """Return a progress bar, a context manager; off a terminal it prints a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=f"   {description}",
        unit=f" {unit}",
        unit_scale=True,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else _LOG_INTERVAL_S,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        leave=True,
    )


class _Lines:
    """A stream that turns a bar's carriage returns into whole lines, for logs."""

    def __init__(self) -> None:
        self._pending = ""
        self._shown = ""
        self._last = 0.0

    def write(self, text: str) -> None:
        line = text.strip("\r\n")
        final = text.endswith("\n")
        if line:
            self._pending = line
        if self._pending and (final or time.monotonic() - self._last >= _LOG_INTERVAL_S):
            if self._pending != self._shown:
                print(self._pending, file=sys.stderr, flush=True)
            self._shown, self._pending, self._last = self._pending, "", time.monotonic()

    def flush(self) -> None:
        sys.stderr.flush()
