"""Items that training leaves out of histories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.sequences import TRANSFORMER
from twotower.config import parse_config
from twotower.data.prepare import prepare
from twotower.model.batch import Bag, Sequences, leave_out
from twotower.training.collectives import World
from twotower.training.loop import Trainer


def trainer_of(values: dict[str, Any], rate: float, **history: Any) -> Trainer:
    for feature in values["features"]["query"]:
        if feature["type"] == "history":
            feature |= {"item_dropout": rate, **history}
    config = parse_config(values)
    return Trainer(config, prepare(config), World(), "train")


def histories(trainer: Trainer, step: int = 0) -> Bag | Sequences:
    share = next(iter(trainer.source.shares(0)))
    value = trainer.assemble(share, step).queries.features["history"]
    assert isinstance(value, (Bag, Sequences))
    return value


def test_weights_go_to_the_items_that_stay() -> None:
    bag = Bag(
        torch.tensor([[3, 5, 7], [2, -1, -1], [4, 6, -1]]),
        torch.tensor([[0.5, 0.3, 0.2], [1, 0, 0], [0.6, 0.4, 0]]),
    )
    gone = torch.tensor([[False, True, False], [True, False, True], [False, False, True]])
    found = leave_out(bag, gone, pooled=True)
    torch.testing.assert_close(found.weights, torch.tensor([[5 / 7, 0, 2 / 7], [0, 0, 0], [0.6, 0.4, 0]]))
    assert found.ids.tolist() == [[3, -1, 7], [-1, -1, -1], [4, 6, -1]]
    assert leave_out(bag, gone, pooled=False).weights.tolist() == (bag.weights * ~gone).tolist()


def test_an_item_of_a_hashed_table_goes_with_all_of_its_rows() -> None:
    bag = Bag(torch.arange(1, 9).reshape(1, 8), torch.full((1, 8), 0.25))
    found = leave_out(bag, torch.tensor([[True, False, False, True]]), pooled=True)
    assert found.ids.tolist() == [[-1, -1, 3, 4, 5, 6, -1, -1]]
    assert found.weights.tolist() == [[0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0]]


@pytest.mark.parametrize("buckets", [None, 50])
@pytest.mark.parametrize("pooling", ["mean", "recency", "weighted"])
def test_a_share_of_the_items_is_left_out(
    pooling: str, buckets: int | None, small_values: Callable[..., dict], tmp_path: Path
) -> None:
    values = small_values(tmp_path)
    values["features"]["item"][0]["buckets"] = buckets
    plain, dropping = (trainer_of(values, rate, pooling=pooling) for rate in (0.0, 0.4))
    whole, some = histories(plain), histories(dropping)
    assert isinstance(whole, Bag)
    assert isinstance(some, Bag)
    there, stays = whole.weights > 0, some.weights > 0
    assert not (stays & ~there).any()
    assert 0.35 < 1 - stays.sum() / there.sum() < 0.45
    assert torch.equal(some.ids[stays], whole.ids[stays])
    left = stays.any(1)
    torch.testing.assert_close(some.weights.sum(1)[left], whole.weights.sum(1)[left])
    assert not torch.equal(histories(dropping, step=1).weights, some.weights), "drawn anew in each step"
    assert torch.equal(histories(dropping).weights, some.weights), "the same after a restart"


def test_encoders_read_zeros(small_values: Callable[..., dict], tmp_path: Path) -> None:
    found = histories(trainer_of(small_values(tmp_path), 0.4, **TRANSFORMER))
    assert isinstance(found, Sequences)
    there = found.stretch.flatten() >= 0
    zero = found.items.weights[there].sum(1) == 0
    assert 0.3 < zero.float().mean() < 0.5


def test_what_is_measured_and_served_knows_every_item(
    small_values: Callable[..., dict], tmp_path: Path
) -> None:
    values = small_values(tmp_path)
    plain, dropping = (trainer_of(values, rate) for rate in (0.0, 0.4))
    users = np.arange(20)
    for trainer in (plain, dropping):
        known = trainer._validation
        assert known is not None
    whole, some = (t._validation.known.latest_queries(users)["history"] for t in (plain, dropping))  # type: ignore[union-attr]
    assert torch.equal(whole.weights, some.weights)  # type: ignore[union-attr]


@pytest.mark.parametrize(("rate", "with_features"), [(0.05, True), (0.0, True), (0.05, False)])
def test_a_drawn_item_without_an_example_is_read_as_in_the_index(
    rate: float, with_features: bool, small_values: Callable[..., dict], tmp_path: Path
) -> None:
    values = small_values(tmp_path)
    values["data"]["source"] |= {"num_items": 400, "num_interactions": 1_500}
    values["features"]["item"][0]["unknown_rate"] = rate
    values["train"] |= {"negatives": {"uniform": 300}, "global_batch_size": 32}
    if not with_features:
        del values["features"]["item"][1:]
        values["features"]["query"] = [f for f in values["features"]["query"] if f["type"] != "profile"]
    trainer = trainer_of(values, 0.0)
    batch = trainer.assemble(next(iter(trainer.source.shares(0))), 0)
    rows = batch.candidate_rows.numpy()
    new = trainer.source.item_counts()[rows] == 0
    assert new.sum() > 30
    ids = batch.items.features["item_id"]
    assert isinstance(ids, Bag)
    own = ids.ids[:, 0].numpy() == rows + 1
    assert own[new].any() != (rate > 0 and with_features)
    assert own[~new].mean() > 0.85
