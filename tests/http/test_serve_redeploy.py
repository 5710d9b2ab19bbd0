"""A sharded application that is deployed again with other arguments: no answer is missing or partial."""

from __future__ import annotations

import threading
import time
from typing import Any

from tests.http.test_serve_swap import Under
from tests.service import Client, Shop

WAIT_S = 60


class Asker(threading.Thread):
    """Asks for a known user again and again, until told to stop."""

    def __init__(self, client: Client, user_id: str) -> None:
        super().__init__()
        self.client = client
        self.user_id = user_id
        self.stop = threading.Event()
        self.answers: list[tuple[int, Any]] = []

    def run(self) -> None:
        while not self.stop.wait(0.02):
            reply = self.client.retrieve(user_id=self.user_id, k=5)
            self.answers.append((reply.status, reply.json.get("partial")))


def test_no_answer_is_missing_or_partial_while_every_replica_is_replaced(client: Client, shop: Shop) -> None:
    from ray import serve

    from serve.app import BuildArgs, build

    def deploy(max_k: int, groups: int = 2) -> None:
        args = BuildArgs(
            store=str(shop.config.store), topology="sharded", groups=groups, cpus_per_replica=0.1, max_k=max_k
        )
        # One replica a group: there is no other that could stand in.
        serve.run(build(args), name="again", route_prefix="/again")

    service = Under(client.url, "/again")

    def limit() -> str:
        return str(service.retrieve(k=10**6).json["error"]["allowed"])

    deploy(100)
    try:
        deadline = time.monotonic() + WAIT_S
        while service.get("/readyz").status != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert limit().endswith("to 100")
        askers = [Asker(service, str(number)) for number in range(3)]
        for asker in askers:
            asker.start()
        try:
            deploy(90)
            # Until the replicas before have gone, for which they take some seconds.
            end = time.monotonic() + 5
            while time.monotonic() < end or not limit().endswith("to 90"):
                assert time.monotonic() < deadline + WAIT_S
                time.sleep(0.2)
        finally:
            for asker in askers:
                asker.stop.set()
            for asker in askers:
                asker.join()
        assert {answer for asker in askers for answer in asker.answers} == {(200, False)}
        assert min(len(asker.answers) for asker in askers) > 50
        before = [_ids(service, user) for user in range(20)]
        # Replicas of the same name now hold another part: none of those answers is taken for one of these.
        deploy(80, groups=1)
        deadline = time.monotonic() + WAIT_S
        while not limit().endswith("to 80"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [_ids(service, user) for user in range(20)] == before
        assert list(service.get("/readyz").json["groups"]) == ["group-0"]
    finally:
        serve.delete("again")


def _ids(service: Client, user: int) -> list[str]:
    reply = service.retrieve(user_id=str(user), k=20)
    assert (reply.status, reply.json["partial"]) == (200, False)
    return [item["item_id"] for item in reply.json["items"]]
