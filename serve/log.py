"""Log lines about the service itself: one for each event, with its facts as keys.

They go where Serve's own lines go, as JSON in a replica. No fact names a user or an item.
"""

from __future__ import annotations

import contextlib
import logging
import traceback

_SERVE = logging.getLogger("ray.serve")
_EVENTS = logging.getLogger("ray.serve.twotower")


def log_failure(what: str, error: BaseException, with_message: bool) -> None:
    """Write what failed, with the stack.

    Args:
        what: failed.
        error: why.
        with_message: write the error's message too, which may name a user.
    """
    if with_message:
        _SERVE.error("%s", what, exc_info=error)
    else:
        where = "".join(traceback.format_tb(error.__traceback__))
        _SERVE.error("%s with %s\n%s", what, type(error).__name__, where)


def log_event(event: str, message: str, level: int = logging.INFO, **facts: str | float | None) -> None:
    """Write one line.

    Args:
        event: its kind, such as "generation_switched".
        message: for people.
        level: of ``logging``; lines of INFO are written whatever the level of Serve's logger is.
        facts: further keys of the line.
    """
    if _EVENTS.level == logging.NOTSET:
        _EVENTS.setLevel(logging.INFO)
    _EVENTS.log(level, message, extra={"event": event, **facts}, stacklevel=2)
    # With the throughput settings Serve collects a thousand lines before it writes any.
    for handler in _SERVE.handlers:
        # As with a line itself: a full disk or a closed stream must not fail what happened.
        with contextlib.suppress(OSError, ValueError):
            handler.flush()
