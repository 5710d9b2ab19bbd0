"""What a report shows beside its numbers: the lists of a few users, made where the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Holdout
from twotower.evaluation.comparison import ModelRanker
from twotower.evaluation.examples import SHOWN, Examples
from twotower.evaluation.holdout import open_arrays
from twotower.evaluation.report import item_groups
from twotower.model.checkpoint import Checkpoint
from twotower.pipeline.runner import Runner


class ShownExamples:
    """Example users of a report, whose lists are being made."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        held: Holdout,
        checkpoint: Path,
        scratch: Path,
        runner: Runner,
    ) -> None:
        """Start to rank for them.

        Args:
            config: of the evaluation.
            dataset: that is evaluated.
            held: its queries.
            checkpoint: directory of the model.
            scratch: folder with the arrays of ``evaluation.holdout`` and ``vectors.npy``.
            runner: makes the lists.
        """
        self._dataset = dataset
        self._chosen = Examples(dataset, held, config.evaluation.examples, config.seed)
        folder, model = str(scratch), str(checkpoint.absolute())
        self._lists = runner.start(_recommend, folder, model, self._chosen.places)

    def result(self) -> list[dict[str, Any]]:
        """Return what ``Examples.shown`` does, when the lists are there."""
        lists = self._lists.result()
        rows = self._chosen.item_rows(lists)
        return self._chosen.shown(lists, rows, item_groups(self._dataset, rows)[0])


def _recommend(scratch: str, checkpoint: str, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what the model recommends to the users at positions [E] of the holdout: [E, 10] item rows."""
    torch.set_num_threads(1)
    held, query = open_arrays(Path(scratch))
    vectors = np.load(Path(scratch) / "vectors.npy", mmap_mode="r")
    ranker = ModelRanker(Checkpoint.open(checkpoint), query, vectors)
    lists = [ranker(int(place), held.part(place, place + 1), SHOWN) for place in places]
    return np.concatenate([np.empty((0, SHOWN), np.int64), *lists])
