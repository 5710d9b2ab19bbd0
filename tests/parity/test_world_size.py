"""Workers share a global batch: 1, 2 and 3 of them give the same loss and gradients."""

import copy
from pathlib import Path

import pytest
import torch

from tests.parity.workers import assert_close, run_world, step_results
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.training.collectives import World
from twotower.training.loop import Trainer

BATCH = 174  # divides by 1, 2 and 3


@pytest.fixture(scope="module")
def config(small_config: Config) -> Config:
    values = copy.deepcopy(small_config.to_json())
    values["train"] |= {"global_batch_size": BATCH, "num_workers": 1}
    values["model"]["query_tower"]["dropout"] = 0.3
    values["model"]["item_tower"] |= {"dropout": 0.2, "input_dropout": 0.1}
    values["features"]["item"][0]["unknown_rate"] = 0.2
    return parse_config(values)


@pytest.fixture(scope="module")
def alone(config: Config, small_dataset: Dataset) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
    torch.set_num_threads(1)
    trainer = Trainer(config, small_dataset, World(), "train")
    last = trainer.steps_per_epoch - 1
    rest = len(trainer.examples) - last * BATCH
    assert rest % 2 or rest % 3, "the last batch must be uneven to test its padding"
    return [0, 1, last], step_results(trainer, [0, 1, last])


@pytest.mark.parametrize("size", [2, 3])
def test_same_loss_and_gradients(
    size: int, config: Config, small_dataset: Dataset, alone: tuple, tmp_path: Path
) -> None:
    steps, expected = alone
    ranks = run_world(config, small_dataset, size, steps, tmp_path / "out")
    for found, wanted in zip(ranks[0][:1], expected[:1], strict=True):
        assert_close(found, wanted)
    # Later steps start from weights that differ by rounding, which Adam's division can enlarge.
    for found, wanted in zip(ranks[0][1:-1], expected[1:-1], strict=True):
        assert_close(found, wanted, relative=1e-3)
    for other in ranks[1:]:
        for mine, theirs in zip(ranks[0], other, strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert torch.equal(mine[name], theirs[name]), f"{name} differs between ranks"


def test_the_last_uneven_batch_from_the_same_weights(
    config: Config, small_dataset: Dataset, alone: tuple, tmp_path: Path
) -> None:
    last = alone[0][-1]
    expected = step_results(Trainer(config, small_dataset, World(), "train"), [last])[0]
    found = run_world(config, small_dataset, 3, [last], tmp_path / "out")[0][0]
    assert_close(found, expected)


def test_local_negatives_alone_would_be_noticed(config: Config, small_dataset: Dataset) -> None:
    """A rank that only saw its own candidates would have another loss: the comparison above has force."""
    whole = Trainer(config, small_dataset, World(), "train")
    loss = whole.gradients(whole.order(0), 0, 0)
    values = copy.deepcopy(config.to_json())
    values["train"]["global_batch_size"] = BATCH // 2
    half = Trainer(parse_config(values), small_dataset, World(), "train")
    halves = torch.stack([half.gradients(whole.order(0), 0, step) for step in (0, 1)])
    assert abs(halves.mean() - loss) > 0.1 * loss
