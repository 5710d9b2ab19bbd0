"""The generations in a bucket: a manifest each, and the files of all of them, each once, by SHA-256.

A manifest is put when all its files are there, and what is downloaded is verified.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower.artefacts import MANIFEST, building, link_or_copy, write_bytes
from twotower.errors import ArtefactError, OvertakenError, UnavailableError
from twotower.generations.files import AGAIN
from twotower.generations.manifest import parse_generation
from twotower.generations.names import IS_NAME, checked_name
from twotower.generations.objects import Content, Found, Objects, at_once
from twotower.listing import listed_file
from twotower.progress import say

_BLOBS, _GENERATIONS = "objects/", "generations/"


class BucketGenerations:
    """Generations below a URL."""

    def __init__(self, objects: Objects) -> None:
        """Take the bucket; nothing is read yet."""
        self._objects = objects

    def get(self, generation_id: str) -> Content | None:
        """Return the object of a manifest; None where there is none of that id."""
        return self._objects.get(_manifest_key(generation_id))

    def exists(self, generation_id: str) -> bool:
        """Return whether there is a generation of that id."""
        return self._objects.exists(_manifest_key(generation_id))

    def manifests(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return the manifests in the bucket that can be read, and why others can not, a sentence each."""
        found, passed = {}, []
        keys = {}
        for each in self._objects.list(_GENERATIONS):
            name = each.key.removeprefix(_GENERATIONS).removesuffix(f"/{MANIFEST}")
            if IS_NAME.fullmatch(name) and each.key == _manifest_key(name):
                keys[name] = each.key
            else:
                passed.append(f"{self._objects.url}/{each.key} is no manifest of a generation")
        contents = at_once(self._objects.get, keys.values())
        for name, content in zip(keys, contents, strict=True):
            if content is not None:
                try:
                    found[name] = self.parse(name, content.data)
                except ArtefactError as error:
                    passed.append(str(error))
        return found, passed

    def parse(self, generation_id: str, data: bytes) -> dict[str, Any]:
        """Return the manifest in the bytes of its object.

        Raises:
            ArtefactError: it is none, of a newer schema, of another id, or damaged; no name of a file in it
                leads anywhere else.
        """
        place = self._place(generation_id)
        manifest = parse_generation(data, place)
        if manifest["id"] != generation_id:
            raise ArtefactError(f"{place} holds generation {manifest['id']}; remove it and push it again")
        return manifest

    def blobs(self, age_s: float) -> list[Found]:
        """Return the objects of files that were put that many seconds ago or earlier."""
        return [o for o in self._objects.list(_BLOBS) if _age(o.modified) >= age_s]

    def blob_keys(self, manifests: dict[str, dict[str, Any]]) -> set[str]:
        """Return the keys of the objects that manifests refer to."""
        return {_blob_key(facts) for m in manifests.values() for facts in m["files"].values()}

    def push(self, generation_id: str, path: Path, replace: bool) -> None:
        """Upload a local generation: files that are missing there, then its manifest.

        Args:
            generation_id: its id.
            path: directory of it, finished.
            replace: also where the bucket holds another generation of that id.

        Raises:
            OvertakenError: the bucket holds another one of that id.
        """
        data = (path / MANIFEST).read_bytes()
        files = self.parse(generation_id, data)["files"]
        blobs = {facts["sha256"]: listed_file(path, name, files, AGAIN) for name, facts in files.items()}
        self._upload_missing(blobs)
        key = _manifest_key(generation_id)
        if replace:
            self._objects.put(key, data)
        elif not self._objects.swap(key, data, None):
            raise OvertakenError(
                f"{self._objects.url} has another generation {generation_id}, made elsewhere of the same "
                "inputs",
                "Publish again to publish that one",
            )
        # A prune may have removed, in between, what nothing referred to yet.
        self._upload_missing(blobs)

    def download(self, manifest: dict[str, Any], data: bytes, path: Path, known: dict[str, Path]) -> None:
        """Make the local copy of a generation of known files and objects, its manifest last.

        Args:
            manifest: of the generation.
            data: the bytes of the manifest.
            path: directory of the copy.
            known: local files by SHA-256; they are linked where they still have their size.

        Raises:
            UnavailableError: the bucket does not answer, or an object is missing or damaged.
        """
        files = manifest["files"]
        with building(path) as partial:
            missing = []
            for name, facts in files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                if not _linked(known.get(facts["sha256"]), partial / name, facts["bytes"]):
                    missing.append(name)
            num_bytes = sum(files[name]["bytes"] for name in missing)
            where = self._objects.url
            say(f"fetch {len(missing)} of {len(files)} files, {num_bytes / 1e6:,.1f} MB, from {where}")
            at_once(lambda name: self._download_file(partial / name, files[name]), missing)
            write_bytes(partial / MANIFEST, data)

    def remove(self, ids: list[str], named: Callable[[], set[str]]) -> list[str]:
        """Remove the manifests of generations that no pointer names; returns ids of those that are gone.

        Args:
            ids: of generations.
            named: returns the ids that pointers name when it is called.
        """
        contents = {name: self.get(name) for name in ids}
        self._objects.delete([_manifest_key(name) for name in ids])
        # What was published at the same moment is put back.
        still = named()
        for name, content in contents.items():
            if name in still and content is not None:
                self._objects.swap(_manifest_key(name), content.data, None)
        return [name for name in ids if name not in still]

    def _place(self, generation_id: str) -> str:
        return f"{self._objects.url}/{_GENERATIONS}{generation_id}"

    def _upload_missing(self, blobs: dict[str, Path]) -> None:
        """Upload the files whose SHA-256 no object has."""
        keys = [f"{_BLOBS}{sha256}" for sha256 in blobs]
        there = at_once(self._objects.exists, keys)
        missing = [
            (key, path) for key, path, known in zip(keys, blobs.values(), there, strict=True) if not known
        ]
        if missing:
            num_bytes = sum(path.stat().st_size for _, path in missing)
            where = self._objects.url
            say(f"push {len(missing)} of {len(blobs)} files, {num_bytes / 1e6:,.1f} MB, to {where}")
            at_once(lambda each: self._objects.upload(*each), missing)

    def _download_file(self, path: Path, facts: dict[str, Any]) -> None:
        key = _blob_key(facts)
        num_bytes, sha256 = self._objects.download(key, path)
        if (num_bytes, sha256) != (facts["bytes"], facts["sha256"]):
            raise UnavailableError(
                f"{self._objects.url}/{key} is damaged: it has {num_bytes} bytes and SHA-256 "
                f"{sha256[:16]}..., its manifest says {facts['bytes']} bytes. Remove that object, and "
                "publish the generation again where it was built"
            )


def _manifest_key(generation_id: str) -> str:
    return f"{_GENERATIONS}{checked_name(generation_id, 'a generation id')}/{MANIFEST}"


def _blob_key(facts: dict[str, Any]) -> str:
    return f"{_BLOBS}{facts['sha256']}"


def _age(modified: datetime.datetime) -> float:
    return (datetime.datetime.now(datetime.UTC) - modified).total_seconds()


def _linked(source: Path | None, target: Path, num_bytes: int) -> bool:
    """Link a cached file; returns whether it was there, at its size."""
    try:
        if source is None or source.stat().st_size != num_bytes:
            return False
        link_or_copy(source, target)
    except FileNotFoundError:
        # Pruned meanwhile.
        return False
    return True
