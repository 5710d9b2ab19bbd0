"""The store: generations side by side, and pointers that name the one in use.

``STORE/generations/ID`` holds generations, ``STORE/CURRENT`` (or another pointer) the id of one. A pointer
only ever names a generation that was complete and verified when it was set.
"""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Final

from twotower.artefacts import has_manifest, locked, read_manifest, write_bytes
from twotower.errors import ArtefactError, RefusedError
from twotower.retrieval.generation import KIND, Generation

CURRENT = "CURRENT"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class _Unset(enum.Enum):
    UNSET = 0


_UNSET: Final = _Unset.UNSET


class Store:
    """A local folder of generations and pointers; it need not exist before something is published."""

    def __init__(self, path: Path | str) -> None:
        """Take the folder."""
        self.root = Path(path)

    def path(self, generation_id: str) -> Path:
        """Return the directory of a generation, whether it is there or not.

        Raises:
            ArtefactError: the id is no name of a directory.
        """
        return self.root / "generations" / _checked(generation_id, "a generation id")

    def generations(self) -> list[str]:
        """Return the ids of finished generations, the oldest first."""
        folder = self.root / "generations"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        finished = [n for n in names if _NAME.fullmatch(n) and has_manifest(folder / n)]
        return sorted(finished, key=lambda n: (str(read_manifest(folder / n, KIND)["created"]), n))

    def current(self, pointer: str = CURRENT) -> str | None:
        """Return the id that a pointer names; None when it was never set.

        Raises:
            ArtefactError: the pointer's file holds no id.
        """
        path = self._pointer(pointer)
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        return _checked(text.strip(), f"the content of {path}")

    def publish(
        self,
        generation_id: str,
        pointer: str = CURRENT,
        expected: str | _Unset | None = _UNSET,
        force: bool = False,
    ) -> str | None:
        """Let a pointer name a generation: one compare-and-swap, after every file was checked.

        Args:
            generation_id: of a finished generation.
            pointer: its name.
            expected: the id that the pointer must still name (None: it must not be set); what it names
                when the call begins, when not given.
            force: publish also below the target index recall.

        Returns:
            the id that the pointer named before.

        Raises:
            ArtefactError: the generation is not finished or damaged.
            RefusedError: its index recall is below the target, or the pointer was set by another publisher.
        """
        path = self.path(generation_id)
        before = self.current(pointer) if isinstance(expected, _Unset) else expected
        # What it shares with the generation in use was checked when that was published: it is not read again.
        known = self.path(before) if before is not None and has_manifest(self.path(before)) else None
        generation = Generation.open(path, verify=True, verified=known)
        if generation.id != generation_id:
            raise ArtefactError(f"{path} holds generation {generation.id}; rename the directory to that")
        index = generation.manifest["index"]
        recall, target = float(index["index_recall"]), float(index["target_index_recall"])
        if recall < target and not force:
            raise RefusedError(
                f"generation {generation_id} is not published: its {index['factory']} index finds "
                f"{recall:.4f} of the top {index['recall_k']} of {index['num_queries']} real queries, "
                f"the target is {target}. Use another index.factory, lower index.target_index_recall, or "
                f"force it; {pointer} still names {self.current(pointer)}"
            )
        with locked(self.root / f".{pointer}.lock"):
            now = self.current(pointer)
            if now == generation_id:
                return now
            if now != before:
                raise RefusedError(
                    f"generation {generation_id} is not published: another publisher was faster, "
                    f"{pointer} names {now}, not {before}. Publish again to replace it"
                )
            if not has_manifest(path):
                raise ArtefactError(f"{path} was removed meanwhile; build the generation again")
            write_bytes(self._pointer(pointer), f"{generation_id}\n".encode())
        return before

    def _pointer(self, pointer: str) -> Path:
        if pointer == "generations":
            raise ArtefactError("a pointer can not be called generations, as the folder is")
        return self.root / _checked(pointer, "a pointer's name")


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise ArtefactError(
            f"{what} is {name!r}; it must be up to 128 letters, digits, dots, dashes and underscores, and "
            "begin with a letter or digit"
        )
    return name
