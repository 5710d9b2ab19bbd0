"""The environment variables that Ray must find before it is imported. This module does not import Ray.

``deploy/ray.env`` holds the same settings for a shell; it is read where it is there, so a value changed in
that file is changed everywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

RAY_ENV_PATH = Path(__file__).parents[1] / "deploy" / "ray.env"

DEFAULTS: dict[str, str] = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "30",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""What an installation without ``deploy/ray.env`` uses; a test keeps the two equal."""

_LINE = re.compile(r'^export (?P<name>[A-Z][A-Za-z0-9_]*)="\$\{(?P=name):-(?P<value>[^"}]*)\}"$')


def read_settings(path: Path = RAY_ENV_PATH) -> dict[str, str]:
    """Return the variables of ``deploy/ray.env`` by name, or the built-in ones where it is not there."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return dict(DEFAULTS)
    matches = (_LINE.match(line) for line in lines)
    return {match["name"]: match["value"] for match in matches if match}


def apply_environment(environment: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """Set the variables that are not set yet, and return the value that each has now.

    Call it before anything imports Ray. An empty variable counts as not set, as in ``deploy/ray.env``.

    Args:
        environment: changed in place; ``os.environ`` when not given.
    """
    target = os.environ if environment is None else environment
    settings = read_settings()
    for name, value in settings.items():
        if not target.get(name):
            target[name] = value
    return {name: target[name] for name in settings}
