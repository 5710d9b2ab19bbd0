"""The files that a manifest lists, and no others: names that stay inside, facts, and the way to one of them.

A manifest may come from a shared bucket, and a directory may have been unpacked by anybody: a name leads to a
regular file of the directory itself or is refused, by its text and by where links lead.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from twotower.errors import ArtefactError, DamagedError

MANIFEST = "manifest.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""What generations, pointers and shards may be called, as a regular expression."""
STORED = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
"""How what was stored is checked: its own keys strictly; those of other releases are passed over."""
_MAX_NAME, _MAX_PART = 1_024, 255
T = TypeVar("T", bound=Collection[str])

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=rf"^{NAME}$")]


def _allowed(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(f"the name {name[:80]!r} {problem}")
    return name


def _apart(names: T) -> T:
    """No file is the folder of another."""
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if both := folders.intersection(names):
        raise ValueError(f"{min(both)[:80]!r} is listed as a file and as a folder")
    return names


class FileFacts(BaseModel):
    """What a manifest says of a file."""

    model_config = STORED

    bytes: Count
    sha256: Sha256


FileName = Annotated[str, AfterValidator(_allowed)]
Files = Annotated[dict[FileName, FileFacts], AfterValidator(_apart)]
"""Facts by relative path."""
Sizes = Annotated[dict[FileName, Count], AfterValidator(_apart)]
"""Bytes by relative path."""


def name_problem(name: str) -> str | None:
    """Return what is wrong with a relative path in a manifest; None where it stays inside."""
    if not name or len(name.encode()) > _MAX_NAME:
        return f"has {len(name)} characters; 1 to {_MAX_NAME} bytes are allowed"
    if any(ord(c) < 32 or ord(c) == 127 for c in name) or "\\" in name:
        return "has a control character or a backslash"
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts:
        return "is outside of it, or not written in the shortest way"
    if any(len(part.encode()) > _MAX_PART for part in parts):
        return f"has a part of more than {_MAX_PART} bytes"
    if name == MANIFEST:
        return "is that of the manifest itself"
    return None


def listed_file(directory: Path, name: str, files: Collection[str], remedy: str) -> Path:
    """Return the path of a file that a manifest lists.

    Args:
        directory: of the artefact.
        name: relative path.
        files: that the manifest lists.
        remedy: what to do where it can not be used, a sentence.

    Raises:
        DamagedError: it is not there.
        ArtefactError: it is not listed, no regular file, or a link to somewhere else.
    """
    if name not in files:
        raise ArtefactError(f"the manifest of {directory} lists no {name}. {remedy}")
    return inside(directory, name, remedy)


def inside(directory: Path, name: str, remedy: str) -> Path:
    """Return the path of a regular file that really lies in a directory.

    Raises:
        DamagedError: it is not there.
        ArtefactError: its name or a link leads out, or it is no regular file.
    """
    path = directory / name
    if problem := name_problem(name):
        raise ArtefactError(f"{directory}: the file name {name[:80]!r} {problem}. {remedy}")
    try:
        root, real = os.path.realpath(directory), os.path.realpath(path)
        status = os.stat(path)
    except OSError as error:
        kind = DamagedError if isinstance(error, FileNotFoundError) else ArtefactError
        raise kind(f"{path} can not be read ({error.strerror}). {remedy}") from None
    if not real.startswith(root.rstrip(os.sep) + os.sep):
        raise ArtefactError(f"{path} is a link that leads out of {directory}. {remedy}")
    if not stat.S_ISREG(status.st_mode):
        raise ArtefactError(f"{path} is no regular file. {remedy}")
    return path


def remove_unlisted(directory: Path, names: Iterable[str]) -> None:
    """Remove every file below a directory that is being built which is not among relative paths."""
    wanted = set(names)
    for folder, _, found in os.walk(directory):
        for name in found:
            path = Path(folder, name)
            if path.relative_to(directory).as_posix() not in wanted:
                path.unlink(missing_ok=True)
