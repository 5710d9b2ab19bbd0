"""Remove users from datasets, checkpoints, recommendations, reports and every kept generation, for good.

python -m jobs.forget --config configs/own-data.yaml --user-id 4711 4712
python -m jobs.forget --config configs/own-data.yaml --users gone.csv --dry-run
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jobs import command, stages
from twotower.config import Config
from twotower.errors import ConfigError
from twotower.progress import stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user-id", metavar="ID", nargs="+", default=[], help="ids of users to forget")
    parser.add_argument("--users", metavar="PATH", help="Parquet or CSV files of the ids of users to forget")
    parser.add_argument("--ignore-missing", action="store_true", help="pass over ids that nothing here knows")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.data.item_files import read_user_ids
    from twotower.lifecycle.forget import UNREACHABLE, forget_users

    if not (arguments.users or arguments.user_id):
        raise ConfigError("nobody to forget: give --user-id or --users")
    stage("forget users")
    ids = read_user_ids(config.data, arguments.users) if arguments.users else []
    done = forget_users(
        config,
        stages.store_of(config),
        [*ids, *arguments.user_id],
        ignore_missing=arguments.ignore_missing,
        dry_run=arguments.dry_run,
    )
    would = "would be removed" if arguments.dry_run else "removed"
    lines = []
    for change in done.changes:
        counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in change.removed.items())
        lines.append(f"{change.kind} {change.name}: {counts + ' ' if counts else ''}{would}")
    lines += [f"left: {sentence}" for sentence in done.left]
    lines += [f"not reached: {what}" for what in UNREACHABLE]
    details = {**dataclasses.asdict(done), "dry_run": arguments.dry_run, "not_reached": list(UNREACHABLE)}
    return command.Result(path=config.home, details=details, lines=lines)


JOB = command.Job("forget", __doc__, work, add_arguments)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())
