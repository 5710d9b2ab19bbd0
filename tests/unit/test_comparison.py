"""The gate that compares a new generation with the one in use, over items that both know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import stages
from tests.generations import plain_generation, untrained_checkpoint
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import RefusedError
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.retrieval.comparison import Comparison, compare
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever
from twotower.schema import KINDS, SPLITS

K = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, small_values: Callable[..., dict[str, Any]]) -> Config:
    return parse_config(small_values(tmp_path_factory.mktemp("comparison")))


@pytest.fixture(scope="module")
def store(config: Config, small_dataset: Dataset) -> Store:
    """Two generations whose towers differ, and ``fewer``: the second without every third item."""
    for name, seed in (("first", 3), ("second", 4)):
        checkpoint = untrained_checkpoint(config, small_dataset, config.checkpoints / name, seed)
        plain_generation(config, small_dataset, checkpoint, name)
    store = Store(config.store)
    store.publish("second")
    deleted = small_dataset.item_ids.ids(np.arange(0, small_dataset.num_catalogue_items, 3))
    update_items(store, deletes=deleted)
    return store


def oracle(dataset: Dataset, generation: Path, common: set[str]) -> tuple[float, int]:
    """Recall of one user at a time, over all answers, the others than common ones crossed out."""
    retriever = Retriever.open(generation)
    log, ids = dataset.interactions, dataset.item_ids
    shares = []
    for user in range(dataset.num_users):
        mine = np.flatnonzero(log.user_row == user)
        before = [i for i in mine if log.split[i] != SPLITS["test"]]
        had = {ids.id(int(log.item_row[i])) for i in before}
        positive = [i for i in mine if log.kind[i] == KINDS["positive"] and log.split[i] == SPLITS["test"]]
        wanted = ({ids.id(int(log.item_row[i])) for i in positive} & common) - had
        if not wanted:
            continue
        history = [
            HistoryItem(ids.id(int(log.item_row[i])), weight=float(log.weight[i]))
            for i in before
            if log.kind[i] == KINDS["positive"]
        ]
        query = Query(
            k=dataset.num_items, user_id=dataset.user_ids.id(user), history=history, exclude_seen=False
        )
        ranked = [item["item_id"] for item in retriever.retrieve(query).items]
        found = [item for item in ranked if item in common and item not in had][:K]
        shares.append(len(wanted & set(found)) / len(wanted))
    return float(np.mean(shares)), len(shares)


@pytest.mark.parametrize("current", ["second", "fewer"])
def test_recalls_are_those_of_single_answers_over_common_items(
    current: str, store: Store, small_dataset: Dataset
) -> None:
    common = set(small_dataset.item_ids.ids(np.arange(small_dataset.num_catalogue_items)))
    if current == "fewer":
        current = str(store.current())
        common -= set(small_dataset.item_ids.ids(np.arange(0, len(common), 3)))
    found = compare(small_dataset, store.path("first"), store.path(current), K, "exclude", seed=1)
    assert isinstance(found, Comparison)
    recall, num_users = oracle(small_dataset, store.path("first"), common)
    assert (found.recall, found.num_users) == (pytest.approx(recall), num_users)
    assert found.current_recall == pytest.approx(oracle(small_dataset, store.path(current), common)[0])
    assert found.recall != found.current_recall
    assert (found.num_items, found.k, found.current) == (len(common), K, current)


def test_a_drop_beyond_the_allowed_share_is_a_reason() -> None:
    def against(recall: float, current: float, max_drop: float) -> str | None:
        return Comparison("old", 100, 500, 9_000, recall, current).reason_against(max_drop)

    assert against(0.18, 0.2, 0.1) is None
    assert against(0.1799, 0.2, 0.1) is not None
    assert against(0.3, 0.2, 0.0) is None
    assert against(0.0, 0.0, 0.0) is None
    assert against(0.0, 0.2, 1.0) is None
    reason = against(0.1, 0.2, 0.1)
    assert reason is not None
    assert "0.1000, of old in use 0.2000" in reason
    assert "loses 50.0%, index.max_recall_drop allows 10.0%" in reason


def test_too_few_users_say_so(store: Store, small_dataset: Dataset) -> None:
    few = Dataset.open(small_dataset.path)
    log = few.interactions
    # All but 19 users take nothing in the test split.
    some = np.unique(log.user_row[log.split == SPLITS["test"]])[:19]
    hidden = (log.split == SPLITS["test"]) & ~np.isin(log.user_row, some)
    few.__dict__["interactions"] = log.select(~hidden)
    said = compare(few, store.path("first"), store.path("second"), K, "exclude", seed=1)
    assert isinstance(said, str)
    assert "users of the test split" in said
    assert "20 are needed" in said


@pytest.mark.slow
def test_the_jobs_gate_refuses_and_force_is_recorded(
    store: Store, small_dataset: Dataset, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    recalls = {name: oracle(small_dataset, store.path(name), _all(small_dataset))[0] for name in _NAMES}
    worse, better = sorted(_NAMES, key=lambda name: recalls[name])
    values = config.to_json()
    values["index"]["max_recall_drop"] = (1 - recalls[worse] / recalls[better]) / 2
    strict = parse_config(values)
    store.publish(better)
    reasons = stages.reasons_against(strict, small_dataset, store.path(worse))
    assert len(reasons) == 1
    with pytest.raises(RefusedError, match=r"index\.max_recall_drop allows"):
        stages.publish(strict, worse, reasons=reasons)
    assert store.current() == better
    stages.publish(strict, worse, force=True, reasons=reasons)
    assert store.current() == worse
    assert store.publications()[-1].reasons == tuple(reasons)

    # The other way round is an improvement, and a generation is not compared with itself.
    assert stages.reasons_against(strict, small_dataset, store.path(better)) == []
    assert f"of {worse} in use" in capsys.readouterr().err
    assert stages.reasons_against(strict, small_dataset, store.path(worse)) == []
    (store.root / "CURRENT").unlink()
    assert stages.reasons_against(strict, small_dataset, store.path(worse)) == []
    assert "none is published yet" in capsys.readouterr().err


_NAMES = ("first", "second")


def _all(dataset: Dataset) -> set[str]:
    return set(dataset.item_ids.ids(np.arange(dataset.num_catalogue_items)))
