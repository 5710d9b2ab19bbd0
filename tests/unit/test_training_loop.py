"""The training loop of one process: it learns, resumes, repeats itself and refuses what can not work."""

import copy

import numpy as np
import pytest
import torch

from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.model.checkpoint import weights_of
from twotower.model.features import Bag
from twotower.schema import KINDS, SPLITS
from twotower.training.collectives import World
from twotower.training.examples import Examples, held_out
from twotower.training.loop import Trainer


def with_train(config: Config, **train: object) -> Config:
    values = copy.deepcopy(config.to_json())
    values["train"] |= train
    return parse_config(values)


def test_resuming_after_an_epoch_equals_not_stopping(small_config: Config, small_dataset: Dataset) -> None:
    whole = Trainer(small_config, small_dataset, World(), "train")
    for _ in range(2):
        whole.run_epoch()
    first = Trainer(small_config, small_dataset, World(), "train")
    first.run_epoch()
    second = Trainer(small_config, small_dataset, World(), "train")
    second.load_state_dict(first.state_dict(), weights_of(first.model), first.best_weights)
    second.run_epoch()
    for name, tensor in weights_of(whole.model).items():
        assert torch.equal(tensor, weights_of(second.model)[name]), name
    assert [r.loss for r in whole.history] == [r.loss for r in second.history]
    assert whole.history[1].loss < whole.history[0].loss


def test_the_seed_decides_the_weights(small_config: Config, small_dataset: Dataset) -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        values = small_config.to_json() | {"seed": seed}
        trainer = Trainer(parse_config(values), small_dataset, World(), "train")
        trainer.run_epoch()
        return weights_of(trainer.model)

    one, again, other = train(3), train(3), train(4)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["tables.id_of_item"], other["tables.id_of_item"])


def test_a_batch_above_the_data_is_refused(small_config: Config, small_dataset: Dataset) -> None:
    config = with_train(small_config, global_batch_size=1_000_000)
    with pytest.raises(TrainingError, match=r"global_batch_size \(1000000\) is above the \d+ training"):
        Trainer(config, small_dataset, World(), "train")


def test_the_learned_temperature_stays_above_its_floor(small_config: Config, small_dataset: Dataset) -> None:
    loss = {"temperature": 0.07, "min_temperature": 0.0699}
    config = with_train(small_config, loss=loss, optimizer={"learning_rate": 0.05})
    trainer = Trainer(config, small_dataset, World(), "train")
    trainer.run_epoch()
    assert trainer.model.log_temperature.exp().item() >= 0.0699 - 1e-7
    fixed = Trainer(
        with_train(small_config, loss=loss | {"learn_temperature": False}), small_dataset, World(), "train"
    )
    fixed.run_epoch()
    assert fixed.model.log_temperature.exp().item() == pytest.approx(0.07, rel=1e-6)


def test_no_example_sees_itself_or_what_came_later(small_dataset: Dataset) -> None:
    examples = Examples(small_dataset, "train")
    everything = small_dataset.interactions
    some = np.arange(0, len(examples), 37)
    batch = examples.queries(some)
    bag = batch["history"]
    assert isinstance(bag, Bag)
    targets = examples.item_rows(some)
    seen_any = 0
    for row, example in enumerate(some):
        position = examples._examples[example]
        user, time = examples._user_of[position], examples.histories.times[position]
        part = slice(everything.user_offsets[user], everything.user_offsets[user + 1])
        allowed = everything.item_row[part][
            (everything.time[part] < time)
            & (everything.split[part] == SPLITS["train"])
            & (everything.kind[part] == KINDS["positive"])
        ]
        history = bag.ids[row][bag.ids[row] >= 0].numpy() - 1
        assert set(history) <= set(allowed.tolist())
        assert len(history) == min(len(allowed), 13)
        assert targets[row] not in history or targets[row] in allowed
        seen_any += len(history)
    assert seen_any > 100


def test_validation_masks_train_and_never_reads_test(small_dataset: Dataset) -> None:
    users = held_out(small_dataset, "validation", 50, seed=1)
    assert len(users.user_rows) == 50
    everything = small_dataset.interactions
    for q, user in enumerate(users.user_rows):
        part = slice(everything.user_offsets[user], everything.user_offsets[user + 1])
        splits, items = everything.split[part], everything.item_row[part]
        relevant = users.relevant_rows[users.relevant_offsets[q] : users.relevant_offsets[q + 1]]
        masked = users.masked_rows[users.masked_offsets[q] : users.masked_offsets[q + 1]]
        assert set(relevant) == set(items[splits == SPLITS["validation"]].tolist())
        assert set(masked) == set(items[splits == SPLITS["train"]].tolist())


def test_known_positives_are_those_of_the_fitted_split(small_dataset: Dataset) -> None:
    examples = Examples(small_dataset, "train")
    some, candidates = np.arange(0, 900, 90), np.array([3, 5, 3, 200, 17, 41, 60])
    train = small_dataset.interactions.select(small_dataset.interactions.split == SPLITS["train"])
    pairs = set(zip(train.user_row.tolist(), train.item_row.tolist(), strict=True))
    for _ in range(2):  # nothing is left over from the call before
        known = examples.known_positives(some, candidates)
        users = examples._user_of[examples._examples[some]]
        expected = [[(int(u), int(c)) in pairs for c in candidates] for u in users]
        assert known.tolist() == expected
    assert 0 < known.sum() < known.size
