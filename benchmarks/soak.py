"""Ten minutes of load at half of saturation: no error, and no process that grows.

``errors``: requests that failed or were answered with anything but 200. ``growth_mib_per_minute``: slope of
the anonymous memory (RssAnon) of the process that grows fastest after the first two minutes, of all
processes of the service: Ray's, HAProxy and the replicas.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks import measure
from benchmarks.faults import CONNECTIONS, check_settings, made_service, user_bodies
from benchmarks.load import run_load
from serve.running import running
from twotower.cluster.processes import descendants
from twotower.environment import apply_environment

WARM_UP_S = 120.0
SAMPLE_S = 5.0


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", threads=1)
    num_items, seconds, warm_up = (20_000, 30.0, 10.0) if quick else (100_000, 600.0, WARM_UP_S)
    # Before anything imports Ray.
    apply_environment()
    from twotower.cluster.session import session

    with tempfile.TemporaryDirectory() as folder:
        config, generation = made_service(Path(folder), num_items)
        with session(config), running(config) as url:
            check_settings(url)
            bodies = user_bodies(generation)
            run_load(url, bodies, 50, 5, CONNECTIONS)
            saturation = run_load(url, bodies, 3000, 5, CONNECTIONS, timeout=60).achieved_rate
            memory = _Memory()
            with memory:
                load = run_load(url, bodies, saturation / 2, seconds, 64)
    growth = memory.growth(warm_up)
    name, worst = max(growth.items(), key=lambda each: each[1])
    rows: list[list[object]] = [
        ["what", "value"],
        ["rate", f"{saturation / 2:.0f}/s, half of {saturation:.0f}/s"],
        ["requests", load.count],
        ["p50, p99, p99.9 ms", ", ".join(f"{load.percentile_ms(p):.2f}" for p in (50, 99, 99.9))],
        ["CPU share of the client", f"{load.cpu_share:.2f}"],
        ["processes", len(growth)],
        ["grows fastest", name],
        *([name, f"{slope:+.3f} MiB/min"] for name, slope in sorted(growth.items(), key=lambda g: -g[1])[:5]),
    ]
    measure.finish("soak", {"errors": load.errors.total(), "growth_mib_per_minute": worst}, rows, quick)


class _Memory:
    """Anonymous memory of every process of the service, over time."""

    def __init__(self) -> None:
        self._samples: dict[str, list[tuple[float, float]]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def growth(self, warm_up: float) -> dict[str, float]:
        """Return MiB a minute by process, of those that lived from the end of the warm-up to the end."""
        begin = min(samples[0][0] for samples in self._samples.values()) + warm_up
        end = max(samples[-1][0] for samples in self._samples.values())
        found = {}
        for name, samples in self._samples.items():
            late = np.array([s for s in samples if s[0] >= begin])
            if len(late) > 2 and late[0, 0] < begin + 2 * SAMPLE_S and late[-1, 0] > end - 2 * SAMPLE_S:
                found[name] = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * 60
        return found

    def _run(self) -> None:
        while not self._stop.is_set():
            now = time.monotonic()
            for process in descendants(os.getpid()):
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                kib = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
                name = Path(words[0].decode()).name or process.pid
                if kib:
                    self._samples.setdefault(f"{name} {process.pid}", []).append((now, int(kib[0]) / 1024))
            self._stop.wait(SAMPLE_S)


if __name__ == "__main__":
    main()
