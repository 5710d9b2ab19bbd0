"""Directories that are immutable once their manifest exists, and the files inside them.

An artefact (dataset, checkpoint, generation, report) is a directory with a ``manifest.json``. It is built
under a temporary sibling name, every file is flushed to disk, the manifest is written last, and one
rename makes it visible. A reader refuses a directory without a manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower.errors import ArtefactError
from twotower.jsonfiles import check_shape, parse_json
from twotower.listing import MANIFEST as MANIFEST
from twotower.progress import say

SCHEMA_VERSION = 1
REPLACED = ".replaced"
"""Ending of the hidden name of an artefact while another takes its place."""


def fingerprint(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_manifest(directory: Path, kind: str, content: dict[str, Any]) -> None:
    """Write the manifest of an artefact: the last file of it to be written."""
    write_json(directory / MANIFEST, {"kind": kind, "schema_version": SCHEMA_VERSION, **content})


def has_manifest(directory: Path) -> bool:
    """Return whether ``directory`` is a finished artefact, as far as it can be read."""
    try:
        return (directory / MANIFEST).is_file()
    except OSError:
        return False


def read_manifest(directory: Path, kind: str, shape: Any = None) -> dict[str, Any]:
    """Return the manifest of a finished artefact.

    Args:
        directory: of the artefact.
        kind: what it must be of.
        shape: the pydantic model of its keys; not checked where none is given.

    Raises:
        ArtefactError: there is no manifest, it can not be read, or it is none of that kind, shape and schema.
    """
    try:
        data = (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ArtefactError(
            f"{directory} is not a finished {kind}: it has no {MANIFEST}. Run the job that makes it again."
        ) from None
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{directory}/{MANIFEST} can not be read ({error}). Let this user read it, or delete {directory}."
        ) from None
    return parse_manifest(data, str(directory), kind, shape)


def parse_manifest(data: bytes, place: str, kind: str, shape: Any = None) -> dict[str, Any]:
    """Return the manifest in the bytes of its file.

    Args:
        data: the bytes.
        place: path or URL of the artefact, for the errors.
        kind: what it must be of.
        shape: the pydantic model of its keys; not checked where none is given.

    Raises:
        ArtefactError: it is not JSON, or it is none of that kind, shape and schema.
    """
    again = f"Delete {place} and make it again."
    manifest = parse_json(data, f"{place}/{MANIFEST}", again)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(f"{place} holds a {str(found)[:60]}, not a {kind}. Give the path of a {kind}.")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ArtefactError(
            f"{place} has schema version {str(version)[:60]}; this release reads "
            f"{SCHEMA_VERSION}. Make it again, or use the release that wrote it."
        )
    if shape is not None:
        check_shape(manifest, shape, f"{place}/{MANIFEST}", again)
    return manifest


def finished(directory: Path, kind: str, shape: Any = None) -> dict[str, Any] | None:
    """Return the manifest of an artefact that is there already; None where it has to be made.

    One that is damaged is made again, which is said.
    """
    if not has_manifest(directory):
        return None
    try:
        return read_manifest(directory, kind, shape)
    except ArtefactError as error:
        say(f"{error} It is made again now")
        return None


def remove(path: Path) -> None:
    """Remove whatever is at a path, folders with all that is in them; links are not followed.

    Raises:
        OSError: a part of it can not be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(directory: Path, ending: str) -> None:
    """Remove an artefact so that no reader sees a part of it: it is hidden by one rename, and then deleted.

    Killed in between, or where something can not be deleted, it leaves a hidden folder of a name that nothing
    else takes, so that it is in nobody's way.

    Args:
        directory: of the artefact; that it is gone is no error.
        ending: of the hidden name.
    """
    hidden = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}{ending}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(directory, hidden)
        with contextlib.suppress(OSError):
            remove(hidden)


@contextlib.contextmanager
def building(directory: Path, keep_partial: bool = False) -> Iterator[Path]:
    """Build an artefact: yields a private directory that becomes ``directory`` when the block ends.

    One process builds at a time (a file lock that dies with its holder). What a killed build left
    behind is removed first, or kept where ``keep_partial`` says that the builder resumes from it. When
    the block raises, ``directory`` is not touched. What was there before is destroyed at the end.

    Raises:
        ArtefactError: the block ended without a manifest.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial")
    with locked(directory.with_name(f".{directory.name}.lock")):
        _settle(directory)
        if not keep_partial or not partial.is_dir():
            remove(partial)
        partial.mkdir(exist_ok=True)
        # A killed builder may have come as far as the manifest, and this one may not.
        (partial / MANIFEST).unlink(missing_ok=True)
        drop_temporaries(partial)
        yield partial
        if not has_manifest(partial):
            raise ArtefactError(f"the build of {directory} ended without a manifest")
        sync_tree(partial)
        if os.path.lexists(directory):
            os.replace(directory, directory.with_name(f".{directory.name}{REPLACED}"))
        os.replace(partial, directory)
        _sync_directory(directory.parent)
        _settle(directory)


def drop_temporaries(folder: Path) -> None:
    """Remove the files half written that a killed writer left in a folder, whose lock the caller holds."""
    for path in folder.rglob(".*.tmp"):
        remove(path)


def settle(folder: Path) -> None:
    """Finish or undo the replacements in a folder of artefacts whose processes were killed.

    Whoever was killed before the new artefact had its name left the old one, which gets it back; later, it
    is destroyed.
    """
    for dying in sorted(folder.glob(f".*{REPLACED}")):
        name = dying.name.removeprefix(".").removesuffix(REPLACED)
        with lock_if_free(folder / f".{name}.lock") as free:
            if free:
                _settle(folder / name)


def _settle(directory: Path) -> None:
    dying = directory.with_name(f".{directory.name}{REPLACED}")
    if os.path.lexists(dying):
        if os.path.lexists(directory):
            remove(dying)
        else:
            os.replace(dying, directory)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock file; waits for the holder, and a killed holder frees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # It may have been removed while this waited: another process may hold the one that is there now.
            if _is_at(file.fileno(), path):
                yield
                return


@contextlib.contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock file if nobody else does, and yield whether that is so; a file made for it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.exists()
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        held = _is_at(file.fileno(), path)
        yield held
        if held and not there:
            path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Let ``target`` be the same file as ``source``, or a copy where the file system has no hard links.

    Both are of immutable directories: a file is replaced there, never written into.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync_tree(directory: Path) -> None:
    """Flush every file and folder below ``directory`` to disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(folder))


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
