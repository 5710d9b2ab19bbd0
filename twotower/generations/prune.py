"""Which generations and leftovers of a store's folder are no longer wanted, and their removal.

A generation disappears by one rename, so that nobody sees a part of it; a reader that has its files open
goes on reading them. What a killed build left behind is recognised by a lock that nobody holds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.artefacts import discard, lock_if_free, remove, settle
from twotower.errors import ConfigError
from twotower.generations.survey import GOING, LOCK, PARTIAL

GRACE_S = 24 * 3600.0
"""Default age of leftovers: a lock that a build on another machine holds may not be seen on this one."""
ANY_AGE_S = float("-inf")
"""Age of leftovers that can not wait; clocks may differ."""
WORK = ".work"


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be."""

    generations: list[str]
    """Ids of generations, the oldest first."""
    leftovers: list[str]
    """What killed builds or publishers left, relative to the store."""
    num_bytes: int
    """Bytes that became free; files shared with what is kept are not counted."""


def unwanted(ids: Sequence[str], keep: int, named: Collection[str]) -> list[str]:
    """Return the generations to remove: all but the newest and those that pointers name.

    Args:
        ids: of all generations, the oldest first.
        keep: how many of the newest stay, 1 or more.
        named: ids that must stay.

    Raises:
        ConfigError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ConfigError(f"keep {keep} generations: it must be at least 1")
    return [name for name in ids[:-keep] if name not in named]


def prune_folder(root: Path, ids: Sequence[str], grace_s: float, dry_run: bool) -> Pruned:
    """Remove generations and leftovers; the caller holds the store's lock, so that nothing is published.

    Args:
        root: folder of the store.
        ids: generations to remove; one that a build or an update works on is left alone.
        grace_s: seconds for which nothing below a leftover has changed.
        dry_run: only say what would be removed.
    """
    if not dry_run:
        # What was to be replaced when its process was killed has its name back.
        settle(root / "generations")
    with contextlib.ExitStack() as locks:
        # One lock may guard several folders.
        free = functools.cache(lambda lock: locks.enter_context(lock_if_free(lock)))
        folder = root / "generations"
        mine = [i for i in ids if free(root / WORK / f"{i}{LOCK}")]
        leftovers = [
            path
            for path, lock in _leftovers(root)
            if path.name.endswith(GOING)
            or (time.time() - _changed(path) >= grace_s and (lock is None or free(lock)))
        ]
        gone = [folder / name for name in mine] + leftovers
        result = Pruned(mine, [str(p.relative_to(root)) for p in leftovers], freed_bytes(gone))
        if not dry_run:
            for name in mine:
                discard(folder / name, GOING[0])
            for path in leftovers:
                # What can not be deleted now is left for the next prune.
                with contextlib.suppress(OSError):
                    remove(path)
    return result


def freed_bytes(paths: Iterable[Path]) -> int:
    """Return the bytes that removing files and folders sets free: of those that no other link holds."""
    links: Counter[tuple[int, int]] = Counter()
    facts = {}
    for path in paths:
        for file in _files(path):
            with contextlib.suppress(FileNotFoundError):
                status = file.lstat()
                links[status.st_dev, status.st_ino] += 1
                facts[status.st_dev, status.st_ino] = status
    return sum(s.st_size for key, s in facts.items() if links[key] >= s.st_nlink)


def _leftovers(root: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield what nothing uses once the lock beside it is free: path, lock."""
    folder, work = root / "generations", root / WORK
    names = _names(folder)
    for name in names:
        path = folder / name
        if name.endswith(GOING):
            yield path, None
        elif name.endswith(PARTIAL):
            yield path, folder / f"{name.removesuffix(PARTIAL)}{LOCK}"
        elif name.endswith(LOCK):
            owner = name.removesuffix(LOCK)
            if not {owner.removeprefix("."), f"{owner}{PARTIAL}"} & set(names):
                yield path, path
    works = _names(work)
    owners = [n.removesuffix(LOCK) for n in works if n.endswith(LOCK)]
    for name in works:
        if not name.endswith(LOCK):
            # A work folder is called after the generation that is built in it.
            owner = max((o for o in owners if name.startswith(o)), key=len, default=name)
            yield work / name, work / f"{owner}{LOCK}"
    for owner in owners:
        path = work / f"{owner}{LOCK}"
        if owner not in names and not any(n.startswith(owner) and n != path.name for n in works):
            yield path, path
    for name in _names(root):
        if name.startswith(".") and name.endswith(".tmp"):
            yield root / name, None


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        for folder, _, names in os.walk(path):
            yield from (Path(folder, name) for name in names)
    else:
        yield path


def _changed(path: Path) -> float:
    """Return when something below a path changed last, seconds since the epoch."""
    latest = 0.0
    folders = [Path(f) for f, _, _ in os.walk(path)] if path.is_dir() else []
    for each in [path, *folders, *_files(path)]:
        with contextlib.suppress(FileNotFoundError):
            latest = max(latest, each.lstat().st_mtime)
    return latest
