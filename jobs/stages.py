"""Where a job's inputs come from: the paths given to it, or what the same configuration makes.

``prepare`` and ``train`` recognise finished work, so asking them for an input costs nothing when it is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import command
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.errors import ArtefactError, ConfigError
from twotower.pipeline.publishing import publish as publish
from twotower.pipeline.publishing import reasons_against as reasons_against
from twotower.pipeline.publishing import retain as retain
from twotower.progress import stage
from twotower.training import preflight
from twotower.training.preflight import Step

if TYPE_CHECKING:
    from twotower.generations.store import Store
    from twotower.pipeline.train import Checkpoints


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset``."""
    parser.add_argument(
        "--dataset", metavar="DIR", type=Path, help="a prepared dataset (made or found by the configuration)"
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add ``--checkpoint``."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="a trained checkpoint (made or found by the configuration)",
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add ``--generation``."""
    parser.add_argument("--generation", metavar="ID", help="id of a generation (the published one)")


def dataset_for(config: Config, path: Path | None = None) -> Dataset:
    """Return the dataset at ``path``, or that of the configuration, preparing it where it is missing."""
    if path is not None:
        return Dataset.open(path)
    stage("prepare")
    return prepare(config)


def require(config: Config, dataset: Dataset, *steps: Step) -> None:
    """Check what later steps ask of a dataset, before the first of them costs anything.

    Raises:
        ConfigError: with everything that speaks against it.
    """
    preflight.require(config, dataset, steps)


def checkpoints_for(config: Config, dataset: Dataset) -> Checkpoints:
    """Return the checkpoints that the configuration makes, training those that are missing; needs Ray."""
    from twotower.cluster.train import on_ray
    from twotower.pipeline.train import train_all

    return train_all(config, dataset, on_ray())


def store_of(config: Config) -> Store:
    """Return the store of generations of the configuration."""
    from twotower.generations.opening import open_store

    return open_store(config)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``."""
    parser.add_argument(
        "--force", action="store_true", help="publish whatever speaks against it; that is recorded"
    )


def generation_for(config: Config, generation: str | None = None) -> Path:
    """Return the folder of the named generation, or of the published one.

    Raises:
        ArtefactError: nothing is published, or there is no generation of that name.
    """
    store = store_of(config)
    name = generation or store.current()
    if name is None:
        raise ArtefactError(
            f"{store.where} has no published generation; run python -m jobs.pipeline with this configuration"
        )
    if not store.has(name):
        known = ", ".join(store.generations()) or "none"
        raise ConfigError(f"--generation {name}: {store.where} has no such generation (it has: {known})")
    return store.fetch(name)


@contextmanager
def on_ray(config: Config) -> Iterator[None]:
    """Join the running Ray cluster, or start Ray on this machine and stop it at the end."""
    from twotower.cluster.session import session

    with session(config):
        command.stop_on_sigterm()
        yield


def index_metrics(generation: Path) -> dict[str, float]:
    """Return the measured index recall of a generation, by the metric's name."""
    from twotower.generations.manifest import generation_manifest

    index = generation_manifest(generation)["index"]
    return {f"index_recall@{index['recall_k']}": index["index_recall"]}
