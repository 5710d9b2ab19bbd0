"""Ports, and the HAProxy processes of a Ray cluster that this process started.

Serve runs HAProxy as a child of one of its actors, from a configuration file in a folder named after the
Ray node. That name tells our processes from anybody else's: nothing is ever ended by program name.

Run as ``python -m twotower.cluster.processes`` this module is the guard of ``serve.running``: it reads node
ids and processes from its standard input until that closes, which also happens when the service's process
is killed, and ends what is left of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05
_GRACE_S = 3.0
_PROC = Path("/proc")
_QUIET_PORTS = range(20_000, 30_000)
"""Below those that the system gives to whoever names none, such as Ray's processes, which start between
choosing a port and using it, and beside those of Ray's workers (10,002 to 19,999) and Serve's replicas."""


def port_is_free(host: str, port: int) -> bool:
    """Return whether a TCP server could listen on ``host:port`` now."""
    return bind_error(host, port) is None


def bind_error(host: str, port: int) -> OSError | None:
    """Return what the system has against a TCP server on ``host:port`` now, such as ``socket.gaierror``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections of a stopped server in TIME_WAIT do not hold a port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except UnicodeError:
            return socket.gaierror(socket.EAI_NONAME, "it is no name of a host")
        except OSError as error:
            return error
    return None


def free_port(preferred: int | None = None, host: str = "") -> int:
    """Return ``preferred`` if it is free, else a port that is free now and that nobody gets by chance.

    Raises:
        OSError: none of ten thousand ports is free.
    """
    if preferred is not None and port_is_free(host, preferred):
        return preferred
    for port in random.sample(_QUIET_PORTS, len(_QUIET_PORTS)):
        if port_is_free(host, port):
            return port
    raise OSError(f"no port of {_QUIET_PORTS.start} to {_QUIET_PORTS.stop - 1} is free")


def wait_until_free(addresses: Iterable[tuple[str, int]], timeout_s: float) -> list[int]:
    """Return the ports that are still held after at most ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    held = list(addresses)
    while held := [(host, port) for host, port in held if not port_is_free(host, port)]:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    return [port for _, port in held]


def haproxy_pids(node_ids: Iterable[str]) -> list[int]:
    """Return the PIDs of HAProxy processes that serve these Ray nodes (hexadecimal node ids)."""
    endings = tuple(f"/{node_id}/haproxy.cfg".encode() for node_id in node_ids)
    pids = []
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if endings and any(argument.endswith(endings) for argument in arguments):
            pids.append(int(entry.name))
    return pids


def end_haproxy(node_ids: Iterable[str], grace_s: float = _GRACE_S) -> int:
    """End the HAProxy processes of these Ray nodes, and return how many there were."""
    node_ids = list(node_ids)
    found = set(haproxy_pids(node_ids))
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        deadline = time.monotonic() + wait_s
        while left := haproxy_pids(node_ids):
            found.update(left)
            for pid in left:
                _signal(pid, number)
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
    return len(found)


def children(pid: int) -> list[int]:
    """Return the PIDs of all descendants of a process (empty where there is no /proc)."""
    parents: dict[int, int] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        # The second field is the program's name in parentheses and may hold blanks.
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, frontier = [], {pid}
    while frontier := {child for child, parent in parents.items() if parent in frontier}:
        found += sorted(frontier)
    return found


@dataclass(frozen=True)
class Process:
    """One process: its PID and when it started, since PIDs are used again."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process that has a PID now; None where there is none, or only a zombie."""
        try:
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        # Of all fields of the file, the third is the state and the 22nd the start time.
        return None if fields[0] == "Z" else cls(pid, fields[19])

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self


def descendants(pid: int) -> set[Process]:
    """Return all processes below a process."""
    return {process for child in children(pid) if (process := Process.of(child))}


def end(processes: Iterable[Process], patience_s: float, grace_s: float = _GRACE_S) -> None:
    """Wait for processes to end by themselves, then ask them to (SIGTERM), then force them (SIGKILL)."""
    left = list(processes)
    for number, wait_s in ((None, patience_s), (signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        for process in left:
            if number is not None and process.alive:
                _signal(process.pid, number)
        deadline = time.monotonic() + wait_s
        while (left := [process for process in left if process.alive]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)


class Guard:
    """A process that cleans up when this one is gone without having done so."""

    def __init__(self) -> None:
        """Start it; it watches over nothing yet."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "twotower.cluster.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            # A session of its own: the terminal's Ctrl-C and hang-up do not reach it.
            start_new_session=True,
        )
        found = Process.of(self._process.pid)
        self._told = set() if found is None else {found}

    @property
    def process(self) -> Process | None:
        """Itself."""
        return Process.of(self._process.pid)

    def add_nodes(self, node_ids: Iterable[str]) -> None:
        """Watch over the HAProxy of Ray nodes."""
        self._tell(node_ids)

    def add_processes(self, processes: Iterable[Process]) -> None:
        """Watch over processes; itself and those it knows are passed over."""
        new = set(processes) - self._told
        self._told |= new
        self._tell(f"{process.pid}:{process.started}" for process in new)

    def close(self) -> None:
        """Let it do its work, and wait for its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, names: Iterable[str]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("".join(f"{name}\n" for name in names).encode())
            self._process.stdin.flush()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _guard() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    names = [line.strip() for line in sys.stdin]
    end_haproxy(name for name in names if ":" not in name)
    end((Process(int(name.split(":")[0]), name.split(":")[1]) for name in names if ":" in name), _GRACE_S)


if __name__ == "__main__":
    _guard()
