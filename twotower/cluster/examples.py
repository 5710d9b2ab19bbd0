"""What a report shows beside its numbers: the lists of a few users are made in a task, where the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from twotower.cluster.pool import pin_threads
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Holdout
from twotower.evaluation.comparison import ModelRanker
from twotower.evaluation.examples import SHOWN, Examples
from twotower.evaluation.holdout import open_arrays
from twotower.evaluation.report import item_groups
from twotower.model.checkpoint import Checkpoint


class ShownExamples:
    """Example users of a report, whose lists are being made on Ray."""

    def __init__(
        self, config: Config, dataset: Dataset, held: Holdout, checkpoint: Path, scratch: Path
    ) -> None:
        """Start to rank for them.

        Args:
            config: of the evaluation.
            dataset: that is evaluated.
            held: its queries.
            checkpoint: directory of the model.
            scratch: folder with the arrays of ``evaluation.holdout`` and ``vectors.npy``.
        """
        self._dataset = dataset
        self._chosen = Examples(dataset, held, config.evaluation.examples, config.seed)
        task = ray.remote(num_cpus=config.cluster.cpus_per_encoder)(_recommend)
        self._lists = task.remote(str(scratch), str(checkpoint.absolute()), self._chosen.places)

    def result(self) -> list[dict[str, Any]]:
        """Return what ``Examples.shown`` does, when the lists are there."""
        lists = ray.get(self._lists)
        rows = self._chosen.item_rows(lists)
        return self._chosen.shown(lists, rows, item_groups(self._dataset, rows)[0])


def _recommend(scratch: str, checkpoint: str, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what the model recommends to the users at positions [E] of the holdout: [E, 10] item rows."""
    pin_threads(1)
    held, query = open_arrays(Path(scratch))
    vectors = np.load(Path(scratch) / "vectors.npy", mmap_mode="r")
    ranker = ModelRanker(Checkpoint.open(checkpoint), query, vectors)
    lists = [ranker(int(place), held.part(place, place + 1), SHOWN) for place in places]
    return np.concatenate([np.empty((0, SHOWN), np.int64), *lists])
