"""The clients of the serving benchmarks, each in a process of its own: wrk, and the open-loop generator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_name("wrk.lua")
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Measured:
    """What a client measured in one run."""

    p50_ms: float
    p99_ms: float
    rate: float
    """Good answers per second."""
    cpu_share: float
    """CPU seconds of the client for each second of the run."""


def require_wrk() -> None:
    """End the benchmark where there is no wrk."""
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark needs the load generator wrk: apt-get install -y wrk")


def closed_loop(url: str, bodies: Path, connections: int, seconds: float) -> Measured:
    """Let wrk send requests on some connections, each as soon as the one before is answered.

    Args:
        url: of the service, with a path before ``/v1/retrieve`` where it has one.
        bodies: file of JSON bodies, one a line.
        connections: at the same time, in one thread.
        seconds: whole ones.
    """
    script = ["-s", str(_SCRIPT), f"{url}/v1/retrieve", "--", str(bodies)]
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", *script]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - begin
    if process.returncode:
        raise SystemExit(f"wrk ended with status {process.returncode}: {output}")
    found = json.loads(output.splitlines()[-1])
    if found["errors"] or not found["requests"]:
        raise SystemExit(f"{url}: wrk counts {found['errors']} errors of {found['requests']} requests")
    share = (usage.ru_utime + usage.ru_stime) / wall
    return Measured(found["p50_ms"], found["p99_ms"], found["requests"] / found["seconds"], share)


def open_loop(
    what: str, url: str, bodies: Path, rate: float, seconds: float, connections: int = 64
) -> Measured:
    """Let ``benchmarks.load`` send requests at a constant rate; any failed request ends the benchmark.

    ``what`` names the server in the reason.
    """
    options = {"--bodies": bodies, "--rate": rate, "--duration": seconds, "--connections": connections}
    flat = [str(part) for pair in options.items() for part in pair]
    command = [sys.executable, "-m", "benchmarks.load", f"{url}/v1/retrieve", *flat]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if found["errors"]:
        raise SystemExit(f"{what} ({url}) at {rate:.0f} requests a second: {found['errors']}")
    figures = found["figures"]
    return Measured(
        figures["p50_ms"], figures["p99_ms"], figures["achieved_rate"], figures["client_cpu_share"]
    )
