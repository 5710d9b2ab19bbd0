"""What went wrong inside a Ray task or actor, without Ray's wrappers around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from twotower.errors import TwotowerError


def own_error(error: BaseException) -> TwotowerError | None:
    """Return the TwotowerError that an exception of Ray is or carries, or None."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        # Ray's errors of tasks are also of the class that was raised, but with a remote trace as message.
        inner = getattr(cause, "cause", None)
        if isinstance(cause, TwotowerError) and inner is None:
            return cause
        cause = inner or cause.__cause__
    return None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the TwotowerError of a task or actor itself where one is behind an exception of Ray."""
    try:
        yield
    except Exception as error:
        own = own_error(error)
        if own is None or own is error:
            raise
        raise own from None
