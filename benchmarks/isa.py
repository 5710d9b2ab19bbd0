"""The instruction set that a benchmark runs on: its name, and a switch to run as on a processor with less.

torch, oneDNN, MKL, FAISS, OpenBLAS, NumPy and Arrow each choose their code by what the processor can, and
each has a variable of its own that lowers the choice, read when the library is loaded. ``lowered`` sets them
all and starts the process anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np
import torch

SETS = ("native", "avx2")
_MARK = "TWOTOWER_BENCHMARK_ISA"
"""Set in a process, and those that it starts, to the instruction set that was asked for."""
_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FAISS_SIMD_LEVEL": "AVX2",
    # Of releases of FAISS that come as one library for each instruction set.
    "FAISS_OPT_LEVEL": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
}


def asked() -> str:
    """Return the instruction set that this process was told to keep to, ``native`` when none."""
    return os.environ.get(_MARK, "native")


def lowered(isa: str) -> None:
    """Start this process anew with every library kept to ``isa``, unless it was; ``native`` changes nothing.

    Args:
        isa: of ``SETS``.
    """
    if isa == "native" or asked() == isa:
        return
    found: Any = np.show_config(mode="dicts")
    beyond = [name for name in found["SIMD Extensions"]["found"] if name.startswith(("AVX512", "X86_V4"))]
    environment = {**os.environ, **_AVX2, "NPY_DISABLE_CPU_FEATURES": " ".join(beyond), _MARK: isa}
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, environment)


def in_use() -> dict[str, str]:
    """Return the instruction set that torch and FAISS run on, such as ``AVX512`` or ``AVX2``."""
    config: Any = getattr(faiss, "SIMDConfig", None)
    level = config.get_level_name() if config else faiss.get_compile_options().split()[-1]
    # Further extensions, such as AVX512_VPOPCNT, are of the same width.
    return {"torch": torch.backends.cpu.get_cpu_capability(), "faiss": level.split("_")[0]}


def named(sets: Mapping[str, str]) -> str:
    """Return one name where all libraries run on the same, else each library's."""
    if len(set(sets.values())) == 1:
        return next(iter(sets.values()))
    return ", ".join(f"{library} {isa}" for library, isa in sets.items())
