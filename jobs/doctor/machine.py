"""Processors, memory, threads, shared memory, disks and limits of this machine or container."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.doctor.findings import Finding, gib, ok, problem, warning
from twotower.config import Config

OBJECT_STORE_BYTES = 1 << 30
"""Shared memory of the Ray that a job starts."""
_LITTLE_MEMORY = 2 << 30
_LITTLE_DISK = 5 << 30
_NO_DISK = 512 << 20
_RAY_FULL = 0.95
"""Share of a disk in use from which on Ray puts nothing on it any more."""
_FEW_FILES = 4_096
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Limits:
    """What a container may use."""

    cpus: float | None
    """CPU time a second; None without a limit."""
    memory_bytes: int | None
    """None without a limit."""


def cgroup_limits(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> Limits:
    """Return the limits of the control groups that this process is in, of either version.

    Args:
        proc: the folder of processes.
        root: the folder of control groups.
    """
    places: dict[str, str] = {}
    try:
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            places |= dict.fromkeys(controllers.split(",") if controllers else [""], path.strip("/"))
    except (OSError, ValueError):
        return Limits(None, None)
    cpus = _least(_cpus_of(text) for text in _texts(root, places.get("", ""), "cpu.max"))
    memory = _least(_number(text) for text in _texts(root, places.get("", ""), "memory.max"))
    if cpus is None:
        of_v1 = zip(
            _texts(root / "cpu", places.get("cpu", ""), "cpu.cfs_quota_us"),
            _texts(root / "cpu", places.get("cpu", ""), "cpu.cfs_period_us"),
            strict=False,
        )
        cpus = _least(_cpus_of(f"{quota} {period}") for quota, period in of_v1)
    if memory is None:
        texts = _texts(root / "memory", places.get("memory", ""), "memory.limit_in_bytes")
        memory = _least(_number(text) for text in texts)
    # Without a limit version 1 has the largest number of pages.
    return Limits(cpus, None if memory is None or memory > 1 << 60 else int(memory))


def _texts(root: Path, path: str, name: str) -> Iterator[str]:
    """Yield a file of a control group and of all above it; a container sees its own at the root."""
    folder = root / path
    for place in (folder, *folder.parents):
        if not place.is_relative_to(root):
            return
        try:
            yield (place / name).read_text().strip()
        except OSError:
            continue


def _cpus_of(text: str) -> float | None:
    quota, _, period = text.partition(" ")
    limit, length = _number(quota), _number(period)
    return None if limit is None or not length or limit <= 0 else limit / length


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # max
        return None


def _least(values: Iterator[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def processors(config: Config, limits: Limits) -> Iterator[Finding]:
    """Yield how many processors there are to use, and whether the configuration asks for more.

    Args:
        config: its training workers are counted.
        limits: of the container.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limited = usable if limits.cpus is None else min(usable, limits.cpus)
    told = f"{limited:g} to use, {os.cpu_count()} in the machine"
    if limits.cpus is not None:
        told += f", {limits.cpus:g} by the control group"
    wanted = config.train.num_workers * config.train.threads_per_worker
    if wanted > limited:
        yield warning(
            "cpu",
            "processors",
            f"{told}; train.num_workers x train.threads_per_worker is {wanted}",
            "lower train.num_workers or train.threads_per_worker where a job trains on this machine",
        )
    else:
        yield ok("cpu", "processors", told)


def memory(limits: Limits, meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Return how much memory is free.

    Args:
        limits: of the container.
        meminfo: what the system says of it.
    """
    try:
        pairs = (line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        facts = {name: int(value.split()[0]) << 10 for name, value in pairs}
        free, total = facts["MemAvailable"], facts["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return ok("memory", "memory", "not known on this system")
    told = f"{gib(free)} available of {gib(total)}"
    if limits.memory_bytes is not None:
        free = min(free, limits.memory_bytes)
        told += f", {gib(limits.memory_bytes)} by the control group"
    if free < _LITTLE_MEMORY:
        return warning(
            "memory",
            "memory",
            told,
            "end other programs, raise the container's limit, or take a larger machine",
        )
    return ok("memory", "memory", told)


def threads(environment: Mapping[str, str], limits: Limits) -> Iterator[Finding]:
    """Yield the settings of thread pools.

    Args:
        environment: variables.
        limits: of the container.
    """
    usable = min(os.cpu_count() or 1, limits.cpus or float("inf"))
    for name in _THREAD_VARIABLES:
        text = environment.get(name, "")
        if not text:
            continue
        parts = text.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            yield problem("threads", name, repr(text), f"set {name} to a whole number from 1, or unset it")
        elif int(parts[0]) > usable:
            yield warning(
                "threads", name, f"{text}, with {usable:g} processors", f"lower {name}, or unset it"
            )
        else:
            yield ok("threads", name, text)
    if not any(environment.get(name) for name in _THREAD_VARIABLES):
        yield ok(
            "threads", "variables", "none set: workers take train.threads_per_worker, others all processors"
        )


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Return the room of shared memory, where Ray keeps its objects.

    Args:
        path: the folder that is held in memory.
    """
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return warning("memory", str(path), "is not there", "mount it: Ray's objects go to the disk instead")
    told = f"{gib(usage.free)} free of {gib(usage.total)}"
    if usage.free < OBJECT_STORE_BYTES:
        return warning(
            "memory",
            str(path),
            told,
            f"Ray wants {gib(OBJECT_STORE_BYTES)} and uses the disk instead; start the container with "
            "--shm-size=2g, or remove old files there",
        )
    return ok("memory", str(path), told)


def disk(name: str, path: Path, full_share: float = 1.0) -> Finding:
    """Return the room for files below a folder, which need not be there yet.

    Args:
        name: what the folder is for.
        path: absolute.
        full_share: share of the disk in use from which on nothing can be put there.
    """
    there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return problem(
            "disk", name, f"{path}: {there} can not be written", "allow it, or choose another folder"
        )
    usage = shutil.disk_usage(there)
    used = 1 - usage.free / usage.total if usage.total else 1.0
    told = f"{path}: {gib(usage.free)} free ({used:.0%} in use)"
    if usage.free < _NO_DISK or used >= full_share:
        return problem(
            "disk", name, told, "remove old artefacts (twotower generations prune), or choose another disk"
        )
    if usage.free < _LITTLE_DISK:
        return warning(
            "disk", name, told, "make room: datasets, checkpoints and generations are kept side by side"
        )
    return ok("disk", name, told)


def disks(config: Config, ray_folder: Path) -> Iterator[Finding]:
    """Yield the room below the storage root and below Ray's folder.

    Args:
        config: names the storage root.
        ray_folder: RAY_TMPDIR.
    """
    if "://" in config.storage.root:
        yield problem(
            "disk", "storage.root", config.storage.root, "give a folder; storage.store may be in a bucket"
        )
    else:
        yield disk("storage.root", config.storage.path)
    yield disk("RAY_TMPDIR", ray_folder, _RAY_FULL)


def open_files() -> Finding:
    """Return how many files a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        return warning(
            "limits",
            "open files",
            f"{soft:,} (at most {hard:,})",
            f"ulimit -n {min(hard, 65_536)} before the job",
        )
    return ok("limits", "open files", f"{soft:,}")
