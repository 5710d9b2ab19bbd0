"""Read raw data and write the prepared dataset: vocabularies, splits, statistics.

python -m jobs.prepare --config configs/movielens.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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


def main(argv: Sequence[str] | None = None) -> int:
    return command.run("prepare", __doc__, work, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
