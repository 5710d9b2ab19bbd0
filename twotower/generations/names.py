"""Names inside a store: of generations, of pointers, and of what lies beside them."""

from __future__ import annotations

import re
from pathlib import Path

from twotower.errors import ArtefactError
from twotower.generations.publications import LOG
from twotower.generations.superseded import SUPERSEDED
from twotower.listing import NAME

CURRENT = "CURRENT"
"""The pointer to the generation in use."""
GENERATIONS = "generations"
"""The folder of the generations in a store."""
RESERVED = (GENERATIONS, LOG, SUPERSEDED)
"""What is beside the pointers in a store."""
IS_NAME = re.compile(NAME)


def checked_pointer(pointer: str) -> str:
    """Return the name of a pointer.

    Raises:
        ArtefactError: it is none.
    """
    if pointer in RESERVED:
        raise ArtefactError(f"a pointer can not be called {pointer}, as what is beside it in the store")
    return checked_name(pointer, "a pointer's name")


def checked_name(name: str, what: str) -> str:
    """Return a name that stays inside the store.

    Raises:
        ArtefactError: it does not.
    """
    if not IS_NAME.fullmatch(name):
        raise ArtefactError(
            f"{what} is {name!r}; it must be up to 128 letters, digits, dots, dashes and underscores, and "
            "begin with a letter or digit"
        )
    return name


def generation_path(root: Path, generation_id: str) -> Path:
    """Return the directory of a generation in a folder, whether it is there or not.

    Args:
        root: the folder.
        generation_id: its id.

    Raises:
        ArtefactError: the id is no name of a directory.
    """
    return root / GENERATIONS / checked_name(generation_id, "a generation id")
