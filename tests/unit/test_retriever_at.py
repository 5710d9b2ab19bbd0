"""Questions as of a moment: the stored history is cut off there first and capped then, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from serve.fanout import encode_for_groups
from tests.generations import edit_manifest, plain_generation
from tests.shop import NUM_ITEMS, build_store
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.errors import NotAllowedError
from twotower.generations.generation import Generation
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.front import make_inputs
from twotower.retrieval.lookup import user_history
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever

Shop = tuple[Config, Dataset, Path]
REFUSED = "at: what user '.*' had done before that moment is not all known"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Features look at 8 items; users have more."""
    return build_store(tmp_path_factory.mktemp("at"))


def kept(shop: Shop, count: int) -> Retriever:
    """The shop, with so many items kept of each user."""
    config, dataset, generation = shop
    values = config.to_json()
    values["index"]["kept_history"] = count
    name = f"kept-{count}"
    path = plain_generation(parse_config(values), dataset, Checkpoint.open(generation / "model"), name)
    return Retriever.open(path)


@pytest.fixture(scope="module")
def retrievers(shop: Shop) -> dict[int, Retriever]:
    """By how many are kept of each user; 8 are by default."""
    return {8: Retriever.open(shop[2]), 9: kept(shop, 9), 100: kept(shop, 100)}


def moments(histories: Histories, user: int) -> list[int]:
    """Moments around everything that a user did."""
    times = histories.of_user(user)[1]
    return sorted({int(t) + more for t in times for more in (-1, 0, 1)})


def explicit(dataset: Dataset, histories: Histories, user: int) -> list[HistoryItem]:
    rows, times, weights = histories.of_user(user)
    ids = dataset.item_ids.ids(rows)
    return [HistoryItem(*item) for item in zip(ids, times.tolist(), weights.tolist(), strict=True)]


@pytest.mark.parametrize("count", [8, 9, 100])
def test_a_stored_history_answers_as_a_sent_one_or_is_refused(
    shop: Shop, retrievers: dict[int, Retriever], count: int
) -> None:
    dataset, retriever = shop[1], retrievers[count]
    histories = Histories.of(dataset.interactions)
    assert np.diff(histories.offsets).max() > 10
    num_refused = 0
    for user in range(0, dataset.num_users, 2):
        user_id, sent = dataset.user_ids.id(user), explicit(dataset, histories, user)
        counts = len(sent)
        for at in moments(histories, user):
            query = Query(k=NUM_ITEMS, user_id=user_id, at=at)
            before = sum(item.time < at for item in sent if item.time is not None)
            # Of what is kept, those after the moment take no place of those before it.
            known = (before >= 8 and counts - before <= count - 8) or counts <= count
            if not known:
                num_refused += 1
                with pytest.raises(NotAllowedError, match=REFUSED) as caught:
                    retriever.retrieve(query)
                assert "index.kept_history" in caught.value.allowed
                with pytest.raises(NotAllowedError, match=REFUSED):
                    retriever.retrieve_batch([Query(k=1), query])
                continue
            stored = retriever.retrieve(query)
            given = retriever.retrieve(Query(k=NUM_ITEMS, user_id=user_id, at=at, history=sent))
            assert stored.items == given.items
            assert stored.strategy == given.strategy == "personal"
    assert (num_refused == 0) == (count == 100)


def heavy_user(retriever: Retriever) -> tuple[str, int]:
    """A user of whom not all is kept, and a moment before what is kept."""
    histories = retriever.generation.histories
    assert histories.cut is not None
    row = int(np.argmax(histories.cut))
    return retriever.generation.user_ids.id(row), int(histories.of_user(row)[1][0])


def test_people_are_shown_what_the_model_looks_at(retrievers: dict[int, Retriever]) -> None:
    user_id, _ = heavy_user(retrievers[8])
    shown = [user_history(retrievers[count].generation, user_id) for count in (8, 100)]
    assert shown[0] == shown[1]
    assert len(shown[0].items) == 8


def answered(retriever: Retriever, query: Query) -> None:
    retriever.retrieve(query)


def found(retriever: Retriever, query: Query) -> None:
    retriever.find([query])


def checked(retriever: Retriever, query: Query) -> None:
    make_inputs(retriever.generation).check(query)


def asked_of_groups(retriever: Retriever, query: Query) -> None:
    encode_for_groups(retriever, [query])


@pytest.mark.parametrize("way", [answered, found, checked, asked_of_groups])
def test_every_way_to_ask_has_the_same_rule(
    retrievers: dict[int, Retriever], way: Callable[[Retriever, Query], None]
) -> None:
    user_id, at = heavy_user(retrievers[8])
    refused = Query(k=5, user_id=user_id, at=at)
    with pytest.raises(NotAllowedError, match=REFUSED):
        way(retrievers[8], refused)
    way(retrievers[100], refused)
    for query in (
        Query(k=5, user_id=user_id),
        Query(k=5, user_id=user_id, at=at, history=[]),
        Query(k=5, user_id="stranger", at=at),
        Query(k=5, at=at),
    ):
        way(retrievers[8], query)


def test_without_a_moment_interactions_of_the_future_are_no_reason_to_refuse(
    retrievers: dict[int, Retriever], monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id, at = heavy_user(retrievers[8])
    monkeypatch.setattr("time.time_ns", lambda: at * 1000)
    assert retrievers[8].retrieve(Query(k=5, user_id=user_id)).items


def test_of_an_older_generation_it_is_not_known_who_had_just_as_many(shop: Shop, tmp_path: Path) -> None:
    config, dataset, generation = shop
    older = Generation.open(generation)
    files = {n: f for n, f in older.manifest["files"].items() if n != "users/history_cut.npy"}
    path = plain_generation(config, dataset, Checkpoint.open(generation / "model"), "older")
    edit_manifest(path, files=files)
    histories = Generation.open(path, verify=False).histories
    assert histories.cut is not None
    assert histories.cut.tolist() == (np.diff(histories.offsets) == 8).tolist()
    assert older.histories.cut is not None
    assert older.histories.cut.sum() < histories.cut.sum()
