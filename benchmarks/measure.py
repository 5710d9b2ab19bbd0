"""What all benchmarks share: interleaved times, extra memory in a fresh process, results as JSON.

A benchmark is a module run as ``python -m benchmarks.NAME [--quick] [--isa avx2]``. It names the instruction
set that it ran on; ``--isa avx2`` runs it as on a processor without AVX-512 (``isa``)::

    quick = measure.start("What this measures.", threads=2)
    samples = measure.times({"ours": ours, "dense": dense}, repeats=3 if quick else 9)
    extra = measure.peak_extra_bytes("benchmarks.loss:blocked", {"batch": 8192}, threads=2)
    measure.finish("loss", {"ours_over_dense": samples["ours"].over(samples["dense"])}, rows, quick)
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import isa

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Sample:
    """Wall-clock times of one callable, in the order of the repeats."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance from the first to the third quartile, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / self.median

    def over(self, other: Sample) -> float:
        """Return the median of this time over the other's of the same repeat, which shares its noise."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def __str__(self) -> str:
        """Say median and spread, such as ``12.3 ms +- 4 %``."""
        return f"{self.median * 1e3:.1f} ms +- {self.spread:.0%}"


def start(description: str, threads: int) -> bool:
    """Read the command line, set torch's number of threads; return whether ``--quick`` was given."""
    quick: bool = options(argparse.ArgumentParser(description=description)).quick
    torch.set_num_threads(threads)
    return quick


def options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, ``--quick`` and ``--isa`` added; an ``--isa`` starts the process anew."""
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument(
        "--isa",
        choices=isa.SETS,
        default="native",
        help="avx2: run as on a processor without AVX-512, into results/NAME-avx2.json",
    )
    options = parser.parse_args()
    isa.lowered(options.isa)
    return options


def times(callables: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Sample]:
    """Time the callables in turn, ``repeats`` rounds after ``warmup`` unmeasured ones.

    The order turns by one place each round, so that none always follows the same other.
    """
    names = list(callables)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            callables[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def peak_extra_bytes(module_function: str, kwargs: Mapping[str, Any], threads: int) -> int:
    """Return by how many bytes one call raises the peak of resident memory, in a fresh process (Linux).

    Args:
        module_function: such as ``benchmarks.loss:blocked``; called with ``kwargs`` it makes the inputs,
            which do not count, and returns the callable that is measured.
        kwargs: its keyword arguments; must survive JSON.
        threads: torch's number of threads in that process.
    """
    command = [sys.executable, "-m", "benchmarks.measure", module_function, json.dumps(dict(kwargs))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    done = subprocess.run(
        command, cwd=RESULTS.parents[1], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def finish(name: str, figures: Mapping[str, float], table: Sequence[Sequence[object]], quick: bool) -> None:
    """Print the table (heading first) and the figures; write results/NAME.json unless quick.

    A run that was kept to an instruction set has a file of its own, such as results/NAME-avx2.json.
    """
    cells = [[str(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    result = {"name": name, "figures": rounded, "isa": isa.named(isa.in_use())}
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        file = name if isa.asked() == "native" else f"{name}-{isa.asked()}"
        whole = {**result, "machine": _machine(), "table": cells}
        (RESULTS / f"{file}.json").write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(result))


def _machine() -> dict[str, object]:
    model = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "isa": isa.in_use(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _resident_bytes(field: str) -> int:
    return int(re.findall(rf"{field}:\s+(\d+) kB", _text("/proc/self/status"))[0]) * 1024


def _measure(module_function: str, kwargs: str) -> None:
    """Print the extra bytes of one call."""
    module, function = module_function.split(":")
    call = getattr(importlib.import_module(module), function)(**json.loads(kwargs))
    # Memory that the allocator still holds from making the inputs would hide what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now (proc(5))
    before = _resident_bytes("VmRSS")
    call()
    print(_resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    _measure(*sys.argv[1:])
