"""The batch that a training takes where the configuration names none."""

from pathlib import Path

import pytest

from tests.datasets import NAMES, files_config, grid, write_csv
from twotower.config.training import TrainConfig
from twotower.data.prepare import prepare
from twotower.errors import TrainingError
from twotower.training.collectives import World
from twotower.training.loop import Trainer


@pytest.mark.parametrize(
    ("positives", "workers", "size"),
    [
        (10_000_000, 2, 1_024),
        (65_536, 2, 1_024),
        (65_535, 2, 512),
        (14_000, 2, 128),
        (14_000, 3, 126),
        (2_048, 1, 32),
        (100, 2, 32),
        (33, 2, 32),
        (31, 2, 30),
        (3, 2, 2),
        (1, 2, 2),
        (0, 1, 1),
    ],
)
def test_it_follows_the_data_and_divides_by_the_workers(positives: int, workers: int, size: int) -> None:
    assert TrainConfig(num_workers=workers).batch_size(positives) == size
    assert TrainConfig(num_workers=workers, global_batch_size=24).batch_size(positives) == 24


def test_a_log_of_a_few_rows_is_trained_on_with_every_default(tmp_path: Path) -> None:
    config = files_config(tmp_path, write_csv(tmp_path / "log.csv", [*NAMES.values()], grid()))
    dataset = prepare(config)
    trainer = Trainer(config, dataset, World(), "train")
    assert trainer.source.steps_per_epoch == -(-dataset.train_positives // 32) == 2
    assert Trainer(config, dataset, World(), "all").source.steps_per_epoch == 3, "the same batch"


def test_a_loss_that_needs_more_candidates_is_refused_once_the_batch_is_known(tmp_path: Path) -> None:
    csv = write_csv(tmp_path / "log.csv", [*NAMES.values()], grid())
    config = files_config(tmp_path, csv, train__loss={"kind": "slatk", "slatk": {"k": 40}})
    with pytest.raises(TrainingError, match=r"^train\.loss\.slatk\.k \(40\) must be below the 32 candidates"):
        Trainer(config, prepare(config), World(), "train")
