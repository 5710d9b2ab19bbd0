"""The store: generations side by side, and pointers that name the one in use.

``STORE/generations/ID`` holds generations, ``STORE/CURRENT`` (or another pointer) the id of one, and
``STORE/publications.jsonl`` what was published when. A pointer only ever names a generation that was complete
and verified when it was set. One lock orders publishers and prunes.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from twotower.artefacts import has_manifest, locked, write_bytes
from twotower.config import Config
from twotower.errors import ArtefactError, ConfigError, OvertakenError, RefusedError
from twotower.generations.generation import Generation
from twotower.generations.manifest import generation_manifest
from twotower.generations.prune import ANY_AGE_S, GRACE_S, Pruned, prune_folder, unwanted
from twotower.generations.publications import (
    LOG,
    Publication,
    append,
    earlier,
    now,
    read_log,
    reasons_against,
)
from twotower.generations.superseded import SUPERSEDED, added, holds
from twotower.generations.survey import Survey, checked_name, checked_pointer, read_pointer, survey
from twotower.hashing import hashing_aside

CURRENT = "CURRENT"
_OUTDATED = (
    "it was made with users who have been forgotten since; build it again from a dataset without them, or "
    "run python -m jobs.forget for them again"
)


class _Unset(enum.Enum):
    UNSET = 0


_UNSET: Final = _Unset.UNSET


def open_store(config: Config) -> Store:
    """Return the store of a configuration: a folder below its root, or ``storage.store`` with that as cache.

    Raises:
        ConfigError: ``storage.store`` can not be used.
    """
    return store_at(config.storage.store or str(config.store), config.store)


def store_at(place: str, cache: Path | str | None = None) -> Store:
    """Return the store at a path or URL; nothing is read yet.

    Args:
        place: path of a folder, or ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``.
        cache: local folder for the generations of a URL.

    Raises:
        ConfigError: the URL can not be used, or has no cache.
    """
    if "://" not in place:
        return Store(place)
    if cache is None:
        raise ConfigError(f"the store {place} is read through a local folder; give one as its cache")
    # Its client is an extra that local stores do without.
    from twotower.generations.bucket import RemoteStore

    return RemoteStore(place, cache)


class Store:
    """A local folder of generations and pointers; it need not exist before something is published."""

    def __init__(self, path: Path | str) -> None:
        """Take the folder."""
        self.root = Path(path)

    @property
    def where(self) -> str:
        """Its path or URL."""
        return str(self.root)

    def path(self, generation_id: str) -> Path:
        """Return the local directory of a generation, whether it is there or not.

        Raises:
            ArtefactError: the id is no name of a directory.
        """
        return self.root / "generations" / checked_name(generation_id, "a generation id")

    def fetch(self, generation_id: str) -> Path:
        """Return the local directory of a finished generation.

        Raises:
            ArtefactError: there is none of that id.
        """
        path = self.path(generation_id)
        generation_manifest(path)
        return path

    def repair(self, generation_id: str) -> bool:
        """Replace the damaged files of a copy; returns False where there is nothing to take them from."""
        return False

    def has(self, generation_id: str) -> bool:
        """Return whether there is a finished generation of that id."""
        return has_manifest(self.path(generation_id))

    def manifest(self, generation_id: str) -> dict[str, Any]:
        """Return the manifest of a finished generation.

        Raises:
            ArtefactError: there is none of that id, or it is of a newer schema.
        """
        return generation_manifest(self.path(generation_id))

    def generations(self) -> list[str]:
        """Return the ids of finished generations that can be read, the oldest first."""
        return list(self.manifests())

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of all generations that can be read, the oldest first."""
        return survey(self.root).manifests

    def pointers(self) -> dict[str, str]:
        """Return the id that each pointer names, by the pointer's name."""
        return survey(self.root).pointers

    def passed_over(self) -> list[str]:
        """Return what can not be read as part of the store, and so is passed over, each a sentence."""
        found = survey(self.root)
        lost = [
            f"{self.where}: the pointer {pointer} names generation {name}, which is not there"
            for pointer, name in found.pointers.items()
            if not self.has(name)
        ]
        return found.passed + lost

    def require(self) -> None:
        """Refuse a store that is not there: nothing was ever built in it.

        Raises:
            ConfigError: it is not.
        """
        if not self.root.is_dir():
            raise ConfigError(
                f"there is no store at {self.root}: nothing was built with this configuration. Run "
                "python -m jobs.pipeline with it, or correct storage.root or name"
            )

    def current(self, pointer: str = CURRENT) -> str | None:
        """Return the id that a pointer names; None when it was never set.

        Raises:
            ArtefactError: the pointer's file holds no id, or can not be read.
        """
        return read_pointer(self._pointer(pointer))

    def published(self, pointer: str = CURRENT) -> str:
        """Return the id that a pointer names.

        Raises:
            ArtefactError: it was never set, or its file holds no id.
        """
        generation_id = self.current(pointer)
        if generation_id is None:
            raise ArtefactError(
                f"nothing is published: {self.where} has no pointer {pointer}; run jobs.pipeline first"
            )
        return generation_id

    def publications(self) -> list[Publication]:
        """Return what was published and rolled back, in order."""
        return read_log(self.root / LOG)

    def earlier(self, pointer: str = CURRENT) -> list[str]:
        """Return what a pointer named before what it names now, the latest first; some may have been removed.

        Raises:
            ArtefactError: it was never set, or the log is damaged.
        """
        return earlier(self.publications(), pointer, self.published(pointer), self._successors())

    def fallbacks(self, pointer: str = CURRENT) -> list[str]:
        """Return what may answer in place of what a pointer names, where that is damaged, the latest first.

        That is what it named before, without what holds forgotten users; nothing where it can not be told.
        """
        found = []
        with contextlib.suppress(Exception):
            for name in dict.fromkeys(self.earlier(pointer)):
                with contextlib.suppress(ArtefactError):
                    if self.has(name) and not self._is_outdated(self.manifest(name)):
                        found.append(name)
        return found

    def publish(
        self,
        generation_id: str,
        pointer: str = CURRENT,
        expected: str | _Unset | None = _UNSET,
        force: bool = False,
        reasons: Sequence[str] = (),
    ) -> str | None:
        """Let a pointer name a generation: one compare-and-swap, after every file was checked.

        Args:
            generation_id: of a finished generation.
            pointer: its name.
            expected: the id that the pointer must still name (None: it must not be set); what it names
                when the call begins, when not given.
            force: publish whatever speaks against it; the log says what that was.
            reasons: what the caller found against it, each a sentence. Too low an index recall and too slow
                a search are found here.

        Returns:
            the id that the pointer named before.

        Raises:
            ArtefactError: the generation is not finished or damaged.
            RefusedError: something speaks against it, or the pointer was set by another publisher.
        """
        before = self.current(pointer) if isinstance(expected, _Unset) else expected
        path = self.fetch(generation_id)
        # What it shares with the generation in use was checked when that was published: it is not read again.
        known = self.path(before) if before is not None else None
        manifest = _verified(path, generation_id, known)
        outdated = [_OUTDATED] if self._is_outdated(manifest) else []
        against = (*reasons_against(manifest["index"]), *outdated, *reasons)
        if against and not force:
            raise RefusedError(
                f"generation {generation_id} is not published: {'. Also, '.join(against)}. --force publishes "
                f"it all the same; {pointer} still names {self.current(pointer)}"
            )
        entry = Publication(now(), pointer, generation_id, before, "publish", force, against)
        return self._set(entry)

    def rollback(self, pointer: str = CURRENT) -> Publication:
        """Let a pointer name what it named before its last publication, which undoes that.

        Rolling back again goes one publication further back. No gate is asked: it was published before.

        Returns:
            what was done: from ``previous`` to ``id``.

        Raises:
            RefusedError: there is nothing to go back to, it was removed, or the pointer was set meanwhile.
            ArtefactError: the generation to go back to is damaged.
        """
        current = self.current(pointer)
        if current is None:
            raise RefusedError(f"{pointer} of {self.where} was never set: there is nothing to roll back")
        steps = self.earlier(pointer)
        if not steps:
            raise RefusedError(
                f"{pointer} names {current}, the first that was published: there is nothing to roll back to"
            )
        there = self.manifests()
        if steps[0] not in there:
            left = ", ".join(dict.fromkeys(s for s in steps if s in there)) or "none"
            why = "can not be read" if self.has(steps[0]) else "was removed by a prune"
            raise RefusedError(
                f"{pointer} named {steps[0]} before {current}, and that {why}. Earlier ones "
                f"that are still there: {left}; name one with python -m jobs.generations publish ID"
            )
        _verified(self.fetch(steps[0]), steps[0], None)
        entry = Publication(now(), pointer, steps[0], current, "rollback")
        self._set(entry)
        return entry

    def prune(self, keep: int, grace_s: float = GRACE_S, dry_run: bool = False) -> Pruned:
        """Remove old generations, and what killed builds left behind.

        Args:
            keep: how many of the newest generations stay; those that a pointer names stay in any case.
            grace_s: seconds for which a leftover must not have changed.
            dry_run: only say what would be removed.

        Raises:
            ConfigError: ``keep`` is below 1.
        """
        with locked(self._lock):
            found = survey(self.root)
            gone = unwanted(list(found.manifests), keep, self._named(found))
            return prune_folder(self.root, gone, grace_s, dry_run)

    def supersede(self, vocabulary_hashes: Iterable[str]) -> None:
        """Let nothing that was made with these vocabularies be published from now on, unless it is forced."""
        path = self.root / SUPERSEDED
        with locked(self._lock):
            data = self._superseded()
            changed = added(data, vocabulary_hashes, str(path))
            if changed != data:
                write_bytes(path, changed)

    def succeed(self, generation_id: str, successor_id: str) -> list[str]:
        """Let every pointer that names a generation name the same one without some users; returns pointers.

        Raises:
            ArtefactError: the successor is not finished, or damaged.
            RefusedError: another publisher was faster.
        """
        _verified(self.fetch(successor_id), successor_id, self.fetch(generation_id))
        named = [pointer for pointer, name in self.pointers().items() if name == generation_id]
        for pointer in named:
            self._set(Publication(now(), pointer, successor_id, generation_id, "forget"))
        return named

    def remove(self, ids: Collection[str]) -> Pruned:
        """Remove generations that no pointer names, and what killed runs left, however young it is.

        A generation that a build or an update works on is left alone.
        """
        with locked(self._lock):
            found = survey(self.root)
            wanted = set(ids) - self._named(found)
            gone = [name for name in found.manifests if name in wanted]
            return prune_folder(self.root, gone, ANY_AGE_S, dry_run=False)

    def _named(self, found: Survey) -> set[str]:
        """Return the ids that pointers name, of a pointer that is damaged what it was set to last.

        Raises:
            ArtefactError: a pointer and the log are damaged both.
        """
        named = set(found.pointers.values())
        if found.damaged_pointers:
            last = {entry.pointer: entry.id for entry in self.publications()}
            named |= {name for pointer, name in last.items() if pointer in found.damaged_pointers}
        return named

    def _successors(self) -> dict[str, str]:
        """Return by id the generation that stands in the place of one that is gone."""
        return {old: name for name, m in self.manifests().items() for old in m.get("replaces", ())}

    def _superseded(self) -> bytes | None:
        path = self.root / SUPERSEDED
        return path.read_bytes() if path.exists() else None

    def _is_outdated(self, manifest: dict[str, Any]) -> bool:
        where = f"{self.where}/{SUPERSEDED}"
        return holds(self._superseded(), str(manifest["vocabulary_hash"]), where)

    def _refuse_outdated(self, entry: Publication) -> None:
        """Refuse what was made before users were forgotten; who forced it has been told."""
        if not entry.forced and self._is_outdated(self.manifest(entry.id)):
            raise RefusedError(
                f"generation {entry.id} is not published: {_OUTDATED}; {entry.pointer} still names "
                f"{self.current(entry.pointer)}"
            )

    def _set(self, entry: Publication) -> str | None:
        """Swap a pointer if it still names ``entry.previous``; returns what it named."""
        with locked(self._lock):
            current = self.current(entry.pointer)
            if current == entry.id:
                return current
            if current != entry.previous:
                raise too_late(entry, current)
            if not self.has(entry.id):
                raise ArtefactError(f"{self.path(entry.id)} was removed meanwhile; build it again")
            self._refuse_outdated(entry)
            append(self.root / LOG, entry)
            write_bytes(self._pointer(entry.pointer), f"{entry.id}\n".encode())
        return entry.previous

    @property
    def _lock(self) -> Path:
        return self.root / ".lock"

    def _pointer(self, pointer: str) -> Path:
        return self.root / checked_pointer(pointer)


def too_late(entry: Publication, current: str | None) -> OvertakenError:
    """Return the error of a publisher who was not the first."""
    return OvertakenError(
        f"generation {entry.id} is not published: another publisher was faster, {entry.pointer} names "
        f"{current}, not {entry.previous}",
        "Publish again to replace it",
    )


def _verified(path: Path, generation_id: str, known: Path | None) -> dict[str, Any]:
    """Check every file of a generation and return its manifest."""
    # A service on this machine needs the CPUs.
    with hashing_aside() as sha256:
        generation = Generation.open(path, verify=True, verified=known, sha256=sha256)
    if generation.id != generation_id:
        raise ArtefactError(f"{path} holds generation {generation.id}; rename the directory to that")
    return generation.manifest
