"""Moments in which the system refuses this process something."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def open_files(more: int) -> Iterator[None]:
    """Let no more files than these be opened inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The lowest number that is free; below it there is none.
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
