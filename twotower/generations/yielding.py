"""Leaves the CPU and memory to others, between and after pieces of the work on a generation.

It is loaded beside the one that answers, in the same process: requests that came meanwhile go first.
"""

from __future__ import annotations

import contextlib
import ctypes
import time

_PAUSE_S = 0.005


def pause() -> None:
    """Leave the CPU and Python's interpreter to others, for longer than most answers take."""
    time.sleep(_PAUSE_S)


def return_memory() -> None:
    """Give memory that was freed back to the system, where the C library has a way."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
