"""Packages, instruction sets and GPUs."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

import twotower
from jobs.doctor.findings import Finding, ok, problem, warning

_AREA = "packages"
_PACKAGES = {
    "ray": ("ray",),
    "torch": ("torch",),
    "faiss": ("faiss-cpu", "faiss-gpu-cuvs"),
    "pyarrow": ("pyarrow",),
}
"""The distributions that bring a module; one is enough."""
_OLDEST_PYTHON = (3, 11)
_GPU_QUERY = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
_PATIENCE_S = 15.0


def packages() -> Iterator[Finding]:
    """Yield the versions of what the jobs need, and whether each can be imported."""
    found = platform.python_version()
    if sys.version_info < _OLDEST_PYTHON:
        yield problem(_AREA, "python", found, "use Python 3.11 or later: make setup PYTHON=python3.12")
    else:
        yield ok(_AREA, "python", f"{found} ({sys.executable})")
    yield ok(_AREA, "twotower", f"{twotower.__version__} ({Path(twotower.__file__).parent})")
    wanted = _wanted()
    for module, distributions in _PACKAGES.items():
        yield _package(module, distributions, wanted)


def _package(module: str, distributions: tuple[str, ...], wanted: dict[str, Requirement]) -> Finding:
    versions = {name: version for name in distributions if (version := _version(name)) is not None}
    setup = "make setup installs the pinned version (FLAVOUR=gpu for GPUs)"
    if not versions:
        return problem(_AREA, module, "is not installed", setup)
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len(versions) > 1:
        return problem(_AREA, module, f"{shown}: both are there", f"uninstall one of them, or {setup}")
    try:
        importlib.import_module(module)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return problem(_AREA, module, f"{shown} can not be imported ({reason})", setup)
    (name, version), *_ = versions.items()
    if name in wanted and not wanted[name].specifier.contains(version, prereleases=True):
        return warning(_AREA, module, f"{shown} is outside of {wanted[name].specifier}", setup)
    return ok(_AREA, module, shown)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wanted() -> dict[str, Requirement]:
    """Return what the installed project asks for, by name; nothing where it runs without installation."""
    try:
        texts = importlib.metadata.requires("twotower") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [Requirement(text) for text in texts]
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate({"extra": "cpu"})}


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """Return the widest instruction set of the processor, and what torch uses of it.

    Args:
        cpuinfo: what the system says of its processors.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ok("cpu", "instructions", f"{platform.machine()} (not known more exactly)")
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    known = [n for n, flag in (("AMX", "amx_tile"), ("AVX512", "avx512f"), ("AVX2", "avx2")) if flag in flags]
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        return warning(
            "cpu",
            "instructions",
            "no AVX2: training and search are several times slower",
            "use a processor with AVX2, or let the virtual machine pass the host's processor on",
        )
    return ok("cpu", "instructions", f"{', '.join(known) or platform.machine()}{_torch_uses()}")


def _torch_uses() -> str:
    try:
        import torch
    except Exception:
        return ""
    return f" (torch uses {torch.backends.cpu.get_cpu_capability()})"


def gpus() -> Iterator[Finding]:
    """Yield the GPUs of this machine, and whether torch and FAISS can use them."""
    program = shutil.which("nvidia-smi")
    listed: list[str] = []
    if program is not None:
        try:
            done = subprocess.run(
                [program, *_GPU_QUERY], capture_output=True, text=True, timeout=_PATIENCE_S, check=True
            )
            listed = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        except (OSError, subprocess.SubprocessError) as error:
            yield warning(
                "gpu",
                "driver",
                f"nvidia-smi fails ({error})",
                "repair the driver, or let it be if no GPU is wanted",
            )
    yield from gpu_findings(listed, _cuda(), _version("faiss-gpu-cuvs") is not None)


def gpu_findings(listed: list[str], usable: int, faiss_gpu: bool) -> Iterator[Finding]:
    """Yield what to think of GPUs.

    Args:
        listed: a line for each that the driver knows.
        usable: how many torch can use.
        faiss_gpu: whether FAISS's GPU build is installed.
    """
    if not listed and not usable:
        yield ok("gpu", "GPU", "none")
        return
    for line in listed:
        yield ok("gpu", "GPU", line)
    if usable < len(listed):
        yield warning(
            "gpu",
            "torch",
            f"can use {usable} of {len(listed)}",
            "make setup FLAVOUR=gpu installs the builds with CUDA; CUDA_VISIBLE_DEVICES may hide a GPU",
        )
    else:
        yield ok("gpu", "torch", f"can use {usable}")
    if not faiss_gpu:
        yield warning(
            "gpu",
            "faiss",
            "is the CPU build: the index is built and searched on CPUs",
            "make setup FLAVOUR=gpu installs FAISS's GPU build, if that is wanted",
        )


def _cuda() -> int:
    try:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:
        return 0
