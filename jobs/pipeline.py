"""The whole way: prepare, train, encode and index, evaluate, publish. Run again, it goes on where it stopped.

python -m jobs.pipeline --config configs/movielens.yaml
"""

from __future__ import annotations

import argparse
import sys

from jobs import command, stages
from twotower.artefacts import read_manifest
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.progress import stage


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    return run(config, stages.dataset_for(config), arguments.force)


def run(config: Config, dataset: Dataset, force: bool = False) -> command.Result:
    """Train, index, evaluate and publish from a prepared dataset.

    Raises:
        ConfigError: a step can not be taken with this dataset; none was taken.
        RefusedError: something speaks against publishing, and ``force`` does not override it.
    """
    from twotower.cluster.build import build_generation
    from twotower.cluster.evaluate import evaluate

    stages.require(config, dataset, "train", "index", "recommend", "evaluate")
    with stages.on_ray(config):
        checkpoints = stages.checkpoints_for(config, dataset)
        stage("encode the catalogue and build the index")
        generation = build_generation(config, dataset, checkpoints.served)
        stage("evaluate")
        report = evaluate(config, dataset, checkpoints.evaluated, generation)
    stage("publish")
    reasons = stages.reasons_against(config, dataset, generation)
    stages.publish(config, generation.name, force=force, reasons=reasons)
    return command.Result(
        path=generation,
        metrics={**read_manifest(report, "report")["metrics"], **stages.index_metrics(generation)},
        details={
            "generation": generation.name,
            "dataset": str(dataset.path),
            "checkpoint": str(checkpoints.served),
            "evaluated_checkpoint": str(checkpoints.evaluated),
            "report": str(report),
        },
    )


JOB = command.Job("pipeline", __doc__, work, stages.add_force)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
