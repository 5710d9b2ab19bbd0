"""Generations and pointers in a bucket, with a local folder as cache: built here, pushed; fetched, read here.

    PREFIX/objects/SHA256                  files of generations, each once; never changed
    PREFIX/generations/ID/manifest.json    put when all its files are there
    PREFIX/pointers/NAME                   the publication that set it last, replaced by compare-and-swap
    PREFIX/publications/NAME/NUMBER.json   all of them
    PREFIX/superseded.json                 vocabularies with users who were forgotten

A bucket has no renames, links or memory maps, so that generations are read from the cache, whose files are
verified when they arrive and are links where another generation has them already. A push that is killed
leaves objects that nothing refers to; a prune removes them when they are old.

The first two kinds of keys are those of ``bucket_generations``, the next two those of ``bucket_pointers``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from twotower.artefacts import MANIFEST, has_manifest, locked
from twotower.errors import ArtefactError, RefusedError, UnavailableError
from twotower.generations.bucket_generations import BucketGenerations
from twotower.generations.bucket_pointers import BucketPointers
from twotower.generations.files import file_facts
from twotower.generations.folder import Folder
from twotower.generations.names import generation_path
from twotower.generations.objects import Objects
from twotower.generations.place import too_late
from twotower.generations.prune import ANY_AGE_S, Pruned, prune_folder, unwanted
from twotower.generations.publications import Publication
from twotower.generations.superseded import SUPERSEDED
from twotower.generations.survey import by_age, survey
from twotower.progress import say


class Bucket:
    """A bucket as a place. The bucket is the truth; the local folder holds copies and builds."""

    def __init__(self, url: str, cache: Path | str) -> None:
        """Take the places; nothing is read yet.

        Args:
            url: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``.
            cache: local folder for copies, where generations are also built before they are pushed.

        Raises:
            ConfigError: the URL is none, or obstore is not installed.
        """
        self.root = Path(cache)
        self._folder = Folder(cache)
        self._objects = Objects(url)
        self._generations = BucketGenerations(self._objects)
        self._pointers = BucketPointers(self._objects)

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
        path = generation_path(self.root, generation_id)
        try:
            found = self._generations.get(generation_id)
        except UnavailableError as error:
            if not has_manifest(path):
                raise
            say(f"the copy of generation {generation_id} in {self.root} is taken: {error}")
            return path
        if found is None:
            if has_manifest(path):
                return path
            raise ArtefactError(f"{self.where} has no generation {generation_id}, and {self.root} neither")
        manifest = self._generations.parse(generation_id, found.data)
        with locked(self.root / ".fetch.lock"):
            if _read(path / MANIFEST) != found.data:
                self._generations.download(manifest, found.data, path, self._cached())
        return path

    def repair(self, generation_id: str) -> bool:
        """Fetch the damaged files of a copy again; returns False where the bucket has no such generation.

        Raises:
            UnavailableError: the bucket does not answer, or an object of it is missing or damaged.
        """
        path = generation_path(self.root, generation_id)
        found = self._generations.get(generation_id)
        if found is None:
            return False
        manifest = self._generations.parse(generation_id, found.data)
        with locked(self.root / ".fetch.lock"):
            files = manifest["files"]
            whole = {str(f["sha256"]): path / name for name, f in files.items() if _is_whole(path / name, f)}
            if any(facts["sha256"] not in whole for facts in files.values()):
                self._generations.download(manifest, found.data, path, whole)
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
        self._generations.push(generation_id, self._folder.fetch(generation_id), replace)

    def has(self, generation_id: str) -> bool:
        """Return whether there is a generation of that id, here or there."""
        return self._folder.has(generation_id) or self._generations.exists(generation_id)

    def is_shared(self, generation_id: str) -> bool:
        """Return whether the bucket has a generation of that id."""
        return self._generations.exists(generation_id)

    def manifest(self, generation_id: str) -> dict[str, Any]:
        """Return the manifest of a generation, as the store has it.

        Raises:
            ArtefactError: there is none of that id, or it is of a newer schema.
        """
        found = self._generations.get(generation_id)
        if found is None:
            return self._folder.manifest(generation_id)
        return self._generations.parse(generation_id, found.data)

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of all generations that can be read, here or there, the oldest first."""
        return by_age({**self._folder.manifests(), **self._generations.manifests()[0]})

    def pointers(self) -> dict[str, str]:
        """Return the id that each pointer names, by the pointer's name."""
        return self._pointers.named()[0]

    def passed_over(self) -> list[str]:
        """Return what can not be read as part of the store, and so is passed over, each a sentence."""
        return [*self._generations.manifests()[1], *self._pointers.named()[1], *survey(self.root).passed]

    def require(self) -> None:
        """Do nothing: a prefix in a bucket is there as soon as something is written below it."""

    def current(self, pointer: str) -> str | None:
        """Return the id that a pointer names; None when it was never set.

        Raises:
            ArtefactError: the pointer's object holds no publication.
        """
        found = self._pointers.get(pointer)
        return None if found is None else found.entry.id

    def swap(self, entry: Publication, check: Callable[[], None]) -> str | None:
        """Push the generation and swap the pointer if it still names ``entry.previous``.

        Args:
            entry: what is published.
            check: raises a ``RefusedError`` where it may not be; called before the push, and after it.

        Returns:
            the id that the pointer named before.

        Raises:
            RefusedError: the pointer names another one, or ``check`` refuses; it has not been set, or names
                what is gone, so that nobody reads it.
            UnavailableError: the bucket does not answer; the message says so if the pointer may be set.
        """
        for pushed in (False, True):
            now = self._pointers.get(entry.pointer)
            current = None if now is None else now.entry.id
            if current == entry.id:
                self._complete(entry, check)
                return current
            if current != entry.previous:
                raise too_late(entry, current)
            if not pushed:
                check()
                self.push(entry.id)
                self._check_pushed(entry, check)
        if now is not None:
            self._pointers.log(now)
        unknown = f"it is not known whether {entry.pointer} names generation {entry.id} now; publish it again"
        with _explained(unknown):
            done = self._pointers.swap(entry, now)
        if done is None:
            raise too_late(entry, self.current(entry.pointer))
        try:
            self._pointers.log(done)
        except UnavailableError as error:
            # The pointer says it too, and the next publisher writes what it says into the log.
            say(f"{entry.pointer} names generation {entry.id}, which is not logged yet: {error}")
        self._complete(entry, check)
        return entry.previous

    def publications(self) -> list[Publication]:
        """Return what was published and rolled back; those of each pointer in order."""
        return self._pointers.publications()

    def superseded(self) -> bytes | None:
        """Return the object of superseded vocabularies; None where there is none."""
        found = self._objects.get(SUPERSEDED)
        return None if found is None else found.data

    def supersede(self, change: Callable[[bytes | None], bytes]) -> None:
        """Replace the object of superseded vocabularies; ``change`` is called until nobody was faster."""
        done = False
        while not done:
            now = self._objects.get(SUPERSEDED)
            done = self._objects.swap(SUPERSEDED, change(None if now is None else now.data), now)

    def prune(self, keep: int, grace_s: float, dry_run: bool) -> Pruned:
        """Remove old generations and objects that nothing refers to, there and in the cache.

        Args:
            keep: how many of the newest generations stay; those that a pointer names stay in any case.
            grace_s: age in seconds that an object must have: a push may be about to refer to it.
            dry_run: only say what would be removed.

        Raises:
            ConfigError: ``keep`` is below 1.
        """
        gone = unwanted(list(by_age(self._generations.manifests()[0])), keep, self._in_use())
        return self._clear(gone, lambda kept: unwanted(self._local(), keep, kept), grace_s, dry_run)

    def remove(self, ids: Collection[str]) -> Pruned:
        """Remove generations that no pointer names, there and here, and all that nothing refers to."""
        wanted = set(ids) - self._in_use()
        gone = [name for name in self.manifests() if name in wanted]
        return self._clear(gone, lambda _: [i for i in self._local() if i in gone], ANY_AGE_S, False)

    def _complete(self, entry: Publication, check: Callable[[], None]) -> None:
        """Push what a pointer names by now again, where a prune removed it while nothing named it.

        Raises:
            RefusedError: it was removed since it may no longer be published; the pointer names it though.
        """
        with _explained(
            f"{entry.pointer} names generation {entry.id} now, but it is not known whether {self.where} has "
            f"all of it; run python -m jobs.generations publish {entry.id} --pointer {entry.pointer}"
        ):
            if not self._generations.exists(entry.id):
                check()
                # Where another machine has pushed one of that id meanwhile, the pointer names that.
                with contextlib.suppress(RefusedError):
                    self.push(entry.id)

    def _check_pushed(self, entry: Publication, check: Callable[[], None]) -> None:
        """Check again: what forgets users supersedes their vocabularies before it looks for generations."""
        try:
            check()
        except RefusedError:
            self.remove([entry.id])
            raise

    def _local(self) -> list[str]:
        """Return the ids of generations in the folder."""
        return list(self._folder.manifests())

    def _in_use(self) -> set[str]:
        """Return the ids that pointers name, of a pointer that is damaged what it was set to last.

        Raises:
            ArtefactError: a pointer and the log are damaged both.
        """
        pointers, damaged = self._pointers.named()
        last = {entry.pointer: entry.id for entry in self.publications()} if damaged else {}
        return {*pointers.values(), *(name for pointer, name in last.items() if pointer not in pointers)}

    def _clear(
        self,
        gone: list[str],
        stale: Callable[[dict[str, Any]], list[str]],
        grace_s: float,
        dry_run: bool,
    ) -> Pruned:
        """Remove generations there, those here that ``stale`` finds (manifests there given), leftovers."""
        before, _ = self._generations.manifests()
        if not dry_run:
            gone = self._generations.remove(gone, self._in_use)
        blobs = self._generations.blobs(grace_s)
        # Read last, so that what was pushed meanwhile counts.
        there, damaged = self._generations.manifests()
        kept = {name: m for name, m in there.items() if not dry_run or name not in gone}
        needed = self._generations.blob_keys(kept)
        unused = [o for o in blobs if o.key not in needed]
        if damaged and unused:
            # Another release may read what this one can not.
            say(f"the files of no generation are removed from {self.where}: {damaged[0]}")
            unused = []
        if not dry_run:
            self._objects.delete([o.key for o in unused])
        with locked(self._folder.lock):
            local = prune_folder(self.root, stale(kept), grace_s, dry_run)
        named = self._generations.blob_keys(before)
        return Pruned(
            list(dict.fromkeys([*gone, *local.generations])),
            [o.key for o in unused if o.key not in named] + local.leftovers,
            sum(o.num_bytes for o in unused) + local.num_bytes,
        )

    def _cached(self) -> dict[str, Path]:
        """Return a local file by SHA-256."""
        files = {}
        for name, manifest in self._folder.manifests().items():
            for file, facts in manifest["files"].items():
                files[str(facts["sha256"])] = generation_path(self.root, name) / file
        return files


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
