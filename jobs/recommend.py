"""Write the top k items of every user, or of every query of a file, to Parquet files.

python -m jobs.recommend --config configs/movielens.yaml --set recommend.k=20
python -m jobs.recommend --config configs/movielens.yaml --queries queries.jsonl --exclude-items gone.csv

Users: user_id, rank, item_id, score, and the columns of recommend.fields. Queries: query_id, user_id,
strategy, and the same. The rows of a file of queries have the keys of POST /v1/retrieve but fields:
user_id, history, features, at, exclude_items, allow_items, filter, k, exclude_seen, all optional, and
a query_id (without one the row's place in the files, from 0). In CSV, lists and objects are written as
JSON. Every query is checked before the first is answered.
"""

from __future__ import annotations

import argparse
import sys

from jobs import command, stages
from twotower.artefacts import read_manifest
from twotower.config import Config
from twotower.progress import stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages.add_generation(parser)
    parser.add_argument(
        "--queries",
        metavar="PATH",
        help="Parquet, CSV or JSON lines, a file, a folder or a glob; every user when not given",
    )
    parser.add_argument(
        "--allow-items",
        metavar="PATH",
        help="Parquet or CSV files of the ids of items that alone may be recommended",
    )
    parser.add_argument(
        "--exclude-items",
        metavar="PATH",
        help="Parquet or CSV files of the ids of items that may not be recommended",
    )


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.cluster.recommend import KIND, PARTS, recommend

    generation = stages.generation_for(config, arguments.generation)
    with stages.on_ray(config):
        stage("recommend")
        path = recommend(
            config, generation, arguments.queries, arguments.allow_items, arguments.exclude_items
        )
    counts = {n: v for n, v in read_manifest(path, KIND).items() if n.startswith("num_")}
    return command.Result(path=path / PARTS, details={"generation": generation.name, **counts})


JOB = command.Job("recommend", __doc__, work, add_arguments)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
