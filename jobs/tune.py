r"""Train with different settings side by side, and show what each did to the validation metric.

python -m jobs.tune --config configs/movielens.yaml --sweep configs/sweeps/temperature.yaml
python -m jobs.tune --config configs/movielens.yaml --set train.epochs=3 \
    'tune.parameters={train.global_batch_size: {values: [256, 1024]}, seed: {values: [1, 2, 3]}}'

Ends with a table, the best trial first, and the path of the table's files and picture. Run again, it trains
only what is missing. The exit code is 2 where a trial failed; the others are measured all the same.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from jobs import command, stages
from twotower.artefacts import read_manifest
from twotower.config import Config, load_config
from twotower.errors import TrainingError
from twotower.evaluation.sweep import trials_of
from twotower.progress import stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages.add_dataset(parser)
    parser.add_argument(
        "--sweep",
        metavar="FILE",
        type=Path,
        help="YAML file of dotted keys and values that replace those of --config, tune among them; --set "
        "replaces them in turn",
    )


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.cluster.tune import KIND, tune

    if arguments.sweep is not None:
        own = itertools.chain.from_iterable(arguments.set)
        config = load_config(arguments.config, [*own], arguments.sweep)
    # What is wrong with the parameters is told before any data is prepared.
    trials_of(config)
    dataset = stages.dataset_for(config, arguments.dataset)
    stage("tune")
    with stages.on_ray(config):
        path = tune(config, dataset)
    manifest = read_manifest(path, KIND)
    num_failed = manifest["trials"].get("failed", 0)
    best, k = manifest["best"], manifest["k"]
    return command.Result(
        path=path,
        metrics={f"validation_recall@{k}": best["recall"], f"validation_ndcg@{k}": best["ndcg"]},
        details={
            "trials": manifest["trials"],
            "best_trial": best["trial"],
            "best_parameters": best["parameters"],
            "best_checkpoint": best["checkpoint"],
            "set": best["set_line"],
        },
        lines=[*(path / "sweep.txt").read_text().splitlines(), "", f"best: {best['set_line']}"],
        exit_code=TrainingError.exit_code if num_failed else 0,
        remark=f"{num_failed} trials failed; run it again to try them again" if num_failed else None,
    )


JOB = command.Job("tune", __doc__, work, add_arguments)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
