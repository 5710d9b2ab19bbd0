"""What a process says that wants to be a fork of another one.

Ray's library takes what follows from the environment when it is loaded, so that forks of other jobs come from
other processes: their common parent tells which.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

FIXED = ("RAY_JOB_ID", "RAY_RAYLET_PID")
"""Variables that a process with Ray can not change for its forks."""
_STREAMS = (0, 1, 2)


def ask(path: str, arguments: list[str]) -> None:
    """Ask for a fork that has these arguments and all that this process has, and live as long as it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        send(connection, {name: os.environ.get(name, "") for name in FIXED})
        parent, _ = receive(connection)
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "group": os.getpgrp(),
        "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(parent)
        send(connection, request)
        connection.recv(1)


def send(connection: socket.socket, content: Any) -> None:
    """Send a value, with the open files 0, 1 and 2."""
    encoded = json.dumps(content).encode()
    socket.send_fds(connection, [len(encoded).to_bytes(8, "big")], _STREAMS)
    connection.sendall(encoded)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """Return the value and the open files that were sent."""
    length, files, _, _ = socket.recv_fds(connection, 8, len(_STREAMS))
    content = b""
    while len(content) < int.from_bytes(length, "big"):
        content += connection.recv(1 << 20)
    return json.loads(content), files
