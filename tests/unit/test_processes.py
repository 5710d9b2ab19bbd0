"""Ports and processes: found, told apart, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from twotower.cluster.processes import (
    Guard,
    Process,
    descendants,
    end,
    end_haproxy,
    free_port,
    haproxy_pids,
    port_is_free,
    wait_until_free,
)

pytestmark = pytest.mark.sockets

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
SLEEP = [sys.executable, "-c", "import time; time.sleep(100)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(100)",
]


@contextlib.contextmanager
def child(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def known(pid: int) -> Process:
    process = Process.of(pid)
    assert process is not None
    return process


@pytest.mark.sockets
def test_ports() -> None:
    port = free_port()
    assert port_is_free("127.0.0.1", port)
    assert free_port(port) == port
    with socket.create_server(("127.0.0.1", port)):
        assert not port_is_free("127.0.0.1", port)
        assert free_port(port) != port
        assert wait_until_free([("127.0.0.1", port)], 0.1) == [port]
    assert wait_until_free([("127.0.0.1", port)], 5) == []
    # None that the system may give to another process, by Linux's defaults, before it is used.
    chosen = {free_port() for _ in range(20)}
    assert all(20_000 <= port < 30_000 for port in chosen)
    assert len(chosen) > 1


def test_a_process_is_its_pid_and_its_start() -> None:
    with child(SLEEP) as running:
        process = known(running.pid)
        assert process.alive
        assert process in descendants(os.getpid())
        assert not Process(process.pid, "1").alive
        running.kill()
        running.wait()
        assert not process.alive
    assert Process.of(running.pid) is None


def test_end_asks_and_then_forces() -> None:
    with child(SLEEP) as willing, child(STUBBORN) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        end([known(willing.pid), known(stubborn.pid)], patience_s=0, grace_s=0.5)
        assert willing.wait() == -signal.SIGTERM
        assert stubborn.wait() == -signal.SIGKILL


def test_end_leaves_another_process_of_the_same_pid() -> None:
    with child(SLEEP) as running:
        end([Process(running.pid, "1")], patience_s=0, grace_s=0)
        assert running.poll() is None


def test_haproxy_is_told_by_its_node() -> None:
    with (
        child([*SLEEP, "-f", "/tmp/x/abc123/haproxy.cfg"]) as ours,
        child([*SLEEP, "/tmp/x/def/haproxy.cfg"]) as other,
    ):
        deadline = time.monotonic() + 10
        while haproxy_pids(["abc123"]) != [ours.pid] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert haproxy_pids([]) == []
        assert end_haproxy(["abc123", "fff"]) == 1
        assert ours.wait() == -signal.SIGTERM
        assert other.poll() is None


def test_the_guard_ends_what_a_killed_process_leaves() -> None:
    code = f"""
import subprocess, sys, time
from twotower.cluster.processes import Guard, Process
guard = Guard()
left = subprocess.Popen({SLEEP!r}, start_new_session=True)
guard.add_processes([Process.of(left.pid)])
print(left.pid, flush=True)
time.sleep(100)
"""
    with child([sys.executable, "-c", code]) as owner:
        assert owner.stdout is not None
        left = known(int(owner.stdout.readline()))
        assert left.alive
        owner.kill()
        deadline = time.monotonic() + 30
        while left.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left.alive


def test_a_closed_guard_is_gone() -> None:
    guard = Guard()
    process = guard.process
    assert process is not None
    guard.close()
    assert not process.alive
