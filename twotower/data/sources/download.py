"""Fetching an official file, or a mirror's copy of it, into the cache.

A file is visible in the cache only when it is complete: it is written under a temporary name, checked,
flushed and renamed, and its origin, size and SHA-256 are recorded in a ``.json`` beside it. Files of
different origins have different places. A folder as mirror is read in place.
"""

from __future__ import annotations

import dataclasses
import datetime
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

from twotower import progress
from twotower.artefacts import drop_temporaries, fingerprint, locked, write_json
from twotower.errors import ArtefactError, DownloadError
from twotower.hashing import sha256_file
from twotower.jsonfiles import read_json
from twotower.redaction import redacted

_BLOCK_BYTES = 1 << 18
_TIMEOUT_S = 30
_REMEDY = (
    "Check the connection, or set data.mirror (or TWOTOWER_MIRROR) to a folder or URL that holds {file}, "
    "or use data.source.kind: generated"
)


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A complete zip on this machine."""

    path: Path
    """Where it is."""
    origin: str
    """The folder or URL it came from."""
    sha256: str
    """SHA-256 of its bytes, 64 hex digits."""


def fetch_zip(file: str, official: str, mirror: str | None, cache: Path) -> Fetched:
    """Return a complete copy of ``file``: in a mirror folder, in the cache, or downloaded.

    Args:
        file: File name, such as ml-1m.zip.
        official: URL of the folder that officially holds it.
        mirror: Folder or URL that stands in for ``official``.
        cache: Folder of downloads.

    Raises:
        DownloadError: it can not be reached, is not there, or is not a complete zip.
    """
    origin = mirror or official
    if origin.startswith("file://"):
        origin = urllib.request.url2pathname(urllib.parse.urlparse(origin).path)
    if "://" not in origin:
        return _from_folder(file, Path(origin).expanduser())
    scheme = urllib.parse.urlparse(origin).scheme
    if scheme not in ("http", "https"):
        raise DownloadError(f"mirror {origin!r} has scheme {scheme!r}; use a folder, http or https")
    place = cache.expanduser() / f"{file.removesuffix('.zip')}-{fingerprint(origin.rstrip('/'))[:8]}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"the cache folder {place} can not be made ({error}); set data.cache") from None
    with locked(place / ".lock"):
        drop_temporaries(place)
        cached = _from_cache(place / file, origin)
        return cached or _download(place / file, f"{origin.rstrip('/')}/{file}", origin)


def check_zip(path: Path, shown: str, full: bool = True) -> None:
    """Check that a file is a complete zip: its directory, and with ``full`` all that is in it.

    Raises:
        DownloadError: it is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if full else None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise DownloadError(
            f"{shown} is not a complete zip file ({path.stat().st_size:,} bytes; {error}): it is "
            "truncated or "
            "something else. Get it again, or name another data.mirror"
        ) from None
    if damaged is not None:
        raise DownloadError(f"{shown} is damaged: {damaged} in it has a wrong checksum. Get it again")


def _from_folder(file: str, folder: Path) -> Fetched:
    path = folder / file
    if not path.is_file():
        there = sorted(p.name for p in folder.glob("*.zip"))[:8] if folder.is_dir() else None
        what = "which is no folder" if there is None else f"which holds {', '.join(there) or 'no zip files'}"
        raise DownloadError(
            f"{file} is not in the mirror {folder}, {what}. Put it there, or name another data.mirror "
            "(or TWOTOWER_MIRROR)"
        )
    check_zip(path, str(path), full=False)  # it is the person's own file; reading it checks the rest
    return Fetched(path, str(folder), sha256_file(path))


def _from_cache(path: Path, origin: str) -> Fetched | None:
    sidecar = path.with_name(path.name + ".json")
    if not path.is_file():
        return None
    try:
        expected = str(read_json(sidecar, "")["sha256"])
    except (ArtefactError, KeyError, TypeError, IndexError):
        progress.say(f"{path} has no readable record of its origin; fetching it again")
        return None
    if sha256_file(path) != expected:
        progress.say(f"{path} is damaged or truncated ({path.stat().st_size:,} bytes); fetching it again")
        return None
    return Fetched(path, origin, expected)


def _download(path: Path, url: str, origin: str) -> Fetched:
    # One temporary name: what a killed download left is written over, and never taken for the file.
    part = path.with_name(f".{path.name}.part")
    progress.say(f"downloading {url}")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "twotower"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
            received = _copy(response, part, total, path.name)
    except urllib.error.HTTPError as error:
        raise DownloadError(
            f"{url} answers {error.code} {error.reason}. {_REMEDY.format(file=path.name)}"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(
            f"{url} can not be reached ({reason}). {_REMEDY.format(file=path.name)}"
        ) from None
    if total is not None and received != total:
        raise DownloadError(
            f"{url} ended after {received:,} of {total:,} bytes; run again. {_REMEDY.format(file=path.name)}"
        )
    check_zip(part, url)
    digest = sha256_file(part)
    record = {
        "url": redacted(url),
        "origin": redacted(origin),
        "bytes": received,
        "sha256": digest,
        "fetched": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    # The record first: a file without its record, or with another's, is fetched again.
    write_json(path.with_name(path.name + ".json"), record)
    os.replace(part, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return Fetched(path, origin, digest)


def _copy(response: Any, part: Path, total: int | None, name: str) -> int:
    received = 0
    with open(part, "wb") as file, progress.bar(total, name, "B") as bar:
        while block := response.read(_BLOCK_BYTES):
            file.write(block)
            received += len(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    return received
