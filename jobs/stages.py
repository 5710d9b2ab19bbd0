"""Where a job's inputs come from: the paths given to it, or what the same configuration makes.

``prepare`` and ``train`` recognise finished work, so asking them for an input costs nothing when it is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import command
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.errors import ArtefactError, ConfigError
from twotower.progress import say, stage
from twotower.training import preflight
from twotower.training.preflight import Step

if TYPE_CHECKING:
    from twotower.retrieval.store import Store


@dataclass(frozen=True)
class Checkpoints:
    """Three fits of one model; one and the same for ``train.fit: train``."""

    chosen: Path
    """Of the train split: its epochs are compared on validation."""
    evaluated: Path
    """Of train and validation, for as many epochs: its quality is measured on test."""
    served: Path
    """Of every interaction, for as many epochs."""


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
    from twotower.cluster.train import refit, train

    stage("train on the train split")
    chosen = train(config, dataset, fit="train")
    if config.train.fit == "train":
        return Checkpoints(chosen, chosen, chosen)
    stage("refit on train and validation, to be measured on test")
    evaluated = refit(config, dataset, chosen, "known")
    stage("refit on every interaction, to be served")
    return Checkpoints(chosen, evaluated, refit(config, dataset, chosen, "all"))


def store_of(config: Config) -> Store:
    """Return the store of generations of the configuration."""
    from twotower.retrieval.store import open_store

    return open_store(config)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``."""
    parser.add_argument(
        "--force", action="store_true", help="publish whatever speaks against it; that is recorded"
    )


def reasons_against(config: Config, dataset: Dataset, generation: Path) -> list[str]:
    """Compare a generation with the published one, on the test split of its dataset.

    Returns:
        for ``publish``: why it should not be published, each a sentence. Where there is nothing to compare
        it with, that is said and none are returned.
    """
    from twotower.retrieval.comparison import compare

    store = store_of(config)
    current = store.current()
    if current == generation.name:
        return []
    if current is None:
        found: Any = "none is published yet"
    else:
        try:
            repeats, k = config.evaluation.repeats, config.index.recall_k
            found = compare(dataset, generation, store.fetch(current), k, repeats, config.seed)
        except ArtefactError as error:
            found = f"the one in use can not be opened ({error})"
    if isinstance(found, str):
        say(f"recall is not compared with another generation: {found}")
        return []
    say(found.describe())
    reason = found.reason_against(config.index.max_recall_drop)
    return [] if reason is None else [reason]


def publish(
    config: Config,
    generation: str,
    pointer: str = "CURRENT",
    force: bool = False,
    reasons: Sequence[str] = (),
) -> None:
    """Publish a generation and remove those that ``storage.keep_generations`` no longer keeps.

    Raises:
        RefusedError: a gate or ``reasons`` speak against it, or another publisher was faster.
    """
    store = store_of(config)
    before = store.publish(generation, pointer, force=force, reasons=reasons)
    say(f"{pointer} names {generation}" + (f", before {before}" if before not in (None, generation) else ""))
    retain(config)


def retain(config: Config) -> None:
    """Remove the generations that ``storage.keep_generations`` does not keep; nothing where it is null."""
    if config.storage.keep_generations is not None:
        store = store_of(config)
        for sentence in store.passed_over():
            say(f"passed over: {sentence}")
        pruned = store.prune(config.storage.keep_generations)
        if pruned.generations or pruned.leftovers:
            say(
                f"removed {len(pruned.generations)} old generations and {len(pruned.leftovers)} leftovers: "
                f"{pruned.num_bytes / 1e6:,.1f} MB free"
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
    from twotower.retrieval.manifest import generation_manifest

    index = generation_manifest(generation)["index"]
    return {f"index_recall@{index['recall_k']}": index["index_recall"]}
