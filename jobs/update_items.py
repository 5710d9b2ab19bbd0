"""Add, change and delete items of the published generation, in seconds, and publish the result.

python -m jobs.update_items --config configs/own-data.yaml --items new.parquet --delete gone.csv
python -m jobs.update_items --config configs/own-data.yaml --delete-id 1042 1043
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from jobs import command, stages
from twotower.config import Config
from twotower.errors import ConfigError
from twotower.progress import stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--items",
        metavar="PATH",
        help="Parquet or CSV files of whole items to add or to replace, with the catalogue's columns",
    )
    parser.add_argument("--delete", metavar="PATH", help="Parquet or CSV files of the ids of items to delete")
    parser.add_argument("--delete-id", metavar="ID", nargs="+", default=[], help="ids of items to delete")
    parser.add_argument("--ignore-missing", action="store_true", help="pass over unknown ids to delete")
    parser.add_argument("--pointer", default="CURRENT", help="pointer that names what to update (CURRENT)")
    parser.add_argument("--no-publish", action="store_true", help="leave the pointer as it is")
    parser.add_argument("--force", action="store_true", help="publish whatever speaks against it")


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.data.item_files import read_item_ids, read_items
    from twotower.retrieval.update import update_items

    if not (arguments.items or arguments.delete or arguments.delete_id):
        raise ConfigError("nothing to update: give --items, --delete or --delete-id")
    stage("update items")
    items = read_items(config.data, arguments.items) if arguments.items else None
    deletes = read_item_ids(config.data, arguments.delete, "--delete") if arguments.delete else []
    store = stages.store_of(config)
    update = update_items(
        store,
        items,
        [*deletes, *arguments.delete_id],
        pointer=arguments.pointer,
        publish=not arguments.no_publish,
        force=arguments.force,
        ignore_missing=arguments.ignore_missing,
    )
    if update.published:
        stages.retain(config)
    counts = ", ".join(f"{getattr(update, n):,} {n}" for n in ("added", "changed", "deleted", "unchanged"))
    return command.Result(
        path=store.path(update.generation),
        details=dataclasses.asdict(update),
        lines=[f"{update.generation}, from {update.base}: items {counts}"],
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run("update_items", __doc__, work, add_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
