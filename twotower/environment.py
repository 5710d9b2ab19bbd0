"""What must hold before Ray is imported: its environment variables, and one folder for all its processes.

``deploy/ray.env`` holds the same settings for a shell; it is read where it is there, so a value changed in
that file is changed everywhere.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from twotower.config import Config
from twotower.errors import ConfigError

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


def check_storage(config: Config, environment: Mapping[str, str] | None = None) -> None:
    """Check that every process of the job means the same folder by ``storage.root``.

    Raises:
        ConfigError: the root is a URL; or it is relative and the job was submitted to a cluster (it runs in a
            copy of the working directory that is thrown away) or the cluster is on another machine.
    """
    environment = os.environ if environment is None else environment
    root = config.storage.root
    if "://" in root:
        raise ConfigError(
            f"storage.root ({root}) is a URL; artefacts live in a folder that every node sees: give its "
            "path. Generations alone may live in a bucket, which storage.store names"
        )
    if Path(root).expanduser().is_absolute():
        return
    remedy = f"give an absolute folder that every node sees, such as --set storage.root=/shared/{root}"
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment:
        raise ConfigError(
            f"storage.root ({root}) is relative, and a submitted job runs in a temporary copy of the working "
            f"directory, where its results would be lost; {remedy}"
        )
    address = environment.get("RAY_ADDRESS", "")
    if not _is_here(address):
        raise ConfigError(
            f"storage.root ({root}) is relative, and the cluster is on another machine "
            f"(RAY_ADDRESS={address}); {remedy}"
        )


def _is_here(address: str) -> bool:
    """Return whether RAY_ADDRESS names no other machine. Nothing is sent to it."""
    if address in ("", "auto", "local"):
        return True
    host = address.split("://")[-1].split("/")[0].rpartition(":")[0].strip("[]") or address
    try:
        family, kind, protocol, _, resolved = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        # Only an address of this machine can be bound.
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(resolved)
    except OSError:
        return False
    return True
