"""What tests of followers use: somebody who follows, and stores whose pointers and files go wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower.artefacts import write_bytes
from twotower.generations.generation import Generation
from twotower.generations.names import CURRENT
from twotower.generations.store import Store
from twotower.retrieval.follower import Follower
from twotower.retrieval.retriever import Retriever


class User:
    """What a service is to a follower: it holds one retriever at a time, and remembers the ids."""

    def __init__(self, store: Store, load: Callable[[Generation], Retriever] = Retriever.ready) -> None:
        self.loaded: list[str] = []
        self.gone: list[str] = []
        self.used: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self._load = load
        self.follower = Follower(store, CURRENT, self.load, 0.01, self.gone.append)
        self.retriever = self.follower.open()
        self.follower.start(self.use, lambda *refusal: self.refused.append(refusal))

    def load(self, generation: Generation) -> Retriever:
        self.loaded.append(generation.id)
        return self._load(generation)

    def use(self, retriever: Retriever) -> None:
        self.used.append(retriever.generation_id)
        self.retriever = retriever

    def wait(self, true: Callable[[], Any]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline, (self.loaded, self.used, self.follower.refused)
            time.sleep(0.005)

    def wait_for(self, name: str) -> None:
        """Wait until a generation answers and is alone in memory."""
        self.wait(lambda: self.retriever.generation_id == name and self.follower.held == [name])

    def wait_a_few_polls(self) -> None:
        """Wait until the pointer has certainly been read some times, and what it names could be loaded."""
        time.sleep(0.6)


Make = Callable[..., User]


def point(store: Store, name: str) -> None:
    """Let the pointer name a generation, whatever it is worth."""
    write_bytes(store.root / CURRENT, f"{name}\n".encode())


def damage(path: Path) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
