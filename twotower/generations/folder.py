"""Generations and pointers in a local folder.

``FOLDER/generations/ID`` holds generations, ``FOLDER/CURRENT`` (or another pointer) the id of one, and
``FOLDER/publications.jsonl`` what was published when. One lock orders publishers and prunes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from twotower.artefacts import has_manifest, locked, write_bytes
from twotower.errors import ArtefactError, ConfigError
from twotower.generations.manifest import generation_manifest
from twotower.generations.names import checked_pointer, generation_path
from twotower.generations.place import too_late
from twotower.generations.prune import ANY_AGE_S, Pruned, prune_folder, unwanted
from twotower.generations.publications import LOG, Publication, append, read_log
from twotower.generations.superseded import SUPERSEDED
from twotower.generations.survey import Survey, read_pointer, survey


class Folder:
    """A local folder as a place; it need not exist before something is published."""

    def __init__(self, path: os.PathLike[str] | str) -> None:
        """Take the folder."""
        self.root = Path(path)

    @property
    def where(self) -> str:
        """Its path."""
        return str(self.root)

    def require(self) -> None:
        """Refuse a folder that is not there: nothing was ever built in it.

        Raises:
            ConfigError: it is not.
        """
        if not self.root.is_dir():
            raise ConfigError(
                f"there is no store at {self.root}: nothing was built with this configuration. Run "
                "python -m jobs.pipeline with it, or correct storage.root or name"
            )

    def has(self, generation_id: str) -> bool:
        """Return whether there is a finished generation of that id."""
        return has_manifest(generation_path(self.root, generation_id))

    def is_shared(self, generation_id: str) -> bool:
        """Return whether there is a finished generation of that id: who reads the folder has it."""
        return self.has(generation_id)

    def manifest(self, generation_id: str) -> dict[str, Any]:
        """Return the manifest of a finished generation.

        Raises:
            ArtefactError: there is none of that id, or it is of a newer schema.
        """
        return generation_manifest(generation_path(self.root, generation_id))

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of all generations that can be read by id, the oldest first."""
        return survey(self.root).manifests

    def passed_over(self) -> list[str]:
        """Return what can not be read as part of the store, and so is passed over, each a sentence."""
        found = survey(self.root)
        lost = [
            f"{self.where}: the pointer {pointer} names generation {name}, which is not there"
            for pointer, name in found.pointers.items()
            if not self.has(name)
        ]
        return found.passed + lost

    def fetch(self, generation_id: str) -> Path:
        """Return the directory of a finished generation.

        Raises:
            ArtefactError: there is none of that id.
        """
        path = generation_path(self.root, generation_id)
        generation_manifest(path)
        return path

    def repair(self, generation_id: str) -> bool:
        """Return False: what is here is no copy, so there is nothing to take a damaged file from."""
        return False

    def push(self, generation_id: str, replace: bool = False) -> None:
        """Check that a generation is finished; whoever reads the folder has it already.

        Raises:
            ArtefactError: it is not finished.
        """
        self.fetch(generation_id)

    def pointers(self) -> dict[str, str]:
        """Return the id that each pointer names, by the pointer's name."""
        return survey(self.root).pointers

    def current(self, pointer: str) -> str | None:
        """Return the id that a pointer names; None when it was never set.

        Raises:
            ArtefactError: the pointer's file holds no id, or can not be read.
        """
        return read_pointer(self._pointer(pointer))

    def swap(self, entry: Publication, check: Callable[[], None]) -> str | None:
        """Let a pointer name a generation if it still names ``entry.previous``; returns what it named.

        Raises:
            ArtefactError: the generation was removed meanwhile.
            RefusedError: the pointer names another one, or ``check`` refuses; it has not been set.
        """
        with locked(self.lock):
            current = self.current(entry.pointer)
            if current == entry.id:
                return current
            if current != entry.previous:
                raise too_late(entry, current)
            if not self.has(entry.id):
                raise ArtefactError(
                    f"{generation_path(self.root, entry.id)} was removed meanwhile; build it again"
                )
            check()
            append(self.root / LOG, entry)
            write_bytes(self._pointer(entry.pointer), f"{entry.id}\n".encode())
        return entry.previous

    def publications(self) -> list[Publication]:
        """Return what was published and rolled back, in order."""
        return read_log(self.root / LOG)

    def superseded(self) -> bytes | None:
        """Return the file of superseded vocabularies; None where there is none."""
        path = self.root / SUPERSEDED
        return path.read_bytes() if path.exists() else None

    def supersede(self, change: Callable[[bytes | None], bytes]) -> None:
        """Replace the file of superseded vocabularies by what ``change`` makes of it."""
        with locked(self.lock):
            data = self.superseded()
            changed = change(data)
            if changed != data:
                write_bytes(self.root / SUPERSEDED, changed)

    def prune(self, keep: int, grace_s: float, dry_run: bool) -> Pruned:
        """Remove old generations, and what killed builds left behind.

        Args:
            keep: how many of the newest generations stay; those that a pointer names stay in any case.
            grace_s: seconds for which a leftover must not have changed.
            dry_run: only say what would be removed.

        Raises:
            ConfigError: ``keep`` is below 1.
        """
        with locked(self.lock):
            found = survey(self.root)
            gone = unwanted(list(found.manifests), keep, self._named(found))
            return prune_folder(self.root, gone, grace_s, dry_run)

    def remove(self, ids: Collection[str]) -> Pruned:
        """Remove generations that no pointer names, and what killed runs left, however young it is.

        A generation that a build or an update works on is left alone.
        """
        with locked(self.lock):
            found = survey(self.root)
            wanted = set(ids) - self._named(found)
            gone = [name for name in found.manifests if name in wanted]
            return prune_folder(self.root, gone, ANY_AGE_S, dry_run=False)

    @property
    def lock(self) -> Path:
        """The file whose lock orders publishers and prunes."""
        return self.root / ".lock"

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

    def _pointer(self, pointer: str) -> Path:
        return self.root / checked_pointer(pointer)
