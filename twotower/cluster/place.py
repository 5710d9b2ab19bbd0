"""Where Ray keeps its files on this machine, and whether a cluster answers; Ray is not imported here."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path

from twotower.errors import ConfigError

_KNOCK_S = 10.0
_SOCKET_BYTES = 107
_LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
"""What Ray puts below its folder, with the longest number of a process."""


def knock(address: str, patience_s: float = _KNOCK_S) -> None:
    """Connect to the head of a cluster: Ray itself would try for minutes, and then end this process.

    Args:
        address: HOST:PORT, with or without ``ray://`` before it; nothing is tried for ``auto``.
        patience_s: seconds to wait for an answer.

    Raises:
        ValueError: the address is none.
        OSError: nothing listens there.
    """
    scheme, _, place = address.rpartition("://")
    if address == "auto" or scheme not in ("", "ray"):
        return
    host, _, port = place.partition("/")[0].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError("it is not HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=patience_s):
            pass
    except UnicodeError:
        raise ValueError("it is no name of a host") from None


def check_folder() -> None:
    """Check that Ray can use RAY_TMPDIR: its sockets lie there, and the system limits their paths.

    Raises:
        ConfigError: it is too long, or no files can be made in it.
    """
    where = folder()
    if not where.is_absolute():
        raise ConfigError(f"RAY_TMPDIR ({where}) must be an absolute path")
    room = _SOCKET_BYTES - len(_LONGEST_SOCKET)
    if len(os.fsencode(where)) > room:
        raise ConfigError(
            f"RAY_TMPDIR ({where}) is {len(os.fsencode(where))} bytes long, and Ray's sockets leave room "
            f"for {room}; choose a shorter path"
        )
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise ConfigError(
            f"RAY_TMPDIR ({where}) can not be written ({error.strerror}); choose another folder"
        ) from error


def folder() -> Path:
    """Return the folder that Ray keeps its session in: RAY_TMPDIR."""
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp")


def running_cluster() -> str | None:
    """Return the address of the cluster that ``ray start`` last started on this machine, if it still answers.

    Ray's own "auto" would also take any other Ray process of the machine, such as a test's.
    """
    path = folder() / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError, ValueError):
        address = path.read_text().strip()
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=2):
            return address
    return None
