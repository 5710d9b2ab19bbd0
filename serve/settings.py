"""What a deployment that answers over HTTP is set to, and the Serve settings that its process runs with."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

from twotower.config import LimitsConfig
from twotower.environment import read_settings

MAX_ONGOING_REQUESTS = 2048
"""A request whose body is still on its way is ongoing too: this is more than slow clients may hold. What
waits for work is bounded by the service itself (``serve.admission``)."""


@dataclass(frozen=True)
class Intake:
    """Which requests are taken in, and what is said about them."""

    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Of requests, and of what waits."""
    token_file: str | None = None
    """File with the bearer token that requests must bring; None asks for none."""
    log_user_ids: bool = False
    """Whether the log of a failure holds its message."""


def serve_settings() -> dict[str, dict[str, str]]:
    """Return the Serve settings of deploy/ray.env that this process runs with, and those it does not.

    Returns:
        "active": value by variable; "missing": wanted value by variable that is not set.
    """
    wanted = {name: value for name, value in read_settings().items() if name.startswith("RAY_SERVE_")}
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
