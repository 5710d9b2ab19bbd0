"""The Serve settings that a process runs with, and how many requests Serve hands to a replica at a time."""

from __future__ import annotations

import logging
import os

from twotower.environment import read_settings

MAX_ONGOING_REQUESTS = 2048
"""A request whose body is still on its way is ongoing too: this is more than slow clients may hold. What
waits for work is bounded by the service itself (``serve.admission``)."""
_PREFIXES = ("RAY_SERVE_", "RAY_worker_niceness")


def serve_settings() -> dict[str, dict[str, str]]:
    """Return the settings for Serve in deploy/ray.env that this process runs with, and those it does not.

    Returns:
        "active": value by variable; "missing": wanted value by variable that is not set.
    """
    wanted = {name: value for name, value in read_settings().items() if name.startswith(_PREFIXES)}
    active = {name: os.environ[name] for name in wanted if os.environ.get(name)}
    return {
        "active": active,
        "missing": {name: value for name, value in wanted.items() if name not in active},
    }


def warn_of_missing(settings: dict[str, dict[str, str]], logger: logging.Logger) -> None:
    """Log the settings that were missing when Ray was started."""
    if missing := settings["missing"]:
        logger.warning(
            "settings of deploy/ray.env missing when Ray was started: %s", ", ".join(sorted(missing))
        )
