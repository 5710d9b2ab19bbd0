"""Read raw data and write the prepared dataset: vocabularies, splits, statistics.

python -m jobs.prepare --config configs/movielens.yaml
"""

from __future__ import annotations

import argparse
import sys

from jobs import command, stages
from twotower.config import Config


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    dataset = stages.dataset_for(config)
    stages.require(config, dataset, "train", "index", "recommend")
    details = {
        "fingerprint": dataset.fingerprint,
        "num_users": dataset.num_users,
        "num_items": dataset.num_items,
        "num_catalogue_items": dataset.num_catalogue_items,
        "num_interactions": len(dataset.interactions),
    }
    return command.Result(path=dataset.path, details=details)


JOB = command.Job("prepare", __doc__, work)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
