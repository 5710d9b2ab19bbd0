"""The store: generations side by side, pointers that name the one in use, and what may be published.

A pointer only ever names a generation that was complete and verified when it was set. Where generations and
pointers are, in a folder or in a bucket, is the place's business: see ``Place``.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from twotower.errors import ArtefactError, RefusedError
from twotower.generations.folder import Folder
from twotower.generations.generation import Generation
from twotower.generations.names import CURRENT, generation_path
from twotower.generations.place import Place
from twotower.generations.prune import GRACE_S, Pruned
from twotower.generations.publications import Publication, earlier, now, reasons_against
from twotower.generations.superseded import SUPERSEDED, added, holds
from twotower.hashing import hashing_aside

_OUTDATED = (
    "it was made with users who have been forgotten since; build it again from a dataset without them, or "
    "run python -m jobs.forget for them again"
)


class _Unset(enum.Enum):
    UNSET = 0


_UNSET: Final = _Unset.UNSET


class Store:
    """Generations and pointers in a place, and the rules of publishing."""

    def __init__(self, place: Place | os.PathLike[str] | str) -> None:
        """Take the place; nothing is read yet.

        Args:
            place: where generations and pointers are; a path is that of a local folder, which need not exist
                before something is published.
        """
        self._place: Place = Folder(place) if isinstance(place, str | os.PathLike) else place

    @property
    def where(self) -> str:
        """Its path or URL."""
        return self._place.where

    @property
    def root(self) -> Path:
        """The local folder in which generations are built and read."""
        return self._place.root

    def path(self, generation_id: str) -> Path:
        """Return the local directory of a generation, whether it is there or not.

        Raises:
            ArtefactError: the id is no name of a directory.
        """
        return generation_path(self.root, generation_id)

    def fetch(self, generation_id: str) -> Path:
        """Return the local directory of a finished generation, which is downloaded where it is not there.

        Raises:
            ArtefactError: there is none of that id.
            UnavailableError: the place does not answer, or a file of it is missing or damaged there.
        """
        return self._place.fetch(generation_id)

    def repair(self, generation_id: str) -> bool:
        """Replace the damaged files of a copy; returns False where there is nothing to take them from."""
        return self._place.repair(generation_id)

    def push(self, generation_id: str, replace: bool = False) -> None:
        """Give others a generation that was built here, without letting a pointer name it.

        Args:
            generation_id: of a finished generation in the local folder.
            replace: also where they have another generation of that id.

        Raises:
            ArtefactError: it is not finished.
            RefusedError: they have another one of that id.
        """
        self._place.push(generation_id, replace)

    def has(self, generation_id: str) -> bool:
        """Return whether there is a finished generation of that id."""
        return self._place.has(generation_id)

    def manifest(self, generation_id: str) -> dict[str, Any]:
        """Return the manifest of a finished generation.

        Raises:
            ArtefactError: there is none of that id, or it is of a newer schema.
        """
        return self._place.manifest(generation_id)

    def generations(self) -> list[str]:
        """Return the ids of finished generations that can be read, the oldest first."""
        return list(self.manifests())

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of all generations that can be read, the oldest first."""
        return self._place.manifests()

    def pointers(self) -> dict[str, str]:
        """Return the id that each pointer names, by the pointer's name."""
        return self._place.pointers()

    def passed_over(self) -> list[str]:
        """Return what can not be read as part of the store, and so is passed over, each a sentence."""
        return self._place.passed_over()

    def require(self) -> None:
        """Refuse a store that is not there: nothing was ever built in it.

        Raises:
            ConfigError: it is not.
        """
        self._place.require()

    def current(self, pointer: str = CURRENT) -> str | None:
        """Return the id that a pointer names; None when it was never set.

        Raises:
            ArtefactError: what is there holds no id, or can not be read.
        """
        return self._place.current(pointer)

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
        """Return what was published and rolled back; those of each pointer in order."""
        return self._place.publications()

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
            grace_s: seconds for which a leftover must not have changed: a push may be about to refer to it.
            dry_run: only say what would be removed.

        Raises:
            ConfigError: ``keep`` is below 1.
        """
        return self._place.prune(keep, grace_s, dry_run)

    def supersede(self, vocabulary_hashes: Iterable[str]) -> None:
        """Let nothing that was made with these vocabularies be published from now on, unless it is forced."""
        hashes = list(vocabulary_hashes)
        self._place.supersede(lambda data: added(data, hashes, self._superseded))

    def succeed(self, generation_id: str, successor_id: str) -> list[str]:
        """Let every pointer that names a generation name the same one without some users; returns pointers.

        Raises:
            ArtefactError: the successor is not finished, or damaged.
            RefusedError: another publisher was faster.
        """
        if self._place.is_shared(generation_id):
            self._place.push(successor_id)
        _verified(self.fetch(successor_id), successor_id, self.fetch(generation_id))
        named = [pointer for pointer, name in self.pointers().items() if name == generation_id]
        for pointer in named:
            self._set(Publication(now(), pointer, successor_id, generation_id, "forget"))
        return named

    def remove(self, ids: Collection[str]) -> Pruned:
        """Remove generations that no pointer names, and what killed runs left, however young it is.

        A generation that a build or an update works on is left alone.
        """
        return self._place.remove(ids)

    def _successors(self) -> dict[str, str]:
        """Return by id the generation that stands in the place of one that is gone."""
        return {old: name for name, m in self.manifests().items() for old in m.get("replaces", ())}

    def _is_outdated(self, manifest: dict[str, Any]) -> bool:
        return holds(self._place.superseded(), str(manifest["vocabulary_hash"]), self._superseded)

    @property
    def _superseded(self) -> str:
        """Where the superseded vocabularies are, for errors."""
        return f"{self.where}/{SUPERSEDED}"

    def _refuse_outdated(self, entry: Publication) -> None:
        """Refuse what was made before users were forgotten; who forced it has been told."""
        if not entry.forced and self._is_outdated(self.manifest(entry.id)):
            raise RefusedError(
                f"generation {entry.id} is not published: {_OUTDATED}; {entry.pointer} still names "
                f"{self.current(entry.pointer)}"
            )

    def _set(self, entry: Publication) -> str | None:
        """Swap a pointer if it still names ``entry.previous``; returns what it named."""
        return self._place.swap(entry, lambda: self._refuse_outdated(entry))


def _verified(path: Path, generation_id: str, known: Path | None) -> dict[str, Any]:
    """Check every file of a generation and return its manifest."""
    # A service on this machine needs the CPUs.
    with hashing_aside() as sha256:
        generation = Generation.open(path, verify=True, verified=known, sha256=sha256)
    if generation.id != generation_id:
        raise ArtefactError(f"{path} holds generation {generation.id}; rename the directory to that")
    return generation.manifest
