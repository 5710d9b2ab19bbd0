"""Measure the model on the test split, beside baselines, and draw the report.

python -m jobs.evaluate --config configs/movielens.yaml
python -m jobs.evaluate --config configs/movielens.yaml --set train.loss.temperature=0.2 --compare REPORT

The model is the one fitted on the train split, also where the published one is refit on everything; request
latency is measured on the published generation. --compare sets the model of another report beside it.
"""

from __future__ import annotations

import argparse
import sys

from jobs import command, stages
from twotower.artefacts import read_manifest
from twotower.config import Config
from twotower.progress import say, stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages.add_dataset(parser)
    stages.add_checkpoint(parser)
    stages.add_generation(parser)
    parser.add_argument(
        "--compare",
        metavar="REPORT",
        help="folder or ID of another report on the same test, whose model is set beside this one",
    )


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.cluster.evaluate import evaluate, set_beside
    from twotower.evaluation.side_by_side import report_of

    other = None if arguments.compare is None else report_of(config.reports, arguments.compare)
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
        if other is None:
            report = evaluate(config, dataset, checkpoint, generation)
        else:
            report = set_beside(config, dataset, checkpoint, generation, other)
    return command.Result(
        path=report,
        metrics=read_manifest(report, "report")["metrics"],
        details={"checkpoint": str(checkpoint), "generation": generation.name if generation else None},
    )


JOB = command.Job("evaluate", __doc__, work, add_arguments)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
