"""A service that follows its pointer: what answers while generations are published and refused."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from tests.generations import plain_generation
from tests.http.conftest import Client
from tests.shop import NUM_USERS, build_store, fresh_checkpoint
from twotower.artefacts import write_bytes
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever

POINTER = "LIVE"
THREADS = 6
USERS = [str(u) for u in range(NUM_USERS)]
WAIT_S = 180


@dataclass(frozen=True)
class Followed:
    """A store with g1 and g2, and a service that follows its pointer LIVE."""

    store: Store
    client: Client

    def wait(self, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Wait until /readyz says what it should, and return it."""
        deadline = time.monotonic() + WAIT_S
        while True:
            reply = self.client.get("/readyz")
            assert reply.status == 200, reply.content
            state = dict(reply.json)
            if true(state):
                return state
            assert time.monotonic() < deadline, state
            time.sleep(0.02)

    def wait_for(self, name: str) -> dict[str, Any]:
        """Wait until a generation answers and is alone in memory."""
        return self.wait(lambda s: s["generation"] == name and s["held"] == [name] and not s["refused"])

    def publish(self, name: str) -> None:
        self.store.publish(name, POINTER)
        self.wait_for(name)


@pytest.fixture(scope="module")
def swapping(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    from ray import serve

    from serve.app import BuildArgs, build

    root = tmp_path_factory.mktemp("swap")
    config, dataset, _ = build_store(root)
    plain_generation(config, dataset, fresh_checkpoint(config, dataset, root / "other", seed=8), "g2")
    store = Store(config.store)
    store.publish("g1", POINTER)
    # CURRENT names a generation too, which must not be served.
    store.publish("g2", expected="g1")
    args = BuildArgs(store=str(config.store), pointer=POINTER, poll_s=0.05, max_k=200)
    serve.run(build(args), name="swap", route_prefix="/swap")
    try:
        yield Followed(store, Under(client.url, "/swap"))
    finally:
        serve.delete("swap")


class Under(Client):
    """A client of the service below a path."""

    def __init__(self, url: str, prefix: str) -> None:
        super().__init__(url)
        self.prefix = prefix

    def send(self, method: str, path: str, *arguments: Any, **more: Any) -> Any:
        return super().send(method, self.prefix + path, *arguments, **more)


@pytest.fixture
def followed(swapping: Followed) -> Followed:
    """The same, answering from g1."""
    swapping.publish("g1")
    return swapping


@pytest.fixture(scope="module")
def known(swapping: Followed) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What the library answers, by generation and user."""
    answers = {}
    for name in ("g1", "g2"):
        retriever = Retriever.open(swapping.store.path(name))
        answers[name] = {u: retriever.retrieve(Query(k=12, user_id=u)).items for u in USERS}
    assert all(answers["g1"][u] != answers["g2"][u] for u in USERS)
    return answers


class Asker(threading.Thread):
    """Sends requests over one connection until it is told to stop."""

    def __init__(self, client: Client, first: int) -> None:
        super().__init__()
        self.client = client
        self.first = first
        self.stop = threading.Event()
        self.answers: list[tuple[str, dict[str, Any]]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection(urlsplit(self.client.url).netloc, timeout=30)
        number = self.first
        while not self.stop.is_set():
            user_id = USERS[number % len(USERS)]
            number += 1
            try:
                body = json.dumps({"user_id": user_id, "k": 12})
                connection.request("POST", "/swap/v1/retrieve", body)
                reply = connection.getresponse()
                content = reply.read()
            except OSError as error:
                self.failures.append(repr(error))
                connection.close()
                continue
            if reply.status == 200:
                self.answers.append((user_id, json.loads(content)))
            else:
                self.failures.append(f"{reply.status} {content!r}")
        connection.close()


def test_no_request_fails_or_mixes_generations_while_they_are_swapped(
    followed: Followed, known: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    askers = [Asker(followed.client, 7 * number) for number in range(THREADS)]
    for asker in askers:
        asker.start()
    try:
        for name in ("g2", "g1", "g2", "g1"):
            followed.publish(name)
        # The same once more as a roll back: the pointer names g2 again.
        assert followed.store.rollback(POINTER).id == "g2"
        followed.wait_for("g2")
    finally:
        for asker in askers:
            asker.stop.set()
        for asker in askers:
            asker.join()
    assert [asker.failures for asker in askers] == [[]] * THREADS
    answers = [answer for asker in askers for answer in asker.answers]
    for user_id, answer in answers:
        assert answer["items"] == known[answer["generation"]][user_id]
    for asker in askers:
        # Guard: each of them saw both, and from one swap to the next.
        seen = [answer["generation"] for _, answer in asker.answers]
        assert sum(a != b for a, b in itertools.pairwise(seen)) >= 3
    assert followed.client.get("/v1/generation").json["id"] == "g2"


def test_a_damaged_generation_is_refused_and_the_old_one_goes_on_answering(
    followed: Followed, known: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    bad = Path(shutil.copytree(followed.store.path("g2"), followed.store.path("g3")))
    manifest = bad / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"id": "g2"', '"id": "g3"'))
    file = bad / "users" / "seen_item_rows.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    write_bytes(followed.store.root / POINTER, b"g3\n")
    state = followed.wait(lambda s: s["refused"])
    assert state["generation"] == "g1"
    assert state["held"] == ["g1"]
    assert state["refused"]["id"] == "g3"
    assert "users/seen_item_rows.npy is damaged" in state["refused"]["reason"]
    described = followed.client.get("/v1/generation")
    assert described.json["id"] == "g1"
    assert described.json["refused"] == state["refused"]
    assert str(followed.store.root).encode() not in described.content
    assert followed.client.items(user_id="5", k=12) == known["g1"]["5"]
    # Mended is published.
    followed.store.publish("g2", POINTER, expected="g3")
    assert followed.wait_for("g2")["refused"] is None


def test_a_pointer_that_is_gone_changes_nothing(followed: Followed) -> None:
    (followed.store.root / POINTER).unlink()
    state = followed.wait(lambda s: s["pointer_problem"])
    assert state["generation"] == "g1"
    assert len(followed.client.items(user_id="5", k=12)) == 12
    write_bytes(followed.store.root / POINTER, b"g1\n")
    assert followed.wait(lambda s: not s["pointer_problem"])["generation"] == "g1"


def test_a_new_item_is_answered_after_an_update(followed: Followed) -> None:
    assert followed.client.get("/v1/items/9001/similar").status == 404
    assert followed.client.items(user_id="5", k=12, allow_items=["9001"]) == []
    base = Generation.open(followed.store.path("g1"))
    item = {**base.items.table([3]).to_pylist()[0], "item_id": "9001", "title": "Brand new"}
    update = update_items(followed.store, pa.Table.from_pylist([item], base.items.schema), pointer=POINTER)
    assert update.added == 1
    followed.wait_for(update.generation)
    similar = followed.client.get("/v1/items/9001/similar?k=5").json
    assert similar["generation"] == update.generation
    assert len(similar["items"]) == 5
    found = followed.client.items(user_id="5", k=12, allow_items=["9001"], fields=["title"])
    assert [(i["item_id"], i["title"]) for i in found] == [("9001", "Brand new")]
    assert "9001" in {i["item_id"] for i in followed.client.items(user_id="5", k=200)}
    assert followed.store.current() == "g2"
