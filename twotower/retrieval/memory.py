"""Gives memory that was freed back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def return_memory() -> None:
    """Give memory that was freed back to the system, where the C library has a way."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
