"""``pipeline.evaluate`` on Ray."""

from __future__ import annotations

from pathlib import Path

from twotower.cluster.runner import on_ray
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.pipeline import evaluate as step


def evaluate(
    config: Config,
    dataset: Dataset,
    checkpoint_dir: Path,
    generation_dir: Path | None,
    address: str | None = None,
) -> Path:
    """Measure a model on the test split in workers and tasks of Ray, and return the directory of the report.

    Args, Returns, Raises: as ``pipeline.evaluate.evaluate``; ``address`` is of a cluster, as ``session``
    takes it.
    """
    return step.evaluate(config, dataset, checkpoint_dir, generation_dir, on_ray(address))


def set_beside(
    config: Config, dataset: Dataset, checkpoint_dir: Path, generation_dir: Path | None, other: Path
) -> Path:
    """Return the report of a model with that of another report beside it, see ``pipeline.evaluate``."""
    return step.set_beside(config, dataset, checkpoint_dir, generation_dir, other, on_ray())
