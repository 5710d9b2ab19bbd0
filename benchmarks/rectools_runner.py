"""RecTools' SASRec inside the environment of ``benchmarks.rectools``: fitted in turns.

python -I benchmarks/rectools_runner.py LOG.npz SETTINGS_JSON

LOG.npz has ``user``, ``item`` and ``time``. For each line of its input the fit goes on for ``steps`` batches,
and a line ``{"positions": ..., "seconds": ...}`` says how many next items it was trained on and how long that
took, the making of batches included. It ends with its input. Imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet


class Turns(Callback):
    """Stops the fit after each turn until the next one is asked for."""

    def __init__(self, steps: int, answers: int) -> None:
        """Take the batches of a turn, and the descriptor that answers go to; a fit copies all of it."""
        self._steps = steps
        self._answers = answers
        self._done = self._positions = 0
        self._begin = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first turn."""
        self._wait(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch; after the last one of a turn answer, and wait."""
        self._positions += int((batch["y"] != 0).sum())
        self._done += 1
        if self._done == self._steps:
            seconds = time.perf_counter() - self._begin
            answer = {"positions": self._positions, "seconds": seconds}
            os.write(self._answers, (json.dumps(answer) + "\n").encode())
            self._wait(trainer)

    def _wait(self, trainer: Trainer) -> None:
        self._done = self._positions = 0
        if not sys.stdin.readline():
            trainer.should_stop = True
        self._begin = time.perf_counter()


def main() -> None:
    """Fit until the input ends."""
    log, settings = np.load(sys.argv[1]), json.loads(sys.argv[2])
    # Only answers are for the other side; libraries print what they like.
    answers = os.dup(1)
    os.dup2(2, 1)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    frame = pd.DataFrame(
        {
            Columns.User: log["user"],
            Columns.Item: log["item"],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(log["time"], unit="s"),
        }
    )
    turns = Turns(settings["steps"], answers)

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=1_000,
            accelerator="cpu",
            devices=1,
            callbacks=[turns],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )

    model = SASRecModel(
        **settings["model"], item_net_block_types=(IdEmbeddingsItemNet,), get_trainer_func=trainer
    )
    model.fit(Dataset.construct(frame))


if __name__ == "__main__":
    main()
