"""The measurement after each epoch on logs that used to mislead it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.datasets import files_config, write_csv
from twotower.config import Config
from twotower.data.prepare import prepare
from twotower.errors import DataError
from twotower.training.collectives import World
from twotower.training.loop import Trainer

TRAIN: dict[str, Any] = {
    "train__epochs": 2,
    "train__global_batch_size": 32,
    "train__num_workers": 1,
    "train__fit": "train",
}
HEADER = ["who", "what", "when"]


def trained(config: Config) -> Trainer:
    trainer = Trainer(config, prepare(config), World(), "train")
    trainer.run_epoch()
    return trainer


@pytest.mark.parametrize("repeats", ["exclude", "include"])
def test_all_that_counts_is_found_among_all_items(tmp_path: Path, repeats: str) -> None:
    # Every row is kept, and users take some items again: nothing that is masked may count as relevant.
    rng = np.random.default_rng(3)
    rows = [[f"u{u}", f"i{rng.integers(25)}", 60 * n] for u in range(20) for n in range(10)]
    log = write_csv(tmp_path / "log.csv", HEADER, rows)
    config = files_config(
        tmp_path,
        log,
        data__repeats="keep",
        evaluation__repeats=repeats,
        train__validation={"k": 100},
        **TRAIN,
    )
    assert trained(config).history[0].validation_recall == 1.0


def test_an_item_taken_again_is_relevant_where_it_is_asked_for(tmp_path: Path) -> None:
    # Everybody ends with what he began with: with repeats left out nothing is relevant.
    rows = [[f"u{u}", f"i{(u + n) % 3}", 60 * n] for u in range(9) for n in range(9)]
    log = write_csv(tmp_path / "log.csv", HEADER, rows)
    again = files_config(tmp_path, log, data__repeats="keep", evaluation__repeats="include", **TRAIN)
    assert trained(again).history[0].validation_recall is not None
    with pytest.raises(DataError, match=r"that they did not have before.*evaluation\.repeats: include"):
        trained(files_config(tmp_path, log, data__repeats="keep", **TRAIN))


def test_nobody_to_validate_is_refused_before_the_first_step(tmp_path: Path) -> None:
    # The only item that is held out for validation is not in the catalogue.
    rows = [
        [f"u{u}", item, 100 * place]
        for u in range(9)
        for place, item in enumerate([*(f"i{(u + n) % 7}" for n in range(7)), "gone", "i7", "i8"])
    ]
    log = write_csv(tmp_path / "log.csv", HEADER, rows)
    items = write_csv(tmp_path / "items.csv", ["sku"], [[f"i{n}"] for n in range(9)])
    config = files_config(tmp_path, log, data__source__items={"path": str(items), "id": "sku"}, **TRAIN)
    with pytest.raises(DataError, match="no user has a positive validation interaction on a catalogue item"):
        Trainer(config, prepare(config), World(), "train")
