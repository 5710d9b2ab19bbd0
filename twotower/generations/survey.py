"""What the folder of a store holds: generations, pointers, and what is neither, each with the reason.

One thing that can not be read (a damaged manifest, a file that somebody left there) is passed over and said:
it keeps nobody from the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.artefacts import REPLACED
from twotower.errors import ArtefactError
from twotower.generations.manifest import generation_manifest
from twotower.generations.names import GENERATIONS, IS_NAME, RESERVED

PARTIAL, LOCK, TEMPORARY = ".partial", ".lock", ".tmp"
GOING = (".pruned", ".refused")
"""Endings of the hidden names of generations that are being deleted: whoever finds one goes on with it."""
_OURS = (*GOING, REPLACED, PARTIAL, LOCK, TEMPORARY)
_POINTER_BYTES = 256


@dataclass
class Survey:
    """What is there."""

    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of generations that can be read, by id, the oldest first."""
    pointers: dict[str, str] = field(default_factory=dict)
    """The id that each pointer names."""
    damaged_pointers: set[str] = field(default_factory=set)
    """Files that may be pointers, and name nothing."""
    passed: list[str] = field(default_factory=list)
    """What was passed over, each a sentence."""


def survey(root: Path) -> Survey:
    """Look at the folder of a store; one that is not there is empty.

    Raises:
        ArtefactError: the folder itself can not be read.
    """
    found = Survey()
    manifests = {}
    for name in _names(root / GENERATIONS):
        if name.startswith(".") and name.endswith(_OURS):
            continue
        place = root / GENERATIONS / name
        if not IS_NAME.fullmatch(name):
            found.passed.append(f"{place} is no generation: none is called so")
            continue
        try:
            manifests[name] = generation_manifest(place)
            if manifests[name]["id"] != name:
                raise ArtefactError(f"{place} holds generation {manifests.pop(name)['id']}, not {name}")
        except ArtefactError as error:
            found.passed.append(str(error))
    found.manifests = by_age(manifests)
    for name in _names(root):
        if name.startswith(".") or name in RESERVED:
            continue
        try:
            named = read_pointer(root / name)
        except ArtefactError as error:
            found.damaged_pointers.add(name)
            found.passed.append(str(error))
            continue
        if named is not None:
            found.pointers[name] = named
    return found


def by_age(manifests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return manifests by id, the oldest first."""
    return dict(sorted(manifests.items(), key=lambda pair: (str(pair[1]["created"]), pair[0])))


def read_pointer(path: Path) -> str | None:
    """Return the id in the file of a pointer; None where there is no file.

    Raises:
        ArtefactError: it is no file that can be read, or holds no id.
    """
    try:
        if path.exists() and not path.is_file():
            raise ArtefactError(f"{path} is no pointer: it is no file")
        with open(path, "rb") as file:
            text = file.read(_POINTER_BYTES).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtefactError(f"{path} can not be read ({error.strerror}); let this user read it") from None
    if not IS_NAME.fullmatch(text):
        raise ArtefactError(
            f"the content of {path} is {text[:80]!r}, no id of a generation; publish one to that pointer, or "
            "remove the file"
        )
    return text


def _names(folder: Path) -> Iterator[str]:
    try:
        yield from sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise ArtefactError(f"{folder} can not be read ({error.strerror}); let this user read it") from None
