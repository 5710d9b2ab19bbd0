"""Ports of the service, processes that an earlier Ray left, and environment variables that matter."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.doctor.findings import Finding, ok, problem, warning
from serve.checks import SIDE_PORTS, check_port
from twotower.cluster import place
from twotower.cluster.processes import port_is_free
from twotower.config import Config
from twotower.environment import read_settings
from twotower.errors import ConfigError
from twotower.redaction import redacted

_PROGRAMS = ("gcs_server", "raylet", "haproxy")
_KNOCK_S = 3.0
_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY")


def ports(config: Config, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether the service could listen now.

    Args:
        config: names its host and port.
        environment: names the ports beside it.
    """
    host, port = config.serve.host, config.serve.port
    try:
        check_port(host, port)
        yield ok("ports", "serve.port", f"{port} on {host} is free")
    except ConfigError as error:
        reason, _, remedy = str(error).partition("; ")
        yield problem("ports", "serve.port", reason, remedy or "choose another serve.host or serve.port")
    for name, usual in SIDE_PORTS.items():
        asked = environment.get(name) or str(usual)
        if not asked.isdecimal() or not 0 < int(asked) < 1 << 16:
            yield problem("ports", name, repr(asked), f"set {name} to a port, 1 to 65535, or unset it")
        elif not port_is_free("", int(asked)):
            yield ok("ports", name, f"{asked} is taken; the service takes another one by itself")
        else:
            yield ok("ports", name, f"{asked} is free")


@dataclass(frozen=True)
class Program:
    """A process of Ray or HAProxy."""

    pid: int
    parent: int
    name: str
    """gcs_server, raylet or haproxy."""


def programs(proc: Path = Path("/proc")) -> list[Program]:
    """Return the processes of Ray and of its HAProxy on this machine, by their PIDs.

    Args:
        proc: the folder of processes.
    """
    found = []
    for entry in proc.iterdir() if proc.is_dir() else ():
        if not entry.name.isdigit():
            continue
        try:
            words = [word.decode(errors="replace") for word in (entry / "cmdline").read_bytes().split(b"\0")]
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        name = os.path.basename(words[0])
        # HAProxy of others is none of our business: Ray's has its file in a folder named after a node.
        if name == "haproxy" and not any(re.search(r"/[0-9a-f]{20,}/haproxy\.cfg$", word) for word in words):
            continue
        if name in _PROGRAMS:
            found.append(Program(int(entry.name), parent, name))
    return sorted(found, key=lambda program: program.pid)


def processes(found: list[Program], cluster: str | None) -> Iterator[Finding]:
    """Yield what to think of processes of Ray.

    One is stale where whoever started it has gone, and no cluster that ``ray start`` made answers.

    Args:
        found: the processes.
        cluster: the address at which a cluster of this machine answers.
    """
    if not found:
        yield ok("processes", "Ray and HAProxy", "none is running")
        return
    rays = {program.pid for program in found if program.name != "haproxy"}
    for program in found:
        told = f"PID {program.pid}"
        if cluster is not None:
            yield ok("processes", program.name, f"{told}, with the cluster at {cluster}")
        elif program.name == "haproxy" and not rays:
            yield problem(
                "processes",
                program.name,
                f"{told} is left of a Ray that has gone, and may hold the service's port",
                f"kill {program.pid}",
            )
        elif program.name != "haproxy" and program.parent <= 1:
            yield warning(
                "processes",
                program.name,
                f"{told} is left of a job that has gone",
                f"kill {program.pid}, unless it is another user's or container's",
            )
        else:
            yield ok("processes", program.name, f"{told}, of process {program.parent}")


def environment(variables: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the environment variables that matter.

    Args:
        variables: by name.
    """
    yield _address(variables.get("RAY_ADDRESS", ""))
    try:
        place.check_folder()
        yield ok("environment", "RAY_TMPDIR", variables.get("RAY_TMPDIR") or "not set: /tmp")
    except ConfigError as error:
        what, _, remedy = str(error).partition("; ")
        yield problem("environment", "RAY_TMPDIR", what, remedy or "give an absolute path to a folder")
    changed = {
        n: variables[n] for n, usual in read_settings().items() if variables.get(n, usual) not in ("", usual)
    }
    if changed:
        shown = ", ".join(f"{name}={value}" for name, value in changed.items())
        yield warning(
            "environment",
            "deploy/ray.env",
            f"other values are set: {shown}",
            "unset them unless they are wanted; docs/serving.md says what each does",
        )
    else:
        yield ok("environment", "deploy/ray.env", "nothing stands against its values")
    proxies = [name for name in _PROXIES if variables.get(name)]
    exempt = variables.get("no_proxy") or variables.get("NO_PROXY") or ""
    if proxies and not {"*", "localhost", "127.0.0.1"} & {name.strip() for name in exempt.split(",")}:
        yield warning(
            "environment",
            proxies[0],
            redacted(variables[proxies[0]]),
            "set no_proxy=localhost,127.0.0.1 as well: Ray and the service talk to themselves",
        )


def _address(address: str) -> Finding:
    if address in ("", "auto", "local"):
        return ok(
            "environment",
            "RAY_ADDRESS",
            address or "not set: a job joins the Ray of this machine or starts one",
        )
    try:
        place.knock(address, _KNOCK_S)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return problem(
            "environment",
            "RAY_ADDRESS",
            f"no Ray cluster answers at {address} ({reason})",
            "start it, give HOST:PORT of its head, or unset RAY_ADDRESS",
        )
    return ok("environment", "RAY_ADDRESS", f"{address} answers")
