"""Follows a pointer of a store: what answers is always of the generation that it names, or of the one before.

A change is noticed by asking for the pointer every so often. The generation that it names then is brought
here, every byte of it is verified, it is loaded beside the one in use and asked canary queries, and one
call lets it answer. A generation that fails is refused and reported, and the one in use stays. All of this
happens in one background thread; nothing else waits for it. A process that starts while the pointer names
one that fails begins with the latest that it named before and that does not.

How a generation is loaded is up to the caller, so that one process or many may hold it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from twotower.artefacts import has_manifest
from twotower.errors import ArtefactError, DamagedError, TwotowerError, may_pass
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.generations.yielding import return_memory
from twotower.hashing import hashing_aside

T = TypeVar("T")
_TURN_S = 0.0005
_FIRST_RETRY_S, _LAST_RETRY_S = 5.0, 300.0
_RELEASE_S, _RELEASE_POLL_S = 30.0, 0.02
"""How long requests may go on with the generation that was replaced before this thread lets go of it."""
_FOLDERS = re.compile(r"(?<![\w./])(?:\w+:/)?/(?:[\w.@+~-]+/)*")


@dataclass(frozen=True)
class Refusal:
    """A generation that the pointer names and that is not used."""

    id: str
    reason: str
    """For people, without paths."""


@dataclass(frozen=True)
class _Failure:
    """Why a generation is not used."""

    reason: str
    """For people, without paths."""
    details: str
    """For the log."""
    passes: bool
    """Whether it may pass, so that the generation is tried again."""


class Follower(Generic[T]):
    """Keeps what answers at the generation that a pointer names."""

    def __init__(
        self,
        store: Store,
        pointer: str,
        load: Callable[[Generation], T],
        poll_s: float = 1.0,
        gone: Callable[[str], None] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        """Keep what to follow; nothing is read yet.

        Args:
            store: holds the pointer and the generations.
            pointer: its name.
            load: makes of a verified generation what answers, warmed up and asked canary queries. An
                error that may not pass (``may_pass``) refuses the generation for good; after another it is
                tried again, if the pointer is followed. What it returns must take weak references, and
                nothing but requests may keep it once it is replaced.
            poll_s: seconds between two looks at the pointer; 0 looks at it in ``open`` only.
            gone: called with the id of a generation once nothing in this process refers to what ``load``
                made of it, also where it never answered.
            log: gets what happens.
        """
        self._store = store
        self._pointer = pointer
        self._load = load
        self._poll_s = poll_s
        self._gone = gone
        self._log = log or logging.getLogger(__name__)
        self._held: list[tuple[str, weakref.ref[Any]]] = []
        self._path = Path()
        self._refused: Refusal | None = None
        self._retry_at: float | None = None
        self._retry_s = _FIRST_RETRY_S
        self._problem: str | None = None
        self._passed_over = False
        self._on_refused: Callable[[str, str], None] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> T:
        """Load what the pointer names now; where that fails, the latest before it that does not.

        Raises:
            ArtefactError: the pointer names none, or one that is damaged or answers nonsense, and so is all
                that it named before.
        """
        name = self._store.published(self._pointer)
        path = None
        try:
            path = self._store.fetch(name)
            return self._begin(name, path)
        # Whatever it is, another one answers meanwhile, and where it may pass this one is tried again.
        except Exception as error:
            failure = self._failure(error, path)
            # What was half loaded is in their variables.
            traceback.clear_frames(error.__traceback__)
            opened = self._open_earlier()
            if opened is None:
                raise
            self._refuse(name, failure)
            return opened

    def start(self, use: Callable[[T], None], refused: Callable[[str, str], None] | None = None) -> None:
        """Follow the pointer from now on, after ``open``.

        Args:
            use: called in the background with what is to answer from then on.
            refused: called with the id of a generation that is not used, and the reason without paths.
        """
        self._on_refused = refused
        if refused is not None and self._refused is not None:
            refused(self._refused.id, self._refused.reason)
        if self._poll_s:
            self._thread = threading.Thread(target=self._run, args=(use,), name="follower", daemon=True)
            self._thread.start()

    def close(self, wait: bool = True) -> None:
        """Stop following.

        Args:
            wait: for the end of a change that is going on.
        """
        self._stop.set()
        if wait and self._thread is not None:
            self._thread.join()

    @property
    def pointer(self) -> str:
        """Name of the pointer."""
        return self._pointer

    @property
    def generation_id(self) -> str:
        """Id of the generation in use."""
        return self._held[-1][0]

    @property
    def held(self) -> list[str]:
        """Ids of the generations in memory, the one in use last."""
        return [name for name, reference in self._held if reference() is not None]

    @property
    def refused(self) -> Refusal | None:
        """The generation that the pointer names, where it was refused."""
        return self._refused

    @property
    def problem(self) -> str | None:
        """Why it is not known what the pointer names, without paths; None where it is."""
        return self._problem

    def _run(self, use: Callable[[T], None]) -> None:
        # Of the usual priority: a thread of a low one that has the GIL and no CPU holds up those that answer.
        while not self._stop.wait(self._poll_s):
            try:
                self._look(use)
            # Whatever a callback has to say: what is published next is followed all the same.
            except Exception as error:
                self._log.error("following pointer %s goes on after %r", self._pointer, error)

    def _look(self, use: Callable[[T], None]) -> None:
        """Look at the pointer once, and change what answers where it names another generation."""
        name = self._named()
        if name == self.generation_id:
            self._accept()
        elif name is not None and self._is_due(name):
            with _short_turns():
                self._change(name, use)
        self._forget_gone()

    def _named(self) -> str | None:
        """Return the id that the pointer names; None where that can not be told now."""
        try:
            name = self._store.current(self._pointer)
            problem = None if name is not None else "it is not set any more"
        # Whatever a disk or a network has to say: the generation in use goes on answering.
        except Exception as error:
            name, problem = None, f"it can not be read ({type(error).__name__})"
            if self._problem is None:
                self._log.warning("pointer %s can not be read, asking again: %s", self._pointer, error)
        else:
            if problem is not None and self._problem is None:
                self._log.warning("pointer %s of %s is not set any more", self._pointer, self._store.where)
        if problem is None and self._problem is not None:
            self._log.warning("pointer %s can be read again", self._pointer)
        self._problem = problem
        return name

    def _is_due(self, name: str) -> bool:
        if self._refused is None or self._refused.id != name:
            self._retry_s = _FIRST_RETRY_S
            return True
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def _change(self, name: str, use: Callable[[T], None]) -> None:
        """Load a generation and let it answer, unless it fails or the pointer names another one by then."""
        path = None
        # Where the pointer is set faster than generations are fetched and loaded, every second one is used.
        insists, self._passed_over = self._passed_over, False
        try:
            path = self._store.fetch(name)
            if self._is_passed_over(name, insists):
                return
            new = self._opened(name, path)
        except Exception as error:
            self._refuse(name, self._failure(error, path))
        else:
            if not self._is_passed_over(name, insists):
                self._switch(name, path, new, use)
                return
            del new
            if self._gone is not None:
                self._gone(name)
        return_memory()

    def _open_earlier(self) -> T | None:
        """Load the latest that the pointer named before and that does not fail; None where all do."""
        for name in self._store.fallbacks(self._pointer):
            path = None
            try:
                path = self._store.fetch(name)
                return self._begin(name, path)
            except Exception as error:
                self._log.warning("generation %s fails too: %s", name, self._failure(error, path).details)
        return None

    def _begin(self, name: str, path: Path) -> T:
        """Load the first generation."""
        opened = self._opened(name, path)
        self._path = path
        self._held = [(name, weakref.ref(opened))]
        return opened

    def _opened(self, name: str, path: Path) -> T:
        try:
            generation = self._verified(path)
        except DamagedError as error:
            # A copy of what is whole in a bucket is worth a second try.
            if not self._store.repair(name):
                raise
            # As text: a record that kept the error would keep the frames below, and what they load.
            self._log.warning("the copy of generation %s was repaired: %s", name, str(error))
            generation = self._verified(path)
        if generation.id != name:
            raise ArtefactError(f"{path} holds generation {generation.id}, not {name}; publish it again")
        return self._load(generation)

    def _verified(self, path: Path) -> Generation:
        if not self._held:
            return Generation.open(path)
        known = self._path if has_manifest(self._path) else None
        # What answers meanwhile needs the CPUs.
        with hashing_aside() as sha256:
            try:
                return Generation.open(path, verified=known, sha256=sha256)
            except ArtefactError:
                if known is None or has_manifest(known):
                    raise
                # A prune took the one in use away meanwhile.
                return Generation.open(path, sha256=sha256)

    def _is_passed_over(self, name: str, insists: bool) -> bool:
        """Return whether the pointer names another generation by now that is to be used instead.

        Args:
            name: of the generation that is being loaded.
            insists: use it all the same, unless what answers now is named again.
        """
        latest = self._named()
        self._passed_over = latest not in (name, None) and (not insists or latest == self.generation_id)
        return self._passed_over

    def _switch(self, name: str, path: Path, new: T, use: Callable[[T], None]) -> None:
        old = self._held[-1][1]()
        before = self.generation_id
        self._held = [*self._held, (name, weakref.ref(new))]
        use(new)
        self._path = path
        self._accept()
        self._log.info("generation %s answers now, before %s", name, before)
        # Whoever lets go of it last frees it, which takes a while: this thread, not one that answers.
        deadline = time.monotonic() + _RELEASE_S
        while old is not None and sys.getrefcount(old) > 2 and time.monotonic() < deadline:
            if self._stop.wait(_RELEASE_POLL_S):
                break
        del old
        return_memory()

    def _accept(self) -> None:
        self._refused = self._retry_at = None

    def _failure(self, error: Exception, path: Path | None) -> _Failure:
        """Return what to say of a generation that could not be fetched to a path, or not be opened there.

        As text: a record of the log that kept the stack would keep what was loaded.
        """
        again = "It is tried again" if self._poll_s else "A restart tries it again"
        if path is None:
            reason = f"it can not be fetched from the store; the log says why. {again}"
            return _Failure(reason, str(error), passes=True)
        if not may_pass(error):
            return _Failure(self._without_paths(str(error), path), str(error), passes=False)
        cause = error.__context__ if isinstance(error, TwotowerError) else error
        reason = f"it can not be loaded ({type(cause).__name__}); the log says why. {again}"
        return _Failure(reason, "".join(traceback.format_exception(error)), passes=True)

    def _refuse(self, name: str, failure: _Failure) -> None:
        if self._named() not in (name, None):
            # It may have been removed since.
            return
        reason = failure.reason
        if self._refused is None or self._refused.id != name or self._refused.reason != reason:
            self._log.error(
                "generation %s is refused, %s answers: %s", name, self.generation_id, failure.details
            )
            if self._on_refused is not None:
                self._on_refused(name, reason)
        self._refused = Refusal(name, reason)
        self._retry_at = None
        if failure.passes:
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(self._retry_s * 2, _LAST_RETRY_S)

    def _without_paths(self, message: str, path: Path) -> str:
        for place in (str(path), str(self._store.root), self._store.where):
            message = message.replace(f"{place}/", "").replace(place, "the store")
        return _FOLDERS.sub("", message)

    def _forget_gone(self) -> None:
        """Say of which generations nothing is left."""
        dead = [name for name, reference in self._held[:-1] if reference() is None]
        self._held = [*(h for h in self._held[:-1] if h[1]() is not None), self._held[-1]]
        for name in dead:
            if self._gone is not None:
                self._gone(name)


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Let Python code that loads hold up that of requests for less than Python's usual 5 ms at a time."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, _TURN_S))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
