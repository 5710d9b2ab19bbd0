"""What went wrong inside a Ray task or actor, without Ray's wrappers around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from twotower.faults import explain


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the error for people that is behind an exception of Ray, where there is one."""
    try:
        yield
    except Exception as error:
        told = explain(error)
        if told is None or told is error:
            raise
        raise told from error
