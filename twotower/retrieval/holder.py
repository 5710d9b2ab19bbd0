"""Holds one group's shards of every generation that somebody needs, loading and freeing them as asked.

Gateways say again and again which generations they need. What one of them needs is loaded in a background
thread; what none has asked for in a while is freed. What is damaged is refused; what can not be read or has
no room now is tried again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from twotower.errors import ArtefactError, DamagedError, may_pass
from twotower.generations.files import CONFIG, ITEM_IDS, TOMBSTONES, verify_files
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.generations.yielding import return_memory
from twotower.hashing import hashing_aside, sha256_file
from twotower.retrieval.groups import ShardGroup

LEASE_S = 60.0
"""How long what a gateway needs is kept after it last said so (seconds)."""
RETRY_S = 10.0
"""How long after an error that may pass a generation is tried again (seconds)."""
_FETCHES, _FETCH_PAUSE_S = 4, 0.5
"""How often, and after how many seconds again, a generation is looked for that is not there."""
_FILES_OF_ALL = {CONFIG, ITEM_IDS, TOMBSTONES}
"""What every group reads beside its shards: attributes, how many item rows there are, and the dead ones."""


class GroupHolder:
    """One group's part of some generations; may be shared by threads."""

    def __init__(
        self,
        store: Store,
        group: int,
        num_groups: int,
        threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold nothing yet.

        Args:
            store: of the generations.
            group: 0 to num_groups - 1.
            num_groups: groups of each generation.
            threads: FAISS threads of a search.
            clock: seconds.
        """
        self.held: dict[str, ShardGroup] = {}
        """The group in each generation in memory, by the generation's id; replaced as a whole."""
        self.refused: dict[str, str] = {}
        """Why a generation that is needed can not be held, by its id."""
        self.failed: dict[str, str] = {}
        """Why a generation that is needed could not be loaded a moment ago, by its id; it is tried again."""
        self._retry_at: dict[str, float] = {}
        self._store = store
        self._group = group
        self._num_groups = num_groups
        self._threads = threads
        self._clock = clock
        self._leases: dict[str, tuple[frozenset[str], float]] = {}
        self._lock = threading.Lock()
        self._loader: threading.Thread | None = None

    def load(self, generation_id: str) -> None:
        """Hold a generation, in this thread.

        Raises:
            ArtefactError: a file of the group is missing or damaged, or there are too few shards.
            OSError: a file can not be read now.
        """
        path = self._fetched(generation_id)
        try:
            part = self._open(path)
        except DamagedError:
            # A copy of what is whole in a bucket is worth a second try.
            if not self._store.repair(generation_id):
                raise
            part = self._open(path)
        with self._lock:
            self.held = {**self.held, generation_id: part}

    def _fetched(self, generation_id: str) -> Path:
        # A gateway found it there. A prune of a bucket puts back what was published meanwhile.
        for _ in range(_FETCHES - 1):
            with contextlib.suppress(ArtefactError):
                return self._store.fetch(generation_id)
            time.sleep(_FETCH_PAUSE_S)
        return self._store.fetch(generation_id)

    def _open(self, path: Path) -> ShardGroup:
        """Return the group's part of a generation, after verifying its files."""
        generation = Generation.open(path, verify=False)
        names = generation.shard_groups(self._num_groups)[self._group]
        prefixes = tuple(f"shards/{name}/" for name in names)
        files = {
            n: f
            for n, f in generation.manifest["files"].items()
            if n.startswith(prefixes) or n in _FILES_OF_ALL
        }
        # What is held answers meanwhile, and needs the CPUs.
        with hashing_aside() if self.held else contextlib.nullcontext(sha256_file) as sha256:
            verify_files(generation.path, files, sha256=sha256)
        return ShardGroup(generation, names, self._threads)

    def begin(self, pointer: str) -> None:
        """Hold what gateways will most likely need, in this thread.

        That is what a pointer names, or the latest before it that can be held. Where nothing can, nothing is
        held: gateways say what they need, and are told why it is not there.
        """
        with contextlib.suppress(Exception):
            self.load(self._store.published(pointer))
            return
        for name in self._store.fallbacks(pointer):
            with contextlib.suppress(Exception):
                self.load(name)
                return

    def need(self, gateway: str, generation_ids: Collection[str]) -> None:
        """Note what a gateway needs: free the rest in this thread, and load what is not there in another.

        Args:
            gateway: its name; what it needed before no longer counts.
            generation_ids: of the generations.
        """
        with self._lock:
            now = self._clock()
            self._leases[gateway] = (frozenset(generation_ids), now + LEASE_S)
            self._leases = {g: lease for g, lease in self._leases.items() if lease[1] > now}
            needed = self._needed()
            before, self.held = self.held, {i: part for i, part in self.held.items() if i in needed}
            self.refused = {i: reason for i, reason in self.refused.items() if i in needed}
            self._retry_at = {i: at for i, at in self._retry_at.items() if i in needed and at > now}
            self.failed = {i: reason for i, reason in self.failed.items() if i in self._retry_at}
            if self._loader is None and self._next() is not None:
                loader = threading.Thread(target=self._load_all, name="holder", daemon=True)
                # It waits for the lock. Where none can be started, the next gateway that asks tries again.
                loader.start()
                self._loader = loader
            freed = len(self.held) < len(before)
        # Only now, without the lock: to free much takes long.
        del before
        if freed:
            return_memory()

    def _needed(self) -> set[str]:
        return {i for ids, _ in self._leases.values() for i in ids}

    def _next(self) -> str | None:
        missing = self._needed() - self.held.keys() - self.refused.keys() - self.failed.keys()
        return min(missing, default=None)

    def _load_all(self) -> None:
        while True:
            with self._lock:
                generation_id = self._next()
                if generation_id is None:
                    self._loader = None
                    return
            try:
                self.load(generation_id)
            # Whatever it is: FAISS raises RuntimeError where it can not read, and gateways are told why.
            except Exception as error:
                self._note(generation_id, error)

    def _note(self, generation_id: str, error: Exception) -> None:
        """Note why a generation is not held, for good or until it is tried again."""
        with self._lock:
            if not may_pass(error):
                self.refused = {**self.refused, generation_id: str(error)}
                return
            reason = f"generation {generation_id} can not be loaded now ({type(error).__name__}: {error})"
            self.failed = {**self.failed, generation_id: reason}
            self._retry_at[generation_id] = self._clock() + RETRY_S
