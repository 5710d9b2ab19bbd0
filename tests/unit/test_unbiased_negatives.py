"""Every mixture of negatives estimates the softmax over the catalogue: each item counts once on average.

Monte Carlo over the steps of real epochs. What an item counts in a query's denominator is read off the loss
itself: with a zero query all scores are 0, and with item vectors that are unit vectors, one for each item,
the gradient of the query holds the share of each item in the denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.datasets import files_config, write_csv
from tests.streams import with_train
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.model.batch import Bag
from twotower.training.assembly import Batch
from twotower.training.collectives import World
from twotower.training.loop import Trainer
from twotower.training.mining import mine

NUM_ITEMS, NUM_LIKED, NUM_USERS = 48, 16, 60
STEPS = 160
OWN = {"explicit": 3, "mined": {"per_query": 3, "skip": 0, "window": 12, "margin": 0.0}}
MIXTURES: dict[str, dict[str, Any]] = {
    "in-batch": {},
    "uniform": {"uniform": 90},
    "popular": {"popular": 200},
    "uniform and popular": {"uniform": 60, "popular": 90},
    "memory": {"memory": 150},
    "memory and mixed": {"memory": 100, "uniform": 60, "popular": 60},
    "explicit": {"explicit": 3},
    "mined": {"mined": OWN["mined"], "popular": 150},
    "all": {**OWN, "memory": 100, "uniform": 60, "popular": 60},
    "explicit, weight 5": {"explicit": 3, "uniform": 80, "own_weight": 5.0},
    "mined, weight .5": {"mined": OWN["mined"], "uniform": 80, "own_weight": 0.5},
}
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset]:
    """A third of the catalogue has examples, a few of these nearly all; negatives are of all items."""
    folder = tmp_path_factory.mktemp("negatives")
    rng = np.random.default_rng(5)
    share = np.geomspace(1, 0.04, NUM_LIKED)
    rows = []
    for user in range(NUM_USERS):
        liked = rng.choice(NUM_LIKED, 3 + user % 4, replace=False, p=share / share.sum())
        rows += [[user, item, int(rng.integers(1000)), "like"] for item in liked]
        shown = rng.choice(NUM_ITEMS, 8, replace=False)
        rows += [[user, item, 0, "skip"] for item in shown if item not in liked]
    events = write_csv(folder / "events.csv", ["who", "what", "when", "event"], rows)
    items = write_csv(folder / "items.csv", ["id"], [[i] for i in range(NUM_ITEMS)])
    names = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "event": "event"}
    config = files_config(
        folder,
        events,
        data__source__columns=names,
        data__source__events={"like": 1.0, "skip": "negative"},
        data__source__items={"path": str(items), "id": "id"},
        features__item=[{"name": "item_id", "type": "id", "dim": 8, "unknown_rate": 0.0}],
        features__query=[{"name": "history", "type": "history", "dim": 8}],
        model__embedding_dim=NUM_ITEMS,
        train__global_batch_size=64,
        train__num_workers=1,
    )
    return config, prepare(config)


def make_trainer(prepared: tuple[Config, Dataset], **train: Any) -> Trainer:
    config, dataset = prepared
    trainer = Trainer(with_train(config, **train), dataset, World(), "all")
    mined = trainer.config.train.negatives.mined
    if mined.per_query:
        examples = trainer.source.examples
        trainer.assemble.mined = mine(trainer.model, examples, World(), mined, seed=1, step=0)
    return trainer


def batches(trainer: Trainer) -> Iterator[Batch]:
    """Yield the batches of whole epochs, ``STEPS`` or more."""
    for epoch in range(-(-STEPS // trainer.source.steps_per_epoch)):
        for step, share in enumerate(trainer.source.shares(epoch), epoch * trainer.source.steps_per_epoch):
            yield trainer.assemble(share, step)


def shares(loss: Callable[[torch.Tensor], torch.Tensor], positive: torch.Tensor) -> Array:
    """Return what each of N unit vectors counts, that of the positive as 1, [b, N]; all scores are 0."""
    zeros = torch.zeros(positive.shape, requires_grad=True)
    loss(zeros).backward()
    assert zeros.grad is not None
    found = (zeros.grad + positive).double()
    return (found / (found * positive).sum(1, keepdim=True)).numpy()


def counted(trainer: Trainer, batch: Batch) -> Array:
    """Return how often each catalogue item counts in each query's denominator, [b, NUM_ITEMS]."""
    bag = batch.items.features["item_id"]
    assert isinstance(bag, Bag)
    items = torch.nn.functional.one_hot(bag.ids[:, 0] - 1, NUM_ITEMS).float()
    b = len(batch.share.rows)
    ones = torch.ones(b)
    found = shares(lambda queries: trainer.compute._in_batch(batch, queries, items, ones), items[:b])
    return found * np.exp(-batch.log_q[:b].numpy())[:, None]


def everywhere(trainer: Trainer) -> Iterator[tuple[Batch, Array, Array]]:
    """Yield batches, what items count in them, and which of these are neither positives nor known."""
    trainer.model.log_temperature.data.zero_()
    examples = trainer.source.examples
    for batch in batches(trainer):
        rows = batch.share.rows
        offsets, known = examples.known_positives(rows)
        open_ = np.ones((len(rows), NUM_ITEMS), bool)
        open_[np.repeat(np.arange(len(rows)), np.diff(offsets)), known] = False
        yield batch, counted(trainer, batch), open_


def assert_once_each(total: Array, times: Array, items: npt.NDArray[np.int64]) -> None:
    """Assert that items count once on average: each roughly, and groups from seldom to often closely."""
    mean = total[items] / times[items]
    assert np.abs(mean - 1).max() < 0.4
    for group in np.array_split(items, 3):
        assert total[group].sum() / times[group].sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_item_counts_once_on_average(name: str, prepared: tuple[Config, Dataset]) -> None:
    mixture = {"memory_start": 0} | MIXTURES[name]
    trainer = make_trainer(prepared, negatives=mixture)
    own_weight = trainer.config.train.negatives.own_weight
    total, times = np.zeros(NUM_ITEMS), np.zeros(NUM_ITEMS)
    num_own = 0
    for batch, weights, open_ in everywhere(trainer):
        own = trainer.assemble._own(batch.share)
        query, place = np.nonzero(own >= 0)
        is_own = np.zeros_like(open_)
        is_own[query, own[query, place]] = True
        # An own negative is no matter of chance, and it is one however many rules found it.
        np.testing.assert_allclose(weights[is_own], own_weight, rtol=1e-3)
        num_own += is_own.sum()
        others = open_ & ~is_own
        total += (weights * others).sum(0)
        times += others.sum(0)
    assert (num_own > 5 * STEPS) == bool({"explicit", "mined"} & mixture.keys())
    counts = trainer.source.item_counts()
    assert (counts > 0).sum() == NUM_LIKED
    drawn = mixture.get("uniform", 0) + mixture.get("popular", 0) > 0
    order = np.argsort(counts, kind="stable")
    assert_once_each(total, times, order if drawn else order[counts[order] > 0])
    if not drawn:
        assert (total[counts == 0] == 0).all()  # only what is drawn reaches items without examples


@pytest.mark.parametrize("name", ["in-batch", "all", "mined, weight .5"])
def test_every_item_counts_once_in_a_binary_cross_entropy_too(
    name: str, prepared: tuple[Config, Dataset]
) -> None:
    """Once over the sampling rate: the loss of the catalogue times that rate is what it estimates."""
    mixture = {"memory_start": 0} | MIXTURES[name]
    trainer = make_trainer(prepared, negatives=mixture, loss={"kind": "bce"})
    trainer.model.log_temperature.data.zero_()
    examples = trainer.source.examples
    total, times = np.zeros(NUM_ITEMS), np.zeros(NUM_ITEMS)
    for batch in batches(trainer):
        bag = batch.items.features["item_id"]
        assert isinstance(bag, Bag)
        items = torch.nn.functional.one_hot(bag.ids[:, 0] - 1, NUM_ITEMS).float()
        rows = batch.share.rows
        zeros = torch.zeros(len(rows), NUM_ITEMS, requires_grad=True)
        trainer.compute._in_batch(batch, zeros, items, torch.ones(len(rows))).backward()
        assert zeros.grad is not None
        rate = ((batch.candidate_rows >= 0).sum().item() - 1) / (NUM_ITEMS - 1)
        # The slope at a score of 0 is a half.
        counts = 2 * zeros.grad.double().numpy() / rate
        open_ = np.ones((len(rows), NUM_ITEMS), bool)
        offsets, known = examples.known_positives(rows)
        open_[np.repeat(np.arange(len(rows)), np.diff(offsets)), known] = False
        own = trainer.assemble._own(batch.share)
        query, place = np.nonzero(own >= 0)
        is_own = np.zeros_like(open_)
        is_own[query, own[query, place]] = True
        np.testing.assert_allclose(counts[is_own], trainer.config.train.negatives.own_weight, rtol=1e-3)
        total += (counts * (open_ & ~is_own)).sum(0)
        times += (open_ & ~is_own).sum(0)
    item_counts = trainer.source.item_counts()
    drawn = mixture.get("uniform", 0) + mixture.get("popular", 0) > 0
    order = np.argsort(item_counts, kind="stable")
    assert_once_each(total, times, order if drawn else order[item_counts[order] > 0])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_small_batches_do_not_count_their_own_positive(batch: int, prepared: tuple[Config, Dataset]) -> None:
    trainer = make_trainer(prepared, negatives={"uniform": 24}, global_batch_size=batch)
    total, times = np.zeros(NUM_ITEMS), np.zeros(NUM_ITEMS)
    for _, weights, open_ in everywhere(trainer):
        total += (weights * open_).sum(0)
        times += open_.sum(0)
    counts = trainer.source.item_counts()
    often, never = counts >= np.sort(counts)[-5], counts == 0
    ratio = (total[often].sum() / times[often].sum()) / (total[never].sum() / times[never].sum())
    assert ratio == pytest.approx(1, abs=0.06)


def test_items_find_users_who_count_the_same_on_average(prepared: tuple[Config, Dataset]) -> None:
    trainer = make_trainer(prepared, loss={"symmetric": True}, global_batch_size=45)
    assert len(trainer.source.examples) % 45 == 0
    trainer.model.log_temperature.data.zero_()
    total, times = np.zeros(NUM_USERS), np.zeros(NUM_USERS)
    examples = trainer.source.examples
    everyone = np.arange(len(examples))
    has = np.zeros((NUM_ITEMS, NUM_USERS), bool)
    has[examples.item_rows(everyone), examples.user_rows(everyone)] = True
    per_user = np.bincount(examples.user_rows(everyone), minlength=NUM_USERS)
    for batch in batches(trainer):
        share, b = batch.share, len(batch.share.rows)
        users = torch.nn.functional.one_hot(torch.from_numpy(share.user_rows[0]), NUM_USERS).float()

        def loss(items: torch.Tensor, share=share, users=users, b=b) -> torch.Tensor:
            return trainer.compute._item_to_query(share, users, items, torch.ones(b))

        weights = shares(loss, users) / share.user_counts[0][:, None]
        open_ = ~has[share.item_rows[0]]
        total += (weights * open_).sum(0)
        times += open_.sum(0)
    mean = total / times * len(examples) / 44  # 44 of a batch's examples are others'
    groups = np.array_split(np.argsort(per_user, kind="stable"), 4)
    assert [mean[g].mean() for g in groups] == pytest.approx([1] * 4, abs=0.05)
