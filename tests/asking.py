"""Clients that ask for known users of the shop all the time, and what they should get."""

from __future__ import annotations

import threading
import time

from tests.service import Client
from twotower.retrieval.retriever import Query, Retriever

WAIT_S = 60


class Asking:
    """Threads that ask for known users until told to stop, and keep every answer."""

    def __init__(self, client: Client) -> None:
        self.answers: list[tuple[str, int, dict]] = []
        self._client = client
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(3)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _ask(self, number: int) -> None:
        # With a pause, so that processes that start meanwhile have a share of the machine.
        while not self._stop.wait(0.005):
            number += 3
            user = str(number % 36)
            reply = self._client.retrieve(user_id=user, k=12)
            self.answers.append((user, reply.status, reply.json))

    def wait_for(self, more: int) -> None:
        """Wait until so many more answers have come."""
        count = len(self.answers) + more
        deadline = time.monotonic() + WAIT_S
        while len(self.answers) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def num_partial(asking: Asking, library: Retriever) -> int:
    """Return how many answers were partial; all are the library's, or the best of the groups there are."""
    everything = {u: library.retrieve(Query(k=500, user_id=u)).items for u in map(str, range(36))}
    partial = 0
    for user, status, answer in asking.answers:
        assert status == 200, answer
        ids = [i["item_id"] for i in answer["items"]]
        expected = [i["item_id"] for i in everything[user]]
        assert answer["partial"] == bool(answer["missing_groups"])
        if answer["partial"]:
            partial += 1
            # The best of the groups that are there, in order.
            assert set(ids) < set(expected)
            assert [i for i in expected if i in set(ids)] == ids
        else:
            assert ids == expected[:12]
    return partial
