"""Train the two towers on the train split; with `train.fit: all` refit them to be measured and served.

python -m jobs.train --config configs/movielens.yaml --set train.epochs=5 train.loss.temperature=0.1
"""

from __future__ import annotations

import argparse
import sys

from jobs import command, stages
from twotower.artefacts import read_manifest
from twotower.config import Config


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.model.checkpoint import KIND, TrainedManifest

    dataset = stages.dataset_for(config, arguments.dataset)
    stages.require(config, dataset, "train", "index", "recommend")
    with stages.on_ray(config):
        checkpoints = stages.checkpoints_for(config, dataset)
    manifest = read_manifest(checkpoints.chosen, KIND, TrainedManifest)
    k, best = config.train.validation.k, manifest["metrics"]
    metrics = {
        f"validation_recall@{k}": best["validation_recall"],
        f"validation_ndcg@{k}": best["validation_ndcg"],
        "loss": best["loss"],
    }
    details = {
        "chosen_checkpoint": str(checkpoints.chosen),
        "evaluated_checkpoint": str(checkpoints.evaluated),
        "best_epoch": manifest["best_epoch"],
        "dataset": str(dataset.path),
    }
    return command.Result(path=checkpoints.served, metrics=metrics, details=details)


JOB = command.Job("train", __doc__, work, stages.add_dataset)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
