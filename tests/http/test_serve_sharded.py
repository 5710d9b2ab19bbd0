"""The sharded topology over HTTP: the answers of the library, and what is left when replicas are killed."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.asking import Asking, num_partial
from tests.following import damage, point
from tests.generations import edit_manifest
from tests.http.test_serve_answers import QUERIES
from tests.http.test_serve_stop import Command, check_the_end, command_line, connected, listening
from tests.service import Client, Shop
from tests.updates import copied, table_of
from twotower.cluster.processes import Process, descendants, free_port
from twotower.config import parse_config
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.retrieval.retriever import Query, Retriever

RECOVERY_S = 180
GROUPS, REPLICAS = 2, 2


@pytest.fixture(scope="module")
def service(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Command]]:
    """``jobs.serve`` with two groups of two replicas."""
    folder = tmp_path_factory.mktemp("sharded")
    # A store of its own, that may change.
    values = copied(shop.config, folder / "runs").to_json()
    values["serve"] |= {"topology": "sharded", "groups": GROUPS, "replicas_per_group": REPLICAS}
    # A group that is late because the machine is busy is not what is asked for here.
    values["serve"]["group_deadline_ms"] = 5_000
    # A machine on which replicas start may keep a request waiting for longer than the second of a service.
    values["serve"]["limits"]["deadline_ms"] = 10_000
    values["serve"]["port"] = port = free_port()
    path = folder / "shop.yaml"
    path.write_text(yaml.safe_dump(values))
    command = Command(folder, "--config", str(path))
    command.config_path = path
    try:
        command.wait_until_ready()
        yield Client(f"http://127.0.0.1:{port}"), command
    finally:
        command.clean_up()


def replicas(command: Command, group: int) -> list[Process]:
    """Return the living processes of a group."""
    return processes(command, f":Group-{group}-")


def processes(command: Command, name: str) -> list[Process]:
    """Return the living processes with a name in their command line."""
    found = [p for p in descendants(command.process.pid) if name in command_line(p.pid)]
    return [p for p in found if p.alive]


def maps(process: Process) -> str:
    """Return which files a process has mapped."""
    return Path(f"/proc/{process.pid}/maps").read_text()


def store_of(command: Command) -> Store:
    return Store(parse_config(yaml.safe_load(command.config_path.read_text())).store)


def wait_until(client: Client, true: Callable[[dict[str, Any]], Any]) -> None:
    """Wait until /readyz says what it should."""
    deadline = time.monotonic() + RECOVERY_S
    while not true(state := client.get("/readyz").json):
        assert time.monotonic() < deadline, state
        time.sleep(0.05)


def all_replicas(command: Command, group: int) -> list[Process]:
    """Wait until a group has all of its processes, and return them."""
    deadline = time.monotonic() + RECOVERY_S
    while len(found := replicas(command, group)) < REPLICAS:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def kill_group(command: Command, group: int, asking: Asking) -> None:
    """Kill every replica of a group, and wait until answers lacked it and are complete again."""
    for process in all_replicas(command, group):
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + RECOVERY_S
    # Not before the kill has been felt.
    while not any(a["partial"] for _, _, a in asking.answers) or any(
        a["partial"] for _, _, a in asking.answers[-60:]
    ):
        assert time.monotonic() < deadline, asking.answers[-1]
        time.sleep(0.05)


def kill_gateway(command: Command, client: Client) -> None:
    """Kill the gateway, and wait until another one answers."""
    (gateway,) = processes(command, ":Gateway")
    os.kill(gateway.pid, signal.SIGKILL)

    def ready() -> bool:
        # A request that was at the gateway when it was killed is cut off.
        with contextlib.suppress(OSError, http.client.HTTPException):
            return client.get("/readyz").status == 200
        return False

    deadline = time.monotonic() + RECOVERY_S
    while gateway.alive or not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [p.pid for p in processes(command, ":Gateway")] != [gateway.pid]


def test_the_answers_are_those_of_the_library(service: tuple[Client, Command], library: Retriever) -> None:
    client, command = service
    assert [len(replicas(command, g)) for g in range(GROUPS)] == [REPLICAS] * GROUPS
    # What only searches starts sooner and takes less memory without torch.
    assert "libtorch" in maps(processes(command, ":Gateway")[0])
    assert not any("libtorch" in maps(replica) for g in range(GROUPS) for replica in replicas(command, g))
    for body, query in QUERIES:
        answer = client.retrieve(**body).json
        expected = library.retrieve(query)
        assert [i["item_id"] for i in answer["items"]] == [i["item_id"] for i in expected.items]
        assert [i["score"] for i in answer["items"]] == pytest.approx(
            [i["score"] for i in expected.items], abs=1e-6
        )
        assert (answer["strategy"], answer["generation"]) == (expected.strategy, "g1")
        assert (answer["partial"], answer["missing_groups"]) == (False, [])
    found = client.get("/v1/items/1003/similar?k=5").json["items"]
    assert [i["item_id"] for i in found] == [i["item_id"] for i in library.similar("1003", 5).items]
    assert client.retrieve(k=5, filter={"colour": {"any_of": [1]}}).status == 422
    batch = client.send("POST", "/v1/retrieve/batch", {"requests": [{"k": 4, "user_id": "3"}, {"k": 2}]})
    expected = [library.retrieve(Query(k=4, user_id="3")), library.retrieve(Query(k=2))]
    for one, other in zip(batch.json["answers"], expected, strict=True):
        assert [i["item_id"] for i in one["items"]] == [i["item_id"] for i in other.items]
    # The demo page asks the gateway.
    assert client.get("/").status == 200
    assert client.get("/demo/users/3/history").json["user_id"] == "3"
    assert client.get("/demo/users/nobody/history").status == 404


def test_a_new_generation_answers_from_all_groups_at_once(
    service: tuple[Client, Command], shop: Shop
) -> None:
    client, command = service
    store = store_of(command)
    items = Generation.open(shop.generation).items.table([0, 1]).to_pylist()
    new = [{**items[0], "title": "changed"}, {**items[1], "item_id": "new", "title": "new"}]
    with Asking(client) as asking:
        asking.wait_for(30)
        update = update_items(store, table_of(new, shop.generation), ["1005"], force=True)
        wait_until(client, lambda s: s["generation"] == update.generation)
        asking.wait_for(30)
    libraries = {"g1": Retriever.open(shop.generation)}
    libraries[update.generation] = Retriever.open(store.path(update.generation))
    expected = {
        (name, u): [i["item_id"] for i in library.retrieve(Query(k=12, user_id=u)).items]
        for name, library in libraries.items()
        for u in map(str, range(36))
    }
    # No request failed, none was partial, and each is the answer of the generation that it names.
    for user, status, answer in asking.answers:
        assert (status, answer["partial"]) == (200, False)
        assert [i["item_id"] for i in answer["items"]] == expected[answer["generation"], user]
    assert {a["generation"] for _, _, a in asking.answers} == {"g1", update.generation}
    assert client.get("/v1/items/new/similar?k=3").status == 200
    assert client.get("/v1/items/1005/similar?k=3").status == 404
    found = client.items(user_id="3", k=1, allow_items=["1000"], exclude_seen=False, fields=["title"])
    assert found[0]["title"] == "changed"
    # Back to the first, for the tests that follow; the groups free the other.
    store.publish("g1", force=True)
    wait_until(client, lambda s: s["held"] == ["g1"])


def test_a_killed_replica_is_not_noticed(service: tuple[Client, Command], library: Retriever) -> None:
    client, command = service
    before = replicas(command, 0)
    with Asking(client) as asking:
        asking.wait_for(50)
        os.kill(before[0].pid, signal.SIGKILL)
        asking.wait_for(150)
    assert num_partial(asking, library) == 0
    all_replicas(command, 0)


def test_a_killed_group_is_missing_until_it_is_back(
    service: tuple[Client, Command], library: Retriever
) -> None:
    client, command = service
    with Asking(client) as asking:
        asking.wait_for(50)
        kill_group(command, 1, asking)
    assert num_partial(asking, library) > 0
    assert all(a["missing_groups"] in ([], ["group-1"]) for _, _, a in asking.answers)


def test_what_was_killed_is_back_while_what_is_published_is_damaged(
    service: tuple[Client, Command], library: Retriever
) -> None:
    """Groups come back with what the gateway answers from, and a gateway with what answered before."""
    client, command = service
    store = store_of(command)
    for name in ("damaged", "whole"):
        shutil.copytree(store.path("g1"), store.path(name))
        edit_manifest(store.path(name), id=name)
    (shard, *_) = Generation.open(store.path("damaged"), verify=False).shard_groups(GROUPS)[1]
    damage(store.path("damaged") / "shards" / shard / "index.faiss")
    point(store, "damaged")
    wait_until(client, lambda s: s["refused"])
    with Asking(client) as asking:
        asking.wait_for(30)
        # All of them: complete answers are then of replicas that were started again.
        kill_group(command, 1, asking)
    assert num_partial(asking, library) > 0
    assert {a["generation"] for _, _, a in asking.answers} == {"g1"}
    kill_gateway(command, client)
    state = client.get("/readyz").json
    assert (state["generation"], state["held"], state["refused"]["id"]) == ("g1", ["g1"], "damaged")
    assert "index.faiss is damaged" in state["refused"]["reason"]
    with Asking(client) as asking:
        asking.wait_for(30)
    assert num_partial(asking, library) == 0
    # What is published next is taken, by these replicas too.
    for name in ("whole", "g1"):
        store.publish(name, force=True)
        wait_until(client, lambda s, name=name: s["held"] == [name] and not s["refused"])
        with Asking(client) as asking:
            asking.wait_for(30)
        assert num_partial(asking, library) == 0
        assert {a["generation"] for _, _, a in asking.answers} == {name}


def test_a_stopped_replica_is_given_up_and_taken_back(
    service: tuple[Client, Command], library: Retriever
) -> None:
    """A process that is there and says nothing, as on a network that drops packets."""
    client, command = service
    stopped = all_replicas(command, 0)[0]

    def num_connections() -> int:
        """Return how many connections to the stopped replica the gateway has."""
        (gateway,) = processes(command, ":Gateway")
        return len(connected({gateway}) & listening({stopped}))

    with Asking(client) as asking:
        asking.wait_for(50)
        assert num_connections() == 1
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + RECOVERY_S
            while num_connections():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            asking.wait_for(150)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        while not num_connections():
            assert time.monotonic() < deadline + RECOVERY_S
            time.sleep(0.1)
        asking.wait_for(50)
    # Nobody waited for it as long as a group may take, so that no answer lacks the group.
    assert num_partial(asking, library) == 0
    assert stopped.alive


def test_what_is_published_is_taken_where_a_prune_removed_what_answers(
    service: tuple[Client, Command], library: Retriever
) -> None:
    """A group that was started again can not hold what answers any more, and needs only the next."""
    client, command = service
    store = store_of(command)
    shutil.copytree(store.path("g1"), store.path("next"))
    edit_manifest(store.path("next"), id="next")
    with Asking(client) as asking:
        asking.wait_for(30)
        store.path("g1").rename(store.root / "gone")
        for process in all_replicas(command, 1):
            os.kill(process.pid, signal.SIGKILL)
        store.publish("next", force=True)
        wait_until(client, lambda s: s["held"] == ["next"])
        assert client.get("/readyz").json["refused"] is None
        seen = len(asking.answers)
        asking.wait_for(60)
    assert num_partial(asking, library) > 0
    assert {(a["generation"], a["partial"]) for _, _, a in asking.answers[seen + 3 :]} == {("next", False)}


def test_nothing_is_left_after_sigkill(service: tuple[Client, Command]) -> None:
    """The last test of this service."""
    client, command = service
    check_the_end(command, int(client.url.rpartition(":")[2]), "SIGKILL")
