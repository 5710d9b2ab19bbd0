"""What is checked before the service starts: its token, what is published, and the ports it listens on."""

from __future__ import annotations

import errno
import os
import socket

from twotower import progress
from twotower.cluster.processes import bind_error, free_port
from twotower.config import Config
from twotower.errors import ArtefactError, ConfigError

SIDE_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
"""Ports that Serve opens beside its HTTP port, by the variable that names each; moved where taken."""


def check_token(config: Config) -> None:
    """Check the file of the token, and warn where whoever reaches this machine is answered without one.

    Raises:
        ConfigError: the file holds no token.
    """
    from serve.middleware import read_token

    host = config.serve.host
    token = read_token(config.serve.token_file)
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        progress.say(
            f"warning: serve.host is {host} and no serve.token_file is set: whoever reaches this machine is "
            "answered; see docs/serving-security.md"
        )


def check_published(config: Config, pointer: str = "CURRENT") -> None:
    """Check every byte of the generation that a pointer names.

    Where it is damaged, and one that the pointer named before may answer in its place, this warns.

    Raises:
        ArtefactError: there is none, or it is damaged and nothing may answer in its place.
    """
    from twotower.generations.generation import Generation
    from twotower.generations.opening import open_store

    store = open_store(config)
    generation_id = store.current(pointer)
    if generation_id is None:
        raise ArtefactError(
            f"nothing is published: {store.where} has no pointer {pointer}. Run `python -m jobs.pipeline` "
            "with the same --config and --set first, or name the configuration that was run"
        )
    try:
        Generation.open(store.fetch(generation_id), verify=True)
    except ArtefactError as error:
        if not store.fallbacks(pointer):
            raise
        progress.say(f"warning: {error} Until then what {pointer} named before answers")


def check_port(host: str, port: int) -> None:
    """Check that the service can listen there.

    Raises:
        ConfigError: it can not, with the reason and what to change.
    """
    error = bind_error(host, port)
    if error is None:
        return
    place, why = f"port {port} on {host}", error.strerror
    if isinstance(error, socket.gaierror):
        reason = f"serve.host ({host}) is not known here ({why}); give a name or an address of this machine"
    elif error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL):
        reason = f"serve.host ({host}) is no address of this machine; give one, such as 127.0.0.1 or 0.0.0.0"
    elif error.errno in (errno.EACCES, errno.EPERM):
        reason = f"{place} is not allowed to this user; choose one from 1024 with --set serve.port="
    elif error.errno == errno.EADDRINUSE:
        reason = f"{place} is taken; stop what listens there, or choose another port with --set serve.port="
    else:
        reason = f"{place} can not be listened on ({why}); choose another serve.host or serve.port"
    raise ConfigError(reason)


def side_port(variable: str) -> int:
    """Return a free port for what opens one beside the service: the usual one unless that is taken.

    Args:
        variable: of ``SIDE_PORTS``; where the environment has it, that port is the usual one.

    Raises:
        ConfigError: the environment holds no port.
    """
    asked = os.environ.get(variable) or str(SIDE_PORTS[variable])
    if not asked.isdecimal() or not 0 < int(asked) < 1 << 16:
        raise ConfigError(f"{variable} is {asked!r}; it must be a port, 1 to 65535")
    return free_port(int(asked))
