"""The whole way: prepare, train, encode and index, evaluate, publish. Run again, it goes on where it stopped.

python -m jobs.pipeline --config configs/movielens.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import command, stages
from twotower.artefacts import read_manifest
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.progress import stage


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    return run(config, stages.dataset_for(config))


def run(config: Config, dataset: Dataset) -> command.Result:
    """Train, index, evaluate and publish from a prepared dataset."""
    from twotower.cluster.build import build_generation
    from twotower.cluster.evaluate import evaluate

    with stages.on_ray(config):
        checkpoints = stages.checkpoints_for(config, dataset)
        stage("encode the catalogue and build the index")
        generation = build_generation(config, dataset, checkpoints.served)
        stage("evaluate")
        report = evaluate(config, dataset, checkpoints.evaluated, generation)
    stage("publish")
    stages.publish(config, generation.name)
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


def main(argv: Sequence[str] | None = None) -> int:
    return command.run("pipeline", __doc__, work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
