"""A store in a bucket, with a local folder as its cache: built here, pushed; fetched, and read here.

    PREFIX/objects/SHA256                  files of generations, each once; never changed
    PREFIX/generations/ID/manifest.json    put when all its files are there
    PREFIX/pointers/NAME                   the publication that set it last, replaced by compare-and-swap
    PREFIX/publications/NAME/NUMBER.json   all of them
    PREFIX/superseded.json                 vocabularies with users who were forgotten

A bucket has no renames, links or memory maps, so that generations are read from the cache, whose files are
verified when they arrive and are links where another generation has them already. A push that is killed
leaves objects that nothing refers to; a prune removes them when they are old.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from twotower.artefacts import (
    MANIFEST,
    building,
    has_manifest,
    link_or_copy,
    locked,
    parse_manifest,
    write_bytes,
)
from twotower.errors import ArtefactError, RefusedError, UnavailableError
from twotower.progress import say
from twotower.retrieval.files import KIND, check_file_name, file_facts
from twotower.retrieval.objects import Content, Objects
from twotower.retrieval.prune import ANY_AGE_S, GRACE_S, Pruned, prune_folder, unwanted
from twotower.retrieval.publications import Publication
from twotower.retrieval.store import CURRENT, Store, checked_name, checked_pointer, too_late
from twotower.retrieval.superseded import SUPERSEDED, added

T = TypeVar("T")
R = TypeVar("R")
_THREADS = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOBS, _GENERATIONS, _POINTERS, _LOG = "objects/", "generations/", "pointers/", "publications/"


class RemoteStore(Store):
    """Generations and pointers in a bucket. The bucket is the truth; the folder holds copies and builds."""

    def __init__(self, url: str, cache: Path | str) -> None:
        """Take the places; nothing is read yet.

        Args:
            url: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``.
            cache: local folder for copies, where generations are also built before they are pushed.

        Raises:
            ConfigError: the URL is none, or obstore is not installed.
        """
        super().__init__(cache)
        self._objects = Objects(url)

    @property
    def where(self) -> str:
        """Its URL."""
        return self._objects.url

    def fetch(self, generation_id: str) -> Path:
        """Return the local copy of a generation, downloading what the cache does not have.

        A copy of another manifest than the store holds now is replaced. A generation that was built here and
        never pushed is returned as it is, and so is a copy while the bucket does not answer.

        Raises:
            ArtefactError: there is none of that id, or it is of a newer schema.
            UnavailableError: the bucket does not answer, or an object of it is missing or damaged.
        """
        path = self.path(generation_id)
        try:
            found = self._objects.get(_manifest_key(generation_id))
        except UnavailableError as error:
            if not has_manifest(path):
                raise
            say(f"the copy of generation {generation_id} in {self.root} is taken: {error}")
            return path
        if found is None:
            if has_manifest(path):
                return path
            raise ArtefactError(f"{self.where} has no generation {generation_id}, and {self.root} neither")
        manifest = self._parse(generation_id, found.data)
        with locked(self.root / ".fetch.lock"):
            if _read(path / MANIFEST) != found.data:
                self._download(manifest, found.data, path, self._cached())
        return path

    def repair(self, generation_id: str) -> bool:
        """Fetch the damaged files of a copy again; returns False where the bucket has no such generation.

        Raises:
            UnavailableError: the bucket does not answer, or an object of it is missing or damaged.
        """
        path = self.path(generation_id)
        found = self._objects.get(_manifest_key(generation_id))
        if found is None:
            return False
        manifest = self._parse(generation_id, found.data)
        with locked(self.root / ".fetch.lock"):
            files = self._files(manifest)
            whole = {str(f["sha256"]): path / name for name, f in files.items() if _is_whole(path / name, f)}
            if any(facts["sha256"] not in whole for facts in files.values()):
                self._download(manifest, found.data, path, whole)
        return True

    def push(self, generation_id: str, replace: bool = False) -> None:
        """Upload a local generation: files that are missing there, then its manifest.

        Args:
            generation_id: of a finished generation in the folder.
            replace: also where the store holds another generation of that id.

        Raises:
            ArtefactError: it is not finished.
            RefusedError: the store holds another one of that id.
        """
        path = super().fetch(generation_id)
        data = (path / MANIFEST).read_bytes()
        files = self._files(self._parse(generation_id, data))
        blobs = {facts["sha256"]: path / name for name, facts in files.items()}
        self._upload_missing(blobs)
        key = _manifest_key(generation_id)
        if replace:
            self._objects.put(key, data)
        elif not self._objects.swap(key, data, None):
            raise RefusedError(
                f"{self.where} has another generation {generation_id}, made elsewhere of the same inputs; "
                "publish again to publish that one"
            )
        # A prune may have removed, in between, what nothing referred to yet.
        self._upload_missing(blobs)

    def has(self, generation_id: str) -> bool:
        """Return whether there is a generation of that id, here or there."""
        return has_manifest(self.path(generation_id)) or self._objects.exists(_manifest_key(generation_id))

    def manifest(self, generation_id: str) -> dict[str, Any]:
        """Return the manifest of a generation, as the store has it.

        Raises:
            ArtefactError: there is none of that id, or it is of a newer schema.
        """
        found = self._objects.get(_manifest_key(generation_id))
        if found is None:
            return super().manifest(generation_id)
        return self._parse(generation_id, found.data)

    def generations(self) -> list[str]:
        """Return the ids of finished generations, here or there, the oldest first."""
        here = {name: Store.manifest(self, name) for name in super().generations()}
        return _by_age({**here, **self._manifests()})

    def pointers(self) -> dict[str, str]:
        """Return the id that each pointer names, by the pointer's name."""
        names = [o.key.removeprefix(_POINTERS) for o in self._objects.list(_POINTERS)]
        found = {name: self.current(name) for name in sorted(names)}
        return {name: value for name, value in found.items() if value is not None}

    def current(self, pointer: str = CURRENT) -> str | None:
        """Return the id that a pointer names; None when it was never set.

        Raises:
            ArtefactError: the pointer's object holds no publication.
        """
        found = self._pointer_now(pointer)
        return None if found is None else found.entry.id

    def publications(self) -> list[Publication]:
        """Return what was published and rolled back; those of each pointer in order."""
        keys = [o.key for o in self._objects.list(_LOG)]
        contents = dict(zip(keys, _at_once(self._objects.get, keys), strict=True))
        entries = {
            key: _parse_pointer(content, f"{self.where}/{key}").entry
            for key, content in contents.items()
            if content is not None
        }
        for name in self.pointers():
            # The last one may not have been logged: its publisher was killed.
            if (found := self._pointer_now(name)) is not None:
                entries.setdefault(_log_key(found), found.entry)
        return [entries[key] for key in sorted(entries)]

    def prune(self, keep: int, grace_s: float = GRACE_S, dry_run: bool = False) -> Pruned:
        """Remove old generations and objects that nothing refers to, there and in the cache.

        Args:
            keep: how many of the newest generations stay; those that a pointer names stay in any case.
            grace_s: age in seconds that an object must have: a push may be about to refer to it.
            dry_run: only say what would be removed.

        Raises:
            ConfigError: ``keep`` is below 1.
            ArtefactError: a manifest can not be read, so that it is not known what it refers to.
        """
        before = self._manifests()
        gone = unwanted(_by_age(before), keep, set(self.pointers().values()))
        return self._clear(gone, lambda kept: unwanted(Store.generations(self), keep, kept), grace_s, dry_run)

    def remove(self, ids: Collection[str]) -> Pruned:
        """Remove generations that no pointer names, there and here, and all that nothing refers to."""
        wanted = set(ids) - set(self.pointers().values())
        gone = [name for name in self.generations() if name in wanted]
        return self._clear(
            gone, lambda _: [i for i in Store.generations(self) if i in gone], ANY_AGE_S, False
        )

    def _clear(
        self,
        gone: list[str],
        stale: Callable[[dict[str, Any]], list[str]],
        grace_s: float,
        dry_run: bool,
    ) -> Pruned:
        """Remove generations there, those here that ``stale`` finds (manifests there given), leftovers."""
        before = self._manifests()
        if not dry_run:
            gone = self._remove_manifests(gone)
        blobs = [o for o in self._objects.list(_BLOBS) if _age(o.modified) >= grace_s]
        # Read last, so that what was pushed meanwhile counts.
        kept = {name: m for name, m in self._manifests().items() if not dry_run or name not in gone}
        needed = self._blob_keys(kept)
        unused = [o for o in blobs if o.key not in needed]
        if not dry_run:
            self._objects.delete([o.key for o in unused])
        with locked(self._lock):
            local = prune_folder(self.root, stale(kept), grace_s, dry_run)
        named = self._blob_keys(before)
        return Pruned(
            list(dict.fromkeys([*gone, *local.generations])),
            [o.key for o in unused if o.key not in named] + local.leftovers,
            sum(o.num_bytes for o in unused) + local.num_bytes,
        )

    def supersede(self, vocabulary_hashes: Iterable[str]) -> None:
        """Let nothing that was made with these vocabularies be published from now on, unless it is forced."""
        hashes, done = list(vocabulary_hashes), False
        while not done:
            now = self._objects.get(SUPERSEDED)
            data = added(None if now is None else now.data, hashes, f"{self.where}/{SUPERSEDED}")
            done = self._objects.swap(SUPERSEDED, data, now)

    def succeed(self, generation_id: str, successor_id: str) -> list[str]:
        """Push the same generation without some users, and let every pointer to the other name it."""
        if self._objects.exists(_manifest_key(generation_id)):
            self.push(successor_id)
        return super().succeed(generation_id, successor_id)

    def _superseded(self) -> bytes | None:
        found = self._objects.get(SUPERSEDED)
        return None if found is None else found.data

    def _remove_manifests(self, names: list[str]) -> list[str]:
        """Remove generations that no pointer names; returns those that are gone."""
        contents = {name: self._objects.get(_manifest_key(name)) for name in names}
        self._objects.delete([_manifest_key(name) for name in names])
        # What was published at the same moment is put back.
        named = set(self.pointers().values())
        for name, content in contents.items():
            if name in named and content is not None:
                self._objects.swap(_manifest_key(name), content.data, None)
        return [name for name in names if name not in named]

    def _set(self, entry: Publication) -> str | None:
        """Push the generation and swap the pointer if it still names ``entry.previous``.

        Raises:
            RefusedError: the pointer names another one, or users were forgotten; it has not been set.
            UnavailableError: the bucket does not answer; the message says so if the pointer may be set.
        """
        for pushed in (False, True):
            now = self._pointer_now(entry.pointer)
            current = None if now is None else now.entry.id
            if current == entry.id:
                self._complete(entry)
                return current
            if current != entry.previous:
                raise too_late(entry, current)
            if not pushed:
                self._refuse_outdated(entry)
                self.push(entry.id)
                self._refuse_pushed(entry)
        if now is not None:
            self._log(now)
        number = 1 if now is None else now.number + 1
        data = json.dumps({**entry.to_json(), "number": number}).encode()
        key = f"{_POINTERS}{entry.pointer}"
        unknown = f"it is not known whether {entry.pointer} names generation {entry.id} now; publish it again"
        with _explained(unknown):
            done = self._objects.swap(key, data, None if now is None else now.content)
        if not done:
            raise too_late(entry, self.current(entry.pointer))
        try:
            self._log(_Pointer(entry, number, Content(data, {})))
        except UnavailableError as error:
            # The pointer says it too, and the next publisher writes what it says into the log.
            say(f"{entry.pointer} names generation {entry.id}, which is not logged yet: {error}")
        self._complete(entry)
        return entry.previous

    def _complete(self, entry: Publication) -> None:
        """Push what a pointer names by now again, where a prune removed it while nothing named it."""
        with _explained(
            f"{entry.pointer} names generation {entry.id} now, but it is not known whether {self.where} has "
            f"all of it; run python -m jobs.generations publish {entry.id} --pointer {entry.pointer}"
        ):
            if not self._objects.exists(_manifest_key(entry.id)):
                # Where another machine has pushed one of that id meanwhile, the pointer names that.
                with contextlib.suppress(RefusedError):
                    self.push(entry.id)

    def _refuse_pushed(self, entry: Publication) -> None:
        """Refuse again: who forgets users supersedes their vocabularies before he looks for generations."""
        try:
            self._refuse_outdated(entry)
        except RefusedError:
            self.remove([entry.id])
            raise

    def _log(self, pointer: _Pointer) -> None:
        self._objects.swap(_log_key(pointer), pointer.content.data, None)

    def _pointer_now(self, pointer: str) -> _Pointer | None:
        key = f"{_POINTERS}{checked_pointer(pointer)}"
        content = self._objects.get(key)
        return None if content is None else _parse_pointer(content, f"{self.where}/{key}")

    def _manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of all generations in the bucket."""
        keys = [o.key for o in self._objects.list(_GENERATIONS) if o.key.endswith(f"/{MANIFEST}")]
        names = [key.removeprefix(_GENERATIONS).removesuffix(f"/{MANIFEST}") for key in keys]
        contents = _at_once(self._objects.get, keys)
        return {
            name: self._parse(name, content.data)
            for name, content in zip(names, contents, strict=True)
            if content is not None
        }

    def _parse(self, generation_id: str, data: bytes) -> dict[str, Any]:
        place = f"{self.where}/{_GENERATIONS}{generation_id}"
        manifest = parse_manifest(data, place, KIND)
        if manifest["id"] != generation_id:
            raise ArtefactError(f"{place} holds generation {manifest['id']}; remove it and push it again")
        return manifest

    def _files(self, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the files of a manifest, whose names and hashes lead nowhere else."""
        place = f"{self.where}/{_GENERATIONS}{manifest['id']}"
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, facts in files.items():
            check_file_name(name, place)
            if not _SHA256.fullmatch(str(facts["sha256"])):
                raise ArtefactError(f"the manifest of {place} gives {name} no SHA-256; push it again")
        return files

    def _blob_keys(self, manifests: dict[str, dict[str, Any]]) -> set[str]:
        return {_blob_key(facts) for m in manifests.values() for facts in self._files(m).values()}

    def _upload_missing(self, blobs: dict[str, Path]) -> None:
        """Upload the files whose SHA-256 no object has."""
        keys = [f"{_BLOBS}{sha256}" for sha256 in blobs]
        there = _at_once(self._objects.exists, keys)
        missing = [
            (key, path) for key, path, known in zip(keys, blobs.values(), there, strict=True) if not known
        ]
        if missing:
            num_bytes = sum(path.stat().st_size for _, path in missing)
            say(f"push {len(missing)} of {len(blobs)} files, {num_bytes / 1e6:,.1f} MB, to {self.where}")
            _at_once(lambda each: self._objects.upload(*each), missing)

    def _download(self, manifest: dict[str, Any], data: bytes, path: Path, known: dict[str, Path]) -> None:
        """Make the local copy of a generation of known files (by SHA-256) and objects, its manifest last."""
        files = self._files(manifest)
        with building(path) as partial:
            missing = []
            for name, facts in files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                if not _linked(known.get(facts["sha256"]), partial / name, facts["bytes"]):
                    missing.append(name)
            num_bytes = sum(files[name]["bytes"] for name in missing)
            say(f"fetch {len(missing)} of {len(files)} files, {num_bytes / 1e6:,.1f} MB, from {self.where}")
            _at_once(lambda name: self._download_file(partial / name, files[name]), missing)
            write_bytes(partial / MANIFEST, data)

    def _download_file(self, path: Path, facts: dict[str, Any]) -> None:
        key = _blob_key(facts)
        num_bytes, sha256 = self._objects.download(key, path)
        if (num_bytes, sha256) != (facts["bytes"], facts["sha256"]):
            raise UnavailableError(
                f"{self.where}/{key} is damaged: it has {num_bytes} bytes and SHA-256 {sha256[:16]}..., its "
                f"manifest says {facts['bytes']} bytes. Remove that object, and publish the generation again "
                "where it was built"
            )

    def _cached(self) -> dict[str, Path]:
        """Return a local file by SHA-256."""
        files = {}
        for name in super().generations():
            with contextlib.suppress(ArtefactError):
                for file, facts in super().manifest(name)["files"].items():
                    files[str(facts["sha256"])] = self.path(name) / file
        return files


@dataclass(frozen=True)
class _Pointer:
    """What a pointer's object holds."""

    entry: Publication
    number: int
    """Of the publications of this pointer, from 1."""
    content: Content


def _parse_pointer(content: Content, where: str) -> _Pointer:
    try:
        value = json.loads(content.data)
        number = int(value["number"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{where} holds no publication ({error}); remove it") from None
    entry = Publication.from_json(value, where)
    checked_name(entry.id, f"the id in {where}")
    return _Pointer(entry, number, content)


def _log_key(pointer: _Pointer) -> str:
    return f"{_LOG}{pointer.entry.pointer}/{pointer.number:08d}.json"


def _blob_key(facts: dict[str, Any]) -> str:
    return f"{_BLOBS}{facts['sha256']}"


def _manifest_key(generation_id: str) -> str:
    return f"{_GENERATIONS}{checked_name(generation_id, 'a generation id')}/{MANIFEST}"


def _by_age(manifests: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(manifests, key=lambda name: (str(manifests[name]["created"]), name))


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


def _is_whole(path: Path, facts: dict[str, Any]) -> bool:
    try:
        return file_facts(path) == {"bytes": facts["bytes"], "sha256": facts["sha256"]}
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what it means that the bucket does not answer inside the block."""
    try:
        yield
    except UnavailableError as error:
        raise UnavailableError(f"{what}. {error}") from None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _at_once(call: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """Call a function that waits for the network on several values at a time; answers in their order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, values))
