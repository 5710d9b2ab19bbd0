"""A sharded application that is deployed again answers on while each of its processes is replaced."""

from __future__ import annotations

import os
import time

from tests.asking import WAIT_S, Asking, num_partial
from tests.http.test_serve_stop import command_line
from tests.http.test_serve_swap import Under
from tests.scraping import scrape
from tests.service import Client, Shop
from twotower.cluster.processes import Process, descendants
from twotower.retrieval.retriever import Retriever


def test_no_answer_is_missing_or_wrong_while_every_replica_is_replaced(client: Client, shop: Shop) -> None:
    from ray import serve

    from serve.app import BuildArgs, build

    service = Under(client.url, "/again")

    def deploy(max_k: int, groups: int = 2) -> None:
        args = BuildArgs(
            store=str(shop.config.store),
            topology="sharded",
            groups=groups,
            cpus_per_replica=0.1,
            max_k=max_k,
            probe_every=1,
            # What is asked is whether an answer is lost, and not how soon it comes on a busy machine.
            group_deadline_ms=5_000,
            limits={"deadline_ms": 10_000},
        )
        # One replica a group: there is no other that could stand in.
        serve.run(build(args), name="again", route_prefix="/again")

    def wait_for(max_k: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while True:
            reply = service.retrieve(k=10**6)
            # Until the routes are there it is 404.
            if reply.status == 422 and reply.json["error"]["allowed"].endswith(f"to {max_k}"):
                return
            assert time.monotonic() < deadline, reply
            time.sleep(0.05)

    def replicas() -> list[Process]:
        """Return the living processes of the application, the gateway's and those of groups."""
        return [p for p in descendants(os.getpid()) if "ServeReplica:again:" in command_line(p.pid)]

    library = Retriever.open(shop.generation)
    deploy(100)
    try:
        wait_for(100)
        with Asking(service) as asking:
            before = replicas()
            assert len(before) == 3
            deploy(90)
            wait_for(90)
            deadline = time.monotonic() + WAIT_S
            while any(process.alive for process in before):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            asking.wait_for(30)
        assert num_partial(asking, library) == 0
        # The answers were compared with exact search in the groups meanwhile.
        deadline = time.monotonic() + WAIT_S
        # That of the gateway before goes after a while: the sum over both is 2.
        while (found := scrape("twotower_index_recall", "again", "Gateway")) != {(): 1.0}:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

        # With other groups: an answer may lack some for a moment, or all of them, and none is wrong.
        with Asking(service) as asking:
            deploy(80, groups=1)
            wait_for(80)
            asking.wait_for(30)
        away = [answer for _, status, answer in asking.answers if status != 200]
        assert {answer["error"]["code"] for answer in away} <= {"index_unavailable"}
        asking.answers = [each for each in asking.answers if each[1] == 200]
        num_partial(asking, library)
        assert not asking.answers[-1][2]["partial"]
        assert list(service.get("/readyz").json["groups"]) == ["group-0"]
    finally:
        serve.delete("again")
