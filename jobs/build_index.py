"""Encode the whole catalogue, build and check the index shards, and publish the generation.

python -m jobs.build_index --config configs/movielens.yaml
"""

from __future__ import annotations

import argparse
import sys

from jobs import command, stages
from twotower.config import Config
from twotower.progress import stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages.add_dataset(parser)
    stages.add_checkpoint(parser)
    parser.add_argument("--no-publish", action="store_true", help="leave CURRENT as it is")
    stages.add_force(parser)


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.cluster.build import build_generation

    dataset = stages.dataset_for(config, arguments.dataset)
    stages.require(config, dataset, "index")
    with stages.on_ray(config):
        checkpoint = arguments.checkpoint or stages.checkpoints_for(config, dataset).served
        stage("encode the catalogue and build the index")
        generation = build_generation(config, dataset, checkpoint)
    if not arguments.no_publish:
        stage("publish")
        reasons = stages.reasons_against(config, dataset, generation)
        stages.publish(config, generation.name, force=arguments.force, reasons=reasons)
    details = {
        "generation": generation.name,
        "published": not arguments.no_publish,
        "checkpoint": str(checkpoint),
    }
    return command.Result(path=generation, metrics=stages.index_metrics(generation), details=details)


JOB = command.Job("build_index", __doc__, work, add_arguments)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
