"""A store with generations, for the tests of stores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.generations import edit_manifest, plain_generation, untrained_checkpoint
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.retrieval.store import Store


@pytest.fixture(scope="session")
def filled(
    tmp_path_factory: pytest.TempPathFactory,
    small_values: Callable[..., dict[str, Any]],
    small_dataset: Dataset,
) -> Config:
    """A configuration whose store holds b, a and c, made in this order; do not change it."""
    config = parse_config(small_values(tmp_path_factory.mktemp("store")))
    checkpoint = untrained_checkpoint(config, small_dataset, config.checkpoints / "c")
    # The names and the times of making are in opposite orders.
    for name in ("b", "a", "c"):
        directory = plain_generation(config, small_dataset, checkpoint, name)
        edit_manifest(directory, created={"b": "1", "a": "2", "c": "3"}[name])
    return config


@pytest.fixture
def store(filled: Config, tmp_path: Path) -> Store:
    """A copy of that store, nothing published."""
    return Store(shutil.copytree(filled.store, tmp_path / "small" / "store"))
