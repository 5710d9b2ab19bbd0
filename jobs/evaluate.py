"""Measure the model on the test split, beside popularity, and draw the report.

python -m jobs.evaluate --config configs/movielens.yaml

The model is the one fitted on the train split, also where the published one is refit on everything; request
latency is measured on the published generation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import command, stages
from twotower.artefacts import read_manifest
from twotower.config import Config
from twotower.progress import say, stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages.add_dataset(parser)
    stages.add_checkpoint(parser)
    stages.add_generation(parser)


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.cluster.evaluate import evaluate

    dataset = stages.dataset_for(config, arguments.dataset)
    stages.require(config, dataset, "evaluate")
    with stages.on_ray(config):
        checkpoint = arguments.checkpoint or stages.checkpoints_for(config, dataset).evaluated
        stage("evaluate")
        generation = None
        if arguments.generation or stages.store_of(config).current():
            generation = stages.generation_for(config, arguments.generation)
        else:
            say("no generation is published: request latency is not measured")
        report = evaluate(config, dataset, checkpoint, generation)
    return command.Result(
        path=report,
        metrics=read_manifest(report, "report")["metrics"],
        details={"checkpoint": str(checkpoint), "generation": generation.name if generation else None},
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run("evaluate", __doc__, work, add_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
