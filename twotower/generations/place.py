"""What a store asks of the place where its generations and pointers are: a folder, or a bucket.

A place keeps things and swaps pointers; whether a generation may be published is for the store to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from twotower.errors import OvertakenError
from twotower.generations.prune import Pruned
from twotower.generations.publications import Publication


class Place(Protocol):
    """Generations, pointers to them, and the log of what the pointers named.

    Generations are built and read in a local folder, ``root``. Where others have generations from elsewhere,
    it holds copies, and ``push`` sends what was built here.

    Every method raises ``UnavailableError`` where the place does not answer, and ``ArtefactError`` for a name
    that can be none.
    """

    @property
    def where(self) -> str:
        """Its path or URL."""

    @property
    def root(self) -> Path:
        """The local folder in which generations are built and read."""

    def require(self) -> None:
        """Refuse a place that is not there.

        Raises:
            ConfigError: nothing was ever built in it.
        """

    def has(self, generation_id: str) -> bool:
        """Return whether there is a finished generation of that id."""

    def is_shared(self, generation_id: str) -> bool:
        """Return whether everybody who reads this place has a generation of that id."""

    def manifest(self, generation_id: str) -> dict[str, Any]:
        """Return the manifest of a finished generation.

        Raises:
            ArtefactError: there is none of that id, or it is of a newer schema.
        """

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of all generations that can be read by id, the oldest first."""

    def passed_over(self) -> list[str]:
        """Return what can not be read as part of the place, and so is passed over, each a sentence."""

    def fetch(self, generation_id: str) -> Path:
        """Return the local directory of a finished generation.

        Raises:
            ArtefactError: there is none of that id.
        """

    def repair(self, generation_id: str) -> bool:
        """Replace the damaged files of a copy; returns False where there is nothing to take them from."""

    def push(self, generation_id: str, replace: bool = False) -> None:
        """Give others a generation that was built here.

        Args:
            generation_id: of a finished generation in the local folder.
            replace: also where they have another generation of that id.

        Raises:
            ArtefactError: it is not finished.
            RefusedError: they have another one of that id.
        """

    def pointers(self) -> dict[str, str]:
        """Return the id that each pointer names, by the pointer's name."""

    def current(self, pointer: str) -> str | None:
        """Return the id that a pointer names; None when it was never set.

        Raises:
            ArtefactError: what is there holds no id, or can not be read.
        """

    def swap(self, entry: Publication, check: Callable[[], None]) -> str | None:
        """Let ``entry.pointer`` name ``entry.id`` if it still names ``entry.previous``, and log it.

        Args:
            entry: what is published.
            check: raises a ``RefusedError`` where it may not be published. A place calls it under the lock
                that ``supersede`` and ``remove`` take, or again once every reader sees the generation: else
                what is superseded in between would be published.

        Returns:
            the id that the pointer named before.

        Raises:
            OvertakenError: it names another one; it has not been set.
            RefusedError: ``check`` refuses.
            ArtefactError: the generation is not there any more.
        """

    def publications(self) -> list[Publication]:
        """Return what was published and rolled back; those of each pointer in order.

        Raises:
            ArtefactError: the log is damaged.
        """

    def superseded(self) -> bytes | None:
        """Return the file of superseded vocabularies; None where there is none."""

    def supersede(self, change: Callable[[bytes | None], bytes]) -> None:
        """Replace the file of superseded vocabularies, so that no other change is lost.

        Args:
            change: returns the new file for the one that is there; it may be called several times.
        """

    def prune(self, keep: int, grace_s: float, dry_run: bool) -> Pruned:
        """Remove old generations, and what killed builds left behind.

        Args:
            keep: how many of the newest generations stay; those that a pointer names stay in any case.
            grace_s: seconds for which a leftover must not have changed.
            dry_run: only say what would be removed.

        Raises:
            ConfigError: ``keep`` is below 1.
        """

    def remove(self, ids: Collection[str]) -> Pruned:
        """Remove generations that no pointer names, and what killed runs left, however young it is."""


def too_late(entry: Publication, current: str | None) -> OvertakenError:
    """Return the error of a publisher who was not the first."""
    return OvertakenError(
        f"generation {entry.id} is not published: another publisher was faster, {entry.pointer} names "
        f"{current}, not {entry.previous}",
        "Publish again to replace it",
    )
