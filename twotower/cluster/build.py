"""``pipeline.build`` on Ray."""

from __future__ import annotations

from pathlib import Path

from twotower.cluster.runner import on_ray
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.pipeline import build


def build_generation(
    config: Config, dataset: Dataset, checkpoint_dir: Path, address: str | None = None
) -> Path:
    """Build a generation in workers and tasks of Ray, and return its directory.

    Args:
        config: the configuration.
        dataset: all nodes must reach its directory.
        checkpoint_dir: all nodes must reach it.
        address: of a cluster, as ``session`` takes it.

    Returns, Raises: as ``pipeline.build.build_generation``.
    """
    return build.build_generation(config, dataset, checkpoint_dir, on_ray(address))
