"""Weights of interactions are weights of examples in the loss, and weigh in histories as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.datasets import files_config, grid, write_csv
from tests.streams import with_train, with_weights
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.data.prepare import prepare
from twotower.errors import TrainingError
from twotower.model.checkpoint import weights_of
from twotower.schema import KINDS, SPLITS
from twotower.training.checks import check_sizes
from twotower.training.collectives import World
from twotower.training.examples import Examples, TowerInputs
from twotower.training.loop import Trainer
from twotower.training.weights import Factors


def trained(config: Config, dataset: Dataset, **loss: Any) -> tuple[dict[str, torch.Tensor], float]:
    """Return the weights after an epoch, and its loss."""
    trainer = Trainer(with_train(config, loss=loss), dataset, World(), "train")
    report = trainer.run_epoch()
    return weights_of(trainer.model), report.loss


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Purchases and views, with the amount that was spent: nothing for every fourth."""
    folder = tmp_path_factory.mktemp("log")
    rows = [[*row, ("purchase", "view", "view")[n % 3], n % 4 * 2.5] for n, row in enumerate(grid(20, 15))]
    return folder, write_csv(folder / "log.csv", ["who", "what", "when", "event", "amount"], rows)


def shop(log: tuple[Path, Path], purchase: float = 1.0, view: float = 1.0, **changes: Any) -> Config:
    names = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "event": "event"}
    return files_config(
        log[0],
        log[1],
        data__source__columns=names | {"value": "amount"},
        data__source__events={"purchase": purchase, "view": view},
        train__global_batch_size=64,
        train__num_workers=1,
        **changes,
    )


def test_event_weights_reach_the_loss_unless_told_not_to(log: tuple[Path, Path]) -> None:
    found = {}
    for events in ((1.0, 1.0), (100.0, 0.001)):
        config = shop(log, *events)
        dataset = prepare(config)
        for weights in ("interaction", "none"):
            found[events, weights] = trained(config, dataset, weights=weights)
        assert same(trained(config, dataset)[0], found[events, "interaction"][0]), "not the default"
    plain = found[(1.0, 1.0), "interaction"]
    for weights in ("none", "interaction"):
        other = found[(100.0, 0.001), weights]
        assert same(plain[0], other[0]) == (plain[1] == other[1]) == (weights == "none")


def test_values_as_weights_reach_the_loss(log: tuple[Path, Path]) -> None:
    scaled = {"weight": "scaled", "value_range": [0, 10]}
    kinds = [{}, {"weight": "value"}, scaled]
    losses = []
    for positives in kinds:
        config = shop(log, data__positives=positives)
        losses.append(trained(config, prepare(config))[1])
    assert losses[0] != losses[1]
    # Scaling divides every weight by the same number, and the loss is a mean over the sum of weights.
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)


@pytest.mark.parametrize("weight", [1e-45, 1e-30, 0.3, 2.0, 1e15])
def test_equal_weights_give_the_bits_of_none(
    weight: float, small_config: Config, small_dataset: Dataset
) -> None:
    dataset = with_weights(small_dataset, [weight])
    weighted, plain = (trained(small_config, dataset, weights=w) for w in ("interaction", "none"))
    assert same(weighted[0], plain[0])
    assert weighted[1] == plain[1]


def test_weights_far_apart_give_numbers(small_config: Config, small_dataset: Dataset) -> None:
    dataset = with_weights(small_dataset, [0.0, 1e-45, 1e-20, 1.0, 1e15])
    weights, loss = trained(small_config, dataset, symmetric=True)
    assert np.isfinite(loss)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_weight_zero_is_no_example_but_is_in_histories(small_dataset: Dataset) -> None:
    dataset = with_weights(small_dataset, [0.0, 0.5, 2.0])
    inputs = TowerInputs(dataset)
    log = dataset.interactions
    fitted = (log.split == SPLITS["train"]) & (log.kind == KINDS["positive"])
    fitted &= log.item_row < dataset.num_catalogue_items
    weighted, plain = (Examples.of(dataset, inputs, "train", False, w) for w in (True, False))
    heavy = log.select(fitted & (log.weight > 0))
    every, all_plain = np.arange(len(weighted)), np.arange(len(plain))
    assert len(plain) == fitted.sum() > len(weighted) == len(heavy)
    assert (weighted.item_rows(every) == heavy.item_row).all()
    assert (weighted.weights(every) == heavy.weight).all()
    assert (weighted.weights(np.array([-1, 3])) == [0, heavy.weight[3]]).all()
    assert (plain.weights(all_plain) == 1).all()
    # How often an item is a positive follows the examples, and so do the corrections of sampling.
    assert (weighted.item_counts() == np.bincount(heavy.item_row, minlength=inputs.num_catalogue_items)).all()
    counts = np.bincount(heavy.user_row, minlength=dataset.num_users)
    assert (weighted.user_counts(every) == counts[heavy.user_row]).all()
    # What weighs nothing was had all the same: it is no negative, and what a history knows.
    train = Histories.of(log.select(log.split == SPLITS["train"]))
    offsets, rows = weighted.known_positives(every)
    for example in (0, 50, 500):
        user = int(weighted.user_rows(np.array([example]))[0])
        assert set(rows[offsets[example] : offsets[example + 1]]) == set(train.of_user(user)[0])
    assert (weighted.histories.item_rows == train.item_rows).all()


def test_only_weightless_interactions_are_an_error_that_says_so(
    small_config: Config, small_dataset: Dataset
) -> None:
    dataset = with_weights(small_dataset, [0.0])
    with pytest.raises(TrainingError, match=r"in split 'train' with a weight above 0; .*loss\.weights: none"):
        Trainer(small_config, dataset, World(), "train")
    Trainer(with_train(small_config, loss={"weights": "none"}), dataset, World(), "train")


def test_a_profile_takes_weights_up_to_one_and_loss_weights_do_not_change_it(
    small_config: Config, small_dataset: Dataset
) -> None:
    """A profile and the loss both read the weight; above 1 only the loss does."""
    batches = {}
    for weight in (0.5, 1.0, 100.0):
        examples = Examples.of(with_weights(small_dataset, [weight]), TowerInputs(small_dataset), "train")
        batches[weight] = examples.queries(np.arange(200))["genre_profile"]
    assert torch.equal(batches[1.0], batches[100.0])
    torch.testing.assert_close(batches[0.5] * 2, batches[1.0])
    heavy, one = (trained(small_config, with_weights(small_dataset, [w])) for w in (100.0, 1.0))
    assert same(heavy[0], one[0])


def test_recency_and_activity_are_factors_of_the_weight(small_config: Config, small_dataset: Dataset) -> None:
    dataset = with_weights(small_dataset, [0.25, 1.0, 3.0])
    log, inputs = dataset.interactions, TowerInputs(dataset)
    day = 86_400e6
    fitted = (log.split == SPLITS["train"]) & (log.kind == KINDS["positive"])
    fitted &= log.item_row < dataset.num_catalogue_items
    users, times, weights = (x[fitted].tolist() for x in (log.user_row, log.time, log.weight))
    for interaction in (True, False):
        values = {"recency_half_life_days": 40.0, "activity_power": 0.5}
        loss = with_train(small_config, loss=values).train.loss
        factors = Factors.of(loss, dataset)
        examples = Examples.of(dataset, inputs, "train", False, interaction, factors)
        found = examples.weights(np.arange(len(examples)))
        latest = max(log.time.tolist())
        wanted = [
            (weight if interaction else 1.0) * 0.5 ** ((latest - time) / day / 40) / users.count(user) ** 0.5
            for user, time, weight in zip(users, times, weights, strict=True)
        ]
        assert found.tolist() == pytest.approx(wanted, rel=1e-9)
        assert examples.weights(np.array([-1, 3])).tolist() == [0, found[3]]
    assert Factors.of(small_config.train.loss, dataset) is None


def test_old_examples_keep_their_share_of_a_batch_of_old_ones(
    small_config: Config, small_dataset: Dataset
) -> None:
    """A half-life of a millisecond: far below the smallest float, and every batch has a loss."""
    dataset = with_weights(small_dataset, [1e-45, 1e15])
    weights, loss = trained(small_config, dataset, recency_half_life_days=1 / 86.4e6, activity_power=1.0)
    assert np.isfinite(loss)
    assert loss > 0
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_ages_of_a_dataset_without_times_are_refused(small_config: Config, small_dataset: Dataset) -> None:
    dataset = Dataset.open(small_dataset.path)
    dataset.manifest = dataset.manifest | {"has_times": False, "as_of": None}
    config = with_train(small_config, loss={"recency_half_life_days": 30.0})
    with pytest.raises(TrainingError, match=r"recency_half_life_days is 30, and dataset .* has no times"):
        check_sizes(config, dataset, 10_000)
    check_sizes(config, small_dataset, 10_000)
