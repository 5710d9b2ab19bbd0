"""Add, change and delete items of the published generation, in seconds, and publish the result.

Once updates have changed more than index.max_delta_share of the items, the index is built anew after that,
from the generation's own items and towers, and published as well.

python -m jobs.update_items --config configs/own-data.yaml --items new.parquet --delete gone.csv
python -m jobs.update_items --config configs/own-data.yaml --delete-id 1042 1043
python -m jobs.update_items --config configs/own-data.yaml --compact
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jobs import command, stages
from twotower.config import Config
from twotower.errors import ConfigError, OvertakenError
from twotower.progress import say, stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--items",
        metavar="PATH",
        help="Parquet or CSV files of whole items to add or to replace, with the catalogue's columns",
    )
    parser.add_argument("--delete", metavar="PATH", help="Parquet or CSV files of the ids of items to delete")
    parser.add_argument("--delete-id", metavar="ID", nargs="+", default=[], help="ids of items to delete")
    parser.add_argument("--ignore-missing", action="store_true", help="pass over unknown ids to delete")
    parser.add_argument(
        "--compact", action="store_true", help="build the index anew, however little updates have changed"
    )
    parser.add_argument("--pointer", default="CURRENT", help="pointer that names what to update (CURRENT)")
    parser.add_argument("--no-publish", action="store_true", help="leave the pointer as it is")
    parser.add_argument("--force", action="store_true", help="publish whatever speaks against it")


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.data.item_files import read_item_ids, read_items
    from twotower.lifecycle.update import update_items

    if not (arguments.items or arguments.delete or arguments.delete_id or arguments.compact):
        raise ConfigError("nothing to update: give --items, --delete, --delete-id or --compact")
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
    counts = ", ".join(f"{getattr(update, n):,} {n}" for n in ("added", "changed", "deleted", "unchanged"))
    lines = [f"{update.generation}, from {update.base}: items {counts}"]
    limit = config.index.max_delta_share
    result = update.generation
    if arguments.compact or (limit is not None and update.share > limit):
        result = _compacted(config, update.generation, arguments)
        lines.append(f"{result}, compacted from {update.generation}")
    if update.published:
        stages.retain(config)
    details = {**dataclasses.asdict(update), "generation": result, "updated": update.generation}
    return command.Result(path=store.path(result), details=details, lines=lines)


def _compacted(config: Config, generation: str, arguments: argparse.Namespace) -> str:
    """Build an updated generation anew and let the pointer that names it name the result; returns its id."""
    from twotower.cluster.compact import compact

    stage("compact the updates")
    store = stages.store_of(config)
    with stages.on_ray(config):
        result = compact(config, store, generation).name
    if not arguments.no_publish:
        try:
            store.publish(result, arguments.pointer, expected=generation, force=arguments.force)
        except OvertakenError as error:
            # To publish it again would undo what the other has published.
            remedy = "Run python -m jobs.update_items --compact again, if updates shall still be compacted"
            raise OvertakenError(error.message, remedy) from None
        say(f"{arguments.pointer} names {result}, before {generation}")
    return result


JOB = command.Job("update_items", __doc__, work, add_arguments)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
