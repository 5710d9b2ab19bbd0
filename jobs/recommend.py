"""Write the top k items of every user to Parquet: user_id, rank, item_id, score.

python -m jobs.recommend --config configs/movielens.yaml --set recommend.k=20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import command, stages
from twotower.config import Config
from twotower.progress import stage


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.cluster.recommend import PARTS, recommend

    generation = stages.generation_for(config, arguments.generation)
    with stages.on_ray(config):
        stage("recommend")
        path = recommend(config, generation)
    return command.Result(path=path / PARTS, details={"generation": generation.name})


def main(argv: Sequence[str] | None = None) -> int:
    return command.run("recommend", __doc__, work, stages.add_generation, argv)


if __name__ == "__main__":
    sys.exit(main())
